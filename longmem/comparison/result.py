"""Figures of a comparison, with their intervals, and what they cost."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longmem.contenders.contender import Cost
from longmem.data import read_text
from longmem.errors import ConfigError, SourceError
from longmem.evals.answers import wilson
from longmem.tasks.task import Measure

DRAWS = 2000  # of a bootstrap
# Settings that say how a comparison was run, not what was asked.
_RUNNING = ("precision", "rows", "seconds")


@dataclass(frozen=True)
class Figure:
    """A mean over cases and its 95 % interval: Wilson's where every case is right or wrong, else a bootstrap over
    cases, those about one text together; None for a single case or text.

    Attributes:
        value: percent, or as the measure says.
    """

    value: float
    low: float | None
    high: float | None
    cases: int


@dataclass(frozen=True)
class Price:
    """What a contender spent on a task.

    Attributes:
        told_tokens: the model read of each round's documents, mean over rounds.
        asked_tokens: it read for a question, mean.
        first_seconds: from the question to the first token of the answer, median.
        token_seconds: for each token after it, mean; None where nothing was generated.
        kept_bytes: the most kept of a round's documents.
    """

    told_tokens: float
    asked_tokens: float
    first_seconds: float
    token_seconds: float | None
    kept_bytes: int

    @classmethod
    def of(cls, cost: Cost, rounds: int) -> Price:
        asked = len(cost.first_seconds)
        return cls(
            told_tokens=cost.told_tokens / rounds,
            asked_tokens=cost.asked_tokens / asked,
            first_seconds=statistics.median(cost.first_seconds),
            token_seconds=cost.said_seconds / cost.said_tokens if cost.said_tokens else None,
            kept_bytes=cost.kept_bytes,
        )


@dataclass(frozen=True)
class Cell:
    """One contender on one task.

    Attributes:
        figures: measure → figure over all cases.
        kinds: kind of case → the same over its cases.
        price: None where there are no figures.
        reason: why there are none.
        cases: what was asked and answered, and every value.
        unasked: how many cases the time was too short for.
        left_out: why the contender could not be asked some cases → how many.
        seconds: that the cell took, cases side by side.
        elsewhere: on which other machine than the rest, and in what precision; "" for none.
    """

    task: str
    contender: str
    figures: dict[str, Figure] = field(default_factory=dict)
    kinds: dict[str, dict[str, Figure]] = field(default_factory=dict)
    price: Price | None = None
    reason: str | None = None
    cases: list[dict[str, Any]] = field(default_factory=list)
    unasked: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    elsewhere: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        """A cell as `dataclasses.asdict` wrote it."""

        def figures_of(row: dict[str, Any]) -> dict[str, Figure]:
            return {measure: Figure(**each) for measure, each in row.items()}

        price = None if row["price"] is None else Price(**row["price"])
        kinds = {kind: figures_of(each) for kind, each in row["kinds"].items()}
        return cls(**{**row, "figures": figures_of(row["figures"]), "kinds": kinds, "price": price})


@dataclass(frozen=True)
class Named:
    """How a report calls a task or a contender.

    Attributes:
        settings: of this task alone.
    """

    name: str
    title: str
    measures: tuple[Measure, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Named:
        """One as `dataclasses.asdict` wrote it."""
        return cls(**{**row, "measures": tuple(Measure(**each) for each in row["measures"])})


@dataclass
class Comparison:
    """All cells of a table, as far as they have been run.

    Attributes:
        settings: what was asked for, of which model.
        machine: where, by which versions and commit.
    """

    tasks: list[Named]
    contenders: list[Named]
    settings: dict[str, Any]
    machine: dict[str, str]
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def cell(self, task: str, contender: str) -> Cell:
        return self.cells.get((task, contender), Cell(task, contender, reason="not run yet"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "tasks": [dataclasses.asdict(task) for task in self.tasks],
            "contenders": [dataclasses.asdict(contender) for contender in self.contenders],
            "settings": self.settings,
            "machine": self.machine,
            "cells": [dataclasses.asdict(cell) for cell in self.cells.values()],
        }

    def save(self, path: Path) -> None:
        """Write a JSON file; one that is there stays whole until the new one is."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, default=str)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.new")
        written.write_text(text + "\n", encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """What `save` wrote.

        Raises:
            SourceError: there is no such file, or something else is in it.
        """
        try:
            row = json.loads(read_text(path))
            tasks, contenders = ([Named.of(each) for each in row[name]] for name in ("tasks", "contenders"))
            cells = [Cell.of(each) for each in row["cells"]]
            return cls(tasks, contenders, row["settings"], row["machine"], {(c.task, c.contender): c for c in cells})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{path} is no report of a comparison ({type(error).__name__}: {error}). Give a folder that `longmem "
                "eval compare` or `all` of this version has written."
            ) from error

    def joined(self, other: Comparison) -> Comparison:
        """The cells of both; where both have figures, the other's.

        Raises:
            ConfigError: they were run with different settings, or on different machines.
        """
        self._agree(other)
        _agree("machine", self.machine, other.machine)
        cells = {place: cell for place, cell in other.cells.items() if cell.figures or not self.cell(*place).figures}
        return Comparison(
            list({each.name: each for each in (*self.tasks, *other.tasks)}.values()),
            list({each.name: each for each in (*self.contenders, *other.contenders)}.values()),
            self.settings,
            self.machine,
            {**self.cells, **cells},
        )

    def filled(self, other: Comparison) -> Comparison:
        """The same with the figures of another machine where there are none; such a cell says where it was run.

        Raises:
            ConfigError: the other has different settings, but for how it was run.
        """
        self._agree(other, besides=_RUNNING)
        machine = other.machine.get("gpu") or other.machine.get("processor")
        where = f"{machine}, {other.settings.get('precision')}"
        cells = {
            place: dataclasses.replace(cell, elsewhere=cell.elsewhere or where)
            for place, cell in other.cells.items()
            if cell.figures and place in self.cells and not self.cells[place].figures
        }
        return dataclasses.replace(self, cells={**self.cells, **cells})

    def _agree(self, other: Comparison, besides: Sequence[str] = ()) -> None:
        """Raise `ConfigError` if other things were asked, or of another model."""
        _agree("settings", self.settings, other.settings, besides)
        for name, both in self._settings_of_both(other).items():
            _agree(f"settings of {name}", *both, besides)

    def in_order(self, tasks: Sequence[str], contenders: Sequence[str]) -> Comparison:
        """The same, tasks and contenders in the order of their names here, others behind them."""

        def sorted_by(names: Sequence[str], some: list[Named]) -> list[Named]:
            return sorted(some, key=lambda each: names.index(each.name) if each.name in names else len(names))

        return dataclasses.replace(
            self, tasks=sorted_by(tasks, self.tasks), contenders=sorted_by(contenders, self.contenders)
        )

    def _settings_of_both(self, other: Comparison) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        mine = {task.name: task.settings for task in self.tasks}
        return {task.name: (mine[task.name], task.settings) for task in other.tasks if task.name in mine}


def _agree(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], besides: Sequence[str] = ()) -> None:
    for name in sorted({*mine, *theirs} - {*besides}):
        if mine.get(name) != theirs.get(name):
            raise ConfigError(
                f"These figures do not belong in one table: {what} differ, {name} is {mine.get(name)!r} in one "
                f"and {theirs.get(name)!r} in the other. Use the same, or write to another folder."
            )


def figures(
    measures: Sequence[Measure],
    values: Sequence[Mapping[str, float]],
    weights: Sequence[float],
    seed: int,
    groups: Sequence[int] | None = None,
) -> dict[str, Figure]:
    """Measure → figure; measures that no case has are left out.

    Args:
        values: of each case, by measure.
        weights: tokens of each case; they count where a measure is a mean over tokens (perplexity).
        groups: of each case; those of one group are drawn together, as they are about the same text.
    """
    found = {}
    for measure in measures:
        some = [
            (each[measure.name], weight, group)
            for each, weight, group in zip(values, weights, groups or range(len(values)), strict=True)
            if measure.name in each
        ]
        if some:
            value_C, weight_C, group_C = (np.array(column) for column in zip(*some, strict=True))
            found[measure.name] = figure(measure, value_C, weight_C, seed, group_C)
    return found


def figure(
    measure: Measure, value_C: np.ndarray, weight_C: np.ndarray, seed: int, group_C: np.ndarray | None = None
) -> Figure:
    """The figure of C cases; those of one group are drawn together."""
    count = len(value_C)
    if measure.form != "perplexity":
        weight_C = np.ones(count)

    def shown(mean: Any) -> Any:
        return np.exp(mean) if measure.form == "perplexity" else 100 * mean if measure.form == "percent" else mean

    value = float(shown((value_C * weight_C).sum() / weight_C.sum()))
    if count < 2 or (group_C is not None and len(np.unique(group_C)) < 2):
        return Figure(value, None, None, count)
    if measure.form == "percent" and set(value_C.tolist()) <= {0.0, 1.0}:
        low, high = wilson(int(value_C.sum()), count)
        return Figure(value, 100 * low, 100 * high, count)
    low, high = interval(
        np.stack([value_C * weight_C, weight_C], 1), group_C, seed, lambda sum_D2: shown(_mean(sum_D2))
    )
    return Figure(value, low, high, count)


def _mean(sum_D2: np.ndarray) -> np.ndarray:
    return sum_D2[..., 0] / sum_D2[..., 1]


def interval(
    part_CN: np.ndarray, group_C: np.ndarray | None, seed: int, of: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Where 95 % of a bootstrap over groups of cases lie.

    Args:
        part_CN: N numbers of each case, whose sums over a draw `of` takes, (draws, N).
        group_C: of each case; each is one of its own if None.
    """
    if group_C is not None:
        _, place_C = np.unique(group_C, return_inverse=True)
        part_CN = np.stack([np.bincount(place_C, column_C) for column_C in part_CN.T], 1)
    count = len(part_CN)
    draws = np.random.default_rng(seed).integers(count, size=(DRAWS, count))
    low, high = np.percentile(of(part_CN[draws].sum(1)), [2.5, 97.5])
    return float(low), float(high)
