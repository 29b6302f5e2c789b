"""How a figure goes with how much was told, and perplexity with how far into the continuation.

X tokens of a continuation.
"""

from __future__ import annotations

import math
import re
from html import escape

import numpy as np

from longmem.comparison.result import Cell, Comparison, Figure, Named
from longmem.comparison.tokens import by_case
from longmem.tasks.task import Measure

_TOLD = re.compile(r"([\d,]+) told")
_PART = 64  # tokens of a continuation that are one place
# Of contenders in their order; those of LongMem are warm.
_COLD = ("#1d4ed8", "#0e7490", "#4338ca", "#15803d", "#65a30d", "#0f766e", "#7c3aed")
_WARM = ("#f59e0b", "#a8a29e", "#eab308", "#c2410c", "#be123c", "#db2777")


def told_in(kind: str) -> int | None:
    """Tokens told in cases of a kind, if that is what makes the kind."""
    found = _TOLD.fullmatch(kind)
    return int(found[1].replace(",", "")) if found else None


def in_order(kinds: list[str]) -> list[str]:
    """Kinds by how much is told; others as they come."""
    return sorted(kinds, key=lambda kind: told_in(kind) or 0)


def curves(comparison: Comparison, task: Named) -> dict[str, list[tuple[int, Figure]]]:
    """Contender → tokens told and the first measure there; only those with more than one amount."""
    found = {}
    for each in comparison.contenders:
        kinds = comparison.cell(task.name, each.name).kinds
        points = [(told_in(kind), figures.get(task.measures[0].name)) for kind, figures in kinds.items()]
        some = sorted((told, figure) for told, figure in points if told is not None and figure is not None)
        if len(some) > 1:
            found[each.name] = some
    return found


def by_position(comparison: Comparison, task: Named) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: perplexity by place in the continuation, where the most was told."""
    kinds = [kind for each in comparison.contenders for kind in comparison.cell(task.name, each.name).kinds]
    most = max(kinds, key=lambda kind: told_in(kind) or 0, default="")
    if told_in(most) is None:
        return [], []
    rows = []
    for each in comparison.contenders:
        if losses := _losses(comparison.cell(task.name, each.name), most):
            ends = range(0, min(map(len, losses)), _PART)
            rows.append([each.name, *(f"{_perplexity(losses, first):.2f}" for first in ends)])
    width = max((len(row) for row in rows), default=1) - 1
    head = [f"{most}; tokens", *(f"{_PART * n + 1} – {_PART * (n + 1)}" for n in range(width))]
    return (head, rows) if rows else ([], [])


def _losses(cell: Cell, kind: str) -> list[np.ndarray]:
    return [-loss_X for (of, *_), loss_X in by_case(cell).items() if of == kind]


def _perplexity(losses: list[np.ndarray], first: int) -> float:
    return float(np.exp(np.concatenate([loss_X[first : first + _PART] for loss_X in losses]).mean()))


def drawing(comparison: Comparison, task: Named) -> str:
    """The curves as SVG; empty if there are none."""
    found = curves(comparison, task)
    if not found:
        return ""
    measure: Measure = task.measures[0]
    amounts = sorted({told for points in found.values() for told, _ in points})
    values = [figure.value for points in found.values() for _, figure in points]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    left, top, width, height, right = 60, 12, 560, 400, 150

    def x(told: int) -> float:
        span = math.log(amounts[-1] / amounts[0]) or 1.0
        return left + width * math.log(told / amounts[0]) / span

    def y(value: float) -> float:
        return top + height * (high - value) / (high - low)

    marks = []
    for number in range(6):
        value = low + (high - low) * number / 5
        marks.append(f'<line x1="{left}" x2="{left + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ccc"/>')
        marks.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for told in amounts:
        marks.append(f'<text x="{x(told):.1f}" y="{top + height + 18}" text-anchor="middle">{told // 1024:,}k</text>')
    marks.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">'
        f"{escape(measure.name)} by thousands (1,024) of tokens told</text>"
    )
    warm, cold = iter(_WARM * 3), iter(_COLD * 3)
    colours = {name: next(warm if name.startswith("longmem") else cold) for name in found}
    labels: list[tuple[float, str]] = []
    for name, points in found.items():
        path = " ".join(f"{x(told):.1f},{y(figure.value):.1f}" for told, figure in points)
        wide = 2.6 if name == "longmem" else 1.4
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="{wide}"/>')
        for told, figure in points:
            marks.append(
                f'<circle cx="{x(told):.1f}" cy="{y(figure.value):.1f}" r="3" fill="{colours[name]}">'
                f"<title>{escape(name)}, {told:,}: {figure.value:.2f}</title></circle>"
            )
        labels.append((y(points[-1][1].value), name))
    last = -math.inf
    for place, name in sorted(labels):
        last = max(place + 4, last + 14)  # one above the other, never over each other
        marks.append(f'<text x="{left + width + 10}" y="{last:.1f}" fill="{colours[name]}">{escape(name)}</text>')
    whole = max(top + height + 48, last + 10)
    size = f'width="{left + width + right}" height="{whole:.0f}" viewBox="0 0 {left + width + right} {whole:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12" font-family="sans-serif" role="img">'
        f"{''.join(marks)}</svg>"
    )
