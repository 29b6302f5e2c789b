"""`longmem setup`, `tokenize`, `replies`, `histories`, `train`, `pack`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longmem.cli import common
from longmem.cli.measure import perplexity_table
from longmem.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from longmem.backbone import Backbone
    from longmem.config import MemoryHead, SideNetConfig
    from longmem.data import Document

Out = Annotated[Path, typer.Option("--out", help="Folder to write to.", show_default=False)]


def setup(
    name: Annotated[str | None, typer.Argument(help="An embedded model; none lists them.", show_default=False)] = None,
    as_json: common.Json = False,
) -> None:
    """Fetch and convert an embedded backbone, once."""
    from longmem import pretrained

    if name is not None:
        folder = pretrained.setup(name, progress=lambda line: typer.echo(line, err=True))
        if as_json:
            common.print_json({"name": name, "folder": str(folder)})
        else:
            typer.echo(folder)
        return
    rows = []
    for model in pretrained.EMBEDDED.values():
        folder = pretrained.folder_of(model)
        ready = pretrained.is_complete(folder)
        rows.append({"name": model.name, "ready": ready, "folder": str(folder), "licence": model.licence})
    if as_json:
        common.print_json(rows)
        return
    table = Table("name", "set up", "licence", box=None, header_style="dim")
    for row in rows:
        table.add_row(row["name"], "yes" if row["ready"] else f"no: longmem setup {row['name']}", row["licence"])
    common.out.print(table)


def tokenize(
    documents: common.Documents,
    out: Out,
    backbone: common.BackboneName = common.DEFAULT_MODEL,
) -> None:
    """Tokenise documents once, for many trainings and evaluations."""
    loaded = common.load_backbone(backbone, "cpu", "bfloat16")
    tokenized = common.load_documents(documents, loaded)
    tokenized.save(out)
    typer.echo(f"{out}: {tokenized.num_tokens:,} tokens of {len(tokenized):,} documents")


def replies(
    out: Annotated[Path, typer.Option("--out", help="The .jsonl file to write.", show_default=False)],
    backbone: common.BackboneName = common.DEFAULT_MODEL,
    count: Annotated[int, typer.Option(help="Prompts, all of them different.")] = 1600,
    longest: Annotated[int, typer.Option(help="Most tokens of a reply; it ends with a sentence.")] = 80,
    rows: Annotated[int, typer.Option(help="Prompts side by side.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts drawn.")] = 0,
    device: common.Device = "auto",
) -> None:
    """Write what the backbone alone replies to ordinary prompts, for `longmem histories --replies`."""
    from longmem.histories import PROMPTS, generate_replies
    from longmem.model import LongMem

    prompts = list(PROMPTS.draw(count, seed))
    loaded = common.load_backbone(backbone, device, "float32")
    # The backbone alone speaks, so any SideNet does.
    model = LongMem(loaded, paper_recipe(loaded))
    out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with out.open("w", encoding="utf-8") as file, common.counting("replying", count, "prompts") as advance:
        for _, reply in generate_replies(model, prompts, longest=longest, rows=rows):
            if reply is not None:
                # Line by line, so that what is there can be used if this is stopped.
                file.write(json.dumps(dataclasses.asdict(reply), ensure_ascii=False) + "\n")
                file.flush()
                written += 1
            advance(1)
    typer.echo(f"{out}: {written:,} replies to {count:,} prompts")


# Options named like a field of `HistoryConfig` have its default, as below.
def histories(
    context: typer.Context,
    documents: common.Documents,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write tokens to, or a .jsonl file for texts.", show_default=False)
    ],
    backbone: common.BackboneName = common.DEFAULT_MODEL,
    tokens: Annotated[int, typer.Option(help="Of all histories together.")] = 20_000_000,
    shortest: Annotated[int, typer.Option(help="Least tokens of a history.")] = 16384,
    longest: Annotated[int, typer.Option(help="Most tokens of a history.")] = 32768,
    distance: Annotated[
        int, typer.Option(help="Least tokens between a thing and a question for it; at least a training --segment.")
    ] = 2048,
    near: Annotated[
        float, typer.Option(help="Share of questions for what was said just before, so that the window stays trusted.")
    ] = 0.15,
    replies: Annotated[
        Path | None, typer.Option(help="File of `longmem replies`: ordinary talk among what is told and asked.")
    ] = None,
    reply_share: Annotated[float, typer.Option(help="How often such talk stands where questions would.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Write training text in which things are told and asked for much later, between passages of DOCUMENTS."""
    from longmem.data import TokenizedDocuments
    from longmem.histories import HistoryConfig, generate_histories, read_replies

    config = HistoryConfig(**{field.name: context.params[field.name] for field in dataclasses.fields(HistoryConfig)})
    if out.suffix != ".jsonl" and out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, expected a folder or a .jsonl file to write to. Give another --out.")
    talk = read_replies(replies) if replies is not None else ()
    loaded = common.load_backbone(backbone, "cpu", "bfloat16")
    filler = common.load_documents(documents, loaded)

    def written() -> Iterator[Document]:
        with common.counting("writing", None, "histories") as advance:
            for history in generate_histories(filler, loaded.tokenizer, config, talk):
                yield history.document
                advance(1)

    if out.suffix == ".jsonl":
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8") as file:
            for document in written():
                file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")
        typer.echo(f"{out}: histories of {config.tokens:,} tokens or more")
        return
    tokenized = TokenizedDocuments.from_documents(written(), loaded.tokenizer)
    tokenized.save(out)
    share = 0.0 if tokenized.answers is None else float(tokenized.answers.mean())
    typer.echo(f"{out}: {tokenized.num_tokens:,} tokens of {len(tokenized):,} histories, {share:.1%} of them answers")


_LEARN, _SHAPE, _RUN = "Training", "Shape of the SideNet", "Run"


def _setting(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_LEARN, **more)


def _shape(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=_SHAPE)


# Options named like a field of `TrainConfig` have its default; a test compares them (importing it here imports torch).
def train(
    context: typer.Context,
    documents: common.Documents,
    out: Out,
    backbone: common.BackboneName = common.DEFAULT_MODEL,
    mix: Annotated[
        str | None, typer.Option(help="Share of the training text of each of DOCUMENTS, in order: '0.8 0.2'.")
    ] = None,
    heldout: Annotated[list[Path] | None, typer.Option(help="Documents to evaluate on; may be repeated.")] = None,
    recipe: Annotated[
        Literal["default", "paper"], _shape("paper: one layer, all its heads, mean keys of 4 tokens, a static gate.")
    ] = "default",
    heads: Annotated[str | None, _shape("Memory heads as layer.head: '17.1 18.2'.")] = None,
    probe: Annotated[Path | None, _shape("Memory heads from a file of `longmem probe`.")] = None,
    below: Annotated[int, _shape("SideNet layers under the first memory layer.")] = 0,
    above: Annotated[int, _shape("SideNet layers from the last memory layer up.")] = 2,
    update: Annotated[Literal["alpha", "difference"], _shape("How a layer changes the difference.")] = "alpha",
    top_k: Annotated[int, _shape("Remembered tokens that each query head retrieves.")] = 64,
    newest_wins: Annotated[bool, _shape("Heads may learn to prefer what was remembered later.")] = False,
    passage_evidence: Annotated[bool, _shape("… and what lies in passages that other queries found.")] = False,
    windows: Annotated[str | None, _shape("How texts of its banks are cut: new tokens + context (960+63).")] = None,
    steps: Annotated[int, _setting("Optimiser steps.")] = 2000,
    rows: Annotated[int, _setting("Streams side by side.")] = 16,
    segment: Annotated[int, _setting("Tokens of a segment.")] = 1024,
    bank_tokens: Annotated[int, _setting("Tokens that each stream's bank keeps.")] = 16384,
    learning_rate: Annotated[float, _setting("Peak.")] = 2e-3,
    gate_rate: Annotated[float, _setting("Factor on the learning rate of α, scales, biases and gates.")] = 10.0,
    final_rate: Annotated[float, _setting("Share of the peak at the end.")] = 0.05,
    warmup: Annotated[int, _setting("Steps up to the peak.")] = 100,
    weight_decay: Annotated[float, _setting("Of matrices.")] = 0.01,
    beta1: Annotated[float, _setting("Of AdamW.")] = 0.9,
    beta2: Annotated[float, _setting("Of AdamW.")] = 0.98,
    clip: Annotated[float, _setting("Largest norm of the gradient.")] = 1.0,
    seed: Annotated[int, _setting("Of everything drawn.")] = 0,
    empty_weight: Annotated[float, _setting("Of the loss of the same text with an empty bank.")] = 0.5,
    wrong_fraction: Annotated[float, _setting("Share of streams that read another's bank in a step.")] = 0.1,
    crowded_fraction: Annotated[float, _setting("Share of streams that read their bank among others'.")] = 0.0,
    crowd: Annotated[int, _setting("Streams whose banks are one to those that are crowded.")] = 4,
    starved_fraction: Annotated[float, _setting("Share of steps that read segments in short windows.")] = 0.0,
    starved: Annotated[int, _setting("Tokens of the shortest of them; or two or four times as many.")] = 64,
    starved_crowd: Annotated[int, _setting("Streams of a crowd in those steps; 1 crowds nobody then.")] = 1,
    harmless_weight: Annotated[float, _setting("Of what a wrong bank changes.")] = 0.0,
    lookup_weight: Annotated[float, _setting("Of the memory regulariser.")] = 0.0,
    answer_weight: Annotated[float, _setting("Of tokens that documents mark as answers; of all others 1.")] = 1.0,
    memory: Annotated[bool, _setting("--no-memory trains the memory-free twin.")] = True,
    max_segments: Annotated[int, _setting("Segments read of one document.")] = 64,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], _setting("auto is bfloat16 on a GPU, float32 elsewhere.")
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile layers: faster on a GPU after a minute.", rich_help_panel=_RUN)
    ] = False,
    log_every: Annotated[int, typer.Option(help="Steps between lines of log.jsonl.", rich_help_panel=_RUN)] = 10,
    eval_every: Annotated[
        int, typer.Option(help="Steps between held-out evaluations; 0 is only at the end.", rich_help_panel=_RUN)
    ] = 0,
    save_every: Annotated[
        int, typer.Option(help="Steps between states to --resume from; 0 is none.", rich_help_panel=_RUN)
    ] = 0,
    eval_prefill: Annotated[
        int, typer.Option(help="Tokens remembered before held-out scoring starts.", rich_help_panel=_RUN)
    ] = 8192,
    eval_segments: Annotated[
        int, typer.Option(help="Segments scored of each held-out document.", rich_help_panel=_RUN)
    ] = 4,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved state in --out.", rich_help_panel=_RUN)
    ] = False,
    warm_from: Annotated[
        Path | None, typer.Option(help="Begin with the weights and shape of a checkpoint.", rich_help_panel=_RUN)
    ] = None,
    device: common.Device = "auto",
) -> None:
    """Train a SideNet. The backbone is not changed."""
    given = [name for name, value in (("--heads", heads), ("--probe", probe), ("--warm-from", warm_from)) if value]
    if recipe == "paper":
        given.append("--recipe paper")
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} each decide the memory heads: give one of them.")
    shares = None if mix is None else parse_shares(mix, len(documents))
    from longmem.config import EncodeConfig
    from longmem.data import Mixture, Streams
    from longmem.evals.perplexity import PerplexityConfig
    from longmem.model import LongMem
    from longmem.train import TrainConfig, train

    where = common.device_of(device)
    chosen = "bfloat16" if where.type == "cuda" else "float32"
    precision = chosen if dtype == "auto" else dtype
    fields: dict[str, Any] = {field.name: context.params[field.name] for field in dataclasses.fields(TrainConfig)}
    fields["dtype"] = precision
    config = TrainConfig(**fields)
    evaluation = PerplexityConfig("blocks", segment=segment, prefill=eval_prefill, segments=eval_segments)
    _check_out(out, resume=resume)

    encode = None if windows is None else EncodeConfig.from_text(windows)
    frozen = common.load_backbone(backbone, device, precision)
    if warm_from is not None:
        model = LongMem.from_pretrained(warm_from, backbone=frozen)
        learns = dataclasses.replace(
            model.config,
            newest_wins=newest_wins or model.config.newest_wins,
            passage_evidence=passage_evidence or model.config.passage_evidence,
            encode=encode or model.config.encode,
        )
        if learns != model.config:
            # What is new is zero at the start, so this is the same network.
            weights = model.sidenet.state_dict()
            model = LongMem(frozen, learns)
            model.sidenet.load_state_dict(weights, strict=False)
    else:
        if recipe == "paper":
            layout = paper_recipe(frozen, below=below, above=above, update=update, top_k=top_k)
        else:
            layout = _default_recipe(
                frozen,
                _memory_heads(heads, probe, backbone),
                below=below,
                above=above,
                update=update,
                top_k=top_k,
                newest_wins=newest_wins,
                passage_evidence=passage_evidence,
            )
        model = LongMem(frozen, layout if encode is None else dataclasses.replace(layout, encode=encode))
    if shares is None:
        texts = common.load_documents(documents, frozen)
    else:
        texts = Mixture(tuple(common.load_documents([path], frozen) for path in documents), shares)
    scored = common.load_documents(heldout, frozen) if heldout else None
    # Before anything is written, and before hours have passed:
    Streams(texts, config.rows, config.segment)
    if scored is not None:
        common.check_long_enough(scored, evaluation)

    with _Live(config.steps) as live:
        result = train(
            model,
            texts,
            config,
            out,
            heldout=scored,
            evaluation=evaluation,
            resume=resume,
            on_figures=live.show,
        )
    if result is not None:
        common.out.print(perplexity_table(result))
    typer.echo(f"{out}: a SideNet for {frozen.name}. Use it with --model {out}")


def pack(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a trained SideNet.", show_default=False)],
    out: Out,
    precision: Annotated[
        Literal["float32", "bfloat16", "int8", "int4"],
        typer.Option(help="int8 and int4 store the difference to the backbone's own layers."),
    ] = "int4",
) -> None:
    """Store a trained SideNet in a smaller file."""
    from longmem.checkpoint import read_config
    from longmem.model import LongMem

    training = read_config(checkpoint).get("training")
    model = LongMem.from_pretrained(checkpoint, device="cpu", dtype="float32")
    model.save(out, precision=precision, training=training)
    size = (out / "sidenet.safetensors").stat().st_size
    typer.echo(f"{out}: {precision}, {size / 1e6:.1f} MB")


def paper_recipe(backbone: Backbone, **settings: Any) -> SideNetConfig:
    """The configuration of the paper (sections 2.2 and 2.3): one memory layer past the middle, with all its heads."""
    from longmem.config import SideNetConfig

    layer = round(0.63 * backbone.num_layers)
    heads = [(layer, head) for head in range(backbone.num_key_value_heads)]
    return SideNetConfig.around(heads, backbone.num_layers, chunk_size=4, fusion="gate", **settings)


def _default_recipe(backbone: Backbone, heads: tuple[MemoryHead, ...], **settings: Any) -> SideNetConfig:
    from longmem.config import SideNetConfig

    stray = [tuple(h) for h in heads if h.layer >= backbone.num_layers or h.kv_head >= backbone.num_key_value_heads]
    if stray:
        raise ConfigError(
            f"Memory heads {stray} do not exist: backbone {backbone.name!r} has layers 0 to {backbone.num_layers - 1} "
            f"with key-value heads 0 to {backbone.num_key_value_heads - 1}. `longmem probe` finds good ones."
        )
    return SideNetConfig.around(heads, backbone.num_layers, **settings)


def _memory_heads(heads: str | None, probe: Path | None, backbone: str) -> tuple[MemoryHead, ...]:
    """The memory heads that the options name, or those of the SideNet that ships for the backbone."""
    from longmem.checkpoint import read_config
    from longmem.config import SideNetConfig
    from longmem.model import SHIPPED

    if heads is not None:
        return parse_heads(heads)
    if probe is not None:
        from longmem.probe import ProbeResult

        found = ProbeResult.load(probe).memory_heads
        if not found:
            raise ConfigError(f"The probe in {probe} found no memory heads. Name some with --heads '17.1 18.2'.")
        return found
    folder = SHIPPED / backbone
    # A backbone that is a folder would leave the package.
    if folder.parent != SHIPPED or not (folder / "config.json").is_file():
        raise ConfigError(
            f"No SideNet ships for backbone {backbone!r}, so its memory heads are not known. Find them with "
            f"`longmem probe --backbone {backbone} --out heads.json`, then add --probe heads.json; or name them with "
            "--heads '17.1 18.2'."
        )
    return SideNetConfig.from_dict(read_config(folder)["sidenet"]).memory_heads


def parse_heads(text: str) -> tuple[MemoryHead, ...]:
    """Memory heads written as layer.head: "17.1 18.2"."""
    from longmem.config import MemoryHead

    words = text.replace(",", " ").split()
    if not words or not all(re.fullmatch(r"\d+\.\d+", word) for word in words):
        raise typer.BadParameter(f"expected layer.head pairs such as '17.1 18.2', got {text!r}.", param_hint="--heads")
    pairs = (word.split(".") for word in words)
    return tuple(sorted({MemoryHead(int(layer), int(head)) for layer, head in pairs}))


def parse_shares(text: str, count: int) -> tuple[float, ...]:
    """Shares of a mixture of `count` kinds of documents: "0.8 0.2"."""
    words = text.replace(",", " ").split()
    if len(words) != count or not all(re.fullmatch(r"\d*\.?\d+", word) for word in words):
        raise typer.BadParameter(
            f"expected {count} shares such as '0.8 0.2', one for each of the documents given; got {text!r}.",
            param_hint="--mix",
        )
    return tuple(float(word) for word in words)


def _check_out(out: Path, *, resume: bool) -> None:
    if resume:
        if not (out / "state" / "state.json").is_file():
            raise CheckpointError(
                f"{out} holds no state to resume from. Expected {out / 'state'}, which --save-every writes; without "
                "it, begin again, or from the weights of a finished run with --warm-from."
            )
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, expected a folder to write to. Give another --out.")
    finished = [name for name in ("sidenet.safetensors", "log.jsonl", "state") if (out / name).exists()]
    if finished:
        raise ConfigError(
            f"{out} holds a run already ({', '.join(finished)}). Go on with it (--resume), give another --out, or "
            "delete it."
        )


class _Live:
    """Figures of a training as they come: a bar on a terminal, lines elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=common.err, disable=not common.err.is_terminal)
        self._task = self._progress.add_task("", total=steps)
        self._evaluation = ""

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, figures: dict[str, Any]) -> None:
        if "loss" in figures:
            line = f"loss {figures['loss']:.4f}, {figures['tokens_per_second']:,.0f} tokens/s"
        else:
            names = (("bank_on", "on"), ("bank_off", "empty"), ("bank_wrong", "wrong"))
            parts = (f"{label} {figures[name]:.3f}" for name, label in names if figures.get(name))
            line = self._evaluation = f"held-out {', '.join(parts)}"
        if self._progress.disable:
            typer.echo(f"step {figures['step']} of {self._steps}: {line}", err=True)
        else:
            shown = f"{line}; {self._evaluation}" if "loss" in figures and self._evaluation else line
            self._progress.update(self._task, completed=figures["step"], description=shown)
