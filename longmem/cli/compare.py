"""`longmem eval compare`, `all` and `qa`: memory against windows and retrieval, on one backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def compare(
    tasks: Annotated[list[str], typer.Argument(help="Tasks by name, or paths of Python files.", show_default=False)],
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
    paper: Paper = None,
    seed: Seed = 0,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Memory, windows, retrieval and MemGPT on the same backbone: some tasks."""
    import longmem.tasks
    from longmem.registry import chosen
    from longmem.tasks.task import Task

    classes = chosen(tasks, longmem.tasks, Task)  # a mistake in a name is told before anything slow
    _compare(
        lambda config, loaded: classes,
        contenders=contenders,
        out=out,
        asked=(quick, data, cases, told, draws, seed),
        sizes={"window": window, "extended": extended, "stretched": stretched, "paper": paper},
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
    paper: Paper = None,
    seed: Seed = 0,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """The same, every task."""
    compare(
        [],
        contenders,
        out,
        quick,
        data,
        cases,
        told,
        draws,
        window,
        extended,
        stretched,
        paper,
        seed,
        model,
        device,
        dtype,
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
    paper: Paper = None,
    seed: Seed = 0,
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
        asked=(False, None, cases, None, None, seed),
        sizes={"window": window, "extended": extended, "stretched": stretched, "paper": paper},
        load=lambda: common.load_model(model, device, dtype),
    )


def _compare(
    tasks: Callable[[TaskConfig, LongMem], Sequence[type[Task] | Task]],
    *,
    contenders: str | None,
    out: Path,
    asked: tuple[bool, Path | None, int | None, int | None, int | None, int],
    sizes: dict[str, Any],
    load: Callable[[], LongMem],
) -> None:
    import longmem.contenders
    from longmem.comparison.html import html
    from longmem.comparison.markdown import Notes, markdown, summary
    from longmem.comparison.run import compare as run
    from longmem.contenders.contender import Contender, ContenderConfig
    from longmem.registry import chosen
    from longmem.tasks.task import TaskConfig

    quick, data, *numbers, seed = asked
    usual = QUICK if quick else FULL
    cases, told, draws = (most if given is None else given for given, most in zip(numbers, usual, strict=True))
    task_config = TaskConfig(data, cases, told, draws, seed)
    contender_config = ContenderConfig(**sizes)
    rivals = chosen([n.strip() for n in (contenders or "").split(",") if n.strip()], longmem.contenders, Contender)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out is a folder for the report.")
    loaded = load()

    def save(comparison: Comparison, cell: Cell) -> None:
        # After every cell: what was interrupted has a report of what was done.
        comparison.save(out / "report.json")
        (out / "report.md").write_text(markdown(comparison), encoding="utf-8")
        (out / "report.html").write_text(html(comparison), encoding="utf-8")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[cell]}"), TimeElapsedColumn())
    quiet = not common.err.is_terminal
    asking = tasks(task_config, loaded)
    with Progress(*columns, console=common.err, transient=True, disable=quiet) as progress:
        bar = progress.add_task("comparing", total=len(asking) * len(rivals), cell="")

        def done(comparison: Comparison, cell: Cell) -> None:
            save(comparison, cell)
            progress.advance(bar)

        comparison = run(
            loaded,
            asking,
            rivals,
            task_config,
            contender_config,
            on_cell=done,
            on_case=lambda task, name, n, count: progress.update(bar, cell=f"{task}, {name}: {n} of {count}"),
        )
    notes = Notes()
    typer.echo(summary(comparison, notes))
    for number, text in enumerate(notes.texts, start=1):
        typer.echo(f"({number}) {text}")
    typer.echo(f"\nEverything else is in {out / 'report.html'}, report.md and report.json.")


# Cases, tokens told, draws.
FULL, QUICK = (100, 16384, 6), (4, 2048, 1)
