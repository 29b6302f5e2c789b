"""`longmem probe`, `longmem bench` and `longmem eval`."""

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
    from longmem.bench import BenchResult
    from longmem.data import TokenizedDocuments
    from longmem.evals.answers import Group
    from longmem.evals.facts import FactsResult
    from longmem.evals.ordinary import OrdinaryResult
    from longmem.evals.perplexity import PerplexityResult
    from longmem.evals.recall import RecallResult
    from longmem.model import LongMem

Filler = Annotated[
    list[Path] | None,
    typer.Option(
        "--filler",
        help="Documents that the bank is filled with; several times for more. Python's documentation by default.",
        show_default=False,
    ),
]
Figures = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file; - is standard output.")]

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
    _check_plot(plot)
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


# As above, for `BenchConfig`.
def bench(
    context: typer.Context,
    model: common.Model = common.DEFAULT_MODEL,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            help="Tokens in the bank; several times for several sizes. 0, 4096, 65536 and 262144 by default.",
            show_default=False,
        ),
    ] = None,
    store: common.MaybeStore = None,
    bank: Annotated[
        str | None, typer.Option(help="Measure with this bank, too, as --search says.", show_default=False)
    ] = None,
    search: common.Search = "exact",
    write: Annotated[int, typer.Option(help="Tokens written.")] = 2304,
    prompt: Annotated[int, typer.Option(help="Tokens in the local window before any is generated.")] = 256,
    tokens: Annotated[int, typer.Option(help="Most tokens generated with a bank.")] = 24,
    seconds: Annotated[float, typer.Option(help="Go on to the next bank after so many (and five tokens).")] = 8.0,
    seed: Annotated[int, typer.Option(help="Of random tokens, keys and values.")] = 0,
    compile: common.Compile = False,
    as_json: Figures = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cost against the size of the bank into this image.", dir_okay=False)
    ] = None,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
    keys: common.Keys = None,
) -> None:
    """Measure what memory costs on this machine: writing, and generating with larger and larger banks."""
    common.check_bank(store, bank, search)
    _check_file(as_json)
    _check_plot(plot)
    from longmem.bench import BenchConfig, steps
    from longmem.bench import bench as run

    names = {field.name for field in dataclasses.fields(BenchConfig)} & set(context.params) - {"sizes"}
    settings: dict[str, Any] = {name: context.params[name] for name in names}
    if sizes:
        settings["sizes"] = tuple(sizes)
    config = BenchConfig(**settings)
    with common.open_bank(store, bank, device, search, keys=keys) as remembered:
        loaded = common.load_model(model, device, dtype, compile=compile)
        banks = [] if remembered is None else [(f"{bank}, {search}", remembered)]
        with common.counting("measuring", steps(config, banks), "steps") as advance:
            result = run(loaded, config, banks=banks, on_step=advance)
    if plot is not None:
        result.plot(plot)
    if _is_told(result, as_json):
        return
    common.out.print(bench_table(result))
    machine = "; ".join(f"{name} {value}" for name, value in result.machine.items())
    common.out.print(f"{result.model} on {machine}", markup=False, highlight=False)
    ratio = result.write_tokens_per_second / result.prefill_tokens_per_second
    common.out.print(
        f"Writing: {result.write_tokens_per_second:,.0f} tokens/s, {ratio:.2f} times as fast as the backbone reads "
        f"({result.prefill_tokens_per_second:,.0f}).",
        markup=False,
        highlight=False,
    )


def bench_table(result: BenchResult) -> Table:
    """Each bank, and what a token costs with it."""
    table = Table(
        "bank", "tokens", "tokens/s", "ms a token", "p95", "of it, search", "p95", box=None, header_style="dim"
    )
    for cost in result.costs:
        times = (cost.ms_p50, cost.ms_p95, cost.search_ms_p50, cost.search_ms_p95)
        size = "" if cost.size is None else f"{cost.size:,}"
        table.add_row(cost.bank, size, f"{cost.tokens_per_second:.1f}", *(f"{ms:.1f}" for ms in times))
    return table


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
            help="Of backbone_local, backbone_window, bank_off, bank_on, bank_wrong, sidenet_window, bank_crowded,"
            " bank_focused; with commas. By default all but the last three: no bank but the whole window, a document's"
            " memory among that of all --rows, and what is read of these where a part is chosen."
        ),
    ] = None,
    focus: common.Focus = 65536,
    rows: Annotated[int, typer.Option(help="Documents side by side; 0 chooses.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the intervals' bootstrap.")] = 0,
    as_json: Figures = None,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Perplexity of documents with the bank on, empty, and filled with another document."""
    from longmem.evals.perplexity import USUAL_CONDITIONS, PerplexityConfig
    from longmem.evals.perplexity import perplexity as run

    names = {field.name for field in dataclasses.fields(PerplexityConfig)} & set(context.params)
    settings: dict[str, Any] = {name: context.params[name] for name in names}
    settings["context"] = context_tokens
    conditions = USUAL_CONDITIONS if only is None else tuple(filter(None, (name.strip() for name in only.split(","))))
    config = PerplexityConfig(**settings, conditions=conditions)
    _check_file(as_json)
    loaded = common.load_model(model, device, dtype)
    read = common.load_documents(documents, loaded.backbone)
    usable = common.check_long_enough(read, config)
    with common.counting("scoring", usable * config.needed, "tokens") as advance:
        result = run(loaded, read, config, on_tokens=advance)
    if _is_told(result, as_json):
        return
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
        "sidenet_window": "bank empty, whole window",
        "bank_crowded": "bank among others",
        "bank_focused": "bank among others, a part read",
    }
    for name, value in result.perplexity.items():
        shown = "not measured" if value is None else f"{value:.3f}"
        table.add_row(labels[name], shown, _interval(result.intervals.get(name), ".3f"))
    if result.gain_percent is not None:
        table.add_row("gain from memory", f"{result.gain_percent:.2f} %", _interval(result.gain_interval, ".2f"))
    if result.recovered is not None:
        table.add_row("of what the whole window gains", f"{100 * result.recovered:.0f} %")
    return table


# As above, for `RecallConfig`.
@evaluations.command()
def recall(
    context: typer.Context,
    model: common.Model = common.DEFAULT_MODEL,
    remembered: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of the bank; several times for several sizes. 65536 by default.", show_default=False),
    ] = None,
    filler: Filler = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="passkey or pairs; both by default.", show_default=False)
    ] = None,
    cases: Annotated[int, typer.Option(help="Questions a task and size.")] = 100,
    pairs: Annotated[int, typer.Option(help="Keys with values side by side, one of which is asked for.")] = 4,
    pool: Annotated[
        int,
        typer.Option(help="Tokens of filler, of which every case remembers a stretch; at least the largest bank's."),
    ] = 0,
    passage: Annotated[int, typer.Option(help="Tokens of a piece of filler, each a source of its own.")] = 512,
    context_tokens: Annotated[
        int, typer.Option("--context", help="Tokens of other text that stand before the question in the window.")
    ] = 0,
    focus: common.Focus = 65536,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    as_json: Figures = None,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Recall of pass keys and of values hidden in remembered text."""
    from longmem.evals import recall as evaluation

    names = {field.name for field in dataclasses.fields(evaluation.RecallConfig)} & set(context.params)
    settings: dict[str, Any] = {name: context.params[name] for name in names} | {"context": context_tokens}
    for name in ("remembered", "tasks"):
        given = settings.pop(name)
        if given:
            settings[name] = tuple(given)
    config = evaluation.RecallConfig(**settings)
    _check_file(as_json)
    loaded = common.load_model(model, device, dtype)
    read = _filler(filler, loaded)
    with common.counting("asking", evaluation.steps(config), "passages and cases") as advance:
        result = evaluation.recall(loaded, read, config, on_case=advance)
    _say_repeats(result.filler_repeats)
    if _is_told(result, as_json):
        return
    for task, sizes in result.groups.items():
        for size, group in sizes.items():
            common.out.print(answers_table(f"{task}, {size:,} remembered", group, evaluation.LABELS))


# As above, for `FactsConfig`.
@evaluations.command()
def facts(
    context: typer.Context,
    model: common.Model = common.DEFAULT_MODEL,
    cases: Annotated[int, typer.Option(help="Conversations; a third each told once, corrected, never told.")] = 500,
    wording: Annotated[
        Literal["seen", "unseen"], typer.Option(help="unseen is kept from training; seen is what it may draw on.")
    ] = "unseen",
    remembered: Annotated[int, typer.Option(help="Tokens of other text in the bank.")] = 16384,
    filler: Filler = None,
    passage: Annotated[int, typer.Option(help="Tokens of a piece of other text, each a source of its own.")] = 512,
    sessions: Annotated[int, typer.Option(help="Sessions before the one that asks.")] = 4,
    facts: Annotated[int, typer.Option(help="Facts told besides the one that is asked for.")] = 4,
    small_talk: Annotated[int, typer.Option(help="Exchanges of each session that tell nothing.")] = 3,
    focus: common.Focus = 65536,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Measure nothing; write conversations in the seen wording to this JSONL file.", dir_okay=False
        ),
    ] = None,
    as_json: Figures = None,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Facts told in earlier conversations, some corrected later, asked in a new one."""
    from longmem.evals import facts as evaluation

    names = {field.name for field in dataclasses.fields(evaluation.FactsConfig)} & set(context.params)
    config = evaluation.FactsConfig(**{name: context.params[name] for name in names})
    if write is not None:
        from longmem.evals.chats import generate_chats

        write.parent.mkdir(parents=True, exist_ok=True)
        with write.open("w", encoding="utf-8") as file:
            for chat in generate_chats(cases, "seen", config.chats):
                file.write(json.dumps(chat.to_dict(), ensure_ascii=False) + "\n")
        typer.echo(f"{cases:,} conversations in the seen wording are in {write}.")
        return
    _check_file(as_json)
    loaded = common.load_model(model, device, dtype)
    read = _filler(filler, loaded) if remembered else None
    with common.counting("asking", evaluation.steps(config), "passages and cases") as advance:
        result = evaluation.facts(loaded, read, config, on_case=advance)
    _say_repeats(result.filler_repeats)
    if _is_told(result, as_json):
        return
    titles = {"once": "told once", "corrected": "corrected later", "silent": "never told"}
    for kind, group in result.groups.items():
        common.out.print(answers_table(titles[kind], group, evaluation.LABELS))


@evaluations.command()
def ordinary(
    context: typer.Context,
    model: common.Model = common.DEFAULT_MODEL,
    prompts: Annotated[int, typer.Option(help="Ordinary prompts, as many of them as there are.")] = 32,
    tokens: Annotated[int, typer.Option(help="Of each reply that are compared with the backbone's own.")] = 8,
    chats: Annotated[int, typer.Option(help="Users whose conversations are remembered.")] = 1,
    remembered: Annotated[int, typer.Option(help="Tokens of other text in the bank.")] = 16384,
    filler: Filler = None,
    passage: Annotated[int, typer.Option(help="Tokens of a piece of other text, each a source of its own.")] = 512,
    focus: common.Focus = 65536,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    as_json: Figures = None,
    device: common.Device = "auto",
    dtype: common.Precision = "auto",
) -> None:
    """Prompts that ask for nothing remembered: is the reply still the backbone's own?"""
    from longmem.evals import ordinary as evaluation

    names = {field.name for field in dataclasses.fields(evaluation.OrdinaryConfig)}
    config = evaluation.OrdinaryConfig(**{name: context.params[name] for name in names})
    _check_file(as_json)
    loaded = common.load_model(model, device, dtype)
    read = _filler(filler, loaded) if remembered else None
    with common.counting("asking", evaluation.steps(config), "passages and prompts") as advance:
        result = evaluation.ordinary(loaded, read, config, on_case=advance)
    if _is_told(result, as_json):
        return
    title = f"the backbone's own, of {prompts}"
    columns = (f"first {tokens} tokens", "95 % interval", "first token", "tokens")
    table = Table(title, *columns, box=None, header_style="dim")
    for name, same in result.agreement.items():
        low, high = same.whole_interval
        table.add_row(
            {"bank_on": "bank on", "bank_off": "bank empty"}[name],
            f"{100 * same.whole:.1f} %",
            f"{100 * low:.1f} – {100 * high:.1f}",
            f"{100 * same.first:.1f} %",
            f"{same.tokens:.1f}",
        )
    common.out.print(table)


def answers_table(title: str, group: Group, labels: tuple[str, ...]) -> Table:
    """Rates of each answer under each condition, and 95 % intervals of the right one."""
    conditions = {
        "bank_on": "bank on",
        "bank_off": "bank empty",
        "bank_wrong": "bank wrong",
        "window": "in the window",
        "backbone_window": "in the backbone's window",
    }
    table = Table(title, *labels, "95 % interval", "log-probability", box=None, header_style="dim")
    for name, score in group.scores.items():
        rates = [f"{100 * score.rates[label]:.1f} %" for label in labels]
        low, high = score.intervals["answer"]
        table.add_row(conditions[name], *rates, f"{100 * low:.1f} – {100 * high:.1f}", f"{score.log_probability:.2f}")
    if group.relative is not None:
        blank = [""] * (len(labels) - 1)
        table.add_row("on / in the window", f"{group.relative:.2f}", *blank, _interval(group.relative_interval, ".2f"))
    return table


def _check_file(as_json: Path | None) -> None:
    if as_json is not None and as_json.is_dir():
        raise typer.BadParameter(f"{as_json} is a folder, expected a file.", param_hint="--json")


def _check_plot(plot: Path | None) -> None:
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--plot needs matplotlib, which is not installed. Run: pip install 'longmem[plot]'.")


def _is_told(
    result: PerplexityResult | RecallResult | FactsResult | OrdinaryResult | BenchResult, as_json: Path | None
) -> bool:
    """Write figures to where --json says; True if that was standard output, which takes nothing else."""
    if as_json is None:
        return False
    if str(as_json) == "-":
        common.print_json(result.to_dict())
        return True
    result.save(as_json)
    return False


def _filler(paths: list[Path] | None, model: LongMem) -> TokenizedDocuments:
    if paths:
        return common.load_documents(paths, model.backbone)
    from longmem.probe import default_documents

    return default_documents(model.tokenizer)


def _say_repeats(repeats: float) -> None:
    if repeats > 1:
        message = f"the filler is too short: each of its passages stands in the bank {repeats:.1f} times on average."
        typer.echo(f"warning: {message} Give more with --filler.", err=True)


def _interval(bounds: Any, form: str) -> str:
    return "" if bounds is None else f"{bounds[0]:{form}} – {bounds[1]:{form}}"
