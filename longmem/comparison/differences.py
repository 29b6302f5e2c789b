"""How much better one contender is than another on the same cases.

C cases that both were asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longmem.comparison.result import DRAWS, Cell, Comparison, Figure, Named
from longmem.tasks.task import Measure

# What each is compared with, and what the difference is worth.
_WORTH = (
    ("longmem", "longmem-empty", "the bank"),
    ("longmem", "longmem-wrong", "that it is the right one"),
    ("longmem", "longmem-extended", "the bank against a long window"),
    ("longmem+rag", "rag-bm25", "the bank and its SideNet, added to retrieval"),
)
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
    pairs = [*_WORTH]
    for name in ("longmem", "longmem+rag"):
        if (best := best_rival(comparison, task, name)) is not None:
            pairs.append((name, best, "against the best without LongMem"))
    found = []
    for first, second, worth in pairs:
        figure = difference(comparison, task, first, second)
        if figure is not None:
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
    value_C2 = np.array([(mine[case][0], theirs[case][0]) for case in shared])
    weight_C = np.array([mine[case][1] if measure.form == "perplexity" else 1.0 for case in shared])
    draws = np.random.default_rng(int(comparison.settings.get("seed", 0))).integers(
        len(shared), size=(DRAWS, len(shared))
    )
    sign = 1 if measure.higher else -1

    def better(place: np.ndarray) -> np.ndarray:
        weight = weight_C[place]
        mean_2 = (value_C2[place] * weight[..., None]).sum(-2) / weight.sum(-1)[..., None]
        gap = mean_2[..., 0] - mean_2[..., 1]
        if measure.form == "perplexity":
            return sign * 100 * np.expm1(gap)
        return sign * gap * (100 if measure.form == "percent" else 1)

    value = float(better(np.arange(len(shared))))
    if len(shared) < 2:
        return Figure(value, None, None, 1)
    low, high = np.percentile(better(draws), [2.5, 97.5])
    return Figure(value, float(low), float(high), len(shared))


def unit(measure: Measure) -> str:
    return {"percent": "points", "perplexity": "%", "number": ""}[measure.form]


def shown(each: Difference, measure: Measure) -> str:
    """A difference with its interval."""
    figure, places = each.figure, {"percent": 0, "perplexity": 1, "number": 2}[measure.form]
    value = f"{figure.value:+.{places}f}"
    if figure.low is None or figure.high is None:
        return f"{value} (one case)"
    return f"{value} ({figure.low:+.{places}f} – {figure.high:+.{places}f})"


def standings(comparison: Comparison, name: str) -> dict[int, list[Difference]]:
    """Verdict → how a contender does against the best without LongMem, task by task."""
    found: dict[int, list[Difference]] = {1: [], -1: [], 0: []}
    for task in comparison.tasks:
        for each in differences(comparison, task):
            if each.first == name and each.second in _RIVALS and each.worth.startswith("against the best"):
                found[each.verdict].append(each)
    return found


def standing_lines(comparison: Comparison, name: str) -> list[str]:
    """The same in words, worst first: where it loses, where it wins, where nothing can be told."""
    measures = {task.name: task.measures[0] for task in comparison.tasks}
    found = standings(comparison, name)
    lines = []
    for verdict, words in ((-1, "loses"), (1, "wins"), (0, "neither can be told")):
        some: Sequence[Difference] = sorted(found[verdict], key=lambda each: each.figure.value * (verdict or 1))[::-1]
        if some:
            told = [
                f"{each.task} {shown(each, measures[each.task])} {unit(measures[each.task])}".rstrip()
                + f" against `{each.second}`"
                for each in some
            ]
            lines.append(f"`{name}` **{words}**: {'; '.join(told)}.")
    return lines


def _values(cell: Cell, measure: Measure) -> dict[int, tuple[float, float]]:
    """Case → value and weight."""
    return {
        row["case"]: (row["values"][measure.name], row["tokens"])
        for row in cell.cases
        if "case" in row and measure.name in row["values"]
    }
