"""Runs contenders on tasks, cell by cell."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import longmem
from longmem.bench import machine
from longmem.comparison.result import Cell, Comparison, Named, Price, figures
from longmem.contenders.contender import Contender, ContenderConfig, Cost
from longmem.errors import LongMemError, UnavailableError
from longmem.model import LongMem
from longmem.tasks.task import Answer, Case, Round, Task, TaskConfig


def compare(
    model: LongMem,
    tasks: Sequence[type[Task] | Task],
    contenders: Sequence[type[Contender]],
    task_config: TaskConfig,
    contender_config: ContenderConfig,
    *,
    on_cell: Callable[[Comparison, Cell], None] | None = None,
    on_case: Callable[[str, str, int, int], None] | None = None,
) -> Comparison:
    """Every contender on every task.

    What cannot be run leaves a cell that says why; nothing else is lost by it.

    Args:
        model: a SideNet and the backbone that all contenders share.
        tasks: classes, or tasks that are made already.
        on_cell: called after each cell, with the comparison so far.
        on_case: progress: task, contender, cases done, cases in all.
    """
    comparison = Comparison(
        [Named(task.name, task.title, task.measures) for task in tasks],
        [Named(each.name, each.title) for each in contenders],
        settings_of(model, task_config, contender_config),
        machine_of(model.device),
    )
    made = {each.name: _made(lambda each=each: each(model, contender_config)) for each in contenders}
    for task in tasks:
        ready, rounds = (
            _made(lambda task=task: task(task_config, model.tokenizer) if isinstance(task, type) else task),
            [],
        )
        if isinstance(ready, Task):
            rounds = _made(lambda ready=ready: list(ready.rounds()))
        for name, contender in made.items():
            reason = next((each for each in (ready, rounds, contender) if isinstance(each, str)), None)
            if reason is not None:
                cell = Cell(task.name, name, reason=reason)
            else:
                step = None if on_case is None else lambda *counts, names=(task.name, name): on_case(*names, *counts)
                cell = run_cell(ready, rounds, contender, task_config.seed, step)
            comparison.cells[task.name, name] = cell
            if on_cell is not None:
                on_cell(comparison, cell)
    return comparison


def _made(make: Callable[[], Any]) -> Any:
    """What was made, or why it could not be."""
    try:
        return make()
    except LongMemError as error:
        return str(error)


def run_cell(
    task: Task,
    rounds: Sequence[Round],
    contender: Contender,
    seed: int,
    on_case: Callable[[int, int], None] | None = None,
) -> Cell:
    """One contender on one task. Cases that it cannot be asked are left out; if that is all, the cell says why."""
    contender.cost = Cost()
    count = sum(len(each.cases) for each in rounds)
    rows: list[dict[str, Any]] = []
    reason = "the task has no cases"
    try:
        for each in rounds:
            contender.prepare(each.documents)
            for case in each.cases:
                try:
                    answer = ask(contender, case)
                except UnavailableError as error:
                    reason = str(error)
                    continue
                rows.append({"kind": case.kind, **_row(case, answer), "values": dict(task.score(case, answer))})
                if on_case is not None:
                    on_case(len(rows), count)
    except LongMemError as error:
        return Cell(task.name, contender.name, reason=str(error))
    if not rows:
        return Cell(task.name, contender.name, reason=reason)

    def counted(some: Sequence[dict[str, Any]]) -> Any:
        return figures(task.measures, [row["values"] for row in some], [row["tokens"] for row in some], seed)

    kinds = {
        kind: counted([row for row in rows if row["kind"] == kind]) for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    price = Price.of(contender.cost, len(rounds))
    return Cell(task.name, contender.name, counted(rows), kinds if len(kinds) > 1 else {}, price, None, rows)


def ask(contender: Contender, case: Case) -> Answer:
    """What a contender makes of a case."""
    if case.continuation:
        losses = contender.log_likelihood(case.prompt, case.continuation)
        return Answer("", sum(losses), len(losses))
    if case.choices:
        scores = torch.tensor([sum(contender.log_likelihood(case.prompt, f" {choice}")) for choice in case.choices])
        right = case.choices.index(case.answers[0])
        return Answer(case.choices[int(scores.argmax())], float(scores.log_softmax(0)[right]), 1)
    losses = contender.log_likelihood(case.prompt, f" {case.answers[0]}") if case.answers else []
    said = contender.generate(case.prompt, case.stop, case.most).strip()
    return Answer(said, sum(losses), len(losses), contender.drawn_on())


def _row(case: Case, answer: Answer) -> dict[str, Any]:
    return {
        # Without the text before it, which may be another's.
        "query": case.prompt.query,
        "answers": case.answers,
        "given": answer.text,
        "log_probability": answer.log_probability,
        "tokens": answer.tokens,
    }


def settings_of(model: LongMem, task_config: TaskConfig, contender_config: ContenderConfig) -> dict[str, Any]:
    return {
        "backbone": model.backbone.name,
        "weights": model.backbone.weights_hash[:12],
        "memory heads": len(model.config.memory_heads),
        **{name: _shown(value) for name, value in dataclasses.asdict(task_config).items()},
        **{name: _shown(value) for name, value in dataclasses.asdict(contender_config).items()},
    }


def _shown(value: Any) -> Any:
    # A folder's place on a machine is nobody's business.
    return value.name if isinstance(value, Path) else value


def machine_of(device: torch.device) -> dict[str, str]:
    """Device, versions and commit."""
    git = ["git", "-C", str(Path(longmem.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {**machine(device), "longmem": longmem.__version__, "commit": commit or "no repository"}
