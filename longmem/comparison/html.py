"""A comparison as one HTML file that needs nothing else: tables, and a drawing of each task in SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from longmem.comparison.curves import by_position, drawing
from longmem.comparison.markdown import (
    PRICES,
    TOKEN_HEAD,
    WORTH,
    Notes,
    about_tokens,
    best_of,
    heading,
    kinds_of,
    late,
    most_cases,
    own,
    prices,
    shown,
    standing,
    token_rows,
    told,
    worth_rows,
)
from longmem.comparison.result import Cell, Comparison, Figure, Named
from longmem.tasks.task import Measure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 600; }
td small { color: #777; }
svg { display: block; margin: .5rem 0 1rem; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } svg text { fill: #ddd; } }
"""


def html(comparison: Comparison) -> str:
    """The whole report."""
    notes = Notes()
    parts = ["<h1>Comparison</h1>", _conditions(comparison), "<h2>Summary</h2>", _summary(comparison, notes)]
    parts += _worth(comparison)
    for task in comparison.tasks:
        cells = [comparison.cell(task.name, each.name) for each in comparison.contenders]
        parts += [f"<h2>{escape(task.name)}: {escape(task.title)}</h2>", plot(task.measures[0], cells)]
        if about := f"{own(task).removeprefix(', ')} {late(comparison, task)}".strip():
            parts.append(f"<p>{escape(about)}</p>")
        parts.append(_details(task, cells, notes))
        if drawn := drawing(comparison, task):
            parts.append(drawn)
        head, places = by_position(comparison, task)
        if places:
            parts += ["<p>Perplexity by place in what follows.</p>", _table(head, list(map(_tr, places)))]
        if of_tokens := token_rows(comparison, task):
            parts.append(f"<p>{escape(about_tokens(comparison, task))}</p>")
            parts.append(_table(TOKEN_HEAD, list(map(_tr, of_tokens))))
    reasons = "".join(f"<li>{escape(text)}</li>" for text in notes.texts)
    if reasons:
        parts.append(f"<h2>Notes</h2><ol>{reasons}</ol>")
    head = f'<meta charset="utf-8"><title>longmem: comparison</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def plot(measure: Measure, cells: Sequence[Cell]) -> str:
    """A dot and its interval for each contender that has a figure, as SVG."""
    figures = {cell.contender: cell.figures[measure.name] for cell in cells if measure.name in cell.figures}
    if not figures:
        return ""
    low, high = _range(measure, figures.values())
    left, width, row = 130, 420, 24
    height = row * len(figures) + 40

    def x(value: float) -> float:
        return left + width * (value - low) / (high - low)

    marks = []
    for number in range(5):
        value = low + (high - low) * number / 4
        marks.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="0" y2="{height - 36}" stroke="#ccc"/>')
        marks.append(f'<text x="{x(value):.1f}" y="{height - 22}" text-anchor="middle">{value:.4g}</text>')
    for number, (name, figure) in enumerate(figures.items()):
        y = row * number + row // 2
        colour = "#888" if name == "oracle" else "#c2410c" if name.startswith("longmem") else "#1d4ed8"
        marks.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if figure.low is not None and figure.high is not None:
            ends = f'x1="{x(figure.low):.1f}" x2="{x(figure.high):.1f}"'
            marks.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        marks.append(
            f'<circle cx="{x(figure.value):.1f}" cy="{y}" r="4.5" fill="{colour}">'
            f"<title>{escape(name)}: {shown(measure, figure)}</title></circle>"
        )
    marks.append(
        f'<text x="{left + width / 2}" y="{height - 4}" text-anchor="middle">{escape(heading(measure))}</text>'
    )
    size = f'width="{left + width + 30}" height="{height}" viewBox="0 0 {left + width + 30} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12" role="img">{"".join(marks)}</svg>'


def _range(measure: Measure, figures: Iterable[Figure]) -> tuple[float, float]:
    """Ends of the axis."""
    ends = [end for f in figures for end in (f.value, f.low, f.high) if end is not None]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 1.0
    return (0.0, high or 1.0) if measure.form == "percent" else (low - margin, high + margin)


def _summary(comparison: Comparison, notes: Notes) -> str:
    rows = []
    for task in comparison.tasks:
        measure = task.measures[0]
        cells = [comparison.cell(task.name, each.name) for each in comparison.contenders]
        best, most = best_of(measure, cells), most_cases(measure, cells)
        tds = [_td(told(cell, measure, notes, most), best=cell.contender in best) for cell in cells]
        rows.append(f"<tr><td>{escape(task.name)}, {escape(heading(measure))}</td>{''.join(tds)}</tr>")
    return _table(["", *(each.name for each in comparison.contenders)], rows)


def _details(task: Named, cells: Sequence[Cell], notes: Notes) -> str:
    measures = [measure for measure in task.measures if any(measure.name in cell.figures for cell in cells)]
    kinds = kinds_of(cells)
    rows = []
    for cell in cells:
        if cell.reason is not None:
            tds = [f'<td colspan="{len(measures) + len(kinds) + len(PRICES)}">{escape(notes.mark(cell.reason))}</td>']
        else:
            tds = [_td(shown(measure, cell.figures.get(measure.name))) for measure in measures]
            for kind in kinds:
                figures = cell.kinds.get(kind, {})
                tds.append(_td(next((shown(m, figures[m.name]) for m in task.measures if m.name in figures), "")))
            tds += map(_td, prices(cell))
        rows.append(f"<tr><td>{escape(cell.contender)}</td>{''.join(tds)}</tr>")
    return _table(["", *map(heading, measures), *kinds, *PRICES], rows)


def _worth(comparison: Comparison) -> list[str]:
    head, rows = worth_rows(comparison)
    if not rows:
        return []
    lines = "".join(f"<li>{escape(_plain(line))}</li>" for line in standing(comparison))
    return ["<h2>What memory is worth</h2>", f"<p>{escape(WORTH)}</p><ul>{lines}</ul>", _table(head, map(_tr, rows))]


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")


def _tr(cells: Sequence[str]) -> str:
    return f"<tr><td>{escape(cells[0])}</td>{''.join(map(_td, cells[1:]))}</tr>"


def _td(text: str, *, best: bool = False) -> str:
    value, _, interval = text.partition(" (")
    small = f" <small>({escape(interval)}</small>" if interval else ""
    return f"<td{' class=best' if best else ''}>{escape(value)}{small}</td>"


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    heads = "".join(f"<th>{escape(each)}</th>" for each in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _conditions(comparison: Comparison) -> str:
    of = {**comparison.settings, **comparison.machine}
    what = ", ".join(f"{name} {value}" for name, value in of.items() if value is not None)
    who = "".join(f"<li><b>{escape(each.name)}</b>: {escape(each.title)}</li>" for each in comparison.contenders)
    how = (
        "Figures with 95 % intervals: Wilson’s where each case is right or wrong, else a bootstrap over cases. "
        "Bold is the best figure, however wide the intervals; oracle does not compete."
    )
    return f"<p>{escape(what)}.</p><p>{how}</p><ul>{who}</ul>"
