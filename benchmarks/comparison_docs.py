"""Everything that is published of a comparison, from its report: figures without the data sets' texts, the results in
docs/comparison.md, docs/comparison.html, the curves, and the README's summary.

    python benchmarks/comparison_docs.py REPORT/report.json [--note "one sentence about this run"]

Give benchmarks/results/smollm2-135m/compare.json to write the same again. Texts between marks are replaced, nothing
else is touched.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

from longmem.comparison import markdown as report
from longmem.comparison.curves import by_position, drawing
from longmem.comparison.html import html
from longmem.comparison.result import Cell, Comparison, Named

ROOT = Path(__file__).parent.parent
FIGURES = Path("benchmarks/results/smollm2-135m/compare.json")
_WIDE = 7  # tasks side by side in a table
# The README's rows and columns.
_ROWS = {
    "facts": "facts told in chats, right",
    "pairs": "value of a key, among four alike",
    "passkey": "pass key",
    "language": "next tokens of a book, perplexity",
    "xquad": "XQuAD, told in advance, F1",
    "locomo": "LoCoMo, F1",
    "key-values": "random keys (lost in the middle)",
    "babi": "bAbI, six places",
    "squality": "SQuALITY, summaries, ROUGE-L",
    "qmsum": "QMSum, summaries, ROUGE-L",
    "many-shot-4": "2,000 labelled examples told, 4 shown",
    "many-shot-20": "2,000 labelled examples told, 20 shown",
    "no-harm-labels": "labels, nothing of use told",
    "fluency": "texts continued, distinct pairs of words",
}
_COLUMNS = {
    "window of 1,024": ("window",),
    "long window": ("extended",),
    "best retrieval": ("rag-bm25", "rag-dense", "rag-hybrid"),
    "MemGPT": ("memgpt",),
    "bank empty": ("longmem-empty",),
    "wrong": ("longmem-wrong",),
    "**bank**": ("longmem",),
    "**bank + BM25**": ("longmem+rag",),
    "**bank + recall**": ("longmem+recall",),
    "paper's recipe": ("longmem-paper",),
    "shown the evidence": ("oracle",),
}


def without_texts(comparison: Comparison) -> Comparison:
    """The same without questions and answers of the data sets, which have licences of their own."""

    def row(case: dict) -> dict:
        kept = {name: value for name, value in case.items() if name not in ("query", "answers")}
        kept["given"] = kept["given"][:80]
        kept["log_probability"] = round(kept["log_probability"], 3)
        kept["values"] = {name: round(value, 4) for name, value in kept["values"].items()}
        if "log_probabilities" in kept:
            kept["log_probabilities"] = [round(each, 2) for each in kept["log_probabilities"]]
        return kept

    cells = {
        place: dataclasses.replace(cell, cases=[row(case) for case in cell.cases])
        for place, cell in comparison.cells.items()
    }
    return dataclasses.replace(comparison, cells=cells)


def results(comparison: Comparison, note: str) -> str:
    """The results in docs/comparison.md."""
    notes = report.Notes()
    parts = [conditions(comparison) + (f" {note}" if note else "")]
    for first in range(0, len(comparison.tasks), _WIDE):
        tasks = comparison.tasks[first : first + _WIDE]
        columns = [report.summed(comparison, task, notes) for task in tasks]
        rows = [[f"`{each.name}`", *cells] for each, *cells in zip(comparison.contenders, *columns, strict=True)]
        head = ["", *(f"{task.name}, {report.heading(task.measures[0])}" for task in tasks)]
        parts.append(report.table(head, rows))
    if notes.texts:
        parts.append("Notes: " + " ".join(f"({n}) {text}." for n, text in enumerate(notes.texts, start=1)))
    if late := [f"{task.name}:{told}" for task in comparison.tasks if (told := report.late(comparison, task))]:
        parts.append(" ".join(late))
    if worth := report.worth(comparison):
        lines = [f"* {line}" for line in report.standing(comparison)]
        parts += ["### What memory is worth", "\n".join(lines), report.WORTH, worth]
    parts += ["### Right answers", "Mean log-probability in nats, which tells contenders apart before answers do:"]
    parts.append(log_probabilities(comparison))
    for task in comparison.tasks:
        if drawing(comparison, task):
            parts += [f"### {task.name}, by how much was told", f"![perplexity by tokens told]({curve(task).name})"]
            parts.append(of_kinds(comparison, task))
            head, rows = by_position(comparison, task)
            if rows:
                parts += ["Perplexity by place in what follows:", report.table(head, rows)]
        if tokens := report.token_rows(comparison, task):
            parts += [report.about_tokens(comparison, task), report.table(report.TOKEN_HEAD, tokens)]
    parts += ["### Costs", about_costs(comparison), costs(comparison)]
    return "\n\n".join(parts)


def conditions(comparison: Comparison) -> str:
    settings, machine = comparison.settings, comparison.machine
    own = "; ".join(f"`{task.name}`{report.own(task)}" for task in comparison.tasks if task.settings)
    return (
        f"SmolLM2-135M-Instruct in {settings['precision']}, {machine.get('gpu') or machine['processor']}, commit "
        f"{machine['commit']}, torch {machine['torch']}, seed {settings['seed']}; {settings['told']:,} tokens told, "
        f"{settings['cases']} cases a task{f' ({own})' if own else ''}, windows of {settings['window']:,}, "
        f"{settings['extended']:,} and {settings['stretched']:,} tokens. 95 % intervals; bold is the best but for "
        f"`oracle`. Every measure, cost and kind of case: [comparison.html](comparison.html); figures, case by case "
        f"and without the data sets' texts: [{FIGURES.name}](../{FIGURES})."
    )


def log_probabilities(comparison: Comparison) -> str:
    tasks = [task for task in comparison.tasks if any(m.name == "log-probability" for m in task.measures)]
    rows = []
    for each in comparison.contenders:
        figures = [comparison.cell(task.name, each.name).figures.get("log-probability") for task in tasks]
        rows.append([f"`{each.name}`", *("–" if figure is None else f"{figure.value:.2f}" for figure in figures)])
    return report.table(["", *(task.name for task in tasks)], rows)


def of_kinds(comparison: Comparison, task: Named) -> str:
    cells = [comparison.cell(task.name, each.name) for each in comparison.contenders]
    kinds, measure = report.kinds_of(cells), task.measures[0]
    rows = [
        [f"`{cell.contender}`", *(report.shown(measure, cell.kinds.get(kind, {}).get(measure.name)) for kind in kinds)]
        for cell in cells
        if cell.kinds
    ]
    return report.table(["", *kinds], rows)


def about_costs(comparison: Comparison) -> str:
    return (
        "Seconds are those of three cases (one of `memgpt`) asked one by one, answers up to eight tokens, though all "
        "cases were answered side by side; other tasks' costs stand in comparison.html. `xquad`:"
    )


def costs(comparison: Comparison) -> str:
    cells = [comparison.cell("xquad", each.name) for each in comparison.contenders]
    return report.table(
        ["", *report.PRICES], [[f"`{c.contender}`", *report.prices(c)] for c in cells if c.price is not None]
    )


def summary(comparison: Comparison) -> str:
    """The README's summary."""
    known = {task.name: task for task in comparison.tasks}
    rows = []
    for task in [known[name] for name in _ROWS if name in known]:
        cells = [comparison.cell(task.name, each.name) for each in comparison.contenders]
        best = report.best_of(task.measures[0], cells)
        row = [chosen([c for c in cells if c.contender in names], task, best) for names in _COLUMNS.values()]
        rows.append([_ROWS[task.name], *row])
    settings, gpu = comparison.settings, comparison.machine.get("gpu")
    lines = [
        f"{settings['told']:,} tokens told, {settings['cases']} cases a task, {f'one {gpu}' if gpu else 'a CPU'}:",
        report.table(["", *_COLUMNS], rows),
    ]
    if where := sorted({cell.elsewhere for cell in comparison.cells.values() if cell.elsewhere}):
        lines.append(f"Some cells were run elsewhere ({'; '.join(where)}); docs/comparison.md marks them.")
    lines += report.standing(comparison, undecided=False)  # those stand in docs/comparison.md
    invented = comparison.cell("facts", "longmem").figures.get("invented")
    if invented is not None:
        share, cases = f"{invented.value:.0f} %", invented.cases
        lines.append(f"Asked for what was never told it invents an answer in {share} of {cases} cases.")
    return "\n\n".join(lines)


def chosen(cells: list[Cell], task: Named, best: set[str]) -> str:
    """The best of some cells, without its interval."""
    measure = task.measures[0]
    some = [cell for cell in cells if measure.name in cell.figures]
    if not some:
        return "–"
    pick = max if measure.higher else min
    cell = pick(some, key=lambda each: each.figures[measure.name].value)
    figure = cell.figures[measure.name]
    text = f"{figure.value:.1f}" if measure.form == "perplexity" else f"{figure.value:.0f} %"
    return f"**{text}**" if cell.contender in best else text


def curve(task: Named) -> Path:
    return Path(f"docs/comparison_{task.name.replace('-', '_')}.svg")


def replaced(path: Path, text: str) -> None:
    """Put a text between the marks of a file."""
    begin, end = "<!-- comparison: written by benchmarks/comparison_docs.py -->", "<!-- comparison ends -->"
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(f"{path} must hold the line {begin!r} once, and {end!r} behind it.")
    new = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL)
    path.write_text(new, encoding="utf-8")


def main(report_path: Path, note: str, root: Path = ROOT) -> None:
    # As it will be read again from what is published.
    comparison = without_texts(Comparison.load(report_path))
    replaced(root / "docs/comparison.md", results(comparison, note))
    replaced(root / "README.md", summary(comparison))
    (root / "docs/comparison.html").write_text(html(comparison), encoding="utf-8")
    for task in comparison.tasks:
        if drawn := drawing(comparison, task):
            (root / curve(task)).write_text(drawn, encoding="utf-8")
    text = json.dumps(comparison.to_dict(), ensure_ascii=False, separators=(",", ":"))
    (root / FIGURES).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of `longmem eval compare`, `all` or `merge`")
    parser.add_argument("--note", default="", help="said of this run in docs/comparison.md")
    arguments = parser.parse_args()
    main(arguments.report, arguments.note)
