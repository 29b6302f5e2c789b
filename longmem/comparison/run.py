"""Runs contenders on tasks, cell by cell."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longmem
from longmem.bench import machine
from longmem.comparison.cell import RunConfig, run_cell
from longmem.comparison.result import Cell, Comparison, Named
from longmem.contenders.contender import Contender, ContenderConfig
from longmem.contenders.together import Speaker
from longmem.errors import LongMemError
from longmem.model import LongMem
from longmem.sidenet import SideNet
from longmem.tasks.task import Round, Task, TaskConfig

BROKE = "broke off"  # how the reason of a cell begins in which something went wrong that nobody expected


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
    asking: dict[str, Any] = {}

    def asked(task: type[Task] | Task) -> tuple[Task, list[Round]] | str:
        """A task and its rounds, made once; or why there are none."""
        if task.name not in asking:
            asking[task.name] = _made(
                lambda: _with_rounds(task(task_config, model.tokenizer) if isinstance(task, type) else task)
            )
        return asking[task.name]

    def note(cell: Cell) -> None:
        comparison.cells[cell.task, cell.contender] = cell
        if on_cell is not None:
            on_cell(comparison, cell)

    cells = {(task.name, each.name): comparison.cell(task.name, each.name) for task in tasks for each in contenders}
    # What broke off before comes last: it may break off again, and take the rest with it.
    for each, again in [(each, again) for again in (False, True) for each in contenders]:
        places = [(task, cells[task.name, each.name]) for task in tasks]
        left = [task for task, cell in places if not cell.figures and _broke(cell) == again]
        if not left:
            continue
        contender = _made(lambda each=each: each(model, contender_config))
        if isinstance(contender, str):
            for task in left:
                note(Cell(task.name, each.name, reason=contender))
            continue
        # One for all tasks: what a device records for it once serves them all.
        speaker = Speaker(contender.model, contender.memory, run_config.rows)
        for task in left:
            ready = asked(task)
            if isinstance(ready, str):
                note(Cell(task.name, each.name, reason=ready))
                continue
            step = None if on_case is None else partial(on_case, task.name, each.name)
            try:
                note(run_cell(*ready, contender, run_config, speaker, step))
            except Exception as error:
                note(Cell(task.name, each.name, reason=f"{BROKE}: {type(error).__name__}: {error}".splitlines()[0]))
                if isinstance(error, torch.AcceleratorError):
                    raise  # the device does nothing more for this process
                traceback.print_exc()
        speaker.release()
    return comparison


def _broke(cell: Cell) -> bool:
    return (cell.reason or "").startswith(BROKE)


def _with_rounds(task: Task) -> tuple[Task, list[Round]]:
    return task, _in_random_order(task)


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
        "SideNet": _hash_of(model.sidenet)[:12],
        **{name: _shown(value) for name, value in dataclasses.asdict(task_config).items()},
        **{name: _shown(value) for name, value in dataclasses.asdict(contender_config).items()},
        **dataclasses.asdict(run_config),
    }


def _hash_of(sidenet: SideNet) -> str:
    """sha256 over its parameters in bfloat16, as checkpoints keep them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(sidenet.named_parameters()):
        stored = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode())
        digest.update(stored.view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
