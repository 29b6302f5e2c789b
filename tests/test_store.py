"""MemoryStore: what it acknowledges survives, what it does not is invisible, and damage is found and named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from longmem.approximate import BankIndex, fingerprint
from longmem.bank import BankEntry, MemoryBank, centre_text, packed, unpacked
from longmem.config import BankSpec, MemoryHead, Precision
from longmem.errors import (
    BankError,
    BankIndexError,
    BankMismatchError,
    BankNotFoundError,
    SourceError,
    StoreCorruptError,
    StoreError,
    StoreNotWritableError,
)
from longmem.grid import Grid
from longmem.lists import KeyLists
from longmem.store import MemoryStore, StoredBank, segments
from longmem.store.files import new_file
from longmem.store.tensors import as_parts

SPEC = BankSpec("tiny", "0" * 64, (MemoryHead(1, 0), MemoryHead(2, 1)), 8)
GRID = Grid.fit(
    torch.randn(2, 99, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9) ** 2,
    torch.ones(2, 1, 8),
    torch.zeros(2, 8),
).to_text()
FORMAT_DOC = Path(__file__).parents[1] / "docs" / "format.md"

# A server that has imported torch once; each process that a test needs is a quick fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["longmem.store"])


def make_entry(source: str, text: str, char_start: int = 0, seed: int = 0, dtype: str = "bfloat16") -> BankEntry:
    """One token a character, with random keys and values."""
    random = torch.Generator().manual_seed(seed)
    tokens = len(text)
    starts_N = torch.arange(char_start, char_start + tokens)
    return BankEntry(
        source=source,
        text=text,
        char_start=char_start,
        token_ids_N=torch.randint(1000, (tokens,), generator=random),
        offsets_N2=torch.stack([starts_N, starts_N + 1], dim=1),
        keys_HNE=torch.randn(2, tokens, 8, generator=random).to(getattr(torch, dtype)),
        values_HNE=torch.randn(2, tokens, 8, generator=random).to(getattr(torch, dtype)),
    )


def assert_same(bank: MemoryBank, expected: MemoryBank) -> None:
    """Bit-identical memory."""
    assert bank.sources == expected.sources
    assert [bank.text_of(source) for source in bank.sources] == [expected.text_of(source) for source in bank.sources]
    for name in ("keys_HNE", "values_HNE", "token_ids_N", "source_index_N", "offsets_N2"):
        ours, theirs = getattr(bank, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), name


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def readable(folder: Path) -> bytes:
    """All bytes of a folder, and behind them what those that zlib has compressed say."""
    everything = b"".join((folder / name).read_bytes() for name in sorted(files_of(folder)))
    said = []
    for match in re.finditer(b"\x78\x9c", everything):
        with suppress(zlib.error):
            said.append(zlib.decompressobj().decompress(everything[match.start() :]))
    return everything + b"".join(said)


def segment_files(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder) as store:
        yield store


# Round trips


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "ü/ß 你\0", "../etc"]), st.text(max_size=20)), max_size=6),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_a_reopened_bank_is_bit_identical(pieces: list[tuple[str, str]], dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    expected = MemoryBank(spec)
    with tempfile.TemporaryDirectory() as folder:
        with MemoryStore.open(folder) as store:
            bank = store.bank("notes", spec)
            for seed, (source, text) in enumerate(pieces):
                entry = make_entry(source, text, expected.length_of(source), seed, dtype)
                expected.append(entry)
                bank.append(entry)
            assert_same(bank, expected)
        for verify in (True, False):
            with MemoryStore.open(folder, create=False) as store:
                assert_same(store.bank("notes", verify=verify), expected)


def test_tensors_that_share_memory_are_stored_apart(store: MemoryStore) -> None:
    both = torch.randn(2, 4, 2, 8).bfloat16()
    entry = replace(make_entry("a", "four"), keys_HNE=both[:, :, 0], values_HNE=both[:, :, 1])
    store.bank("notes", SPEC).append(entry)
    again = store.bank("notes")
    assert torch.equal(again.keys_HNE, entry.keys_HNE)
    assert torch.equal(again.values_HNE, entry.values_HNE)


def describe(folder: str, pipe: Connection) -> None:
    with MemoryStore.open(folder, create=False) as store:
        bank = store.bank("user/1234", SPEC)
        pipe.send((os.getpid(), bank.sources, bank.text_of("a"), bank.keys_HNE.view(torch.int16).tolist()))


def test_a_new_process_finds_the_same_bank(store: MemoryStore, folder: Path) -> None:
    bank = store.bank("user/1234", SPEC)
    bank.append(make_entry("a", "one "))
    bank.append(make_entry("b", "other"))
    bank.append(make_entry("a", "two", 4))
    ours, theirs = processes.Pipe()
    process = processes.Process(target=describe, args=(str(folder), theirs))
    process.start()
    assert ours.poll(60)
    pid, sources, text, keys = ours.recv()
    process.join(60)
    assert pid != os.getpid()
    assert sources == ("a", "b")
    assert text == "one two"
    assert keys == bank.keys_HNE.view(torch.int16).tolist()


@pytest.mark.parametrize("precision, grid", [("full", None), ("int8", None), ("int4", None), ("int4", GRID)])
@pytest.mark.parametrize("centred", [True, False])
def test_the_format_document_s_decoders_read_a_store(
    store: MemoryStore, folder: Path, precision: Precision, grid: str | None, centred: bool
) -> None:
    decoder: dict = {}
    codes = re.findall(r"```python\n(.*?)```", FORMAT_DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(codes) == 3
    for code in codes:
        assert len(code.strip().splitlines()) <= 20
        assert "import longmem" not in code and "from longmem" not in code
        exec(code, decoder)
    centre = centre_text(torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(9))) if centred else None
    spec = replace(SPEC, precision=precision, centre=centre, grid=grid)
    entries = [make_entry("a", "grüß "), make_entry("b", "", 0, 1), make_entry("a", "dich 🙂", 5, 2)]
    for entry in entries:
        store.bank("notes", spec).append(entry)
    bank, first = store.bank("notes"), 0
    decoded = list(decoder["read_bank"](folder, "notes"))
    assert len(decoded) == len(entries)
    for (row, text, token_ids, tensors), entry in zip(decoded, entries, strict=True):
        assert (row["source"], row["char_start"], row["tokens"]) == (entry.source, entry.char_start, len(entry))
        assert text == entry.text
        assert token_ids.tolist() == entry.token_ids_N.tolist()
        at, first = slice(first, first + len(entry)), first + len(entry)
        for which, (name, kept_HNE) in enumerate((("keys", bank.keys_HNE), ("values", bank.values_HNE))):
            found = tensors[name]
            if grid is not None and name == "keys":
                found = torch.from_numpy(decoder["unpack_by_grid"](found.numpy(), row["spec"])).bfloat16()
            elif precision != "full":
                found = torch.from_numpy(decoder["unpack"](found.numpy(), which, row["spec"]).copy()).bfloat16()
            assert torch.equal(found, kept_HNE[:, at])


# Few bits


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=20)), max_size=5),
    st.sampled_from([("int8", None), ("int4", None), ("int4", GRID)]),
    st.booleans(),
)
def test_a_bank_in_few_bits_is_the_same_in_memory_and_on_disk(
    pieces: list[tuple[str, str]], few: tuple[Precision, str | None], once: bool
) -> None:
    spec = replace(SPEC, precision=few[0], centre=centre_text(torch.ones(2, 2, 8)), grid=few[1])
    expected, whole = MemoryBank(spec), MemoryBank(SPEC)
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(folder) as store:
        # A model's spec opens a bank of any precision.
        bank = store.bank("notes", spec)
        for seed, (source, text) in enumerate(pieces):
            entry = make_entry(source, text, expected.length_of(source), seed)
            expected.append(entry)
            whole.append(entry)
            (bank if once else store.bank("notes", SPEC)).append(entry)
        bank.refresh()
        assert_same(bank, expected)
        assert_same(store.bank("notes"), expected)
        assert store.verify().ok
        # Rounded all at once, or piece by piece: the same.
        keys_HNE = unpacked(packed(replace(make_entry("a", "x" * len(whole)), keys_HNE=whole.keys_HNE), spec), spec)
        assert torch.equal(keys_HNE.keys_HNE, expected.keys_HNE)
        store.consolidate("notes")
        assert_same(store.bank("notes"), expected)
        assert store.verify().ok
        if bank.sources:
            gone = bank.sources[0]
            bank.forget(gone)
            expected.forget(gone)
            assert_same(bank, expected)
            assert_same(store.bank("notes"), expected)
            assert store.verify().ok


def test_bytes_a_token_are_what_the_spec_says(store: MemoryStore, folder: Path) -> None:
    sizes = {}
    for precision in ("full", "int8", "int4"):
        spec = replace(SPEC, precision=precision)
        for tokens in (1000, 2000):
            name = f"{precision}-{tokens}"
            store.bank(name, spec).append(make_entry("a", "x" * tokens))
            sizes[name] = next(info.bytes for info in store.banks() if info.name == name)
        info = next(info for info in store.banks() if info.name == f"{precision}-2000")
        assert (info.precision, info.bytes_per_token) == (precision, info.bytes / 2000)
        # What a token more costs: its keys and values, and less than 3 bytes of ids and places.
        assert 0 <= (sizes[f"{precision}-2000"] - sizes[f"{precision}-1000"]) / 1000 - spec.bytes_per_token < 3


def test_segments_and_records_of_version_2_are_read_as_they_are(store: MemoryStore, folder: Path) -> None:
    """They had ids, offsets and text as tensors of their own, and could be mixed with later ones."""
    entries = [make_entry("a", "grüß "), make_entry("b", "other", 0, 1)]
    expected, bank = MemoryBank(SPEC), store.bank("notes", SPEC)
    for entry in entries:
        bank.append(entry)
        expected.append(entry)
        made_from = {
            "token_ids": entry.token_ids_N,
            "offsets": entry.offsets_N2,
            "text": torch.frombuffer(bytearray(entry.text.encode()), dtype=torch.uint8),
        }
        pieces = json.dumps([[entry.source, 0, len(entry.text), len(entry)]])
        data = save(
            {"keys": entry.keys_HNE, "values": entry.values_HNE, **made_from},
            metadata={"longmem_segment": "2", "pieces": pieces},
        )
        ((piece, file),) = store.manifest.query(
            "SELECT piece.id, file FROM piece JOIN segment ON segment.id = segment ORDER BY piece.id DESC LIMIT 1"
        )
        (folder / "segments" / file).write_bytes(data)
        with store.manifest.transaction() as database:
            database.execute(
                "UPDATE segment SET sha256 = ?, bytes = ? WHERE file = ?",
                (hashlib.sha256(data).hexdigest(), len(data), file),
            )
            database.execute("UPDATE record SET data = ? WHERE piece = ?", (zlib.compress(save(made_from)), piece))
    assert store.verify().ok
    assert_same(store.bank("notes"), expected)
    third = make_entry("a", "dich", 5, 2)
    bank.append(third)
    expected.append(third)
    store.consolidate("notes")
    assert store.verify().ok and len(segment_files(folder)) == 1
    assert_same(store.bank("notes"), expected)


def test_a_bank_keeps_the_precision_that_it_was_made_with(store: MemoryStore) -> None:
    store.bank("notes", replace(SPEC, precision="int4"))
    assert store.bank("notes", SPEC).spec.precision == "int4"
    for given_spec, name in ((replace(SPEC, precision="int8"), "notes"), (replace(SPEC, precision="int4"), "plain")):
        store.bank("plain", SPEC)
        with pytest.raises(BankMismatchError, match=r"keeps keys and values in (int4|full).*another bank name"):
            store.bank(name, given_spec)
    assert store.bank("keys", replace(SPEC, precision="int4", grid=GRID)).spec.grid == GRID
    with pytest.raises(BankMismatchError, match="in int4, 'notes' in int4 rounded otherwise: rows of one mean nothing"):
        store.merge("keys", "notes")
    with pytest.raises(BankError, match="grid in a bank's spec is not that of 2 heads"):
        MemoryBank(replace(SPEC, precision="int4", grid="AAAA")).append(make_entry("a", "x"))
    with pytest.raises(BankError, match="centre in a bank's spec is not that of 2 heads"):
        MemoryBank(replace(SPEC, precision="int4", centre="AAAA")).append(make_entry("a", "x"))


def test_rounded_rows_of_another_shape_are_found(store: MemoryStore, folder: Path) -> None:
    spec = replace(SPEC, precision="int4")
    store.bank("notes", spec).append(make_entry("a", "text"))
    with store.manifest.transaction() as database:
        database.execute("UPDATE bank SET spec = ?", (replace(SPEC, precision="int8").to_json(),))
    with pytest.raises(StoreCorruptError, match="were expected for int8"):
        store.bank("notes")
    assert [fault.kind for fault in store.verify().faults] == ["header"]


# Banks and their names


def test_banks_and_sources_are_described(store: MemoryStore, folder: Path) -> None:
    before = datetime.now(UTC)
    bank = store.bank("user/1234", SPEC)
    for entry in (make_entry("a", "one "), make_entry("b", "other"), make_entry("a", "two", 4)):
        bank.append(entry)
    store.bank("empty", replace(SPEC, backbone="other"))
    empty, user = store.banks()
    assert (empty.name, empty.tokens, empty.sources, empty.bytes, empty.backbone) == ("empty", 0, 0, 0, "other")
    assert (user.name, user.tokens, user.sources, user.backbone) == ("user/1234", 12, 2, "tiny")
    assert user.bytes == sum(path.stat().st_size for path in segment_files(folder))
    assert before <= user.created < user.updated <= datetime.now(UTC)
    a, b = bank.source_infos()
    assert (a.source, a.tokens, a.chars) == ("a", 7, 7)
    assert (b.source, b.tokens, b.chars) == ("b", 5, 5)
    assert before <= a.created < b.created <= datetime.now(UTC)
    assert store.bank("user/1234").source_infos() == [a, b]


@pytest.mark.parametrize("name", ["", "/", "a/", "/a", "a//b", "..", "a/../b", "a b", "ä", "a\n", "a\\b"])
def test_names_that_cannot_be_are_refused(store: MemoryStore, name: str) -> None:
    with pytest.raises(BankError, match="cannot name a bank"):
        store.bank(name, SPEC)
    assert store.banks() == []


@pytest.mark.parametrize("name", ["a", "user/1234", "a.b-c_D/...", "..a", "0"])
def test_namespaces_are_names_not_paths(store: MemoryStore, folder: Path, name: str) -> None:
    store.bank(name, SPEC).append(make_entry("a", "text"))
    assert store.bank(name).name == name
    assert {path.parent for path in segment_files(folder)} == {folder / "segments"}


def test_an_unknown_bank_names_those_there_are(store: MemoryStore) -> None:
    with pytest.raises(BankNotFoundError, match="no banks yet"):
        store.bank("notes")
    store.bank("user/1", SPEC)
    for attempt in (store.bank, store.delete):
        with pytest.raises(BankNotFoundError, match="user/1"):
            attempt("notes")
    assert [info.name for info in store.banks()] == ["user/1"]


def test_the_same_weights_by_another_name_open_the_bank(store: MemoryStore) -> None:
    store.bank("notes", SPEC).append(make_entry("a", "text"))
    assert len(store.bank("notes", replace(SPEC, backbone="folder/of/the/same/model"))) > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "1" * 64),
        ("memory_heads", (MemoryHead(1, 0), MemoryHead(2, 0))),
        ("head_dim", 16),
        ("dtype", "float32"),
    ],
)
def test_another_spec_is_a_mismatch_that_says_where(store: MemoryStore, field: str, value: object) -> None:
    store.bank("notes", SPEC).append(make_entry("a", "text"))
    given = replace(SPEC, **{field: value})
    with pytest.raises(BankMismatchError) as caught:
        store.bank("notes", given)
    message = str(caught.value)
    assert f"{field}: given {value!r}, expected {getattr(SPEC, field)!r}" in message
    assert message.count("given") == 1
    assert "another bank name" in message
    assert store.bank("notes", SPEC).text_of("a") == "text"


def test_delete_drops_one_bank_and_its_files(store: MemoryStore, folder: Path) -> None:
    gone, stays = store.bank("gone", SPEC), store.bank("stays", SPEC)
    gone.append(make_entry("a", "text"))
    stays.append(make_entry("a", "text"))
    store.delete("gone")
    assert [info.name for info in store.banks()] == ["stays"]
    assert len(segment_files(folder)) == 1
    for attempt in (gone.refresh, lambda: gone.append(make_entry("b", "x")), lambda: gone.forget("a")):
        with pytest.raises(BankNotFoundError, match="deleted"):
            attempt()
    assert len(segment_files(folder)) == 1
    # A new bank of the same name is another bank.
    assert len(store.bank("gone", SPEC)) == 0


# Forgetting


def test_forget_unlinks_the_bytes_and_the_name(folder: Path) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        expected = MemoryBank(SPEC)
        for entry in (make_entry("a", "kept "), make_entry("b secret", "s3cret", 0, 1), make_entry("a", "too", 5, 2)):
            bank.append(entry)
            if entry.source == "a":
                expected.append(entry)
        assert bank.forget("b secret") == 6
        assert_same(bank, expected)
        assert_same(store.bank("notes"), expected)
        assert len(segment_files(folder)) == 2
        everything = readable(folder)
        assert b"kept" in everything
        assert b"s3cret" not in everything and b"b secret" not in everything
        with pytest.raises(SourceError, match="b secret"):
            bank.forget("b secret")
        bank.append(make_entry("b secret", "again"))
        assert store.bank("notes").text_of("b secret") == "again"


def test_many_sources_are_forgotten_at_once(store: MemoryStore) -> None:
    bank, other = store.bank("notes", SPEC), store.bank("notes", SPEC)
    entries = [make_entry(name, f"text of {name} ", 0, seed) for seed, name in enumerate("abcdefg")]
    entries.append(make_entry("c", "goes on", 10, 9))
    for entry in entries:
        bank.append(entry)
    other.refresh()
    with pytest.raises(SourceError, match="'z'"):
        bank.forget_all(["a", "z"])
    assert len(bank.sources) == 7 and store.bank("notes").sources == bank.sources
    versions = len(store.log("notes"))
    assert bank.forget_all(["a", "c", "g"]) == 10 + 17 + 10
    assert len(store.log("notes")) == versions + 1
    assert bank.forget_all([]) == 0 and len(store.log("notes")) == versions + 1
    expected = MemoryBank(SPEC)
    for entry in entries:
        if entry.source not in "acg":
            expected.append(entry)
    other.refresh()
    for each in (bank, other, store.bank("notes")):
        assert_same(each, expected)
        assert {piece.source for piece in each.pieces} == set("bdef")


def test_refresh_follows_another_writer(store: MemoryStore, folder: Path) -> None:
    reader = store.bank("notes", SPEC)
    with MemoryStore.open(folder) as other:
        writer = other.bank("notes", SPEC)
        writer.append(make_entry("a", "one "))
        assert len(reader) == 0
        reader.refresh()
        assert_same(reader, writer)
        writer.append(make_entry("b", "other"))
        writer.forget("a")
        writer.append(make_entry("a", "new"))
        reader.refresh()
        assert_same(reader, writer)
        writer.append(make_entry("a", " end", 3))
        # An append takes over first what was written before it, so that memory and disk keep one order.
        reader.append(make_entry("c", "mine"))
        writer.refresh()
        assert_same(reader, writer)
        assert_same(store.bank("notes"), reader)


# Errors change nothing


def test_entries_that_do_not_fit_leave_the_disk_alone(store: MemoryStore, folder: Path) -> None:
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "text"))
    before = files_of(folder)
    good = make_entry("a", "more", 4)
    for entry, error in (
        (replace(good, char_start=3), BankError),
        (replace(good, keys_HNE=good.keys_HNE.float()), BankError),
        (replace(good, text="mo\ud800e"), SourceError),
        (replace(good, source="\ud800", char_start=0), SourceError),
    ):
        with pytest.raises(error):
            bank.append(entry)
    with pytest.raises(SourceError):
        bank.forget("unknown")
    assert files_of(folder) == before
    assert bank.text_of("a") == store.bank("notes").text_of("a") == "text"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond a file size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 4096], ids=["segment", "manifest"])
def test_a_full_disk_leaves_nothing_behind(store: MemoryStore, folder: Path, size: int) -> None:
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "text"))
    before = files_of(folder)
    with largest_file(size), pytest.raises(StoreNotWritableError, match=re.escape(str(folder))):
        bank.append(make_entry("a", " more", 4))
    assert files_of(folder) == before
    assert bank.text_of("a") == store.bank("notes").text_of("a") == "text"
    bank.append(make_entry("a", " more", 4))
    assert store.bank("notes").text_of("a") == "text more"


def test_a_closed_store_says_so(store: MemoryStore) -> None:
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "text"))
    store.close()
    with pytest.raises(StoreError, match="closed"):
        bank.append(make_entry("b", "text"))
    assert bank.text_of("a") == "text"


def test_opening_without_creating_creates_nothing(folder: Path) -> None:
    with pytest.raises(StoreError, match="No store"):
        MemoryStore.open(folder, create=False)
    assert not folder.exists()


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "memories", Path("/proc/memories")):
        with pytest.raises(StoreNotWritableError, match=re.escape(str(path))):
            MemoryStore.open(path)
    assert file.read_text() == "mine"


def test_another_program_s_manifest_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    manifest = folder / "manifest.sqlite"
    with sqlite3.connect(manifest) as database:
        database.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StoreError, match="another program"):
        MemoryStore.open(folder)
    manifest.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreCorruptError, match="damaged"):
        MemoryStore.open(folder)


def test_a_later_format_is_refused(store: MemoryStore, folder: Path) -> None:
    with sqlite3.connect(folder / "manifest.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="format 99"):
        MemoryStore.open(folder)


def test_a_store_of_format_5_is_opened_as_it_is(store: MemoryStore, folder: Path) -> None:
    """Its banks have no grid."""
    spec = replace(SPEC, precision="int4", centre=centre_text(torch.ones(2, 2, 8)))
    bank, expected = store.bank("notes", spec), MemoryBank(spec)
    for each in (bank, expected):
        each.append(make_entry("a", "one two"))
    assert "grid" not in spec.to_json()
    store.close()
    with sqlite3.connect(folder / "manifest.sqlite") as database:
        database.execute("PRAGMA user_version = 5")
    database.close()
    for _ in range(2):
        with MemoryStore.open(folder) as again:
            assert_same(again.bank("notes"), expected)
            assert again.bank("notes").spec == spec and again.bank("notes").spec.grid is None
            assert again.verify().ok
    with sqlite3.connect(folder / "manifest.sqlite") as database:
        assert database.execute("PRAGMA user_version").fetchone() == (6,)
    database.close()


@contextmanager
def unprivileged() -> Iterator[None]:
    """As root, permissions stop nothing: be nobody for a while."""
    if os.geteuid() == 0:
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"root that cannot give up its rights: {error}")
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that everybody can reach (pytest's own cannot be), for stores that are made read-only."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        unlock(folder)


def unlock(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755)


def lock(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_no_store_is_created_in_a_read_only_folder(locked: Path) -> None:
    lock(locked)
    with unprivileged():
        for path in (locked, locked / "memories"):
            with pytest.raises(StoreNotWritableError, match="can be created"):
                MemoryStore.open(path)
    assert files_of(locked) == set()


def test_a_read_only_store_can_be_read(locked: Path) -> None:
    with MemoryStore.open(locked) as store:
        bank = store.bank("notes", SPEC)
        bank.append(make_entry("a", "text"))
    lock(locked)
    before = files_of(locked)
    with unprivileged(), MemoryStore.open(locked) as store:
        assert not store.writable
        bank = store.bank("notes", SPEC)
        assert bank.text_of("a") == "text"
        for attempt in (
            lambda: bank.append(make_entry("b", "text")),
            lambda: bank.forget("a"),
            lambda: store.bank("new", SPEC),
            lambda: store.delete("notes"),
        ):
            with pytest.raises(StoreNotWritableError, match="reading only"):
                attempt()
    assert files_of(locked) == before


def test_a_read_only_store_with_a_log_is_read_whole_or_not_at_all(
    store: MemoryStore, folder: Path, locked: Path
) -> None:
    store.bank("notes", SPEC).append(make_entry("a", "text"))
    # What a machine that loses power leaves, seen from a medium that cannot be written.
    shutil.copytree(folder, locked, dirs_exist_ok=True)
    lock(locked)
    with unprivileged(), MemoryStore.open(locked) as reader:
        assert reader.bank("notes").text_of("a") == "text"
    (locked / "manifest.sqlite-shm").unlink()
    with unprivileged(), pytest.raises(StoreError, match="unfinished log"):
        MemoryStore.open(locked)
    unlock(locked)
    with MemoryStore.open(locked) as recovered:
        assert recovered.bank("notes").text_of("a") == "text"


# Damage


def test_every_flipped_bit_is_found(store: MemoryStore, folder: Path) -> None:
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "good"))
    (good,) = segment_files(folder)
    bank.append(make_entry("b", "damaged"))
    (path,) = {*segment_files(folder)} - {good}
    original = path.read_bytes()
    for position in range(0, len(original), 97):
        damaged = bytearray(original)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(StoreCorruptError, match=rf"{path.name}.*source 'b'.*'notes'"):
            store.bank("notes")
    path.write_bytes(original[: len(original) // 2])
    for verify in (True, False):
        with pytest.raises(StoreCorruptError, match=path.name):
            store.bank("notes", verify=verify)
    path.write_bytes(original)
    assert store.bank("notes").text_of("b") == "damaged"


def test_a_missing_segment_is_named(store: MemoryStore, folder: Path) -> None:
    store.bank("notes", SPEC).append(make_entry("a", "text"))
    (path,) = segment_files(folder)
    path.unlink()
    with pytest.raises(StoreCorruptError, match=rf"{path.name} is missing.*source 'a'"):
        store.bank("notes")


def test_left_overs_of_a_crash_are_swept_and_running_writers_spared(folder: Path) -> None:
    with MemoryStore.open(folder) as store:
        store.bank("notes", SPEC).append(make_entry("a", "text"))
        (kept,) = segment_files(folder)
        orphan, left, foreign = (folder / "segments" / name for name in ("0.safetensors", "1.tmp", "readme.txt"))
        for path in (orphan, left, foreign):
            path.write_bytes(b"x")
        fresh = folder / "segments" / "2.tmp"
    with new_file(fresh) as file:
        file.write(b"x")
        with MemoryStore.open(folder) as store:
            assert set(segment_files(folder)) == {kept, fresh, foreign}
    with MemoryStore.open(folder) as store:
        assert set(segment_files(folder)) == {kept, foreign}
        assert store.bank("notes").text_of("a") == "text"


# Several processes


def write_forever(folder: str, pipe: Connection) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        while True:
            start = bank.length_of("diary")
            bank.append(make_entry("diary", f"{start:09} ", start, seed=start))
            pipe.send(start + 10)


def test_what_was_acknowledged_survives_kill_9(folder: Path) -> None:
    acknowledged = 0
    with MemoryStore.open(folder) as store:
        reader = store.bank("notes", SPEC)
        for attempt in range(5):
            ours, theirs = processes.Pipe(duplex=False)
            process = processes.Process(target=write_forever, args=(str(folder), theirs))
            process.start()
            theirs.close()
            for _ in range(3 + attempt):
                assert ours.poll(60)
                acknowledged = ours.recv()
                reader.refresh()  # a reader beside the writer sees whole entries, at least the acknowledged ones
                assert reader.length_of("diary") >= acknowledged
            # Somewhere in the middle of the next appends.
            time.sleep(0.003 * attempt)
            process.kill()
            process.join(60)
            while ours.poll():  # acknowledged before the kill, read after it
                try:
                    acknowledged = ours.recv()
                except EOFError:
                    break
            reader.refresh()
            length = reader.length_of("diary")
            assert acknowledged <= length <= acknowledged + 10
            assert reader.text_of("diary") == "".join(f"{start:09} " for start in range(0, length, 10))
            assert torch.equal(reader.keys_HNE[:, -10:], make_entry("", " " * 10, seed=length - 10).keys_HNE)
    with MemoryStore.open(folder) as store:
        assert_same(store.bank("notes"), reader)
        assert len([path for path in segment_files(folder) if path.suffix == ".safetensors"]) == length // 10


def write_both(folder: str, mine: str, rounds: int, pipe: Connection) -> None:
    """Write a source of one's own, and race for a shared one."""
    won = 0
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        for seed in range(rounds):
            bank.append(make_entry(mine, "x", bank.length_of(mine), seed))
            try:
                bank.append(make_entry("shared", mine, bank.length_of("shared"), seed))
                won += 1
            except BankError:
                bank.refresh()
    pipe.send(won)


def test_writers_of_one_bank_never_extend_a_source_twice_at_one_place(folder: Path) -> None:
    # The store and the bank are created in the race as well.
    rounds, running = 12, []
    for name in ("p", "q", "r"):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=write_both, args=(str(folder), name, rounds, theirs))
        process.start()
        running.append((name, process, ours))
    won = {}
    for name, process, ours in running:
        assert ours.poll(60)
        won[name] = ours.recv()
        process.join(60)
        assert process.exitcode == 0
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        for name in won:
            assert bank.length_of(name) == rounds
            assert bank.text_of("shared").count(name) == won[name]
        assert bank.length_of("shared") == sum(won.values()) == len(bank.tokens_of("shared"))


def test_two_banks_at_the_same_place_cannot_both_append(store: MemoryStore, folder: Path) -> None:
    with MemoryStore.open(folder) as other:
        first, second = store.bank("notes", SPEC), other.bank("notes", SPEC)
        first.append(make_entry("a", "text"))
        with pytest.raises(BankError, match="up to character 4"):
            second.append(make_entry("a", "late"))
        assert second.text_of("a") == "text"
        assert len(segment_files(folder)) == 1


# Indexes


def make_index(bank: MemoryBank, lists: bool = False) -> BankIndex:
    query_HQE = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(7))
    return BankIndex.choose(bank.keys_HNE, query_HQE, top_k=4, lists=lists)


@pytest.fixture
def indexed(store: MemoryStore) -> StoredBank:
    """A bank of two sources whose index is kept; a third was written afterwards."""
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "x" * 150, seed=1))
    bank.append(make_entry("b", "x" * 150, seed=2))
    bank.save_index(make_index(bank))
    bank.append(make_entry("c", "x" * 20, seed=3))
    return bank


def make_key_lists(bank: MemoryBank) -> BankIndex:
    """As an index is made on a GPU."""
    query_HQE = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(7))
    pairs = zip(bank.keys_HNE.split(1), query_HQE.split(1), strict=True)
    heads = tuple(KeyLists.choose(*pair, top_k=4, target=0.8, size=8, num_lists=9) for pair in pairs)
    return BankIndex(heads, 4, 0.8, fingerprint(bank.keys_HNE))


@pytest.mark.parametrize("kind", ["sketches", "lists", "key lists"])
def test_a_reopened_index_finds_the_same(store: MemoryStore, folder: Path, kind: str) -> None:
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "x" * 300))
    index = make_key_lists(bank) if kind == "key lists" else make_index(bank, kind == "lists")
    bank.save_index(index)
    assert bank.index is index
    bank.append(make_entry("b", "x" * 20, seed=1))
    query_HQE = torch.randn(2, 9, 8)
    expected = index.search(slice(0, 2), query_HQE, bank.keys_HNE, 4)
    for verify in (True, False):
        with MemoryStore.open(folder, create=False) as again:
            assert again.bank("notes").index is None  # exact unless asked for
            reopened = again.bank("notes", verify=verify, search="index")
            assert reopened.index is not None and reopened.index.recall == index.recall
            found = reopened.index.search(slice(0, 2), query_HQE, reopened.keys_HNE, 4)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_forgetting_removes_an_index_and_its_bytes(indexed: StoredBank, store: MemoryStore, folder: Path) -> None:
    other = store.bank("notes", search="index")
    assert (folder / "indexes" / "1.safetensors").is_file()
    indexed.forget("c")
    assert indexed.index is None and list((folder / "indexes").iterdir()) == []
    other.refresh()
    assert other.index is None
    with pytest.raises(
        BankIndexError, match=r"'notes' has no index\. Make one: `longmem index --store .* --bank notes`"
    ):
        store.bank("notes", search="index")


def test_deleting_a_bank_removes_its_index(indexed: StoredBank, store: MemoryStore, folder: Path) -> None:
    store.delete("notes")
    assert list((folder / "indexes").iterdir()) == []
    assert not store.bank("notes", SPEC).drop_index()


def test_a_bank_whose_deletion_fails_keeps_its_index(indexed: StoredBank, store: MemoryStore, folder: Path) -> None:
    with pytest.raises(SourceError):
        indexed.forget("z")
    assert store.bank("notes", search="index").index is not None


def test_an_index_that_does_not_fit_is_refused(indexed: StoredBank, store: MemoryStore, folder: Path) -> None:
    """Such as one that was copied from another store, or from a backup."""
    path = folder / "indexes" / "1.safetensors"
    kept = path.read_bytes()
    indexed.forget("a")
    indexed.append(make_entry("a", "x" * 200, seed=9))
    path.write_bytes(kept)
    with pytest.raises(BankIndexError, match=r"does not fit: it was made for 300 tokens .* the 370 remembered now"):
        store.bank("notes", search="index")
    assert len(store.bank("notes")) == 370


def test_no_index_is_kept_of_what_was_forgotten_meanwhile(
    indexed: StoredBank, store: MemoryStore, folder: Path
) -> None:
    index = make_index(indexed)
    store.bank("notes").forget("b")
    with pytest.raises(BankIndexError, match="was forgotten while its index was made"):
        indexed.save_index(index)
    assert list((folder / "indexes").iterdir()) == [] and indexed.index is None
    with pytest.raises(BankIndexError, match="170"):
        indexed.save_index(index)


def test_an_index_can_be_replaced_and_dropped(indexed: StoredBank, store: MemoryStore, folder: Path) -> None:
    indexed.save_index(make_index(indexed))
    assert len(store.bank("notes", search="index").index or ()) == 320
    assert [path.name for path in (folder / "indexes").iterdir()] == ["1.safetensors"]
    assert indexed.drop_index() and indexed.index is None
    assert not indexed.drop_index()
    assert list((folder / "indexes").iterdir()) == []


def test_an_outgrown_index_says_so(indexed: StoredBank, store: MemoryStore) -> None:
    indexed.append(make_entry("d", "x" * 60, seed=5))
    with pytest.warns(UserWarning, match=r"knows 300 of 380 tokens.*longmem index"):
        bank = store.bank("notes", search="index")
    assert bank.index is not None


def test_a_new_bank_has_no_index(store: MemoryStore) -> None:
    with pytest.raises(BankNotFoundError):
        store.bank("other", SPEC, search="index")
    assert store.banks() == []


def test_a_damaged_index_is_named_and_can_be_made_again(indexed: StoredBank, store: MemoryStore, folder: Path) -> None:
    path = folder / "indexes" / "1.safetensors"
    kept = path.read_bytes()
    for place in (0, 9, 300, len(kept) - 1):
        damaged = bytearray(kept)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(StoreCorruptError, match=r"1\.safetensors.*longmem index"):
            store.bank("notes", search="index")
    path.write_bytes(b"")
    with pytest.raises(StoreCorruptError, match="cannot be read"):
        store.bank("notes", search="index")
    path.write_bytes(kept.replace(b'"longmem_index":"2"', b'"longmem_index":"9"'))
    with pytest.raises(StoreCorruptError, match="index format 9"):
        store.bank("notes", search="index")
    indexed.save_index(make_index(indexed))
    assert store.bank("notes", search="index").index is not None


def test_left_overs_of_indexes_are_swept(indexed: StoredBank, folder: Path) -> None:
    indexes = folder / "indexes"
    (indexes / "99.safetensors").write_bytes(b"of a bank that is gone")
    (indexes / "old.tmp").write_bytes(b"")
    os.utime(indexes / "old.tmp", (0, 0))
    (indexes / "new.tmp").write_bytes(b"")
    with MemoryStore.open(folder) as again:
        assert sorted(path.name for path in indexes.iterdir()) == ["1.safetensors", "new.tmp"]
        assert again.bank("notes", search="index").index is not None


def test_an_index_of_a_full_disk_leaves_nothing_behind(
    indexed: StoredBank, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "indexes" / "1.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreNotWritableError, match=r"was not kept.*No space"):
        indexed.save_index(make_index(indexed))
    assert [path.read_bytes() for path in (folder / "indexes").iterdir()] == [before]


def test_a_file_that_goes_between_checksum_and_reading_is_no_damage(
    store: MemoryStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = store.bank("notes", SPEC)
    bank.append(make_entry("a", "gone"))
    bank.append(make_entry("b", "stays"))
    digest, forgotten = segments.digest, []

    def digest_then_forget(path: Path) -> str:
        found = digest(path)
        if not forgotten:
            forgotten.append(bank.forget("a"))
        return found

    monkeypatch.setattr(segments, "digest", digest_then_forget)
    assert store.bank("notes").sources == ("b",) and forgotten == [4]


# Stores of earlier versions

SCHEMA_1 = """
CREATE TABLE bank (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, revision INTEGER NOT NULL,
    created TEXT NOT NULL, updated TEXT NOT NULL
);
CREATE TABLE segment (
    id INTEGER PRIMARY KEY AUTOINCREMENT, bank INTEGER NOT NULL REFERENCES bank (id), ordinal INTEGER NOT NULL,
    source TEXT NOT NULL, char_start INTEGER NOT NULL, chars INTEGER NOT NULL, tokens INTEGER NOT NULL,
    file TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, created TEXT NOT NULL,
    UNIQUE (bank, ordinal)
);
PRAGMA application_id = 0x4C4D454D;
PRAGMA user_version = 1;
"""


def write_version_1(folder: Path, entries: list[BankEntry], spec: BankSpec = SPEC) -> None:
    """A store as the first version wrote it, with these entries in bank `notes`."""
    (folder / "segments").mkdir(parents=True)
    database = sqlite3.connect(folder / "manifest.sqlite")
    database.executescript(SCHEMA_1)
    day = "2026-01-31T12:00:00.000000+00:00"
    database.execute("INSERT INTO bank VALUES (1, 'notes', ?, ?, ?, ?)", (spec.to_json(), len(entries), day, day))
    for ordinal, entry in enumerate(entries):
        data = save(
            {
                "keys": entry.keys_HNE,
                "values": entry.values_HNE,
                "token_ids": entry.token_ids_N,
                "offsets": entry.offsets_N2,
                "text": torch.frombuffer(bytearray(entry.text.encode()), dtype=torch.uint8),
            },
            metadata={"longmem_segment": "1", "source": entry.source, "char_start": str(entry.char_start)},
        )
        file = f"{ordinal:032x}.safetensors"
        (folder / "segments" / file).write_bytes(data)
        place = (ordinal, entry.source, entry.char_start, len(entry.text), len(entry), file)
        row = (ordinal + 1, 1, *place, hashlib.sha256(data).hexdigest(), len(data), day)
        database.execute(f"INSERT INTO segment VALUES ({', '.join('?' * 11)})", row)
    database.commit()
    database.close()


def test_a_store_of_the_first_version_is_migrated(folder: Path) -> None:
    entries = [make_entry("a", "grüß "), make_entry("b", "other", 0, 1), make_entry("a", "dich", 5, 2)]
    write_version_1(folder, entries)
    expected = MemoryBank(SPEC)
    for entry in entries:
        expected.append(entry)
    for _ in range(2):
        with MemoryStore.open(folder) as store:
            bank = store.bank("notes", SPEC)
            assert_same(bank, expected)
            assert [info.source for info in bank.source_infos()] == ["a", "b"]
            more = make_entry("a", "!", expected.length_of("a"), 3)
            bank.append(more)
            expected.append(more)
    with MemoryStore.open(folder) as store:
        assert store.bank("notes").forget("b") == 5
        expected.forget("b")
        assert_same(store.bank("notes"), expected)
        assert len(segment_files(folder)) == 4


def test_a_store_of_the_first_version_can_be_read_where_it_cannot_be_migrated(locked: Path) -> None:
    entry = make_entry("a", "text")
    write_version_1(locked / "memories", [entry])
    lock(locked)
    before = {name: (locked / name).read_bytes() for name in files_of(locked)}
    with unprivileged(), MemoryStore.open(locked / "memories") as store:
        assert not store.writable
        bank = store.bank("notes", SPEC)
        assert bank.text_of("a") == "text" and torch.equal(bank.keys_HNE, entry.keys_HNE)
        (info,) = store.banks()
        assert (info.tokens, info.sources) == (4, 1)
        with pytest.raises(StoreNotWritableError):
            bank.forget("a")
    assert {name: (locked / name).read_bytes() for name in files_of(locked)} == before


def test_a_commit_that_only_the_log_knows_does_not_come_back_without_its_file(folder: Path, tmp_path: Path) -> None:
    """A process that is killed inside COMMIT may have written the log, and not the index of the log."""
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        bank.append(make_entry("a", "text"))
        index = folder / "manifest.sqlite-shm"
        before = index.read_bytes()
        bank.append(make_entry("b", "unseen"))
        with open(index, "r+b") as file:
            file.write(before)
        with MemoryStore.open(folder) as other:  # sweeps the file of b, which has no row
            assert other.bank("notes").sources == ("a",) and len(segment_files(folder)) == 1
        # All processes die; the next recovers the log.
        shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
        with MemoryStore.open(tmp_path / "copy") as recovered:
            assert recovered.bank("notes").sources == ("a",)


@given(
    st.lists(
        st.tuples(st.sampled_from([torch.uint8, torch.bfloat16, torch.int32, torch.float64]), st.integers(0, 7)),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
@settings(deadline=None)
def test_parts_of_a_file_are_one_that_safetensors_reads(
    shapes: list[tuple[torch.dtype, int]], metadata: dict[str, str]
) -> None:
    tensors = {str(i): (torch.randn(3, size, 5) * 9).to(dtype) for i, (dtype, size) in enumerate(shapes)}
    data = b"".join(as_parts(tensors, metadata))
    found = load(data)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == metadata
    for name, said in header.items():  # may be read where it lies
        assert said["data_offsets"][0] % tensors[name].element_size() == 0


def test_an_entry_is_stored_from_any_memory(folder: Path) -> None:
    """Keys and values that are parts of other tensors, in any order of dimensions."""
    entry = make_entry("a", "some text")
    noise = torch.full((9, 2, 16), float("nan"), dtype=torch.bfloat16)
    noise[:, :, ::2] = entry.keys_HNE.transpose(0, 1)
    strided = replace(entry, keys_HNE=noise[:, :, ::2].transpose(0, 1))
    with MemoryStore.open(folder) as store:
        store.bank("notes", SPEC).append(strided)
    with MemoryStore.open(folder) as store:
        assert torch.equal(store.bank("notes").keys_HNE, entry.keys_HNE)
