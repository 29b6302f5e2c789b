"""`longmem probe` and `longmem eval`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longmem.cli import common
from longmem.errors import MissingExtraError

if TYPE_CHECKING:
    from longmem.evals.perplexity import PerplexityResult

evaluations = typer.Typer(help="Measure what memory is worth.", no_args_is_help=True)


# Options named like a field of `ProbeConfig` have its default; a test compares them (importing it imports torch).
def probe(
    context: typer.Context,
    documents: Annotated[
        list[Path] | None,
        typer.Argument(help="Text the backbone reads well; Python's documentation by default.", show_default=False),
    ] = None,
    backbone: common.BackboneName = common.DEFAULT_MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Write the choice and its evidence to this JSON file.", dir_okay=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the heat map into this image.", dir_okay=False)] = None,
    texts: Annotated[int, typer.Option(help="Stretches of text for the look-up test.")] = 6,
    remembered: Annotated[int, typer.Option(help="Tokens remembered in the look-up test.")] = 7168,
    window: Annotated[int, typer.Option(help="Tokens of the window that looks things up.")] = 1024,
    sessions: Annotated[int, typer.Option(help="Sessions of the causal test.")] = 4,
    facts: Annotated[int, typer.Option(help="Facts told in each session.")] = 8,
    filler: Annotated[int, typer.Option(help="Tokens of text between a session and its questions.")] = 1024,
    max_heads: Annotated[int, typer.Option(help="Most heads that are chosen.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    device: common.Device = "auto",
    dtype: common.Precision = "bfloat16",
    as_json: common.Json = False,
) -> None:
    """Find the heads of a backbone whose keys and values are worth remembering."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--plot needs matplotlib, which is not installed. Run: pip install 'longmem[plot]'.")
    from longmem.probe import ProbeConfig, default_documents
    from longmem.probe import probe as run

    names = {field.name for field in dataclasses.fields(ProbeConfig)} & set(context.params)
    config = ProbeConfig(**{name: context.params[name] for name in names})
    loaded = common.load_backbone(backbone, device, dtype)
    read = common.load_documents(documents, loaded) if documents else default_documents(loaded.tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=common.err, transient=True, disable=not common.err.is_terminal) as progress:
        stages = {stage: progress.add_task(stage, total=None) for stage in ("look-up", "knock-out", "addition")}
        result = run(
            loaded,
            read,
            config=config,
            on_progress=lambda stage, done, total: progress.update(stages[stage], completed=done, total=total),
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result.save(out)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        result.plot(plot)
    if as_json:
        common.print_json(json.loads(result.to_json()))
        return
    common.out.print(result.heat_map())
    listed = " ".join(f"{layer}.{head}" for layer, head in result.memory_heads)
    typer.echo(f"Memory heads of {result.backbone}: {listed}" if listed else "No head can be chosen.")


# As above, for `PerplexityConfig`.
@evaluations.command()
def perplexity(
    context: typer.Context,
    documents: common.Documents,
    model: common.Model = common.DEFAULT_MODEL,
    protocol: Annotated[
        Literal["blocks", "sliding"],
        typer.Option(help="blocks start with an empty window; sliding always sees `context` tokens or more."),
    ] = "sliding",
    prefill: Annotated[int, typer.Option(help="Tokens remembered before scoring starts.")] = 16384,
    segments: Annotated[int, typer.Option(help="Segments scored of each document.")] = 16,
    segment: Annotated[int, typer.Option(help="Tokens of a segment.")] = 1024,
    context_tokens: Annotated[int, typer.Option("--context", help="Least local tokens (sliding).")] = 1024,
    stride: Annotated[int, typer.Option(help="Tokens scored at a time (sliding).")] = 512,
    only: Annotated[
        str | None,
        typer.Option(
            help="Of backbone_local, backbone_window, bank_off, bank_on, bank_wrong; with commas. All by default."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Documents side by side; 0 chooses.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the intervals' bootstrap.")] = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; - is standard output.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Perplexity of documents with the bank on, empty, and filled with another document."""
    from longmem.evals.perplexity import CONDITIONS, PerplexityConfig
    from longmem.evals.perplexity import perplexity as run

    names = {field.name for field in dataclasses.fields(PerplexityConfig)} & set(context.params)
    settings: dict[str, Any] = {name: context.params[name] for name in names}
    settings["context"] = context_tokens
    conditions = CONDITIONS if only is None else tuple(filter(None, (name.strip() for name in only.split(","))))
    config = PerplexityConfig(**settings, conditions=conditions)
    if as_json is not None and as_json.is_dir():
        raise typer.BadParameter(f"{as_json} is a folder, expected a file.", param_hint="--json")
    loaded = common.load_model(model, device, dtype)
    read = common.load_documents(documents, loaded.backbone)
    usable = common.check_long_enough(read, config)
    with common.counting("scoring", usable * config.needed, "tokens") as advance:
        result = run(loaded, read, config, on_tokens=advance)
    if as_json is not None and str(as_json) == "-":
        common.print_json(result.to_dict())
        return
    if as_json is not None:
        result.save(as_json)
    common.out.print(perplexity_table(result))
    scored = f"{result.tokens:,} tokens of {len(result.documents)} documents scored"
    left_out = len(read) - len(result.documents)
    typer.echo(f"{scored}; {left_out} shorter than {config.needed:,} tokens left out." if left_out else f"{scored}.")


def perplexity_table(result: PerplexityResult) -> Table:
    """Conditions, perplexities and 95 % intervals."""
    table = Table("", "perplexity", "95 % interval", box=None, header_style="dim")
    labels = {
        "backbone_local": "backbone, same window",
        "backbone_window": "backbone, whole window",
        "bank_off": "bank empty",
        "bank_on": "bank on",
        "bank_wrong": "bank wrong",
    }
    for name, value in result.perplexity.items():
        shown = "not measured" if value is None else f"{value:.3f}"
        table.add_row(labels[name], shown, _interval(result.intervals.get(name), ".3f"))
    if result.gain_percent is not None:
        table.add_row("gain from memory", f"{result.gain_percent:.2f} %", _interval(result.gain_interval, ".2f"))
    return table


def _interval(bounds: Any, form: str) -> str:
    return "" if bounds is None else f"{bounds[0]:{form}} – {bounds[1]:{form}}"
