"""Encrypted namespaces: nothing readable on the disk, everything works as without, and without the key nothing does."""

from __future__ import annotations

import importlib.metadata
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import SPEC, assert_same, largest_file, make_entry, make_index, readable, segment_files

from longmem.bank import BankEntry, DrawnOn, MemoryBank
from longmem.errors import (
    BankError,
    MissingExtraError,
    StoreCorruptError,
    StoreError,
    StoreKeyError,
    StoreNotWritableError,
)
from longmem.model import LongMem
from longmem.retention import Cap
from longmem.store import KeyFolder, MemoryStore, StoredBank, Stretch, encryption
from longmem.store.encryption import BLOCK_BYTES, Keys, Seal
from longmem.store.traces import needles, traces

pytest.importorskip("cryptography")

TEXT = "My sister Zoë hides the key of the boathouse under the third stone."
SOURCE = "the diary of a sister"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder) as store:
        yield store


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(tiny_model_dir), device="cpu")


def entries(source: str = SOURCE) -> list[BankEntry]:
    return [make_entry(source, TEXT), make_entry(source, TEXT, len(TEXT), seed=1), make_entry("other", TEXT, seed=2)]


def folder_of(store: MemoryStore) -> Path:
    """Of its keys."""
    assert isinstance(store.keys.provider, KeyFolder)
    return store.keys.provider.folder


def fill(bank: MemoryBank) -> MemoryBank:
    for entry in entries():
        bank.append(entry)
    return bank


def encrypted(store: MemoryStore, name: str = "user/1") -> StoredBank:
    store.encrypt(name)
    bank = store.bank(name, SPEC)
    fill(bank)
    return bank


def found(store: MemoryStore) -> set[str]:
    """What can be read of the entries: kinds of needles, names of sources, the key."""
    sought = {needle: kind for entry in entries() for needle, kind in needles(entry).items()}
    kinds: set[str] = {sought[needle] for needle in traces(store.folder, sought)}
    said = readable(store.folder)
    if SOURCE.encode() in said:
        kinds.add("source")
    for path in folder_of(store).glob("*") if folder_of(store).exists() else ():
        key = bytes.fromhex(path.read_text())
        kinds |= {"key" for part in (key, key.hex().encode(), key[:16]) if part in said}
    return kinds


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- sealing -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.binary(max_size=40), st.text(min_size=0, max_size=20), st.integers(1, 9))
def test_what_is_sealed_opens_under_its_name_alone(data: bytes, name: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryption, "BLOCK_BYTES", block)
        keys, key_id = in_memory()
        seal = Seal(keys, key_id)
        sealed = seal.data(data, name)
        assert keys.opened(sealed, name) == data and sealed != seal.data(data, name)
        assert keys.name(seal.name(name)) == name and seal.name(name) == seal.name(name) != seal.name(name + "'")
        with pytest.raises(StoreCorruptError):
            keys.opened(sealed, name + "'")
        for at in range(8, len(sealed)):
            changed = bytearray(sealed)
            changed[at] ^= 1
            with pytest.raises((StoreCorruptError, StoreKeyError)):
                keys.opened(bytes(changed), name)
        for end in range(encryption._HEADER_BYTES, len(sealed)):
            with pytest.raises(StoreCorruptError):
                keys.opened(sealed[:end], name)


def in_memory() -> tuple[Keys, str]:
    key = bytes(range(32))
    keys, key_id = Keys(KeyFolder(Path("nowhere"))), encryption._id_of(key)
    keys._known[key_id] = key
    return keys, key_id


def test_blocks_cannot_change_places() -> None:
    keys, key_id = in_memory()
    sealed, size = Seal(keys, key_id).data(bytes(3 * BLOCK_BYTES), "a"), BLOCK_BYTES + 16
    start = encryption._HEADER_BYTES
    blocks = [sealed[start + n * size :][:size] for n in range(3)]
    assert keys.opened(sealed, "a") == bytes(3 * BLOCK_BYTES)
    # The same zeros, and not the same bytes: no counter is used twice.
    assert len({bytes(block) for block in blocks}) == 3
    for order in ((1, 0, 2), (0, 2, 1), (0, 0, 2)):
        with pytest.raises(StoreCorruptError, match="belongs elsewhere"):
            keys.opened(sealed[:start] + b"".join(blocks[n] for n in order), "a")
    with pytest.raises(StoreCorruptError, match="expected in 3 blocks"):
        keys.opened(sealed[:-size], "a")


# ---- a bank --------------------------------------------------------------------------------------------------


def test_nothing_is_readable_and_everything_comes_back(store: MemoryStore, folder: Path) -> None:
    plain = fill(store.bank("plain", SPEC))
    assert found(store) == {"text", "token ids", "keys", "values", "source"}  # the scan can see
    store.delete("plain")
    assert found(store) == set()
    bank = encrypted(store)
    bank.save_index(make_index(bank))
    bank.keep_scores("surprise", {piece.id: torch.ones(piece.tokens) for piece in bank.pieces})
    bank.set_cap(Cap(tokens=10_000, policy="oldest", pinned=(SOURCE,)))
    assert found(store) == set()
    with MemoryStore.open(folder) as again:
        for verify in (True, False):
            opened = again.bank("user/1", verify=verify, search="index")
            assert_same(opened, plain)
            assert opened.cap == bank.cap and opened.cap is not None and opened.cap.pinned == (SOURCE,)
            assert all(bool((score == 1).all()) for score in opened.scores("surprise").values())
        assert again.verify().ok and again.banks()[0].sources == 2
    assert found(store) == set()


def test_a_key_is_readable_by_its_owner_alone(store: MemoryStore, folder: Path) -> None:
    store.encrypt("user/1")
    (key,) = folder_of(store).iterdir()
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o777 == 0o700
    assert key.parent == folder.with_name("memories.keys")
    with pytest.raises(StoreError, match="encrypted already"):
        store.encrypt("user/1")
    assert list(folder_of(store).iterdir()) == [key]


def test_keys_lie_where_one_says(tmp_path: Path) -> None:
    with MemoryStore.open(tmp_path / "memories", keys=tmp_path / "safe") as store:
        plain = fill(MemoryBank(SPEC))
        encrypted(store)
    with MemoryStore.open(tmp_path / "memories") as store, pytest.raises(StoreKeyError, match=r"memories\.keys"):
        store.bank("user/1")
    with MemoryStore.open(tmp_path / "memories", keys=tmp_path / "safe") as store:
        assert_same(store.bank("user/1"), plain)


def test_an_existing_namespace_is_written_anew(store: MemoryStore) -> None:
    other, bank = store.bank("team", SPEC), fill(store.bank("user/1", SPEC))
    other.append(make_entry("answer", "Under the stone.", seed=7))
    drawn = replace(
        make_entry("generated", "Under the third.", seed=8), drew_on=(DrawnOn("user/1", SOURCE, 3, 9, 0.5),)
    )
    other.append(drawn)
    assert isinstance(bank, StoredBank)
    bank.keep_scores("surprise", {bank.pieces[0].id: torch.ones(bank.pieces[0].tokens)})
    bank.save_index(make_index(bank))
    store.fork("user/1", "user/1/draft")
    store.encrypt("user/1")
    assert found(store) == set()
    bank.refresh()
    for name in ("user/1", "user/1/draft"):
        assert_same(store.bank(name), bank)
    assert store.verify().ok and not store.index_path(bank.id).exists()
    assert bank.scores("surprise")[bank.pieces[0].id].tolist() == [1.0] * bank.pieces[0].tokens
    assert [one.source for one in store.preview_forget("user/1", [Stretch(SOURCE)]).generated] == ["generated"]
    store.forget("user/1", [Stretch(SOURCE)])
    assert store.manifest.query("SELECT * FROM drew") == []


def test_a_fork_cannot_be_encrypted_alone(store: MemoryStore) -> None:
    fill(store.bank("user/1", SPEC))
    store.fork("user/1", "user/1/draft")
    with pytest.raises(BankError, match="encrypted as a whole"):
        store.encrypt("user/1/draft")
    store.encrypt("user/1/later")
    with pytest.raises(StoreError, match="of its own"):
        store.fork("user/1", "user/1/later")
    assert len(list(folder_of(store).iterdir())) == 1


def test_an_append_that_was_under_way_is_not_written_in_the_clear(store: MemoryStore, folder: Path) -> None:
    bank, write = store.bank("user/1", SPEC), store.write_segment

    def encrypt_meanwhile(*arguments):
        new = write(*arguments)
        with MemoryStore.open(folder) as other:
            other.encrypt("user/1")
        return new

    store.write_segment = encrypt_meanwhile
    with pytest.raises(StoreError, match="meanwhile"):
        bank.append(entries()[0])
    store.write_segment = write
    assert segment_files(folder) == []
    bank.append(entries()[0])
    assert found(store) == set() and len(store.bank("user/1")) == len(entries()[0])


# ---- operations ----------------------------------------------------------------------------------------------


def test_operations_keep_it_encrypted(store: MemoryStore, tmp_path: Path) -> None:
    bank = encrypted(store)
    store.consolidate("user/1")
    store.fork("user/1", "user/1/draft")
    store.fork("user/1", "user/2")
    assert store.seal("user/2").key_id not in (None, store.seal("user/1").key_id)
    assert store.seal("user/1/draft").key_id == store.seal("user/1").key_id
    assert found(store) == set() and store.verify().ok
    for name in ("user/1", "user/1/draft", "user/2"):
        assert_same(store.bank(name), bank)
    store.bank("user/2").append(make_entry("new", "Something else.", seed=3))
    assert store.merge("user/1", "user/2") == len("Something else.")
    assert store.diff("user/1", "user/2").same == (SOURCE, "other", "new")
    store.bank("plain", SPEC)
    with pytest.raises(StoreError, match="is not: nothing was merged"):
        store.merge("plain", "user/1")
    file = tmp_path / "user.longmem"
    with pytest.raises(StoreError, match="plain=True"):
        store.export("user/1", file)
    assert not file.exists()
    store.export("user/1", file, plain=True)
    assert TEXT.encode() in readable(file.parent) or SOURCE.encode() in file.read_bytes()
    store.encrypt("user/3")
    store.import_(file, "user/3")
    assert_same(store.bank("user/3"), store.bank("user/1"))
    receipt = store.forget("user/1", [Stretch(SOURCE)])
    assert receipt.is_about(SOURCE) and store.is_genuine(receipt)
    assert store.bank("user/1").sources == ("other", "new") and SOURCE in store.bank("user/3").sources
    assert found(store) == set() and store.verify().ok


def test_parts_are_forgotten_and_damage_is_mended(store: MemoryStore, model: LongMem, folder: Path) -> None:
    store.encrypt("user/1")
    bank, never = store.bank("user/1", model.bank_spec), model.new_bank()
    model.write_text(bank, TINY_TEXT + TEXT + TINY_TEXT, source=SOURCE)
    model.write_text(never, TINY_TEXT * 2, source=SOURCE)
    store.forget("user/1", [Stretch(SOURCE, len(TINY_TEXT), len(TINY_TEXT) + len(TEXT))], model)
    bank.refresh()
    assert_same(bank, never)
    (segment,) = segment_files(folder)
    flip(segment, segment.stat().st_size // 2)
    report = store.verify()
    assert [fault.kind for fault in report.faults] == ["checksum"]
    (mended,) = store.repair(model)
    assert mended.pieces == 1 and store.verify().ok
    assert_same(store.bank("user/1"), never)
    assert found(store) == set()


# ---- without the key -----------------------------------------------------------------------------------------


def test_without_its_key_nothing_opens_and_nothing_is_lost(store: MemoryStore, folder: Path, model: LongMem) -> None:
    bank = encrypted(store)
    fill(store.bank("plain", SPEC))
    (key,) = folder_of(store).iterdir()
    kept, before = key.read_text(), segment_files(folder)
    for content, message in ((None, "not in"), ("00" * 32, "another key"), ("zz", "cannot be read")):
        key.unlink(missing_ok=True)
        if content is not None:
            key.write_text(content)
        with MemoryStore.open(folder) as again:
            with pytest.raises(StoreKeyError, match=message):
                again.bank("user/1")
            with pytest.raises(StoreKeyError, match=message):
                again.repair(model, "user/1")
            assert [fault.kind for fault in again.verify().faults] == ["key"]
            assert len(again.bank("plain")) == len(bank) and len(again.banks()) == 2
    key.write_text(kept)
    with MemoryStore.open(folder) as again:
        assert_same(again.bank("user/1"), bank)
        assert again.verify().ok and segment_files(folder) == before


def test_changed_bytes_are_named(store: MemoryStore, folder: Path) -> None:
    encrypted(store)
    one, two, _ = (store.folder / "segments" / piece.file for piece in store.pieces(1))
    data = one.read_bytes(), two.read_bytes()
    flip(one, len(data[0]) - 1)
    for verify, message in ((True, "is damaged: its sha256"), (False, "has changed, or belongs elsewhere")):
        with pytest.raises(StoreCorruptError, match=message):
            store.bank("user/1", verify=verify)
    # Two whole files of one key that change places.
    one.write_bytes(data[1]), two.write_bytes(data[0])
    with pytest.raises(StoreCorruptError, match="belongs elsewhere"):
        store.bank("user/1", verify=False)
    one.write_bytes(data[0]), two.write_bytes(data[1])
    # Two records.
    with sqlite3.connect(folder / "manifest.sqlite") as database:
        database.execute("UPDATE record SET data = (SELECT data FROM record WHERE piece = 2) WHERE piece = 1")
    database.close()
    assert [fault.kind for fault in store.verify().faults] == ["record"]
    with sqlite3.connect(folder / "manifest.sqlite") as database:
        database.execute("UPDATE piece SET source = CAST(source || X'00' AS BLOB) WHERE id = 1")
    database.close()
    with pytest.raises(StoreCorruptError, match="name of a source"):
        store.bank("user/1")


def test_destroying_the_key_forgets_in_every_copy(store: MemoryStore, folder: Path, tmp_path: Path) -> None:
    bank = encrypted(store)
    encrypted(store, "user/2")
    shutil.copytree(folder, tmp_path / "backup")
    store.destroy_key("user/1")
    assert len(list(folder_of(store).iterdir())) == 1
    for copy in (folder, tmp_path / "backup"):
        with MemoryStore.open(copy, keys=folder_of(store)) as again:
            with pytest.raises(StoreKeyError, match="destroyed"):
                again.bank("user/1")
            assert_same(again.bank("user/2"), bank)
    with pytest.raises(StoreKeyError):
        bank.append(make_entry("late", TEXT))
    with pytest.raises(StoreError, match="Delete its banks"):
        store.encrypt("user/1")
    store.delete("user/1")
    store.encrypt("user/1")
    assert_same(fill(store.bank("user/1", SPEC)), store.bank("user/2"))
    with pytest.raises(StoreError, match="no key"):
        store.destroy_key("user/3")


def test_generated_text_whose_key_is_gone_is_named_and_left(store: MemoryStore) -> None:
    """Nobody can read it: it must not keep others from forgetting what it drew on."""
    fill(store.bank("team", SPEC))
    encrypted(store)
    bank = store.bank("user/1")
    bank.append(replace(make_entry("reply", "Under it.", seed=8), drew_on=(DrawnOn("team", SOURCE, 3, 9, 0.5),)))
    other = store.bank("other", SPEC)
    other.append(replace(make_entry("more", "It is.", seed=9), drew_on=(DrawnOn("user/1", "reply", 0, 5, 0.5),)))
    seen = store.preview_forget("team", [Stretch(SOURCE)])
    assert {one.source for one in seen.generated} == {"reply", "more"} and seen.unreadable == ()
    store.destroy_key("user/1")
    seen = store.preview_forget("team", [Stretch(SOURCE)])
    assert [one.source for one in seen.generated] == ["more"] and seen.unreadable == ("user/1",)
    store.forget("team", [Stretch(SOURCE)])
    assert store.bank("team").sources == ("other",)


class Service:
    """A keeper of keys that is no folder."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def get(self, key_id: str) -> bytes | None:
        return self.kept.get(key_id)

    def put(self, key_id: str, key: bytes) -> None:
        self.kept[key_id] = key

    def destroy(self, key_id: str) -> bool:
        return self.kept.pop(key_id, None) is not None

    def __str__(self) -> str:
        return "the service"


def test_keys_can_be_kept_by_a_service(folder: Path) -> None:
    service, plain = Service(), fill(MemoryBank(SPEC))
    with MemoryStore.open(folder, keys=service) as store:
        encrypted(store)
        assert_same(store.bank("user/1"), plain)
    assert len(service.kept) == 1 and not folder.with_name("memories.keys").exists()
    with MemoryStore.open(folder) as store:
        assert [info.key for info in store.banks()] == ["missing"]
    with MemoryStore.open(folder, keys=service) as store:
        assert_same(store.bank("user/1"), plain)
        assert [info.key for info in store.banks()] == ["there"]
        kept = dict(service.kept)
        service.kept = {key_id: bytes(32) for key_id in kept}
    with (
        MemoryStore.open(folder, keys=service) as store,
        pytest.raises(StoreKeyError, match="service holds another"),
    ):
        store.bank("user/1")
    service.kept = kept
    with MemoryStore.open(folder, keys=service) as store:
        store.bank("plain", SPEC)
        store.destroy_key("user/1")
        assert service.kept == {} and [info.key for info in store.banks()] == ["none", "destroyed"]
        with pytest.raises(StoreKeyError, match="not in the service"):
            store.bank("user/1")


def test_a_service_that_refuses_has_destroyed_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    with MemoryStore.open(folder, keys=service) as store:
        bank = encrypted(store)
        with monkeypatch.context() as patch, pytest.raises(NotADirectoryError):
            patch.setattr(service, "destroy", lambda key_id: Path(__file__, key_id).unlink())
            store.destroy_key("user/1")
        assert store.receipts() == [] and [info.key for info in store.banks()] == ["there"]
        bank.append(make_entry("later", TEXT))
        store.destroy_key("user/1")


def test_a_destroyed_key_gives_a_receipt(store: MemoryStore) -> None:
    bank = encrypted(store)
    store.tag("user/1", "first", 1)
    key_id = store.seal("user/1").key_id
    receipt = store.destroy_key("user/1")
    assert receipt.destroyed_key == key_id and receipt.tokens_of("user/1") == len(bank)
    assert receipt.facts["banks"][0]["tags"] == ["first"]
    assert store.is_genuine(receipt) and store.receipts("user/1") == [receipt] == [store.destroy_key("user/1")]
    assert store.verify().faults[0].kind == "key"


def test_a_key_that_is_not_there_is_not_destroyed(store: MemoryStore) -> None:
    bank = encrypted(store)
    (key,) = folder_of(store).iterdir()
    away = key.rename(key.with_suffix(".away"))
    with MemoryStore.open(store.folder) as other, pytest.raises(StoreKeyError, match="was not destroyed"):
        other.destroy_key("user/1")
    assert store.receipts() == []
    away.rename(key)
    with MemoryStore.open(store.folder) as other:
        assert_same(other.bank("user/1"), bank)
        other.bank("user/1").append(make_entry("later", TEXT))
        other.destroy_key("user/1")


def test_nobody_writes_with_a_key_that_was_destroyed(store: MemoryStore, folder: Path) -> None:
    """Others keep it in memory: what they wrote could be read by nobody when they have ended."""
    encrypted(store)
    with MemoryStore.open(folder) as other:
        bank = other.bank("user/1")
        store.destroy_key("user/1")
        before = segment_files(folder)
        with pytest.raises(StoreKeyError, match="was destroyed on"):
            bank.append(make_entry("late", TEXT))
        assert segment_files(folder) == before


def test_a_store_of_format_3_can_be_encrypted(store: MemoryStore, folder: Path) -> None:
    plain = fill(store.bank("user/1", SPEC))
    store.close()
    with sqlite3.connect(folder / "manifest.sqlite") as database:
        database.execute("DROP TABLE encryption")
        database.execute("DROP TABLE commits")
        database.execute("DROP TABLE location")
        database.execute("PRAGMA user_version = 3")
    database.close()
    (folder / "twin.sqlite").unlink()
    with MemoryStore.open(folder) as again:
        again.encrypt("user/1")
        assert_same(again.bank("user/1"), plain)
        assert found(again) == set()


def test_without_the_package_nothing_is_written(
    store: MemoryStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert importlib.metadata.version("cryptography")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.kdf.hkdf", None)
    with pytest.raises(MissingExtraError, match=r"longmem\[encryption\]"):
        store.encrypt("user/1")
    assert not folder_of(store).exists() and store.seal("user/1").key_id is None


def test_a_disk_that_is_full_leaves_the_bank_as_it_was(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = fill(store.bank("user/1", SPEC))
    before = segment_files(store.folder)
    with largest_file(1000), pytest.raises(StoreNotWritableError):
        store.encrypt("user/1")
    assert segment_files(store.folder) == before and store.seal("user/1").key_id is None
    assert list(folder_of(store).iterdir()) == []
    assert_same(store.bank("user/1"), bank)
