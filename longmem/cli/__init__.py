"""The `longmem` command. One module a group of commands; nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longmem import __version__
from longmem.cli import banks, compare, encryption, forgetting, learn, measure, stores, talk, versions
from longmem.errors import LongMemError


class _Commands(TyperGroup):
    """Says what went wrong in one line on standard error; `LONGMEM_DEBUG=1` shows the traceback instead."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (BrokenPipeError, EOFError):
            raise
        except (LongMemError, OSError) as error:
            if os.environ.get("LONGMEM_DEBUG") == "1":
                raise
            typer.echo(f"error: {_explained(error)}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


def _explained(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Check the path, its permissions and the free space."
    return str(error)


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {message}", err=True)


app = typer.Typer(
    cls=_Commands,
    help="Long-term memory for language models: what they read is kept in banks on disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longmem {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


_REMEMBER, _KEEP, _TRAIN = "Remember and read", "Keep", "Train and measure"
for _command in (
    banks.write,
    banks.recall,
    talk.generate,
    talk.chat,
    banks.banks,
    banks.sources,
    banks.index,
):
    app.command(rich_help_panel=_REMEMBER)(_command)
for _command in (
    forgetting.forget,
    forgetting.receipts,
    encryption.encrypt,
    encryption.destroy_key,
    versions.log,
    versions.tag,
    versions.fork,
    versions.merge,
    versions.diff,
    versions.copy,
    versions.export,
    banks.verify,
    banks.repair,
    banks.consolidate,
    banks.retain,
    stores.place,
):
    app.command(rich_help_panel=_KEEP)(_command)
app.command("import", rich_help_panel=_KEEP)(versions.import_)
for _command in (
    learn.setup,
    learn.tokenize,
    learn.replies,
    learn.histories,
    measure.probe,
    learn.train,
    learn.pack,
    measure.bench,
):
    app.command(rich_help_panel=_TRAIN)(_command)
for _name, _command in (
    ("compare", compare.compare),
    ("all", compare.every),
    ("qa", compare.qa),
    ("merge", compare.merge),
):
    measure.evaluations.command(_name)(_command)
app.add_typer(measure.evaluations, name="eval", rich_help_panel=_TRAIN)


def main() -> None:
    """Entry point of the `longmem` command."""
    sys.exit(app(prog_name="longmem"))


__all__ = ["app", "main"]
