"""`longmem log`, `tag`, `fork`, `merge`, `diff`, `copy`, `export`, `import`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from longmem.cli import common

_MOST_SOURCES = 3

To = Annotated[str, typer.Option(help="Name of the new bank.", show_default=False)]


def log(store: common.Store, bank: common.Bank, keys: common.Keys = None, as_json: common.Json = False) -> None:
    """List the versions of a bank: when each began, by what, and how much it holds."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        versions = opened.log(bank)
    if as_json:
        common.print_json([dataclasses.asdict(version) for version in versions])
        return
    table = Table("", "time", "what", "tokens", "added", "sources", "tags", box=None, header_style="dim")
    for version in reversed(versions):
        what = version.operation if version.note is None else f"{version.operation} {version.note}"
        sources = ", ".join(version.sources[:_MOST_SOURCES])
        if version.sources[_MOST_SOURCES:]:
            sources += f" and {len(version.sources) - _MOST_SOURCES} more"
        if version.forgotten:
            sources += f" ({version.forgotten:,} tokens forgotten since)"
        time = version.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        numbers = (f"{version.tokens:,}", f"{version.added:,}")
        row = (str(version.number), time, what, *numbers, sources.strip(), ", ".join(version.tags))
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    common.out.print(table if versions else f"Nothing was written to bank {bank} yet.")


def tag(
    label: Annotated[str, typer.Argument(help="Name of the version.", show_default=False)],
    store: common.Store,
    bank: common.Bank,
    version: common.Version = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tag; the version stays.")] = False,
    keys: common.Keys = None,
) -> None:
    """Name a version of a bank, the newest by default."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        if remove:
            opened.untag(bank, label)
            said = f"Bank {bank} has no tag {label} any more."
        else:
            said = f"Version {opened.tag(bank, label, common.version_of(version))} of bank {bank} is {label}."
    common.out.print(said, markup=False, highlight=False)


def fork(
    store: common.Store, bank: common.Bank, to: To, version: common.Version = None, keys: common.Keys = None
) -> None:
    """Make a bank that begins as a version of another.

    Named below it (notes → notes/draft) it shares its files: at once, and both forget together. By any other name it is
    a copy.
    """
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        opened.fork(bank, to, version=common.version_of(version))
        made = next(info for info in opened.banks() if info.name == to)
    shares = f"shares files with {made.namespace}" if made.namespace != to else "has files of its own"
    common.out.print(f"Bank {to} holds {made.tokens:,} tokens and {shares}.", markup=False, highlight=False)


def merge(
    other: Annotated[str, typer.Argument(help="Bank whose texts are added.", show_default=False)],
    store: common.Store,
    bank: common.Bank,
    version: common.Version = None,
    keys: common.Keys = None,
) -> None:
    """Add to a bank what another one (--version: of it) holds and it does not."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        came = opened.merge(bank, other, version=common.version_of(version))
    common.out.print(f"{came:,} tokens of {other} came into bank {bank}.", markup=False, highlight=False)


def diff(
    store: common.Store,
    bank: common.Bank,
    other: Annotated[
        str | None, typer.Argument(help="Another bank; the same one by default.", show_default=False)
    ] = None,
    version: common.Version = None,
    other_version: Annotated[
        str | None, typer.Option(help="Number or tag of the other's version.", show_default=False)
    ] = None,
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Show what two banks, or two versions of one, hold differently."""
    from longmem.store import MemoryStore

    versions = common.version_of(version), common.version_of(other_version)
    with MemoryStore.open(store, create=False, keys=keys) as opened:
        found = opened.diff(bank, other or bank, version=versions[0], other_version=versions[1])
    if as_json:
        common.print_json(dataclasses.asdict(found))
        return
    lines = [f"- {source}" for source in found.ours] + [f"+ {source}" for source in found.theirs]
    lines += [f"≠ {c.source}: alike up to character {c.common} of {c.ours} and {c.theirs}" for c in found.changed]
    for line in lines or [f"Nothing: {len(found.same)} sources are the same."]:
        common.out.print(line, markup=False, highlight=False)


def copy(
    store: common.Store,
    bank: common.Bank,
    to: To,
    version: common.Version = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    keys: common.Keys = None,
) -> None:
    """Make a bank for another model from the texts that a bank keeps, by encoding them again."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        opened.require_free(to)
        total = opened.log(bank)[-1].tokens if opened.log(bank) else 0
        loaded = common.load_model(model, device)
        with common.counting("encoding", total, "tokens") as advance:
            opened.copy(bank, to, loaded, version=common.version_of(version), on_tokens=advance)
        made = next(info for info in opened.banks() if info.name == to)
    common.out.print(f"Bank {to} holds {made.tokens:,} tokens for {made.backbone}.", markup=False, highlight=False)


def export(
    file: Annotated[Path, typer.Argument(help="File to be written.", dir_okay=False, show_default=False)],
    store: common.Store,
    bank: common.Bank,
    version: common.Version = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Export an encrypted bank, too: anyone can read the file.")
    ] = False,
    keys: common.Keys = None,
) -> None:
    """Write a bank to one file, with its texts, versions and tags."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        total = sum(info.bytes for info in opened.banks() if info.name == bank)
        with common.counting("writing", total, "bytes") as advance:
            size = opened.export(bank, file, version=common.version_of(version), plain=plain, on_bytes=advance)
        encrypted = opened.seal(bank).key_id is not None
    if encrypted:
        common.out.print(f"Bank {bank} is encrypted; {file} is not.", markup=False, highlight=False)
    common.out.print(f"{file}: {common.size(size)}.", markup=False, highlight=False)


def import_(
    file: Annotated[Path, typer.Argument(help="File that `longmem export` wrote.", dir_okay=False, show_default=False)],
    store: common.Store,
    bank: Annotated[
        str | None, typer.Option(help="Name of the new bank; the one it had by default.", show_default=False)
    ] = None,
    keys: common.Keys = None,
) -> None:
    """Make a bank from a file that `longmem export` wrote."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, keys=keys) as opened:
        with common.counting("reading", None, "bytes") as advance:
            name = opened.import_(file, bank, on_bytes=advance)
        made = next(info for info in opened.banks() if info.name == name)
    said = f"Bank {name} holds {made.tokens:,} tokens of {made.sources:,} sources."
    common.out.print(said, markup=False, highlight=False)
