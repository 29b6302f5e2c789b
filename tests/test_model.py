"""LongMem: writing is a pure function of a source's own tokens, reading is checked, and both survive the disk."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.config import EncodeConfig
from longmem.errors import BankMismatchError, CheckpointError, ConfigError, SideNetNotFoundError, SourceError
from longmem.model import LongMem
from longmem.store import MemoryStore

MODEL = tiny.model("llama")  # windows of 24 tokens behind up to 8 of context
STRIDE, OVERLAP = 24, 8
IDS_N = tiny.tokens(70)


def assert_same_up_to_rounding(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Batches of another shape add up in another order, and the bank's dtype has eight bits."""
    for mine_HNE, other_HNE in zip(mine, other, strict=True):
        assert mine_HNE.dtype == torch.bfloat16
        torch.testing.assert_close(mine_HNE, other_HNE, atol=2e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_token_is_encoded_in_the_window_of_its_cell(family: str) -> None:
    model = tiny.model(family)
    keys_HNE, values_HNE = model.encode(IDS_N)
    assert keys_HNE.shape == values_HNE.shape == (3, 70, model.backbone.head_dim)
    for cell in range(3):
        begin, end = cell * STRIDE, min((cell + 1) * STRIDE, 70)
        context = max(0, begin - OVERLAP)
        prefix_1 = torch.tensor([model.backbone.prefix_token_id])
        window_1T = torch.cat((prefix_1, IDS_N[context:end]))[None]
        seen = model.backbone(window_1T, boundaries=(1, 2))
        for head, (layer, kv_head) in enumerate(model.config.memory_heads):
            key_BKTE, value_BKTE = model.backbone.keys_values(layer, seen.hidden_states[layer])
            kept = slice(begin - context + 1, end - context + 1)  # neither prefix nor context
            assert_same_up_to_rounding(
                (keys_HNE[head, begin:end], values_HNE[head, begin:end]),
                (key_BKTE[0, kv_head, kept].bfloat16(), value_BKTE[0, kv_head, kept].bfloat16()),
            )


@given(st.integers(0, 70), st.data())
def test_keys_do_not_depend_on_later_tokens(end: int, data: st.DataObject) -> None:
    others_N = tiny.tokens(data.draw(st.integers(0, 40)), seed=5)
    whole = MODEL.encode(IDS_N)
    changed = MODEL.encode(torch.cat((IDS_N[:end], others_N)))
    assert_same_up_to_rounding(
        (changed[0][:, :end], changed[1][:, :end]),
        (whole[0][:, :end], whole[1][:, :end]),
    )


@pytest.mark.parametrize("place", [0, 15, 16, 23, 24, 39, 40, 69])
def test_a_token_is_seen_in_its_own_cell_and_by_the_overlap_of_the_next(place: int) -> None:
    changed_N = IDS_N.clone()
    changed_N[place] = (changed_N[place] + 1) % tiny.VOCABULARY
    same_N = (MODEL.encode(IDS_N)[0] == MODEL.encode(changed_N)[0]).all(-1).all(0)
    cell_end = (place // STRIDE + 1) * STRIDE
    reach = cell_end + (STRIDE if cell_end - place <= OVERLAP else 0)
    assert same_N[:place].all() and same_N[reach:].all()
    assert not same_N[place]
    if reach > cell_end and cell_end < 70:
        assert not same_N[cell_end:reach].all()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 70), max_size=5))
def test_keys_do_not_depend_on_the_pieces_a_source_came_in(cuts: list[int]) -> None:
    pieces = [MODEL.encode(IDS_N[:end], begin) for begin, end in pairwise([0, *sorted(cuts), 70])]
    together = torch.cat([keys for keys, _ in pieces], dim=1), torch.cat([values for _, values in pieces], dim=1)
    assert_same_up_to_rounding(together, MODEL.encode(IDS_N))


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_keys_do_not_depend_on_how_many_windows_share_a_batch(batch_size: int) -> None:
    ids_N = tiny.tokens(150)
    assert_same_up_to_rounding(MODEL.encode(ids_N, batch_size=batch_size), MODEL.encode(ids_N, batch_size=1))


def test_progress_counts_every_new_token_once() -> None:
    counts: list[int] = []
    MODEL.encode(IDS_N, 30, on_tokens=counts.append)
    assert sum(counts) == 40


@settings(max_examples=20)
@given(st.lists(st.integers(0, len(TINY_TEXT.split(" ")) - 1), max_size=4))
def test_a_text_written_in_pieces_is_the_text_written_at_once(model: LongMem, cuts: list[int]) -> None:
    words = TINY_TEXT.split(" ")
    # Pieces begin with the space before a word, where the tokenizer would have cut anyway.
    pieces = [
        "".join(f" {word}" if begin + i else word for i, word in enumerate(words[begin:end]))
        for begin, end in pairwise([0, *sorted(cuts), len(words)])
    ]
    whole, pieced = model.new_bank(), model.new_bank()
    written = model.write_text(whole, TINY_TEXT, source="text")
    assert written == len(whole) == sum(model.write_text(pieced, p, source="text", append=True) for p in pieces)
    assert torch.equal(pieced.token_ids_N, whole.token_ids_N)
    assert torch.equal(pieced.offsets_N2, whole.offsets_N2)
    assert pieced.text_of("text") == whole.text_of("text") == TINY_TEXT
    assert_same_up_to_rounding((pieced.keys_HNE, pieced.values_HNE), (whole.keys_HNE, whole.values_HNE))


def test_sources_do_not_see_each_other(model: LongMem) -> None:
    alone, shared = model.new_bank(), model.new_bank()
    model.write_text(shared, "The harbour is quiet in winter. " * 3, source="first")
    before = len(shared)
    model.write_text(shared, TINY_TEXT, source="second")
    model.write_text(alone, TINY_TEXT, source="second")
    assert torch.equal(shared.keys_HNE[:, before:], alone.keys_HNE)
    assert torch.equal(shared.values_HNE[:, before:], alone.values_HNE)


def test_offsets_are_those_of_the_text(model: LongMem) -> None:
    bank = model.new_bank()
    text = "Bees – bees! Ådas båt, 蜜蜂.\n"
    model.write_text(bank, "Before. ", source="text")
    model.write_text(bank, text, source="text", append=True)
    assert bank.text_of("text") == "Before. " + text
    starts, ends = bank.offsets_N2.T.tolist()
    assert starts[0] == 0 and ends[-1] == len("Before. " + text)
    assert all(start <= previous for start, previous in zip(starts[1:], ends, strict=False))


def test_write_reads_a_file_and_names_it_by_its_path(model: LongMem, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(TINY_TEXT, encoding="utf-8")
    bank = model.new_bank()
    assert model.write(bank, path) == len(bank) > 0
    model.write(bank, path, source="again")
    assert bank.sources == (str(path), "again")


def test_what_cannot_be_written_is_refused_and_changes_nothing(model: LongMem, tmp_path: Path) -> None:
    bank = model.new_bank()
    model.write_text(bank, TINY_TEXT, source="text")
    length = len(bank)
    for text in ("", " \n"):
        with pytest.raises(SourceError, match="'new' is empty"):
            model.write_text(bank, text, source="new")
    with pytest.raises(SourceError, match=r"'text' is remembered already .* append"):
        model.write_text(bank, "More.", source="text")
    with pytest.raises(SourceError, match="does not exist"):
        model.write(bank, tmp_path / "missing.txt")
    assert len(bank) == length and bank.sources == ("text",)
    assert model.write_text(bank, "", source="text", append=True) == 0


def test_a_bank_of_another_model_is_neither_read_nor_written(model: LongMem, other_tiny_model_dir: Path) -> None:
    foreign = LongMem.from_pretrained(other_tiny_model_dir, device="cpu").new_bank()
    with pytest.raises(BankMismatchError, match="weights differ"):
        model.write_text(foreign, TINY_TEXT, source="text")
    with pytest.raises(BankMismatchError, match="weights differ"):
        model(tiny.tokens(1, 4), foreign)
    fewer = MemoryBank(tiny.model("llama").bank_spec)
    with pytest.raises(BankMismatchError):
        model(tiny.tokens(2, 4), [None, fewer])


@pytest.mark.parametrize("memory", [-0.1, 1.1, float("nan"), float("inf")])
def test_the_dial_has_two_ends(memory: float) -> None:
    with pytest.raises(ConfigError, match="memory is a dial"):
        MODEL(tiny.tokens(1, 4), memory=memory)


@pytest.mark.parametrize("banks", [0, 1, 3])
def test_every_row_needs_a_bank_or_none(banks: int) -> None:
    with pytest.raises(ConfigError, match=f"{banks} banks were given for a batch of 2 rows"):
        MODEL(tiny.tokens(2, 4), [None] * banks)


@torch.no_grad()
def test_one_bank_serves_every_row() -> None:
    ids_BT, bank = tiny.tokens(3, 9), tiny.bank(MODEL, 40)
    assert torch.equal(MODEL(ids_BT, bank).logits_BTV, MODEL(ids_BT, [bank] * 3).logits_BTV)


@torch.no_grad()
def test_the_last_position_alone_has_the_same_logits() -> None:
    ids_BT, bank = tiny.tokens(2, 9), tiny.bank(MODEL, 40)
    last_B1V = MODEL(ids_BT, bank, last_only=True).logits_BTV
    torch.testing.assert_close(last_B1V, MODEL(ids_BT, bank).logits_BTV[:, -1:])


@torch.no_grad()
def test_reading_writes_nothing_and_writing_reads_nothing() -> None:
    bank = tiny.bank(MODEL, 40)
    keys_HNE = bank.keys_HNE.clone()
    MODEL(tiny.tokens(2, 9), bank)
    assert torch.equal(bank.keys_HNE, keys_HNE)
    encoded = MODEL.encode(IDS_N)
    other_sidenet = tiny.model("llama").sidenet
    tiny.randomise(other_sidenet, 1.0, seed=7)
    again = LongMem(MODEL.backbone, other_sidenet).encode(IDS_N)
    assert torch.equal(again[0], encoded[0]) and torch.equal(again[1], encoded[1])


@pytest.mark.parametrize("name", ["smollm9", "no/such-folder", "../elsewhere"])
def test_a_name_without_a_sidenet_says_how_to_train_one(name: str) -> None:
    with pytest.raises(SideNetNotFoundError, match=f"longmem train DOCUMENTS --backbone {name}"):
        LongMem.from_pretrained(name)


def test_a_folder_that_holds_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json has format None"):
        LongMem.from_pretrained(tmp_path)


@pytest.mark.parametrize("update", ["alpha", "difference"])
@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_logits(update: str, tmp_path: Path) -> None:
    model = tiny.model("llama", update=update)
    model.save(tmp_path / "sidenet", precision="float32", training={"steps": 3})
    again = LongMem.from_pretrained(tmp_path / "sidenet", backbone=model.backbone)
    ids_BT, bank = tiny.tokens(2, 30), tiny.bank(model, 60)
    assert again.config == model.config
    assert torch.equal(again(ids_BT, bank).logits_BTV, model(ids_BT, bank).logits_BTV)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not any(module.training for module in again.modules())


@torch.no_grad()
def test_a_bank_written_closed_and_opened_again_gives_the_same_logits(model: LongMem, tmp_path: Path) -> None:
    ids_BT = tiny.tokens(1, 30)
    in_memory = model.new_bank()
    with MemoryStore.open(tmp_path / "memories") as store:
        stored = store.bank("notes", spec=model.bank_spec)
        for bank in (in_memory, stored):
            model.write_text(bank, TINY_TEXT, source="text")
            model.write_text(bank, "And then it rained.", source="text", append=True)
        expected_BTV = model(ids_BT, in_memory).logits_BTV
        assert torch.equal(model(ids_BT, stored).logits_BTV, expected_BTV)
    assert not torch.equal(model(ids_BT).logits_BTV, expected_BTV)
    with MemoryStore.open(tmp_path / "memories") as store:
        again = store.bank("notes", spec=model.bank_spec)
        assert torch.equal(model(ids_BT, again).logits_BTV, expected_BTV)


def test_a_bank_in_few_bits_is_centred_on_what_no_bank_remembers(model: LongMem) -> None:
    """One spec for every bank, and rows near to what was written."""
    spec = model.bank_spec_in("int4")
    assert spec == model.bank_spec and spec.centre == model.bank_spec_in("int8").centre
    assert model.bank_spec_in("full") == model.bank_spec and model.bank_spec_in("full").centre is None
    plain, few, bare = model.new_bank(), MemoryBank(spec), MemoryBank(replace(spec, centre=None))
    for bank in (plain, few, bare):
        model.write_text(bank, TINY_TEXT, source="a")
    error, worse = ((bank.keys_HNE.float() - plain.keys_HNE.float()).norm() for bank in (few, bare))
    assert 0 < error < worse < 0.2 * plain.keys_HNE.float().norm()


@torch.no_grad()
def test_four_bits_of_keys_go_where_they_decide_scores(tiny_model_dir: Path) -> None:
    """A bank of the model without a grid is read, too."""
    model = LongMem.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")
    for number in model.config.memory_layers:
        # Of a trained model keys vary in some coordinates far more than in others.
        layer: Any = model.backbone.layers[number]
        layer.self_attn.k_proj.weight[::3] *= 20
    spec = model.bank_spec_in("int4")
    assert spec.grid is not None and model.bank_spec_in("int8").grid is None
    assert model.bank_spec_in("int4") == spec and model.bank_spec_in("int4").grid == spec.grid
    plain, few, former = model.new_bank(), MemoryBank(spec), MemoryBank(replace(spec, grid=None))
    for bank in (plain, few, former):
        model.write_text(bank, TINY_TEXT, source="a")
        assert model(tiny.tokens(1, 9), bank).logits_BTV.isfinite().all()
    assert torch.equal(few.values_HNE, former.values_HNE) and not torch.equal(few.keys_HNE, former.keys_HNE)
    asked_HQE = model.asked(plain.token_ids_N[:40], plain)
    assert asked_HQE.shape[0] == len(spec.memory_heads) and asked_HQE.shape[1] % 40 == 0
    cost, formerly = ((asked_HQE @ (b.keys_HNE.float() - plain.keys_HNE.float()).mT).norm() for b in (few, former))
    assert 0 < cost < formerly


def test_both_precisions_of_one_backbone_share_banks(tiny_model_dir: Path) -> None:
    whole, half = (LongMem.from_pretrained(tiny_model_dir, device="cpu", dtype=d) for d in ("float32", "bfloat16"))
    assert half.backbone.dtype == half.sidenet.layers[0].alpha_D.dtype == torch.bfloat16
    assert whole.bank_spec == half.bank_spec
    bank = whole.new_bank()
    whole.write_text(bank, TINY_TEXT, source="text")
    with torch.no_grad():
        assert half(tiny.tokens(1, 9), bank).logits_BTV.isfinite().all()


def test_windows_without_overlap_are_independent() -> None:
    model = tiny.model("llama", encode=EncodeConfig(10, 0))
    whole = model.encode(IDS_N)
    second = model.encode(IDS_N[10:20])
    assert_same_up_to_rounding((whole[0][:, 10:20], whole[1][:, 10:20]), second)
