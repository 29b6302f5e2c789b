"""Segments that lie elsewhere: the same bank, whole before it is committed, gone when it is forgotten.

S3 is tested with moto's server, where moto and s3fs are installed.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import TINY_TEXT
from test_store import SPEC, assert_same, make_entry, make_index

from longmem.bank import MemoryBank
from longmem.errors import (
    ConfigError,
    MissingExtraError,
    StoreCorruptError,
    StoreError,
    StoreNotWritableError,
    StoreUnreachableError,
)
from longmem.model import LongMem
from longmem.store import MemoryStore, Stretch
from longmem.store.files import new_file
from longmem.store.remote import Remote

Place = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "key", "secret": "secret", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    fsspec.filesystem("s3", **options).call_s3("create_bucket", Bucket="bucket")
    yield options
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A location and how to get there."""
    name = uuid.uuid4().hex
    if request.param == "s3":
        return f"s3://bucket/{name}", request.getfixturevalue("s3")
    return (f"memory://{name}" if request.param == "memory" else f"file://{tmp_path}/elsewhere"), {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def store(folder: Path, place: Place) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder, segments=place[0], storage_options=place[1]) as store:
        yield store


@pytest.fixture
def remote(store: MemoryStore) -> Remote:
    assert store.files.remote is not None
    return store.files.remote


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(tiny_model_dir), device="cpu")


def copies(folder: Path) -> set[str]:
    return {path.name for path in (folder / "segments").iterdir()}


def drop_copies(folder: Path) -> None:
    for path in (folder / "segments").iterdir():
        path.unlink()


def fill(bank: MemoryBank) -> MemoryBank:
    for number in range(3):
        bank.append(make_entry(f"source {number}", f"text {number} " * 20, seed=number))
    return bank


def change(remote: Remote, file: str, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "changed").write_bytes(data)
    remote.put(tmp_path / "changed", file)


def test_a_bank_is_there_without_its_copies(store: MemoryStore, folder: Path, remote: Remote, place: Place) -> None:
    bank, plain = store.bank("notes", SPEC), fill(MemoryBank(SPEC))
    fill(bank)
    assert set(remote.names()) == copies(folder) and len(remote.names()) == 3
    store.close()
    drop_copies(folder)
    with MemoryStore.open(folder, storage_options=place[1]) as again:
        assert_same(again.bank("notes"), plain)
        assert copies(folder) == set(remote.names())
        report = again.verify()
        assert report.ok and report.orphans == ()


def test_every_operation_works_elsewhere(
    store: MemoryStore, folder: Path, remote: Remote, model: LongMem, tmp_path: Path
) -> None:
    bank, never = store.bank("notes", model.bank_spec), model.new_bank()
    for one, text in ((bank, TINY_TEXT + "secret " + TINY_TEXT), (never, TINY_TEXT * 2)):
        model.write_text(one, text, source="a")
        model.write_text(one, TINY_TEXT, source="b")
    store.consolidate("notes")
    drop_copies(folder)
    store.fork("notes", "copy")
    store.fork("notes", "notes/draft")
    store.forget("notes", [Stretch("a", len(TINY_TEXT), len(TINY_TEXT) + 7)], model)
    bank.refresh()
    # The part was encoded again, and comes behind what was written after it.
    assert bank.text_of("a") == never.text_of("a") and bank.text_of("b") == never.text_of("b")
    drop_copies(folder)
    store.export("notes", tmp_path / "file")
    store.import_(tmp_path / "file", "again")
    store.delete("copy")
    assert_same(store.bank("again"), store.bank("notes"))
    pytest.importorskip("cryptography")
    before = set(remote.names())
    store.encrypt("again")
    assert_same(store.bank("again"), store.bank("notes"))
    drop_copies(folder)
    assert_same(store.bank("again"), store.bank("notes"))
    assert set(remote.names()) != before and store.verify().ok and store.verify().orphans == ()
    for name in ("notes", "notes/draft", "again"):
        store.delete(name)
    assert remote.names() == [] and copies(folder) == set()


def test_what_is_forgotten_is_gone_there(store: MemoryStore, folder: Path, remote: Remote) -> None:
    bank = fill(store.bank("notes", SPEC))
    drop_copies(folder)
    store.forget("notes", [Stretch("source 1")])
    assert len(remote.names()) == 2 and copies(folder) == set()
    assert store.bank("notes").sources == ("source 0", "source 2") and len(bank) > 0


@pytest.mark.parametrize("damage", ["missing", "size", "checksum"])
def test_damage_there_is_named_and_mended(
    store: MemoryStore, folder: Path, remote: Remote, model: LongMem, tmp_path: Path, damage: str
) -> None:
    bank = store.bank("notes", model.bank_spec)
    model.write_text(bank, TINY_TEXT, source="a")
    ((file, data),) = [(path.name, path.read_bytes()) for path in (folder / "segments").iterdir()]
    if damage == "missing":
        remote.remove(file)
    else:
        change(remote, file, tmp_path, data[:-1] if damage == "size" else data[:-1] + bytes([data[-1] ^ 1]))
    assert [(fault.kind, fault.file) for fault in store.verify().faults] == [(damage, f"segments/{file}")]
    drop_copies(folder)
    with pytest.raises(StoreCorruptError):
        store.bank("notes")
    assert store.repair(model)[0].pieces == 1
    drop_copies(folder)
    assert store.verify().ok
    assert_same(store.bank("notes"), bank)


def test_a_damaged_copy_is_made_again(store: MemoryStore, folder: Path, model: LongMem) -> None:
    bank = store.bank("notes", model.bank_spec)
    model.write_text(bank, TINY_TEXT, source="a")
    (copy,) = (folder / "segments").iterdir()
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreCorruptError, match="longmem repair"):
        store.bank("notes")
    assert store.repair(model)[0].pieces == 0
    assert_same(store.bank("notes"), bank)


def test_what_killed_writers_left_there_goes(
    store: MemoryStore, folder: Path, remote: Remote, place: Place, tmp_path: Path, model: LongMem
) -> None:
    fill(store.bank("notes", SPEC))
    known, (lost, drafted, left) = remote.names(), (f"{digit * 32}.safetensors" for digit in "012")
    for file in (lost, drafted, left):
        change(remote, file, tmp_path, b"left")
    (folder / "segments" / left).write_bytes(b"left")
    with new_file(store.files.path(drafted).with_suffix(".tmp")) as file:
        file.write(b"being uploaded")
        file.flush()
        # What is here as well goes when the store is opened, or something is forgotten.
        with MemoryStore.open(folder, storage_options=place[1]):
            assert remote.names() == sorted([*known, lost, drafted])
        # The others have to be looked for.
        assert store.verify().orphans == (f"{remote.url}/{lost}",)
        store.repair(model)
        assert remote.names() == sorted([*known, drafted])
    store.bank("notes").forget("source 0")
    assert len(remote.names()) == 2 and set(remote.names()) < set(known)


# ---- what can go wrong ---------------------------------------------------------------------------------------


def test_the_manifest_remembers_where(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/elsewhere"
    with MemoryStore.open(folder, segments=f"{url}/") as store:
        fill(store.bank("notes", SPEC))
    with MemoryStore.open(folder) as store, MemoryStore.open(folder, segments=url):
        assert store.files.remote is not None and store.files.remote.url == url
    with pytest.raises(StoreError, match=f"are in {url}, not in memory://other"):
        MemoryStore.open(folder, segments="memory://other")
    with MemoryStore.open(tmp_path / "local") as store:
        fill(store.bank("notes", SPEC))
    with pytest.raises(StoreError, match="are in its folder, not in"):
        MemoryStore.open(tmp_path / "local", segments=url)


def test_a_lost_manifest_finds_its_segments(folder: Path, tmp_path: Path) -> None:
    with MemoryStore.open(folder, segments=f"file://{tmp_path}/elsewhere") as store:
        bank = fill(store.bank("notes", SPEC))
    drop_copies(folder)
    (folder / "manifest.sqlite").unlink()
    with pytest.raises(StoreCorruptError):
        MemoryStore.open(folder)
    MemoryStore.rebuild(folder)
    with MemoryStore.open(folder) as store:
        assert_same(store.bank("notes"), bank)
        assert store.verify().ok and store.verify().without_record == 0


def test_a_location_that_refuses(folder: Path, tmp_path: Path) -> None:
    """What cannot be uploaded was not written; what cannot be downloaded is not damaged."""
    elsewhere = tmp_path / "elsewhere"
    with MemoryStore.open(folder, segments=f"file://{elsewhere}") as store:
        bank = fill(store.bank("notes", SPEC))
        away = elsewhere.rename(tmp_path / "away")
        elsewhere.write_text("no folder")
        with pytest.raises(StoreUnreachableError, match=r"was not uploaded .*Nothing is lost"):
            bank.append(make_entry("later", "text"))
        assert "later" not in store.bank("notes").sources
        drop_copies(folder)
        with pytest.raises(StoreNotWritableError, match="Done, but"):
            store.forget("notes", [Stretch("source 0")])
        with pytest.raises(StoreUnreachableError, match="Nothing is taken for lost"):
            store.bank("notes")
        elsewhere.unlink()
        away.rename(elsewhere)
        assert store.bank("notes").sources == ("source 1", "source 2")
    with MemoryStore.open(folder) as store:
        store.forget("notes", [Stretch("source 1")])
        assert len(list(elsewhere.glob("*.safetensors"))) == 1


def test_a_location_that_is_not_there_has_lost_nothing(folder: Path, tmp_path: Path, model: LongMem) -> None:
    """A disk that is not mounted, say: nothing is encoded again, and nothing written where it should be."""
    elsewhere = tmp_path / "elsewhere"
    with MemoryStore.open(folder, segments=f"file://{elsewhere}") as store:
        fill(store.bank("notes", SPEC))
        drop_copies(folder)
        elsewhere.rename(tmp_path / "away")
        for act in (lambda: store.bank("notes"), lambda: store.repair(model), store.verify):
            with pytest.raises(StoreUnreachableError, match="Nothing is taken for lost"):
                act()
    assert not elsewhere.exists()


def test_no_two_stores_share_a_location(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/elsewhere"
    with MemoryStore.open(folder, segments=url) as store:
        fill(store.bank("notes", SPEC))
    with pytest.raises(StoreError, match="of another store"):
        MemoryStore.open(tmp_path / "other", segments=url)
    (tmp_path / "elsewhere" / "longmem-store").write_text("another")
    with MemoryStore.open(folder) as store, pytest.raises(StoreUnreachableError, match="is another store's"):
        store.verify()


def test_an_upload_that_is_gone_is_not_committed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryStore.open(folder, segments=f"file://{tmp_path}/elsewhere") as store:
        bank = fill(store.bank("notes", SPEC))
        put = Remote.put

        def put_half(self: Remote, local: Path, file: str) -> None:
            put(self, local, file)
            (tmp_path / "elsewhere" / file).write_bytes(b"half")

        monkeypatch.setattr(Remote, "put", put_half)
        with pytest.raises(StoreCorruptError, match="Nothing was written"):
            bank.append(make_entry("later", "text"))
        assert store.verify().ok and len(list((tmp_path / "elsewhere").glob("*.safetensors"))) == 3


def test_indexes_stay_here(folder: Path, tmp_path: Path) -> None:
    with MemoryStore.open(folder, segments=f"file://{tmp_path}/elsewhere") as store:
        bank = store.bank("notes", SPEC)
        fill(bank)
        bank.save_index(make_index(bank))
        assert store.bank("notes", search="index").index is not None
        assert len(list((tmp_path / "elsewhere").glob("*.safetensors"))) == 3


def test_locations_that_are_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no location that fsspec knows"):
        MemoryStore.open(folder, segments="nowhere://at/all")
    assert importlib.util.find_spec("gcsfs") is None
    with pytest.raises(MissingExtraError, match="gcsfs"):
        MemoryStore.open(folder, segments="gs://bucket/folder")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(MissingExtraError, match=r"longmem\[s3\]"):
            MemoryStore.open(folder, segments="s3://bucket/folder")
