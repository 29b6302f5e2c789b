"""A comparison as Markdown: the summary, every other figure, costs, reasons, conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longmem.comparison.curves import by_position, in_order
from longmem.comparison.differences import STANDING, differences, standing_lines
from longmem.comparison.differences import WORTH as WORTHS
from longmem.comparison.differences import shown as shown_difference
from longmem.comparison.result import Cell, Comparison, Figure, Named
from longmem.comparison.tokens import GAIN, LIKELY, MARGIN, MEASURES, key_share, token_figures
from longmem.tasks.task import Measure


def markdown(comparison: Comparison) -> str:
    """The whole report."""
    notes = Notes()
    parts = ["# Comparison", conditions(comparison), "## Summary", summary(comparison, notes)]
    if compared := worth(comparison):
        parts += ["## What memory is worth", WORTH, compared, "\n\n".join(standing(comparison))]
    parts += ["## Each task", *(details(comparison, task, notes) for task in comparison.tasks)]
    if notes.texts:
        parts += ["## Notes", "\n".join(f"{number}. {text}" for number, text in enumerate(notes.texts, start=1))]
    return "\n\n".join(parts) + "\n"


class Notes:
    """Reasons of empty cells, and where others were run, numbered as they first appear."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, reason: str) -> str:
        """What stands in an empty cell."""
        return f"– {self.number(reason)}"

    def number(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"


def summary(comparison: Comparison, notes: Notes) -> str:
    """The first measure of every task, contenders in columns."""
    rows = []
    for task in comparison.tasks:
        rows.append([f"{task.name}, {heading(task.measures[0])}", *summed(comparison, task, notes)])
    return table(["", *(each.name for each in comparison.contenders)], rows)


def summed(comparison: Comparison, task: Named, notes: Notes) -> list[str]:
    """A task's row of the summary, bold where it is best."""
    cells = _cells(comparison, task)
    best, most = best_of(task.measures[0], cells), most_cases(task.measures[0], cells)
    texts = [told(cell, task.measures[0], notes, most) for cell in cells]
    return [f"**{text}**" if cell.contender in best else text for cell, text in zip(cells, texts, strict=True)]


WORTH = (
    "How much better the first of each pair is on the same cases, with 95 % intervals of a bootstrap over cases: "
    "points, or percent of a perplexity. Cases about the same text are drawn together. The best without LongMem is "
    "chosen by these very cases, which favours it."
)


def worth(comparison: Comparison) -> str:
    """A table of differences, task by task."""
    head, rows = worth_rows(comparison)
    return table(head, rows) if rows else ""


def worth_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of that table."""
    found = {task.name: {each.worth: each for each in differences(comparison, task)} for task in comparison.tasks}
    pairs = [pair for pair, worth in WORTHS.items() if any(worth in each for each in found.values())]
    head = ["", *(f"{WORTHS[pair]}: {' – '.join(pair)}" for pair in pairs)]
    rows = []
    for task in comparison.tasks:
        row = []
        for pair in pairs:
            each = found[task.name].get(WORTHS[pair])
            text = "" if each is None else shown_difference(each, task.measures[0])
            row.append(f"{text} {each.second}" if each is not None and pair[1] == "best" else text)
        if any(row):
            rows.append([f"{task.name}{', %' if task.measures[0].form == 'perplexity' else ''}", *row])
    return head, rows


def standing(comparison: Comparison, *, undecided: bool = True) -> list[str]:
    """Where LongMem loses and wins, in words."""
    return [line for name in STANDING for line in standing_lines(comparison, name, undecided=undecided)]


def details(comparison: Comparison, task: Named, notes: Notes) -> str:
    """Every measure of a task and what it cost, contenders in rows."""
    measures = [m for m in task.measures if any(m.name in c.figures for c in _cells(comparison, task))]
    kinds = kinds_of(_cells(comparison, task))
    head = ["", *map(heading, measures), *kinds, *PRICES]
    rows = []
    for cell in _cells(comparison, task):
        if cell.reason is not None:
            rows.append([cell.contender, notes.mark(cell.reason)])
            continue
        of_kinds = [_of_kind(task.measures, cell.kinds.get(kind, {})) for kind in kinds]
        figures = [shown(measure, cell.figures.get(measure.name)) for measure in measures]
        rows.append([cell.contender, *figures, *of_kinds, *prices(cell)])
    count = max((figure.cases for cell in _cells(comparison, task) for figure in cell.figures.values()), default=0)
    parts = [f"### {task.name}: {task.title}", f"{count} cases{own(task)}.{late(comparison, task)}", table(head, rows)]
    head, rows = by_position(comparison, task)
    if rows:
        parts += ["Perplexity by place in what follows:", table(head, rows)]
    if of_tokens := token_rows(comparison, task):
        parts += [about_tokens(comparison, task), table(TOKEN_HEAD, of_tokens)]
    return "\n\n".join(parts)


TOKEN_HEAD = ("", "key tokens, perplexity", "better %", "worse %", "than")


def token_rows(comparison: Comparison, task: Named) -> list[list[str]]:
    """The cells of `TOKEN_HEAD`, where continuations were scored token by token."""
    rows = []
    for name, each in token_figures(comparison, task.name).items():
        figures = [shown(measure, each.figures.get(measure.name)) for measure in MEASURES]
        rows.append([name, *figures, "" if name == each.base else each.base])
    return rows


def about_tokens(comparison: Comparison, task: Named) -> str:
    return (
        f"Key tokens, {key_share(comparison, task.name):.1f} % of all: extended makes them more probable than window "
        f"does by more than {GAIN:g} nats, and gives them more than {LIKELY:g} nats. They are chosen by these two, so "
        f"extended is at its best there and window at its worst. Better and worse: by more than {MARGIN:g} nats."
    )


def own(task: Named) -> str:
    """Settings of this task alone."""
    return "".join(f", {name} {value:,}" for name, value in task.settings.items())


def late(comparison: Comparison, task: Named) -> str:
    """Which contenders had no time for all cases, or could not be asked all."""
    told = ""
    for cell in _cells(comparison, task):
        if cell.unasked:
            told += f" {cell.contender} had time for {len(cell.cases)}."
        for reason, count in cell.left_out.items() if cell.cases else ():
            told += f" {cell.contender} was not asked {count}: {reason}."
    return told


def kinds_of(cells: Sequence[Cell]) -> list[str]:
    return in_order(list(dict.fromkeys(kind for cell in cells for kind in cell.kinds)))


def _cells(comparison: Comparison, task: Named) -> list[Cell]:
    return [comparison.cell(task.name, each.name) for each in comparison.contenders]


def _of_kind(measures: Sequence[Measure], figures: dict[str, Figure]) -> str:
    """The first measure that a kind of case has."""
    return next((f"{m.name} {shown(m, figures[m.name])}" for m in measures if m.name in figures), "")


PRICES = ("tokens told", "tokens a question", "s to first token", "s a token", "kept")


def prices(cell: Cell) -> list[str]:
    """The cells of `PRICES`."""
    price = cell.price
    if price is None:
        return [""] * len(PRICES)
    a_token = "" if price.token_seconds is None else f"{price.token_seconds:.3f}"
    return [
        f"{price.told_tokens:,.0f}",
        f"{price.asked_tokens:,.0f}",
        f"{price.first_seconds:.2f}",
        a_token,
        size(price.kept_bytes),
    ]


def size(count: float) -> str:
    """A number of bytes in words: 1.4 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def told(cell: Cell, measure: Measure, notes: Notes, most: int) -> str:
    """A cell's figure, or the number of the reason why there is none; of how many cases, if `most` are more."""
    if cell.reason is not None:
        return notes.mark(cell.reason)
    figure = cell.figures.get(measure.name)
    if figure is None:
        return notes.mark(f"no case has {measure.name!r}")
    text = shown(measure, figure) + (f" of {figure.cases}" if figure.cases < most else "")
    return f"{text} {notes.number(f'run elsewhere: {cell.elsewhere}')}" if cell.elsewhere else text


def most_cases(measure: Measure, cells: Sequence[Cell]) -> int:
    return max((cell.figures[measure.name].cases for cell in cells if measure.name in cell.figures), default=0)


def shown(measure: Measure, figure: Figure | None) -> str:
    """A figure with its interval."""
    if figure is None:
        return ""
    places = {"percent": 0, "number": 2, "perplexity": 2}[measure.form]
    if figure.low is None:
        return f"{figure.value:.{places}f} (one text)"
    return f"{figure.value:.{places}f} ({figure.low:.{places}f} – {figure.high:.{places}f})"


def heading(measure: Measure) -> str:
    unit = " %" if measure.form == "percent" else ""
    return f"{measure.name}{unit}{'' if measure.higher else ' (less is better)'}"


def best_of(measure: Measure, cells: Sequence[Cell]) -> set[str]:
    """Contenders with the best figure, those left out that are shown the evidence or were asked fewer cases."""
    values = {
        c.contender: c.figures[measure.name].value
        for c in cells
        if measure.name in c.figures
        and c.contender != "oracle"
        and c.figures[measure.name].cases == most_cases(measure, cells)
    }
    if len(set(values.values())) < 2:
        return set()
    best = max(values.values()) if measure.higher else min(values.values())
    return {name for name, value in values.items() if value == best}


def conditions(comparison: Comparison) -> str:
    """What was run, on what."""
    of = {**comparison.settings, **comparison.machine}
    lines = [", ".join(f"{name} {value}" for name, value in of.items() if value is not None) + "."]
    lines += [
        "Figures with 95 % intervals: Wilson's where each case is right or wrong, else a bootstrap over cases. "
        "Bold is the best figure, however wide the intervals; `oracle` does not compete."
    ]
    lines += [f"**{each.name}**: {each.title}." for each in comparison.contenders]
    return "\n\n".join((*lines[:2], "\n".join(f"* {line}" for line in lines[2:])))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; short rows are filled up."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [each.replace("|", "\\|").replace("\n", " ") for each in (*row, *[""] * (len(head) - len(row)))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
