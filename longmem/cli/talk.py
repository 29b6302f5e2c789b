"""`longmem generate` and `longmem chat`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from longmem.cli import common

if TYPE_CHECKING:
    from longmem.attribution import Attribution
    from longmem.chat import ChatSession
    from longmem.generation import Piece
    from longmem.group import Readable

# Spans of one source that are at most so many characters apart are one place.
_NEAR = 40
_MOST_FOOTNOTES = 10
_RECALLED = 4
_CUT_SOON = 2_000_000  # tokens whose passages are found in a few seconds
_HELP = """\
/sources  what the last reply drew on, and what was recalled for it
/quit     leave (or Ctrl-D)
Ctrl-C    stop a reply"""

MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token; higher values sample.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens with this share of the probability.")]
TopK = Annotated[int, typer.Option(help="Sample from so many of the most likely tokens; 0 is all.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling.")]
Window = Annotated[
    int | None, typer.Option(help="Tokens of the local window; 1536, or the backbone's if smaller, by default.")
]
Recall = Annotated[
    int, typer.Option(help="Passages of the bank that are put into the window: what is remembered about the text.")
]
Focus = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a bank that are read at most: of a larger one what has to do with the text; 0 reads all. "
        "65,536 by default, and 0 with --search index.",
        show_default=False,
    ),
]
Memory = Annotated[float, typer.Option(help="A dial: 0 is the backbone alone, 1 the trained strength.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - is standard input.", show_default=False)],
    store: common.MaybeStore = None,
    bank: common.MaybeBanks = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    window: Window = None,
    memory: Memory = 1.0,
    recall: Recall = 0,
    focus: Focus = None,
    remember: Annotated[bool, typer.Option(help="Write what leaves the local window to the bank.")] = True,
    attribute: Annotated[bool, typer.Option("--attribute", help="Say which remembered text it drew on.")] = False,
    search: common.Search = "exact",
    version: common.Version = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    compile: common.Compile = False,
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Continue a text, with what a bank remembers."""
    common.check_bank(store, bank, search)
    if attribute and not bank:
        raise typer.BadParameter("without --bank there is nothing to draw on.", param_hint="--attribute")
    _check_recall(recall, bank)
    from longmem import generation

    config = generation.GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        window=window,
        memory=memory,
        recall=recall,
        focus=_focus(focus, search),
        attribute=attribute,
        remember=remember and version is None,  # what is past cannot be written to
    )
    if prompt == "-":
        prompt = sys.stdin.read()
    with common.open_banks(store, bank, device, search, common.version_of(version), keys=keys) as remembered:
        loaded = common.load_model(model, device, compile=compile)
        pieces: list[Piece] = []
        for piece in generation.generate(loaded, prompt, bank=remembered, config=config):
            pieces.append(piece)
            if not as_json:
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
        if as_json:
            common.print_json(
                {
                    "prompt": prompt,
                    "text": "".join(piece.text for piece in pieces),
                    "tokens": len(pieces),
                    "pieces": [dataclasses.asdict(piece) for piece in pieces],
                }
            )
            return
        typer.echo()
        if attribute and remembered is not None:
            _print_footnotes(pieces, remembered)


def chat(
    store: common.MaybeStore = None,
    bank: common.MaybeBanks = None,
    session: Annotated[
        str | None, typer.Option(help="Name of the conversation, to continue it; the time by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; the model's own by default.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    window: Window = None,
    memory: Memory = 1.0,
    recall: Annotated[
        int | None,
        typer.Option(
            help="Passages of the bank put into the window for each turn; 4, or 0 of millions of tokens.",
            show_default=False,
        ),
    ] = None,
    focus: Focus = None,
    search: common.Search = "exact",
    precision: common.BankPrecision = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    compile: common.Compile = False,
    keys: common.Keys = None,
) -> None:
    """Talk to a model that remembers, in this conversation and the next. Ctrl-C stops a reply, Ctrl-D leaves."""
    common.check_bank(store, bank, search)
    _check_recall(recall or 0, bank)
    from longmem.chat import ChatSession
    from longmem.generation import GenerationConfig
    from longmem.store import MemoryStore

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        window=window,
        memory=memory,
        recall=recall or 0,
        focus=_focus(focus, search),
        attribute=bool(bank),
    )
    name = datetime.now().strftime("%Y-%m-%d %H:%M:%S") if session is None else session
    loaded = common.load_model(model, device, compile=compile)
    # Tried without a bank first: settings that cannot work should not leave a new bank behind.
    ChatSession(loaded, None, name, config, system=system).close()
    if store is None or not bank:
        with ChatSession(loaded, None, name, config, system=system) as conversation:
            typer.echo("No --bank: this conversation is forgotten when it ends. /help lists commands.", err=True)
            _converse(conversation, None)
        return
    with MemoryStore.open(store, keys=keys) as opened:
        # The first is written to, and made if there is none.
        (first, _), *others = names = common.weighted(bank)
        found = [opened.bank(first, common.spec_of(loaded, precision), device=loaded.device, search=search)]
        common.check_precision(found[0], first, precision)
        found += [opened.bank(other, device=loaded.device, search=search) for other, _ in others]
        remembered = common.together(found, [weight for _, weight in names])
        soon = sum(len(one) for one in found) <= _CUT_SOON
        if recall is None and soon:
            config = dataclasses.replace(config, recall=_RECALLED)
        with ChatSession(loaded, remembered, name, config, system=system) as conversation:
            for one in found:
                typer.echo(f"Bank {one.name} remembers {common.contents(one)}.", err=True)
            if recall is None and not soon:
                typer.echo(
                    f"To cut so much into passages takes a while: they are recalled with --recall {_RECALLED}.",
                    err=True,
                )
            typer.echo(f"This is {conversation.source} of bank {first}. /help lists commands.", err=True)
            _converse(conversation, remembered)


def _focus(given: int | None, search: str) -> int:
    """Whoever asks for a bank's index wants all of the bank searched."""
    from longmem.focus import FOCUS

    return given if given is not None else 0 if search == "index" else FOCUS


def _check_recall(recall: int, bank: list[str] | None) -> None:
    if recall and not bank:
        raise typer.BadParameter("without --bank there is nothing to recall.", param_hint="--recall")


def _converse(conversation: ChatSession, bank: Readable | None) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history)
    reply: list[Piece] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n/quit or Ctrl-D leaves.", err=True)
            continue
        if line == "/quit":
            return
        if line == "/help":
            typer.echo(_HELP)
        elif line == "/sources":
            for hit in conversation.recalled:
                typer.echo(f"in the window: {hit.source}:{hit.start}–{hit.end} “{common.snippet(hit.text, 240)}”")
            if bank is None or not _print_footnotes(reply, bank):
                typer.echo("The last reply drew on nothing in particular.")
        elif line.startswith("/"):
            typer.echo(f"There is no command {line.split()[0]}. /help lists commands.", err=True)
        elif line:
            reply = _reply(conversation, line)


def _reply(conversation: ChatSession, line: str) -> list[Piece]:
    pieces = []
    stream = conversation.send(line)
    try:
        for piece in stream:
            pieces.append(piece)
            typer.echo(piece.text, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        # The turn is remembered as far as it went.
        getattr(stream, "close", lambda: None)()
    typer.echo()
    return pieces


# ---- footnotes ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Stretch:
    """Consecutive generated tokens that drew most on the same place; `source` is None if on nothing in particular."""

    text: str
    source: str | None
    start: int = 0
    end: int = 0
    bank: str | None = None
    weights: list[float] = field(default_factory=list)


def stretches(pieces: Sequence[Piece]) -> list[Stretch]:
    """Generated text cut where the place that it drew on changes.

    Of the places that a token drew on, the one counts that all tokens together drew on most: a passage that is being
    told rather than a word that happens to fit.
    """
    from longmem.attribution import NOTICED

    noticed = [[span for span in piece.sources if span.weight >= NOTICED] for piece in pieces]
    place_of, totals = _places([span for spans in noticed for span in spans])
    found: list[Stretch] = []
    last_place = None
    for piece, spans in zip(pieces, noticed, strict=True):
        place = max((place_of[span] for span in spans), key=lambda p: totals[p], default=None)
        if not found or place != last_place:
            found.append(Stretch("", None))
        stretch, last_place = found[-1], place
        stretch.text += piece.text
        mine = [span for span in spans if place_of[span] == place]
        if mine:
            known = [(stretch.start, stretch.end)] if stretch.source is not None else []
            bounds = known + [(span.start, span.end) for span in mine]
            stretch.source, stretch.bank = mine[0].source, mine[0].bank
            stretch.start, stretch.end = min(start for start, _ in bounds), max(end for _, end in bounds)
            stretch.weights.append(sum(span.weight for span in mine))
    return found


def _places(spans: Sequence[Attribution]) -> tuple[dict[Attribution, int], list[float]]:
    """Which place each span belongs to, and the weight of each place: spans of a source that are near each other."""
    place_of: dict[Attribution, int] = {}
    totals: list[float] = []
    source, end = None, 0
    for span in sorted(spans, key=lambda span: (span.bank or "", span.source, span.start)):
        if (span.bank, span.source) != source or span.start > end + _NEAR:
            totals.append(0.0)
            source, end = (span.bank, span.source), span.end
        end = max(end, span.end)
        place_of[span] = len(totals) - 1
        totals[-1] += span.weight
    return place_of, totals


def _print_footnotes(pieces: Sequence[Piece], bank: Readable) -> int:
    """Print what stretches of generated text drew on, the heaviest in the order of the text; returns how many."""
    from longmem.group import BankGroup, members

    drawn = [stretch for stretch in stretches(pieces) if stretch.source is not None]
    heaviest = sorted(drawn, key=lambda stretch: -sum(stretch.weights))[:_MOST_FOOTNOTES]
    for number, stretch in enumerate((s for s in drawn if s in heaviest), start=1):
        source = stretch.source or ""
        share = sum(stretch.weights) / len(stretch.weights)
        typer.echo(f"\n[{number}] “{common.snippet(stretch.text)}”")
        of = next(one for one, _ in members(bank) if one.name == stretch.bank)
        where = f"{of.name}, " if isinstance(bank, BankGroup) else ""
        place = f"{where}{source}:{stretch.start}–{stretch.end}"
        typer.echo(f"    {place}, {share:.0%} of the memory heads' attention")
        typer.echo(f"    “{common.snippet(of.text_of(source, stretch.start, stretch.end), 240)}”")
    if len(drawn) > len(heaviest):
        typer.echo(f"\n{len(drawn) - len(heaviest)} lighter ones are not shown.")
    return len(drawn)
