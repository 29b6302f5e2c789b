"""How much better one contender is than another on the same cases.

C cases that both were asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longmem.comparison.result import Cell, Comparison, Figure, Named, interval
from longmem.tasks.task import Measure

# What each is compared with, and what the difference is worth.
WORTH = {
    ("longmem", "longmem-empty"): "the bank",
    ("longmem", "longmem-wrong"): "that it is the right one",
    ("longmem", "longmem-extended"): "the bank against a long window",
    ("longmem+rag", "rag-bm25"): "LongMem added to retrieval",
    ("longmem", "best"): "against the best without LongMem",
    ("longmem+rag", "best"): "the same with retrieval",
    ("longmem+recall", "best"): "the same with what it recalls",
}
# Whose standing is told in words.
STANDING = [first for first, second in WORTH if second == "best"]
# What does without LongMem and is not shown the evidence.
_RIVALS = ("window", "extended", "extended-rope", "rag-bm25", "rag-dense", "rag-hybrid", "memgpt")


@dataclass(frozen=True)
class Difference:
    """Of the first measure of a task.

    Attributes:
        worth: what the difference says.
        figure: how much better the first is, whichever way the measure counts: points, or percent of a perplexity.
    """

    task: str
    first: str
    second: str
    worth: str
    figure: Figure

    @property
    def verdict(self) -> int:
        """1 where the first is better, −1 where it is worse, 0 where the interval does not tell."""
        low, high = self.figure.low, self.figure.high
        return 0 if low is None or high is None else int(low > 0) - int(high < 0)


def differences(comparison: Comparison, task: Named) -> list[Difference]:
    """What memory is worth on a task: against the same without it, and against the best of all others."""
    found = []
    for pair, worth in WORTH.items():
        first, second = pair[0], pair[1] if pair[1] != "best" else best_rival(comparison, task, pair[0])
        figure = None if second is None else difference(comparison, task, first, second)
        if second is not None and figure is not None:
            found.append(Difference(task.name, first, second, worth, figure))
    return found


def best_rival(comparison: Comparison, task: Named, name: str) -> str | None:
    """Who is best of those without LongMem, on the cases that `name` was asked."""
    measure, asked = task.measures[0], len(_values(comparison.cell(task.name, name), task.measures[0]))
    cells = [comparison.cell(task.name, rival) for rival in _RIVALS]
    # Those that could be asked few of the cases may be best at these.
    figures = {
        cell.contender: cell.figures[measure.name].value
        for cell in cells
        if measure.name in cell.figures and cell.figures[measure.name].cases == asked
    }
    pick = max if measure.higher else min
    return pick(figures, key=lambda each: figures[each]) if figures else None


def difference(comparison: Comparison, task: Named, first: str, second: str) -> Figure | None:
    """How much better `first` is than `second`, with a bootstrap over cases; None if they have none in common."""
    measure = task.measures[0]
    mine, theirs = (_values(comparison.cell(task.name, name), measure) for name in (first, second))
    shared = [case for case in mine if case in theirs]
    if not shared:
        return None
    # Value of the one, value of the other, weight: their sums over cases tell the rest.
    value_C2 = np.array([(mine[case][0], theirs[case][0]) for case in shared])
    weight_C1, group_C = np.array([[mine[case][1]] for case in shared]), np.array([mine[case][2] for case in shared])
    part_C3 = np.concatenate((value_C2 * weight_C1, weight_C1), 1)

    def better(sum_D3: np.ndarray) -> np.ndarray:
        gap = (sum_D3[..., 0] - sum_D3[..., 1]) / sum_D3[..., 2]
        scaled = {"perplexity": 100 * np.expm1(gap), "percent": 100 * gap, "number": gap}[measure.form]
        return scaled if measure.higher else -scaled

    value = float(better(part_C3.sum(0)))
    if len(np.unique(group_C)) < 2:
        return Figure(value, None, None, len(shared))
    low, high = interval(part_C3, group_C, int(comparison.settings.get("seed", 0)), better)
    return Figure(value, low, high, len(shared))


def unit(measure: Measure) -> str:
    return {"percent": "points", "perplexity": "%", "number": ""}[measure.form]


def shown(each: Difference, measure: Measure) -> str:
    """A difference with its interval."""
    figure, places = each.figure, {"percent": 0, "perplexity": 1, "number": 2}[measure.form]
    value = f"{figure.value:+.{places}f}"
    if figure.low is None or figure.high is None:
        return f"{value} (one text)"
    return f"{value} ({figure.low:+.{places}f} – {figure.high:+.{places}f})"


def standings(comparison: Comparison, name: str) -> dict[int, list[Difference]]:
    """Verdict → how a contender does against the best without LongMem, task by task."""
    found: dict[int, list[Difference]] = {1: [], -1: [], 0: []}
    for task in comparison.tasks:
        for each in differences(comparison, task):
            if each.worth == WORTH[name, "best"]:
                found[each.verdict].append(each)
    return found


def standing_lines(comparison: Comparison, name: str, *, undecided: bool = True) -> list[str]:
    """The same in words, worst first: where it loses, where it wins, where nothing can be told (if wanted)."""
    measures = {task.name: task.measures[0] for task in comparison.tasks}
    found = standings(comparison, name)
    lines = []
    for verdict, words in ((-1, "loses"), (1, "wins"), (0, "is undecided")):
        some: Sequence[Difference] = sorted(found[verdict], key=lambda each: each.figure.value * (verdict or 1))[::-1]
        if some and (verdict or undecided):
            told = [
                f"{each.task} {shown(each, measures[each.task])} {unit(measures[each.task])}".rstrip()
                + f" against `{each.second}`"
                for each in some
            ]
            lines.append(f"`{name}` **{words}**: {'; '.join(told)}.")
    return lines


def _values(cell: Cell, measure: Measure) -> dict[int, tuple[float, float, int]]:
    """Case → value, weight and group."""
    return {
        row["case"]: (
            row["values"][measure.name],
            row["tokens"] if measure.form == "perplexity" else 1.0,
            row.get("group", row["case"]),
        )
        for row in cell.cases
        if "case" in row and measure.name in row["values"]
    }
