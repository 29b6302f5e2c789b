"""Which tokens of a continuation a contender makes more probable, and how it does at those that need their long past.

A mean over all tokens hides what memory is for: most tokens follow from the last sentence. Key tokens are those that
the backbone's long window makes far more probable than its short one and finds likely then (LongPPL, Fang et al. 2024,
arXiv:2410.23771, section 3: gain above 2 nats, log-probability above −2, here with the backbone as its own judge).

X tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from longmem.comparison.result import Cell, Comparison, Figure, figure
from longmem.tasks.task import Measure

GAIN, LIKELY = 2.0, -2.0
# Nats by which a token must differ to count as better or worse.
MARGIN = 0.1
# The judges, and what others are compared with.
_SHORT, _LONG, _EMPTY = "window", "extended", "longmem-empty"
_OTHER = "longmem-paper"  # has weights of its own
MEASURES = (
    Measure("key tokens", "perplexity", higher=False),
    Measure("better"),
    Measure("worse", higher=False),
)


@dataclass(frozen=True)
class TokenFigures:
    """Of one contender on one task.

    Attributes:
        base: with what it is compared: the same weights with an empty bank, or the backbone with its short window.
        figures: measure → figure. Perplexity of key tokens; share of all tokens better and worse than under `base`.
    """

    base: str
    figures: dict[str, Figure]


def token_figures(comparison: Comparison, task: str) -> dict[str, TokenFigures]:
    """Contender → figures, over the continuations that it and those it is compared with were given; empty where none
    were given, or a judge was not asked."""
    told = {each.name: by_case(comparison.cell(task, each.name)) for each in comparison.contenders}
    short, long = told.get(_SHORT, {}), told.get(_LONG, {})
    seed, found = int(comparison.settings.get("seed", 0)), {}
    for name, mine in told.items():
        base = _EMPTY if name.startswith("longmem") and name != _OTHER and told.get(_EMPTY) else _SHORT
        cases = [case for case in mine if case in short and case in long and case in told[base]]
        rows = [(mine[case], told[base][case], long[case] - short[case], long[case]) for case in cases]
        groups = [group for *_, group in cases]
        keys = [(gain_X > GAIN) & (long_X > LIKELY) for _, _, gain_X, long_X in rows]
        figures = {}
        if some := [
            (-own_X[key_X].mean(), key_X.sum(), group)
            for (own_X, *_), key_X, group in zip(rows, keys, groups, strict=True)
            if key_X.any()
        ]:
            loss_C, count_C, group_C = (np.array(column) for column in zip(*some, strict=True))
            figures["key tokens"] = figure(MEASURES[0], loss_C, count_C, seed, group_C)
        if rows and name != base:
            gains = [own_X - base_X for own_X, base_X, *_ in rows]
            for measure, sign in ((MEASURES[1], 1), (MEASURES[2], -1)):
                share_C = np.array([(sign * gain_X > MARGIN).mean() for gain_X in gains])
                figures[measure.name] = figure(measure, share_C, np.ones(len(share_C)), seed, np.array(groups))
        if figures:
            found[name] = TokenFigures(base, figures)
    return found


def key_share(comparison: Comparison, task: str) -> float:
    """How many of all tokens are key tokens, in percent."""
    short, long = (by_case(comparison.cell(task, name)) for name in (_SHORT, _LONG))
    keys = [(long[case] - short[case] > GAIN) & (long[case] > LIKELY) for case in short if case in long]
    return 100 * float(np.concatenate(keys).mean()) if keys else 0.0


def by_case(cell: Cell) -> Mapping[tuple[str, int, int], np.ndarray]:
    """Log-probability of each token, by kind, number and group of the case."""
    return {
        (row["kind"], row["case"], row["group"]): np.array(row["log_probabilities"])
        for row in cell.cases
        if row.get("log_probabilities") and "group" in row  # older reports do not tell
    }
