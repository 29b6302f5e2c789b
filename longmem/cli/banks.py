"""`longmem write`, `recall`, `banks`, `sources`, `index`, `verify`, `repair`, `consolidate`, `retain`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from longmem.cli import common
from longmem.config import RetentionPolicy as Policy
from longmem.errors import SourceError, StoreNotWritableError

# What tokenising costs in memory for each token: ids and character offsets as Python objects.
_TOKENIZING = 200
# Ids, offsets and their share of the text on disk, beside keys and values.
_PROVENANCE = 28
# Copies of a text's keys and values that exist while it is written: collected, joined, in the file, in the bank.
_COPIES = 4
# Characters of a text by which its tokens are estimated.
_BEGINNING = 20_000


def write(
    files: Annotated[list[str], typer.Argument(help="UTF-8 text files; - is standard input.", show_default=False)],
    store: common.Store,
    bank: common.Bank,
    source: Annotated[
        str | None, typer.Option(help="Name in the bank, for a single text; the path by default.")
    ] = None,
    precision: common.BankPrecision = None,
    windows: common.BankWindows = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Remember texts. All of them are checked before any is written; each is on disk when its line appears."""
    if source is not None and len(files) > 1:
        raise typer.BadParameter(f"--source names one text; {len(files)} were given.", param_hint="--source")
    from longmem.store import MemoryStore, check_bank_name

    check_bank_name(bank)
    texts = _read(files, source, store)
    loaded = common.load_model(model, device)
    spec = common.spec_of(loaded, precision, windows)
    _check_room([len(text.encode()) for text in texts.values()], store, loaded.bank_spec.bytes_per_token)
    with MemoryStore.open(store, keys=keys) as opened:
        if not opened.writable:
            raise StoreNotWritableError(
                f"The store in {store} cannot be written, only read. Change its permissions, or give another --store."
            )
        target = opened.bank(bank, spec, device=loaded.device)
        common.check_precision(target, bank, precision)
        common.check_windows(target, bank, windows)
        _check_new(texts, target.sources, bank)
        written = {}
        tokens = sum(_about_tokens(loaded.tokenizer, text) for text in texts.values())
        with common.counting("remembering", tokens, "tokens") as advance:
            for name, text in texts.items():
                written[name] = loaded.write_text(target, text, source=name, on_tokens=advance)
                if not as_json:
                    common.out.print(f"{name}: {written[name]:,} tokens", markup=False, highlight=False)
        if as_json:
            rows = [{"source": name, "tokens": count} for name, count in written.items()]
            common.print_json({"bank": bank, "written": rows, "tokens": len(target), "sources": len(target.sources)})
        else:
            common.out.print(f"Bank {bank} remembers {common.contents(target)}.", markup=False, highlight=False)


def _about_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text has, by its beginning: to cut a long one takes longer than a GPU takes to encode it."""
    beginning = text[:_BEGINNING]
    tokens = len(tokenizer(beginning, add_special_tokens=False).input_ids)
    return round(tokens * len(text) / max(1, len(beginning)))


def _read(files: Sequence[str], source: str | None, folder: Path) -> dict[str, str]:
    """Source names and texts, in order."""
    from longmem.data import decode_text, read_text

    # Sizes first: a file that is larger than memory must not be read to find that out.
    paths = [Path(file) for file in files if file != "-"]
    _check_room([path.stat().st_size for path in paths if path.is_file()], folder)
    texts: dict[str, str] = {}
    for file in files:
        name = source or ("stdin" if file == "-" else file)
        text = decode_text(sys.stdin.buffer.read(), "Standard input") if file == "-" else read_text(Path(file))
        if name in texts:
            raise SourceError(f"{name} is given twice. Name every text once.")
        texts[name] = text
    return texts


def _check_new(texts: dict[str, str], remembered: Sequence[str], bank: str) -> None:
    known = [name for name in texts if name in set(remembered)]
    if known:
        raise SourceError(
            f"Bank {bank!r} remembers {', '.join(map(repr, known))} already; nothing was written. To replace a source, "
            f"first `longmem forget --bank {bank} {known[0]}`; to keep both, give another name with --source."
        )


def _check_room(text_sizes: Sequence[int], folder: Path, bytes_per_token: int = 0) -> None:
    """Raise `SourceError` if texts of these sizes in bytes do not fit into memory or onto the store's disk."""
    # Three bytes a token is on the safe side for text; English has four to five.
    tokens, largest = sum(text_sizes) // 3, max(text_sizes, default=0) // 3
    memory = sum(text_sizes) + tokens * bytes_per_token + largest * (_TOKENIZING + (_COPIES - 1) * bytes_per_token)
    disk = tokens * (bytes_per_token + _PROVENANCE)
    free_memory, free_disk = available_memory(), available_disk(folder)
    if memory <= free_memory and disk <= free_disk:
        return
    raise SourceError(
        f"Too much text at once: about {tokens:,} tokens need {common.size(memory)} of memory, of which "
        f"{common.size(free_memory)} are available, and at least {common.size(disk)} on the disk of {folder}, of which "
        f"{common.size(free_disk)} are. Nothing was written. Split the text and write the parts one by one, to several "
        "banks if they are very many; or use a larger machine."
    )


def available_memory() -> int:
    """Bytes of memory that new data can take without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def available_disk(folder: Path) -> int:
    """Free bytes where `folder` is, or would be."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def recall(
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    store: common.Store,
    bank: common.Banks,
    top_k: Annotated[int, typer.Option(help="How many passages.")] = 8,
    words: Annotated[
        float | None,
        typer.Option(help="Share of the word score: 0 is the memory heads alone, 1 words (BM25) alone."),
    ] = None,
    search: common.Search = "exact",
    version: common.Version = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Show the remembered passages that a query is about."""
    from longmem import recall as passages

    with common.open_banks(store, bank, device, search, common.version_of(version), keys=keys) as remembered:
        assert remembered is not None
        loaded = common.load_model(model, device)
        hits = passages.recall(loaded, remembered, query, top_k, words)
    if as_json:
        common.print_json([{"rank": rank, **dataclasses.asdict(hit)} for rank, hit in enumerate(hits, start=1)])
        return
    if not hits:
        common.out.print("Nothing that is remembered matches.")
        return
    table = Table("", "score", "memory", "words", "source", "text", box=None, pad_edge=False, header_style="dim")
    for rank, hit in enumerate(hits, start=1):
        scores = (f"{score:.2f}" for score in (hit.score, hit.memory_score, hit.word_score))
        of = f"{hit.bank}, " if len(bank) > 1 else ""
        place = Text(f"{of}{hit.source}:{hit.start}–{hit.end}", overflow="fold")
        table.add_row(str(rank), *scores, place, Text(common.snippet(hit.text, 240)))
    common.out.print(table)


def banks(store: common.Store, keys: common.Keys = None, as_json: common.Json = False) -> None:
    """List the banks of a store."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        infos = opened.banks()
    if as_json:
        common.print_json([{**dataclasses.asdict(info), "bytes_per_token": info.bytes_per_token} for info in infos])
        return
    columns = ["bank", "tokens", "sources", "size", "a token", "kept in", "backbone", "updated"]
    encrypted = any(info.key != "none" for info in infos)
    if encrypted:
        columns.append("encrypted")
    table = Table(*columns, box=None, header_style="dim")
    for info in infos:
        updated = info.updated.astimezone().strftime("%Y-%m-%d %H:%M")
        sizes = (common.size(info.bytes), common.size(info.bytes_per_token), info.precision)
        tokens = f"{info.tokens:,}" if info.rows == info.tokens else f"{info.rows:,} of {info.tokens:,}"
        row = [info.name, tokens, f"{info.sources:,}", *sizes, info.backbone, updated]
        if encrypted:
            row.append({"none": "", "there": "yes"}.get(info.key, f"key {info.key}"))
        table.add_row(*map(Text, row))
    common.out.print(table if infos else f"No banks in {store} yet.")


def sources(
    store: common.Store,
    bank: common.Bank,
    version: common.Version = None,
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """List what a bank remembers."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        infos = opened.bank(bank, verify=False, version=common.version_of(version)).source_infos()
    if as_json:
        common.print_json([dataclasses.asdict(info) for info in infos])
        return
    table = Table("source", "tokens", "characters", "written", box=None, header_style="dim")
    for info in infos:
        written = info.created.astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(*map(Text, (info.source, f"{info.tokens:,}", f"{info.chars:,}", written)))
    common.out.print(table if infos else f"Bank {bank} remembers nothing yet.")


def index(
    store: common.Store,
    bank: common.Bank,
    recall: Annotated[
        float, typer.Option(help="Share of the nearest remembered tokens that each memory head should find.")
    ] = 0.99,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Measure with queries recorded on this text; parts of the bank's own by default.", dir_okay=False
        ),
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Remove the bank's index.")] = False,
    model: common.Model = common.DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="Where the bank will be searched: cpu, cuda, cuda:1, auto.")] = "cpu",
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Make a large bank fast to search, for `--search index`, and say how much is found so."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        target = opened.bank(bank, device="cpu" if drop else common.device_of(device))
        if drop:
            had = target.drop_index()
            if as_json:
                common.print_json({"bank": bank, "dropped": had})
                return
            said = "It is searched exactly." if had else "There was none."
            common.out.print(f"Bank {bank} has no index now. {said}", markup=False, highlight=False)
            return
        from longmem.data import read_text
        from longmem.indexing import make_index, steps

        read = None if text is None else read_text(text)
        loaded = common.load_model(model, device)
        with common.counting("indexing", steps(loaded), "steps") as advance:
            made = make_index(loaded, target, recall=recall, text=read, on_step=advance)
        target.save_index(made)
        heads = zip(target.spec.memory_heads, made.kinds, made.recall, strict=True)
        rows = [{"layer": head.layer, "kv_head": head.kv_head, "index": kind, "recall": r} for head, kind, r in heads]
    if as_json:
        common.print_json({"bank": bank, "tokens": len(made), "top_k": made.top_k, "target": recall, "heads": rows})
        return
    table = Table("memory head", "index", "recall", box=None, header_style="dim")
    for row in rows:
        table.add_row(f"{row['layer']}.{row['kv_head']}", row["index"], f"{row['recall']:.3f}")
    common.out.print(table)
    worst = min(made.recall)
    common.out.print(
        f"Of the {made.top_k} nearest of {len(made):,} tokens, {worst:.1%} or more are found (measured on text that "
        f"chose nothing). Search so with --search index.",
        markup=False,
        highlight=False,
    )
    if worst < recall:
        typer.echo(f"warning: less than the {recall} asked for. Ask for more with --recall.", err=True)


OneOrAll = Annotated[str | None, typer.Option("--bank", help="Name of a bank; all by default.", show_default=False)]


def verify(store: common.Store, bank: OneOrAll = None, keys: common.Keys = None, as_json: common.Json = False) -> None:
    """Check that every file of a store is what was written. Exits with 1 if one is not."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        total = sum(info.bytes for info in opened.banks() if bank in (None, info.name))
        with common.counting("checking", total, "bytes") as advance:
            report = opened.verify(bank, on_bytes=advance)
    if as_json:
        common.print_json({"ok": report.ok, **dataclasses.asdict(report)})
    else:
        for fault in report.faults:
            where = "" if fault.bank is None else f"bank {fault.bank}"
            which = f", source {', '.join(fault.sources)}" if fault.sources else ""
            place = f", {fault.file}" if fault.file else ""
            common.out.print(f"{fault.kind}: {where}{which}{place}: {fault.meaning}", markup=False, highlight=False)
        checked = (
            f"{report.banks} bank{'' if report.banks == 1 else 's'}, {report.segments:,} segments, {report.tokens:,} "
            f"tokens, {common.size(report.bytes)}"
        )
        said = "all is well" if report.ok else f"{len(report.faults)} faults. Mend them: `longmem repair`"
        common.out.print(f"{checked}: {said}.", markup=False, highlight=False)
        if report.without_record:
            common.out.print(
                f"The text of {report.without_record:,} pieces has one copy only; `longmem repair` makes a second.",
                highlight=False,
            )
        if report.orphans:
            common.out.print(
                f"{len(report.orphans):,} files are no part of the store; `longmem repair` removes them.",
                highlight=False,
            )
        if report.quarantined:
            common.out.print(f"{report.quarantined:,} pieces are in quarantine.", highlight=False)
    if not report.ok:
        raise typer.Exit(1)


def repair(
    store: common.Store,
    bank: OneOrAll = None,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Mend a damaged store: what is lost of keys and values is encoded again; what cannot be is moved aside.

    First the manifest, from its second copy. If that cannot be read, end all other programs that use the store.
    """
    from longmem.store import MemoryStore

    rebuilt = MemoryStore.rebuild(store, keys=keys)
    if rebuilt is not None:
        done = "made anew from its second copy" if rebuilt.whole else f"{rebuilt.rows:,} rows of it put right"
        typer.echo(f"The manifest: {rebuilt.meaning}; {done}.", err=True)
    with MemoryStore.open(store, create=False, keys=keys) as opened:
        loaded = common.load_model(model, device)
        total = sum(info.bytes for info in opened.banks() if bank in (None, info.name))
        with (
            common.counting("checking", total, "bytes") as read,
            common.counting("encoding again", None, "tokens") as advance,
        ):
            repairs = opened.repair(loaded, bank, on_tokens=advance, on_bytes=read)
    if as_json:
        common.print_json([dataclasses.asdict(made) for made in repairs])
        return
    for made in repairs:
        parts = [
            f"{made.pieces:,} pieces encoded again ({made.tokens:,} tokens)" if made.pieces else "",
            f"{made.records:,} texts copied" if made.records else "",
            "its index removed" if made.index_removed else "",
            f"{len(made.quarantined):,} pieces moved to quarantine" if made.quarantined else "",
        ]
        said = ", ".join(filter(None, parts)) or "nothing to mend"
        common.out.print(f"Bank {made.bank}: {said}.", markup=False, highlight=False)
        for piece in made.quarantined:
            place = f"{piece.source}:{piece.char_start}–{piece.char_start + piece.chars}"
            kept = " Its text is kept in the manifest." if piece.text_kept else ""
            file = f" Its file: {piece.file}." if piece.file else ""
            common.out.print(f"  quarantine: {place}: {piece.reason}{kept}{file}", markup=False, highlight=False)


def consolidate(store: common.Store, bank: common.Bank, keys: common.Keys = None, as_json: common.Json = False) -> None:
    """Merge the many small files of a bank into few large ones."""
    from longmem.store import MemoryStore

    with (
        MemoryStore.open(store, create=False, keys=keys) as opened,
        common.counting("merging", None, "segments") as advance,
    ):
        made = opened.consolidate(bank, on_segments=advance)
    if as_json:
        common.print_json(dataclasses.asdict(made))
        return
    common.out.print(
        f"Bank {made.bank}: {made.segments_before:,} segments are {made.segments:,} now, {common.size(made.bytes)}.",
        markup=False,
        highlight=False,
    )


def retain(
    store: common.Store,
    bank: common.Bank,
    cap: Annotated[int | None, typer.Option(help="Most tokens that keep their keys and values.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="Most bytes of keys and values on disk.")] = None,
    policy: Annotated[
        Policy,
        typer.Option(help="What goes: oldest, all but an even sample, repetitions, least attention, least surprise."),
    ] = "oldest",
    unit: Annotated[int, typer.Option(help="Consecutive tokens that stay or go together.")] = 64,
    days: Annotated[float | None, typer.Option(help="Forget sources last written longer ago than this.")] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="A source, or a pattern with *, that stays whole; may be given often.")
    ] = None,
    always: Annotated[bool, typer.Option("--always", help="Also after every write from now on.")] = False,
    never: Annotated[bool, typer.Option("--never", help="Take back --always; nothing else.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    model: common.Model = common.DEFAULT_MODEL,
    device: common.Device = "auto",
    keys: common.Keys = None,
    as_json: common.Json = False,
) -> None:
    """Bring a bank down to a size. What goes loses its keys and values; its text stays, unless --days forgets it."""
    from longmem.keeping import retain as bring_down
    from longmem.retention import Cap
    from longmem.store import MemoryStore

    wanted = Cap(cap, max_bytes, policy, unit, days, tuple(pin or ()))
    if never == (cap is not None or max_bytes is not None or days is not None):
        raise typer.BadParameter("give --cap, --bytes or --days; or --never alone.", param_hint="--cap")
    with MemoryStore.open(store, create=False, keys=keys) as opened:
        target = opened.bank(bank)
        if never:
            target.set_cap(None)
            common.out.print(f"Bank {bank} grows without limit.", markup=False, highlight=False)
            return
        limit = wanted.rows(target.spec.bytes_per_token)
        scored = policy == "surprise" and limit is not None and len(target) > limit
        loaded = common.load_model(model, device) if scored else None
        with common.counting("reading", None, "tokens") as advance:
            chosen = bring_down(target, wanted, model=loaded, preview=True, on_tokens=advance)
        if not as_json:
            for name in chosen.forgotten:
                common.out.print(f"{name}: forgotten, text and all", markup=False, highlight=False)
            rows = target.source_index_N.bincount(minlength=len(target.sources)).tolist()
            held = dict(zip(target.sources, rows, strict=True))
            for name, lost in chosen.thinned.items():
                common.out.print(f"{name}: {lost:,} of {held[name]:,} tokens", markup=False, highlight=False)
        smaller = chosen.rows < chosen.rows_before
        if smaller and not (yes or dry_run or as_json):
            typer.confirm(f"Keep {chosen.rows:,} of {chosen.rows_before:,} tokens?", abort=True, err=True)
        if not dry_run:
            if smaller:
                bring_down(target, wanted, model=loaded)
            if always:
                target.set_cap(wanted)
    said = {
        "bank": bank,
        "tokens_before": chosen.rows_before,
        "tokens": chosen.rows,
        "forgotten": chosen.forgotten,
        "thinned": chosen.thinned,
        "done": not dry_run,
    }
    if as_json:
        common.print_json(said)
        return
    how = "would keep" if dry_run else "keeps"
    later = " So it does after every write." if always and not dry_run else ""
    common.out.print(
        f"Bank {bank} {how} {chosen.rows:,} of {chosen.rows_before:,} tokens.{later}", markup=False, highlight=False
    )
