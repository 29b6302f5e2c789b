"""`longmem eval compare`, `all`, `qa` and `merge`: memory against windows and retrieval, on one backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from longmem.cli import common
from longmem.errors import ConfigError

if TYPE_CHECKING:
    from longmem.comparison.result import Cell, Comparison
    from longmem.model import LongMem
    from longmem.tasks.task import Task, TaskConfig

TASKS = "Tasks by name, or paths of Python files; each perhaps with its own numbers: language:told=65536,cases=32."
Contenders = Annotated[
    str | None,
    typer.Option(help="Names with commas between, or paths of Python files; all by default.", show_default=False),
]
Out = Annotated[Path, typer.Option(help="Folder for report.html, report.md and report.json.", file_okay=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Few cases and short texts: minutes on two CPU cores.")]
Cases = Annotated[int | None, typer.Option(help="Questions a task; 100, or 4 with --quick.", show_default=False)]
Told = Annotated[
    int | None,
    typer.Option(help="Tokens told before the questions; 16384, or 2048 with --quick.", show_default=False),
]
Draws = Annotated[int | None, typer.Option(help="Draws of examples; 6, or 1 with --quick.", show_default=False)]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder of data sets (docs/comparison.md says which files).", file_okay=False, exists=True),
]
Window = Annotated[int, typer.Option(help="Tokens of a window.")]
Extended = Annotated[int, typer.Option(help="Tokens of the long window, at most what the backbone was trained on.")]
Stretched = Annotated[int, typer.Option(help="Tokens of the window beyond the trained one (extended-rope).")]
Paper = Annotated[Path | None, typer.Option(help="SideNet trained with --recipe paper.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the report in --out, which has the same settings.")]
Rows = Annotated[int | None, typer.Option(help="Cases side by side; 32 on a GPU, else 1.", show_default=False)]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="That a contender may take on a task, about; then its last cases are left out. 0, no end; 2 with --quick.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Amount:
    """How much is asked.

    Attributes:
        seconds: a cell; 0 is no end.
    """

    cases: int = 100
    told: int = 16384
    draws: int = 6
    seconds: float = 0.0

    @classmethod
    def of(cls, quick: bool, **given: float | None) -> Amount:
        """What is usual, or with `quick` so little that all takes minutes on two CPU cores; and what was given."""
        usual = cls(cases=4, told=2048, draws=1, seconds=2.0) if quick else cls()
        return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def compare(
    tasks: Annotated[list[str], typer.Argument(help=TASKS, show_default=False)],
    contenders: Contenders = None,
    out: Out = Path("report"),
    quick: Quick = False,
    data: Data = None,
    cases: Cases = None,
    told: Told = None,
    draws: Draws = None,
    window: Window = 1024,
    extended: Extended = 8192,
    stretched: Stretched = 32768,
    focus: common.Focus = 65536,
    paper: Paper = None,
    seed: Seed = 0,
    resume: Resume = False,
    rows: Rows = None,
    seconds: Seconds = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Memory, windows, retrieval and MemGPT on the same backbone: some tasks."""
    import longmem.tasks
    from longmem.registry import chosen
    from longmem.tasks.task import Task, TaskConfig

    # A mistake in a name is told before anything slow.
    named = [own_numbers(each) for each in tasks]
    classes: list[Any] = list(chosen([each for each, _ in named], longmem.tasks, Task))
    numbers = {kind.name: own for each, own in named if own for kind in chosen([each], longmem.tasks, Task)}
    for own in numbers.values():
        TaskConfig(**own)

    def made(config: TaskConfig, loaded: LongMem) -> list[type[Task] | Task]:
        return [
            kind(dataclasses.replace(config, **numbers[kind.name]), loaded.tokenizer) if kind.name in numbers else kind
            for kind in classes
        ]

    _compare(
        made,
        contenders=contenders,
        out=out,
        asked=(Amount.of(quick, cases=cases, told=told, draws=draws, seconds=seconds), data, seed),
        sizes={"window": window, "extended": extended, "stretched": stretched, "focus": focus, "paper": paper},
        running=(resume, rows),
        load=lambda: common.load_model(model, device, dtype),
    )


def every(
    contenders: Contenders = None,
    out: Out = Path("report"),
    quick: Quick = False,
    data: Data = None,
    cases: Cases = None,
    told: Told = None,
    draws: Draws = None,
    window: Window = 1024,
    extended: Extended = 8192,
    stretched: Stretched = 32768,
    focus: common.Focus = 65536,
    paper: Paper = None,
    seed: Seed = 0,
    resume: Resume = False,
    rows: Rows = None,
    seconds: Seconds = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """The same, every task."""
    compare(
        tasks=[],  # all
        contenders=contenders,
        out=out,
        quick=quick,
        data=data,
        cases=cases,
        told=told,
        draws=draws,
        window=window,
        extended=extended,
        stretched=stretched,
        focus=focus,
        paper=paper,
        seed=seed,
        resume=resume,
        rows=rows,
        seconds=seconds,
        model=model,
        device=device,
        dtype=dtype,
    )


def qa(
    documents: Annotated[
        list[Path], typer.Option(help="Text files, .jsonl files, or folders of them.", show_default=False)
    ],
    questions: Annotated[
        Path, typer.Option(help='JSONL: {"question": …, "answer": …, "evidence": …} a line.', show_default=False)
    ],
    contenders: Contenders = None,
    out: Out = Path("report"),
    cases: Annotated[int, typer.Option(help="Questions asked at most, the first of the file.")] = 1000,
    window: Window = 1024,
    extended: Extended = 8192,
    stretched: Stretched = 32768,
    focus: common.Focus = 65536,
    paper: Paper = None,
    seed: Seed = 0,
    resume: Resume = False,
    rows: Rows = None,
    seconds: Seconds = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Your own questions on your own documents, asked of every contender."""
    from longmem.comparison.own import OwnQuestions, read_questions

    list(read_questions(questions))  # a mistake in it is told before anything slow
    _compare(
        lambda config, loaded: [OwnQuestions(documents, questions, config, loaded.tokenizer)],
        contenders=contenders,
        out=out,
        asked=(Amount.of(False, cases=cases, seconds=seconds), None, seed),
        sizes={"window": window, "extended": extended, "stretched": stretched, "focus": focus, "paper": paper},
        running=(resume, rows),
        load=lambda: common.load_model(model, device, dtype),
    )


def _compare(
    tasks: Callable[[TaskConfig, LongMem], Sequence[type[Task] | Task]],
    *,
    contenders: str | None,
    out: Path,
    asked: tuple[Amount, Path | None, int],
    sizes: dict[str, Any],
    running: tuple[bool, int | None],
    load: Callable[[], LongMem],
) -> None:
    import logging

    import longmem.contenders
    from longmem.comparison.cell import RunConfig
    from longmem.comparison.result import Comparison
    from longmem.comparison.run import compare as run
    from longmem.contenders.contender import Contender, ContenderConfig
    from longmem.registry import chosen
    from longmem.tasks.task import TaskConfig

    amount, data, seed = asked
    task_config = TaskConfig(data, amount.cases, amount.told, amount.draws, seed)
    contender_config = ContenderConfig(**sizes)
    rivals = chosen([n.strip() for n in (contenders or "").split(",") if n.strip()], longmem.contenders, Contender)
    resume, rows = running
    RunConfig(rows or 1, amount.seconds)
    _folder(out)
    before = Comparison.load(out / "report.json") if resume and (out / "report.json").exists() else None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index
    loaded = load()
    run_config = RunConfig(rows or (32 if loaded.device.type == "cuda" else 1), amount.seconds)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[cell]}"), TimeElapsedColumn())
    quiet = not common.err.is_terminal
    asking = tasks(task_config, loaded)
    with Progress(*columns, console=common.err, transient=True, disable=quiet) as progress:
        bar = progress.add_task("comparing", total=len(asking) * len(rivals), cell="")

        def done(comparison: Comparison, cell: Cell) -> None:
            # After every cell: what was interrupted has a report of what was done.
            _write(comparison, out)
            progress.advance(bar)

        comparison = run(
            loaded,
            asking,
            rivals,
            task_config,
            contender_config,
            run_config,
            before=before,
            on_cell=done,
            on_case=lambda task, name, n, count: progress.update(bar, cell=f"{task}, {name}: {n} of {count}"),
        )
    _write(comparison, out)
    _tell(comparison, out)


def merge(
    reports: Annotated[list[Path], typer.Argument(help="Folders of reports.", file_okay=False, show_default=False)],
    out: Out = Path("report"),
    fill: Annotated[
        list[Path] | None,
        typer.Option(
            help="Report of the same settings from another machine: its figures stand where there are none, and say so",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
) -> None:
    """One report of several that were run apart, with the same settings on machines of one kind."""
    from functools import reduce

    import longmem.contenders
    import longmem.tasks
    from longmem.comparison.result import Comparison
    from longmem.contenders.contender import Contender
    from longmem.registry import found
    from longmem.tasks.task import Task

    _folder(out)
    comparison = reduce(Comparison.joined, [Comparison.load(each / "report.json") for each in reports])
    comparison = reduce(Comparison.filled, [Comparison.load(each / "report.json") for each in fill or []], comparison)
    # In whatever order they were run.
    comparison = comparison.in_order([*found(longmem.tasks, Task)], [*found(longmem.contenders, Contender)])
    _write(comparison, out)
    _tell(comparison, out)


def own_numbers(text: str) -> tuple[str, dict[str, Any]]:
    """A task's name, and the numbers given behind it: `language:told=65536,cases=32`.

    Raises:
        ConfigError: there is no such number.
    """
    name, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        return text, {}
    numbers: dict[str, Any] = {}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        if key not in _NUMBERS or not value.isdecimal():
            raise ConfigError(
                f"{text!r}: {part!r} is not one of {', '.join(f'{each}=NUMBER' for each in _NUMBERS)}, with commas "
                "between."
            )
        numbers[key] = int(value)
    return name, numbers


def _folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out is a folder for the report.")


def _write(comparison: Comparison, out: Path) -> None:
    from longmem.comparison.html import html
    from longmem.comparison.markdown import markdown

    comparison.save(out / "report.json")
    (out / "report.md").write_text(markdown(comparison), encoding="utf-8")
    (out / "report.html").write_text(html(comparison), encoding="utf-8")


def _tell(comparison: Comparison, out: Path) -> None:
    from longmem.comparison.markdown import Notes, summary

    notes = Notes()
    typer.echo(summary(comparison, notes))
    for number, text in enumerate(notes.texts, start=1):
        typer.echo(f"({number}) {text}")
    typer.echo(f"\nEverything else is in {out / 'report.html'}, report.md and report.json.")


_NUMBERS = ("cases", "told", "draws")
