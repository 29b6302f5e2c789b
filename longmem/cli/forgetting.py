"""`longmem forget`, `receipts`."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from longmem.cli import common

if TYPE_CHECKING:
    from longmem.model import LongMem
    from longmem.store import MemoryStore, Preview, Receipt, Stretch

_MOST_SHOWN = 20


def forget(
    store: common.Store,
    bank: common.Bank,
    source: Annotated[
        str | None, typer.Argument(help="Name of the source, as `longmem sources` lists it.", show_default=False)
    ] = None,
    span: Annotated[
        list[str] | None,
        typer.Option(help="Characters of the source, first:end; several times for several.", show_default=False),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(help="What was written then or later: 2026-01-31, 2026-01-31T12:00.", show_default=False),
    ] = None,
    before: Annotated[str | None, typer.Option(help="What was written before then.", show_default=False)] = None,
    match: Annotated[
        str | None, typer.Option(help="Passages that a query finds, as `longmem recall` does.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many passages, with --match.")] = 8,
    generated: Annotated[
        bool, typer.Option("--generated", help="Also what the model has said that drew on it, turn by turn.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Show what would be forgotten, and leave.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Forget a source, parts of it, what was written in a time, or what a query finds, for good.

    It goes from the disk, and from every version, tag and fork of the bank's namespace. What is left of a source is
    encoded again. First it is shown, and asked for.
    """
    ways = [source is not None or span is not None, after is not None or before is not None, match is not None]
    if sum(ways) != 1 or (span is not None and source is None):
        raise typer.BadParameter(
            "say what to forget in one way: a source (with --span, parts of it), --after and --before, or --match.",
            param_hint="forget",
        )
    from longmem.store import MemoryStore, Stretch

    spans = [_span(text) for text in span or []]
    times = {name: _time(text, name) for name, text in (("after", after), ("before", before)) if text is not None}
    with MemoryStore.open(store, create=False, keys=keys) as opened:
        if not preview:
            opened.manifest.require_writable()
        loaded: LongMem | None = None
        if match is not None:
            loaded = common.load_model(model, device)
            stretches = _matching(opened, bank, loaded, match, top_k)
        elif times:
            stretches = opened.written(bank, **times)
        else:
            assert source is not None
            stretches = [Stretch(source, *limits) for limits in spans] or [Stretch(source)]
        found = opened.preview_forget(bank, stretches)
        if not as_json or not yes:
            _show(found)
        if preview or not stretches:
            if as_json:
                common.print_json(_told(found, []))
            return
        if not yes:
            typer.confirm(f"Forget {_amount(found)} for good?", abort=True, err=True)
            if found.generated and not generated:
                generated = typer.confirm("Forget what was generated from it as well?", default=False, err=True)
        asked: defaultdict[str, list[Stretch]] = defaultdict(list)
        for one in found.generated if generated else ():
            asked[one.bank].append(one.stretch)
        # The bank itself comes last: places in it do not move before.
        asked[bank] = [*asked.pop(bank, []), *stretches]
        encode = found.encode > 0 or any(opened.preview_forget(name, parts).encode for name, parts in asked.items())
        if encode and loaded is None:
            loaded = common.load_model(model, device)
        with common.counting("encoding again", found.encode or None, "tokens") as advance:
            receipts = [opened.forget(name, parts, loaded, on_tokens=advance) for name, parts in asked.items()]
    if as_json:
        common.print_json(_told(found, receipts))
        return
    for receipt in receipts:
        for lost in receipt.facts["banks"]:
            again = f", {lost['encoded_again']:,} encoded again" if lost["encoded_again"] else ""
            common.out.print(
                f"Bank {lost['bank']} forgot {lost['tokens']:,} tokens{again}.", markup=False, highlight=False
            )
        common.out.print(f"Receipt {receipt.number}: {receipt.signature}", markup=False, highlight=False)


def _span(text: str) -> tuple[int, int | None]:
    first, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first or 0), int(end) if end else None
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no stretch of characters: give first:end, as in 120:180.", param_hint="--span"
        ) from error


def _time(text: str, name: str) -> datetime:
    """A time with a zone: the machine's, where none is given."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no time: give 2026-01-31 or 2026-01-31T12:00, with a zone if it is not yours (+01:00).",
            param_hint=f"--{name}",
        ) from error


def _matching(opened: MemoryStore, bank: str, model: LongMem, query: str, top_k: int) -> list[Stretch]:
    from longmem.recall import recall
    from longmem.store import Stretch

    hits = recall(model, opened.bank(bank, device=model.device), query, top_k)
    return [Stretch(hit.source, hit.start, hit.end) for hit in hits]


def _amount(found: Preview) -> str:
    sources = len({span.source for span in found.text} | set(found.whole))
    if sources == 1 and found.whole:
        return f"{found.whole[0]} ({found.tokens:,} tokens)"
    return f"{found.tokens:,} tokens of {sources} source{'' if sources == 1 else 's'}"


def _show(found: Preview) -> None:
    """What would go, on standard error."""
    if not found.text and not found.whole:
        typer.echo("Nothing that is remembered matches.", err=True)
        return
    for span in found.text[:_MOST_SHOWN]:
        part = "all" if span.source in found.whole else f"{span.start}–{span.end}"
        typer.echo(f"{span.source}:{part} “{common.snippet(span.text, 240)}”", err=True)
    if len(found.text) > _MOST_SHOWN:
        typer.echo(f"and {len(found.text) - _MOST_SHOWN:,} more stretches.", err=True)
    others = [name for name in found.banks if name != found.bank]
    if others:
        typer.echo(f"Forks lose it as well: {', '.join(others)}.", err=True)
    if found.encode:
        typer.echo(f"About {found.encode:,} tokens have to be encoded again.", err=True)
    for one in found.generated[:_MOST_SHOWN]:
        place = f"{one.bank}, {one.source}:{one.start}–{one.end}"
        typer.echo(f"drew on it ({one.weight:.0%}): {place} “{common.snippet(one.text)}”", err=True)
    if len(found.generated) > _MOST_SHOWN:
        typer.echo(f"and {len(found.generated) - _MOST_SHOWN:,} more that drew on it.", err=True)
    for name in found.unreadable:
        typer.echo(f"Bank {name} holds text that drew on it, and cannot be read: its key is missing.", err=True)


def _told(found: Preview, receipts: list[Receipt]) -> dict:
    import dataclasses

    return {
        **dataclasses.asdict(found),
        "receipts": [{**receipt.facts, "signature": receipt.signature} for receipt in receipts],
    }


def receipts(store: common.Store, keys: common.Keys = None, as_json: common.Json = False) -> None:
    """List what was forgotten, and check that no receipt was altered. Exits with 1 if one was."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        found = opened.receipts()
        genuine = not found or opened.is_genuine(found[-1])
    if as_json:
        rows = [{**receipt.facts, "signature": receipt.signature} for receipt in found]
        common.print_json({"genuine": genuine, "receipts": rows})
    else:
        table = Table("", "time", "bank", "tokens", "sources", "signature", box=None, header_style="dim")
        for receipt in found:
            facts = receipt.facts
            tokens = f"{receipt.tokens_of(facts['bank']):,}"
            time = receipt.time.astimezone().strftime("%Y-%m-%d %H:%M")
            sources = "all: its key" if receipt.destroyed_key else str(len(facts["removed"]))
            row = (str(receipt.number), time, facts["bank"], tokens, sources, receipt.signature)
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        common.out.print(table if found else "Nothing was forgotten yet.")
    if not genuine:
        raise typer.Exit(1)
