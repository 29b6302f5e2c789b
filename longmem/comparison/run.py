"""Runs contenders on tasks, cell by cell.

The first cases of a cell are asked one by one, which is what its costs are of; on a GPU the others side by side.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longmem
from longmem.bench import machine
from longmem.comparison.result import Cell, Comparison, Named, Price, figures
from longmem.contenders.contender import Contender, ContenderConfig, Cost, Posed
from longmem.contenders.lockstep import Lockstep
from longmem.contenders.together import log_likelihoods, say
from longmem.errors import ConfigError, LongMemError, UnavailableError
from longmem.model import LongMem
from longmem.tasks.task import Answer, Case, Round, Task, TaskConfig

# Cases that are asked one by one where others are asked side by side; of those who converse, which takes long.
_TIMED, _TALKED = 3, 1
# Cases of those at once.
_TALKS = 64
# Remembered tokens of all banks that wait with their questions, and how many questions wait.
_BANKS, _WAITING = 1 << 22, 256


@dataclass(frozen=True)
class RunConfig:
    """How cells are run.

    Attributes:
        rows: cases side by side.
        seconds: that a cell may take, about, before the rest of its cases is left out; 0 is no limit.
    """

    rows: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seconds < 0:
            raise ConfigError(
                f"rows must be at least 1 and seconds at least 0 (no limit); got {self.rows} and {self.seconds}."
            )


def compare(
    model: LongMem,
    tasks: Sequence[type[Task] | Task],
    contenders: Sequence[type[Contender]],
    task_config: TaskConfig,
    contender_config: ContenderConfig,
    run_config: RunConfig | None = None,
    *,
    before: Comparison | None = None,
    on_cell: Callable[[Comparison, Cell], None] | None = None,
    on_case: Callable[[str, str, int, int], None] | None = None,
) -> Comparison:
    """Every contender on every task.

    What cannot be run leaves a cell that says why; nothing else is lost by it.

    Args:
        model: a SideNet and the backbone that all contenders share.
        tasks: classes, or tasks that are made already.
        before: an interrupted run of the same: cells that have figures there are not run again.
        on_cell: called after each cell, with the comparison so far.
        on_case: progress: task, contender, cases done, cases in all.

    Raises:
        ConfigError: `before` had other settings, or another machine.
    """
    run_config = run_config or RunConfig()
    comparison = Comparison(
        [Named(task.name, task.title, task.measures, _own_settings(task, task_config)) for task in tasks],
        [Named(each.name, each.title) for each in contenders],
        settings_of(model, task_config, contender_config, run_config),
        machine_of(model.device),
    )
    if before is not None:
        comparison = before.joined(comparison)
    made: dict[str, Any] = {}
    for task in tasks:
        left = [each for each in contenders if not comparison.cell(task.name, each.name).figures]
        ready, rounds = (
            _made(lambda task=task: task(task_config, model.tokenizer) if isinstance(task, type) else task),
            [],
        )
        if left and isinstance(ready, Task):
            rounds = _made(lambda ready=ready: _in_random_order(ready))
        for each in left:
            if each.name not in made:
                made[each.name] = _made(lambda each=each: each(model, contender_config))
            contender = made[each.name]
            reason = next((some for some in (ready, rounds, contender) if isinstance(some, str)), None)
            if reason is not None:
                cell = Cell(task.name, each.name, reason=reason)
            else:
                step = (
                    None if on_case is None else lambda *counts, names=(task.name, each.name): on_case(*names, *counts)
                )
                cell = run_cell(ready, rounds, contender, run_config, step)
            comparison.cells[task.name, each.name] = cell
            if on_cell is not None:
                on_cell(comparison, cell)
    return comparison


def _in_random_order(task: Task) -> list[Round]:
    """Rounds, so that those that there is time for are like the others."""
    rounds = list(task.rounds())
    return [rounds[place] for place in np.random.default_rng(task.config.seed).permutation(len(rounds))]


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
    config: RunConfig | None = None,
    on_case: Callable[[int, int], None] | None = None,
) -> Cell:
    """One contender on one task. Cases that it cannot be asked are left out; if that is all, the cell says why."""
    config = config or RunConfig()
    count = sum(len(each.cases) for each in rounds)
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[Case, Posed]] = []
    contender.cost, price = Cost(), None
    reason, start, seen = "the task has no cases", time.perf_counter(), 0

    def note(case: Case, answer: Answer) -> None:
        rows.append({"kind": case.kind, **_row(case, answer), "values": dict(task.score(case, answer))})
        if on_case is not None:
            on_case(len(rows), count)

    def answer_waiting() -> None:
        answers = ask_together(contender, waiting, config.rows)
        for (case, _), answer in zip(waiting, answers, strict=True):
            note(case, answer)
        waiting.clear()

    timed = (_TALKED if contender.converses else _TIMED) if config.rows > 1 else count
    talks: list[tuple[Round, Case]] = []
    try:
        for number, each in enumerate(rounds):
            if _late(start, config) and seen:
                break
            talking = contender.converses and len(rows) >= timed
            if not talking:
                other = task.other(rounds, number)
                contender.prepare(each.documents, other.documents if other else ())
            for case in each.cases:
                if _late(start, config) and rows:
                    break
                seen += 1
                try:
                    if len(rows) < timed:
                        note(case, ask(contender, case))
                        price = Price.of(contender.cost, number + 1)
                    elif contender.converses:
                        talks.append((each, case))
                    else:
                        waiting.append((case, contender.pose(case.prompt)))
                except UnavailableError as error:
                    reason = str(error)
            banks = {id(posed.bank): posed.bank for _, posed in waiting if posed.bank is not None}
            if len(waiting) >= _WAITING or sum(bank.capacity for bank in banks.values()) >= _BANKS:
                answer_waiting()
        for first in range(0, len(talks), _TALKS):
            some = talks[first : first + _TALKS]
            if _late(start, config):
                seen -= len(some)
                continue
            posed = pose_in_lockstep(contender, some, config.rows)
            waiting += zip((case for _, case in some), posed, strict=True)
            answer_waiting()
        answer_waiting()
    except LongMemError as error:
        return Cell(task.name, contender.name, reason=str(error))
    except torch.OutOfMemoryError:
        return Cell(task.name, contender.name, reason=f"memory of {contender.model.device} was too small")
    if not rows:
        return Cell(task.name, contender.name, reason=reason)

    def counted(some: Sequence[dict[str, Any]]) -> Any:
        values, tokens = [row["values"] for row in some], [row["tokens"] for row in some]
        return figures(task.measures, values, tokens, task.config.seed)

    kinds = {
        kind: counted([row for row in rows if row["kind"] == kind]) for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    kinds = kinds if len(kinds) > 1 else {}
    return Cell(task.name, contender.name, counted(rows), kinds, price, None, rows, count - seen)


def _late(start: float, config: RunConfig) -> bool:
    return bool(config.seconds) and time.perf_counter() - start > config.seconds


def ask(contender: Contender, case: Case) -> Answer:
    """What a contender makes of a case."""
    losses = [contender.log_likelihood(case.prompt, text) for text in wanted(case)]
    if not asks_for_text(case):
        return scored(case, losses)
    said = contender.generate(case.prompt, case.stop, case.most)
    return scored(case, losses, said, contender.drawn_on())


def pose_in_lockstep(contender: Contender, asked: Sequence[tuple[Round, Case]], rows: int) -> list[Posed]:
    """The windows of a contender that converses, many side by side: of each round a twin is told, and asked by twins of
    its own."""
    lockstep = Lockstep(contender.model, contender.memory, rows)

    def twin(of: Contender) -> Contender:
        made = copy.copy(of)
        made.reader, made.cost = lockstep.reader(), Cost()
        return made

    told = {id(each): (each, twin(contender)) for each, _ in asked}
    lockstep.run([partial(one.prepare, each.documents) for each, one in told.values()])
    return lockstep.run([partial(twin(told[id(each)][1]).pose, case.prompt) for each, case in asked])


def ask_together(contender: Contender, waiting: Sequence[tuple[Case, Posed]], rows: int) -> list[Answer]:
    """`ask` of many cases, side by side."""
    model, memory = contender.model, contender.memory
    asked = [(posed, contender.reader.tokenize(text)) for case, posed in waiting for text in wanted(case)]
    losses = iter(log_likelihoods(model, memory, asked))
    answers = [scored(case, [next(losses) for _ in wanted(case)]) for case, _ in waiting]
    alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for number, (case, _) in enumerate(waiting):
        if asks_for_text(case):
            alike.setdefault((case.stop, case.most or case.prompt.room), []).append(number)
    for (stop, most), numbers in alike.items():
        texts = say(model, memory, [waiting[number][1] for number in numbers], most, stop, rows)
        for number, (text, drawn_on) in zip(numbers, texts, strict=True):
            answers[number] = dataclasses.replace(answers[number], text=text.strip(), drawn_on=drawn_on)
    return answers


def wanted(case: Case) -> list[str]:
    """Texts whose probability is measured, as they follow the prompt."""
    if case.continuation:
        return [case.continuation]
    return [f" {each}" for each in case.choices or case.answers[:1]]


def asks_for_text(case: Case) -> bool:
    return not case.continuation and not case.choices


def scored(case: Case, losses: Sequence[list[float]], text: str = "", drawn_on: tuple[str, ...] = ()) -> Answer:
    """An answer, from the log-probabilities of what was wanted and what was said."""
    if case.choices:
        scores = torch.tensor([sum(each) for each in losses])
        right = case.choices.index(case.answers[0])
        return Answer(case.choices[int(scores.argmax())], float(scores.log_softmax(0)[right]), 1)
    (only,) = losses or ([],)
    return Answer(text.strip(), sum(only), len(only), drawn_on, tuple(only) if case.continuation else ())


def _row(case: Case, answer: Answer) -> dict[str, Any]:
    return {
        # Without the text before it, which may be another's.
        "query": case.prompt.query,
        "answers": list(case.answers),
        "given": answer.text,
        "log_probability": answer.log_probability,
        "tokens": answer.tokens,
        **({"log_probabilities": [round(each, 3) for each in answer.log_probabilities]} if case.continuation else {}),
    }


def _own_settings(task: type[Task] | Task, config: TaskConfig) -> dict[str, Any]:
    """What is asked of a task that is not asked of all."""
    own = {} if isinstance(task, type) else dataclasses.asdict(task.config)
    return {name: _shown(value) for name, value in own.items() if value != getattr(config, name)}


def settings_of(
    model: LongMem, task_config: TaskConfig, contender_config: ContenderConfig, run_config: RunConfig
) -> dict[str, Any]:
    return {
        "backbone": model.backbone.name,
        "precision": str(model.backbone.dtype).removeprefix("torch."),
        "weights": model.backbone.weights_hash[:12],
        "memory heads": len(model.config.memory_heads),
        **{name: _shown(value) for name, value in dataclasses.asdict(task_config).items()},
        **{name: _shown(value) for name, value in dataclasses.asdict(contender_config).items()},
        **dataclasses.asdict(run_config),
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
