"""Stored banks are kept to a cap: on disk what it says, read the same again, and mended to the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tiny
import torch
from conftest import TINY_TEXT
from test_store import assert_same, segment_files

from longmem.bank import MemoryBank
from longmem.errors import BankError, ConfigError
from longmem.keeping import retain
from longmem.model import LongMem
from longmem.retention import Cap
from longmem.store import MemoryStore, StoredBank


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder) as store:
        yield store


def write(bank: MemoryBank, model: LongMem) -> None:
    model.write_text(bank, TINY_TEXT, source="a")
    model.write_text(bank, "Bees dream of the sea. " * 3, source="b")
    model.write_text(bank, "The lighthouse was lit in March.\n", source="a", append=True)


@pytest.fixture
def bank(store: MemoryStore, model: LongMem) -> StoredBank:
    bank = store.bank("notes", model.bank_spec)
    write(bank, model)
    return bank


@pytest.mark.parametrize("policy", ["oldest", "duplicates", "surprise"])
@pytest.mark.parametrize("consolidated", [False, True])
def test_a_thinned_bank_is_the_same_in_memory_on_disk_and_mended(store, folder, bank, model, policy, consolidated):
    whole = model.new_bank()
    write(whole, model)
    if consolidated:
        store.consolidate("notes")
        bank.refresh()
    elsewhere = MemoryStore.open(folder)
    reader = elsewhere.bank("notes")
    cap = Cap(tokens=len(bank) // 2, policy=policy, unit=4)
    before = store.banks()[0]
    previewed = retain(bank, cap, model=model, preview=True)
    assert len(bank) == len(whole) and len(reader) == len(whole)
    done = retain(bank, cap, model=model)
    assert torch.equal(done.keep_N, previewed.keep_N) and len(bank) == done.rows <= len(whole) // 2
    whole.thin(done.keep_N)
    reader.refresh()
    for each in (bank, reader, store.bank("notes")):
        assert_same(each, whole)
        assert torch.equal(each.place_N, whole.place_N)
    after = store.banks()[0]
    assert (after.tokens, after.rows) == (before.tokens, done.rows) and after.bytes < before.bytes
    assert store.verify().ok
    # A damaged segment is encoded again, and thinned as it was.
    damaged = segment_files(folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert not store.verify().ok
    store.repair(model)
    assert store.verify().ok
    assert_same(store.bank("notes"), whole)
    store.consolidate("notes")
    assert_same(store.bank("notes"), whole)
    # It is continued as if nothing had gone, and forgets.
    for each in (store.bank("notes"), whole):
        model.write_text(each, "More of it.", source="a", append=True)
        assert each.forget("b") == len(model.tokenizer("Bees dream of the sea. " * 3).input_ids)
    assert_same(store.bank("notes"), whole)
    assert store.verify().ok
    elsewhere.close()


def test_a_thinned_bank_is_read_as_its_rows(store, bank, model):
    """Logits are those of a bank that was given these rows alone."""
    retain(bank, Cap(tokens=len(bank) // 2, policy="surprise", unit=1), model=model)
    bare = MemoryBank(bank.spec)
    other = model.new_bank()
    write(other, model)
    assert 0 < len(bank) < len(other)
    ids_1T = tiny.tokens(1, 9)
    found = model(ids_1T, bank)
    assert not torch.equal(found.logits_BTV, model(ids_1T, other).logits_BTV)
    keys_HNE, values_HNE = bank.keys_HNE, bank.values_HNE
    from longmem.bank import BankEntry

    places = torch.arange(len(bank))
    offsets_N2 = torch.stack((places, places + 1), dim=1)
    bare.append(BankEntry("x", "x" * len(bank), 0, bank.token_ids_N, offsets_N2, keys_HNE, values_HNE))
    assert torch.equal(found.logits_BTV, model(ids_1T, bare).logits_BTV)
    for hit in model.recall("Where do the bees sleep?", bank=bank, top_k=3):
        assert bank.text_of(hit.source, hit.start, hit.end) == hit.text


def test_a_cap_that_is_set_is_kept_after_writes(store, model):
    bank = store.bank("notes", model.bank_spec)
    bank.set_cap(Cap(tokens=20, unit=4))
    for number in range(8):
        model.write_text(bank, f"Note {number}: bees, boats and honey.", source=f"note {number}")
        assert len(bank) <= 22  # a tenth more is let pass
    assert "note 0" in bank.sources and len(bank.tokens_of("note 0")) > 0  # thinned, not forgotten
    assert int((bank.source_index_N == 7).sum()) == len(bank.tokens_of("note 7"))
    again = store.bank("notes")
    assert again.cap == Cap(tokens=20, unit=4)
    assert_same(again, bank)
    bank.set_cap(None)
    model.write_text(bank, TINY_TEXT, source="long")
    assert len(bank) > 22 and bank.cap is None


def test_what_nobody_attends_to_goes_first(store, bank, model):
    cap = Cap(tokens=len(bank) // 2, policy="attention", unit=2)
    with pytest.raises(ConfigError, match="Nobody has attended"):
        retain(bank, cap, model=model)
    for _ in model.generate("Ada keeps", bank=bank, max_new_tokens=4, attribute=True):
        pass
    scores = bank.scores("attention")
    assert scores and all(bool((score_M >= 0).all()) for score_M in scores.values())
    total = sum(float(score_M.sum()) for score_M in scores.values())
    assert total > 0
    row = int(bank.place_N.max())
    bank.attend(torch.tensor([0, row]), torch.tensor([100.0, 50.0]))
    bank.save_attention()
    assert sum(float(score_M.sum()) for score_M in bank.scores("attention").values()) == pytest.approx(total + 150)
    first, last = bank.span(0, 0), bank.span(row, row)
    retain(bank, cap, model=model)
    assert bank.span(0, 0) == first
    assert last in [bank.span(position, position) for position in range(len(bank))]


def test_a_write_does_not_fail_for_a_cap(store, folder, model):
    """Neither where nobody has attended to anything yet, nor where a reader can keep no counts."""
    bank = store.bank("notes", model.bank_spec)
    bank.set_cap(Cap(tokens=20, unit=4, policy="attention"))
    for number in range(3):
        model.write_text(bank, TINY_TEXT, source=f"note {number}")
        assert len(bank) <= 22
    bank.attend(torch.tensor([0]), torch.tensor([1.0]))
    store.close()
    bank.save_attention()


def test_old_sources_are_forgotten_text_and_all(store, bank, model):
    then = (datetime.now(UTC) - timedelta(days=40)).isoformat(timespec="microseconds")
    with store.manifest.transaction() as database:
        database.execute("UPDATE piece SET created = ? WHERE source = 'b'", (then,))
    fresh = store.bank("notes")
    done = retain(fresh, Cap(days=30))
    assert done.forgotten == ("b",) and fresh.sources == store.bank("notes").sources == ("a",)
    assert retain(fresh, Cap(days=30)).forgotten == ()


def test_surprise_is_how_badly_the_backbone_predicts(model):
    ids_N = torch.tensor(model.tokenizer(TINY_TEXT).input_ids)
    whole = model.surprise(ids_N)
    assert whole.shape == ids_N.shape and bool((whole > 0).all())
    # A pure function of the source so far.
    torch.testing.assert_close(model.surprise(ids_N, 30), whole[30:])
    logits_TV = model.backbone.logits(
        model.backbone(model.with_prefix(ids_N[:23])[None], boundaries={4}).hidden_states[4]
    )[0]
    expected = torch.nn.functional.cross_entropy(logits_TV, ids_N[:24], reduction="none")
    torch.testing.assert_close(whole[:24], expected)


def test_what_cannot_be_decided_changes_nothing(store, bank, model):
    before = len(bank)
    with pytest.raises(ConfigError, match="needs the model"):
        retain(bank, Cap(tokens=5, policy="surprise"))
    keep_N = torch.ones(before, dtype=torch.bool)
    keep_N[3] = False
    model.write_text(store.bank("notes"), "Meanwhile.", source="other")
    with pytest.raises(BankError, match="has changed since"):
        bank.thin(keep_N)
    assert len(store.bank("notes")) > before and store.verify().ok
