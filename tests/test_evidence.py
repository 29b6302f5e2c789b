"""Passage evidence against loops over tokens, all at once and one by one."""

from __future__ import annotations

from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longmem.retrieved
from longmem.bank import MemoryBank
from longmem.evidence import PassageSums, SteadyPassageSums, faded_sums
from longmem.group import BankGroup
from longmem.model import LongMem
from longmem.ops import FADING, PASSAGE, PLACES
from longmem.steps import BatchDecoder

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@st.composite
def readings(draw: st.DrawFn) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where each layer's heads found what, and how much attention it drew."""
    batch, kv_heads, group, tokens, found, layers = (draw(st.integers(1, most)) for most in (2, 2, 2, 9, 4, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    # Few passages, so that they meet, and the first and the last place, which lie beside each other.
    starts = torch.tensor([0, 1, 3, PLACES - 1, PLACES, 7 * PLACES + 3])
    shape = (batch, kv_heads, group, tokens, found)
    made = []
    for _ in range(layers):
        passage = starts[torch.randint(len(starts), shape, generator=random)]
        index = passage * PASSAGE + torch.randint(PASSAGE, shape, generator=random)
        made.append((index, torch.rand(shape, generator=random)))
    return made


def expected(reads: list[tuple[torch.Tensor, torch.Tensor]], layer: int, place: tuple[int, ...]) -> float:
    """What others drew to the passage of one token, and those beside it: of this layer before its query, of the
    layers below up to it."""
    index, _ = reads[layer]
    b, t = place[0], place[3]
    near = [(int(index[place]) // PASSAGE + beside) % PLACES for beside in (-1, 0, 1)]
    total = 0.0
    for other in range(layer + 1):
        others, weights = reads[other]
        for earlier in range(t + (other < layer)):
            here = others[b, :, :, earlier] // PASSAGE % PLACES
            drawn = sum(float(weights[b, :, :, earlier][here == passage].sum()) for passage in near)
            total += FADING ** (t - earlier) * drawn
    return total


@settings(max_examples=30)
@given(readings(), st.integers(1, 9))
def test_evidence_is_what_the_tokens_before_and_the_layers_below_drew(reads: list, first: int) -> None:
    tokens = reads[0][0].shape[3]
    whole, pieces = PassageSums(), PassageSums()
    sums = []
    whole.start()
    for layer, (index, weight) in enumerate(reads):
        sums.append(whole.evidence(layer, index, weight))
        for place in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).view(-1, 5)[:40].tolist():
            assert float(sums[layer][tuple(place)]) == pytest.approx(expected(reads, layer, tuple(place)), abs=1e-4)
    for begin, end in ((0, min(first, tokens)), (min(first, tokens), tokens)):
        if begin == end:
            continue
        pieces.start()
        for layer, (index, weight) in enumerate(reads):
            part = slice(begin, end)
            found = pieces.evidence(layer, index[..., part, :], weight[..., part, :])
            torch.testing.assert_close(found, sums[layer][..., part, :], **TOLERANCE)


@given(st.integers(1, 200), st.booleans(), st.integers(0, 9))
def test_sums_fade_and_go_on(tokens: int, goes_on: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    drawn_BTP = torch.rand(2, tokens, 5, generator=random)
    before_BP = torch.rand(2, 5, generator=random) if goes_on else None
    sum_BP = torch.zeros(2, 5) if before_BP is None else before_BP
    for token, found_BP in enumerate(faded_sums(drawn_BTP, before_BP).unbind(1)):
        sum_BP = FADING * sum_BP + drawn_BTP[:, token]
        torch.testing.assert_close(found_BP, sum_BP, **TOLERANCE)


def test_sums_do_not_depend_on_the_order_of_what_was_found() -> None:
    index = torch.randint(90, (1, 3, 3, 20, 64), generator=torch.Generator().manual_seed(0))
    weight = torch.rand(index.shape, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    first, second = (
        PassageSums().evidence(0, index, weight),
        PassageSums().evidence(0, index[..., order], weight[..., order]),
    )
    assert torch.equal(first[..., order], second)


def test_padding_behind_a_row_leaves_nothing() -> None:
    index = torch.randint(300, (2, 1, 2, 6, 3), generator=torch.Generator().manual_seed(0))
    weight = torch.rand(index.shape, generator=torch.Generator().manual_seed(1))
    padded, steady = PassageSums(torch.tensor([4, 6])), SteadyPassageSums((7,), 3, torch.ones(3, dtype=torch.bool))
    padded.evidence(7, index, weight)
    for row, length in enumerate((4, 6)):
        alone = PassageSums()
        alone.evidence(7, index[row : row + 1, ..., :length, :], weight[row : row + 1, ..., :length, :])
        torch.testing.assert_close(padded.kept[7][row], alone.kept[7][0], **TOLERANCE)
        steady.begin(2, padded, row)
        assert torch.equal(steady.kept[7][2], padded.kept[7][row]) and not steady.kept[7][:2].any()
    steady.begin(2, PassageSums(), 0)
    assert not steady.kept[7].any()


def test_a_row_that_waits_keeps_its_sums() -> None:
    takes_B = torch.tensor([True, False])
    steady = SteadyPassageSums((1,), 2, takes_B)
    memory = steady.kept[1]
    index, weight = torch.zeros(2, 1, 1, 1, 1, dtype=torch.int64), torch.ones(2, 1, 1, 1, 1)
    steady.start()
    steady.evidence(1, index, weight)
    assert memory[:, 0].tolist() == [1.0, 0.0] and steady.kept[1] is memory


def evident(**settings: object) -> LongMem:
    """A model whose heads listen to evidence."""
    model = tiny.model(passage_evidence=True, **settings)
    with torch.no_grad():
        for layer in model.sidenet.layers:
            if layer.kv_heads:
                layer.memory.evidence_KG += 1.0
    return model


@torch.no_grad()
def test_evidence_changes_what_is_read_and_nothing_where_its_gain_is_zero() -> None:
    plain, ids_T = tiny.model(), tiny.tokens(1, 12)
    bank = tiny.bank(plain, 200)
    model = tiny.model(passage_evidence=True, trained=False)
    model.sidenet.load_state_dict(plain.sidenet.state_dict(), strict=False)
    assert torch.equal(model(ids_T, bank).logits_BTV, plain(ids_T, bank).logits_BTV)
    for layer in model.sidenet.layers:
        if layer.kv_heads:
            layer.memory.evidence_KG += 1.0
    raised, before = (each(ids_T, bank).logits_BTV for each in (model, plain))
    assert not torch.allclose(raised[:, 1:], before[:, 1:], atol=1e-4)
    assert torch.equal(model(ids_T, model.new_bank()).logits_BTV, plain(ids_T, plain.new_bank()).logits_BTV)


@pytest.mark.parametrize("update", ["alpha", "difference"])
@torch.no_grad()
def test_a_window_reads_alike_at_once_and_token_by_token(update: str) -> None:
    model = evident(update=update)
    ids_N, bank = tiny.tokens(14), tiny.bank(model, 150)
    whole = model(ids_N[None], bank).logits_BTV[0]
    cache = model.new_cache()
    pieces = [
        model(ids_N[None, part], bank, cache=cache).logits_BTV[0] for part in (slice(0, 5), slice(5, 6), slice(6, 14))
    ]
    torch.testing.assert_close(torch.cat(pieces), whole, **TOLERANCE)


@torch.no_grad()
def test_texts_side_by_side_read_as_they_do_alone() -> None:
    model = evident()
    banks = [tiny.bank(model, 150), tiny.bank(model, 90, seed=1), None]
    texts = [tiny.tokens(9), tiny.tokens(6, seed=3), tiny.tokens(7, seed=4)]
    whole = [model(text_N[None], bank).logits_BTV[0] for text_N, bank in zip(texts, banks, strict=True)]
    begun, filled = BatchDecoder(model, 3, 20), BatchDecoder(model, 3, 20)
    for row, text_N in enumerate(texts):
        begun.begin(row, text_N[:4], banks[row])
    filled.fill({row: text_N[: 3 + row % 2] for row, text_N in enumerate(texts)}, banks)
    filled.step([int(texts[0][3]), None, int(texts[2][3])], banks)
    for decoder in (begun, filled):
        for token in (4, 5):
            logits_BV, _ = decoder.step([int(text_N[token]) for text_N in texts], banks)
            for row in range(3):
                torch.testing.assert_close(logits_BV[row], whole[row][token], **TOLERANCE)


@torch.no_grad()
def test_steps_with_sums_in_two_launches() -> None:
    """As a GPU takes them; rows may wait."""
    pytest.importorskip("triton")
    model = evident(newest_wins=True)
    banks = [tiny.bank(model, 150), None, tiny.bank(model, 9, seed=1)]
    plain, at_once = BatchDecoder(model, 3, 20), BatchDecoder(model, 3, 20)
    for decoder in (plain, at_once):
        for row, bank in enumerate(banks):
            decoder.begin(row, tiny.tokens(4 + row, seed=row), bank)
    for tokens in ([3, 5, 7], [9, 4, None], [2, 2, 8], [None, 1, 1]):
        expected, _ = plain.step(tokens, banks)
        with mock.patch.object(longmem.retrieved, "joins_at_once", lambda device: True):
            found, _ = at_once.step(tokens, banks)
        rows = [row for row, token in enumerate(tokens) if token is not None]
        torch.testing.assert_close(found[rows], expected[rows], **TOLERANCE)
        for layer in model.config.memory_layers:
            mine, its = (decoder.passage_sums.kept[layer] for decoder in (at_once, plain))
            assert its.any()
            torch.testing.assert_close(mine, its, **TOLERANCE)


@torch.no_grad()
def test_banks_that_are_read_together_are_told_apart() -> None:
    """A bank of the group changes nothing if what it holds is not found; evidence for it is not evidence for another
    bank's passages."""
    model = evident()
    bank = tiny.bank(model, 150)
    ids_T, empty = tiny.tokens(1, 12), MemoryBank(model.bank_spec)
    alone = model(ids_T, bank).logits_BTV
    torch.testing.assert_close(model(ids_T, BankGroup([bank, empty])).logits_BTV, alone, **TOLERANCE)
    index = torch.tensor([0, 1 << 40]).view(1, 1, 1, 1, 2)
    sums = PassageSums()
    sums.evidence(0, index[..., :1], torch.ones(1, 1, 1, 1, 1))
    sums.start()
    assert sums.evidence(0, index, torch.zeros(1, 1, 1, 1, 2)).flatten().tolist() == [pytest.approx(FADING), 0.0]
