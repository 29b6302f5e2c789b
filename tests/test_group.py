"""Several banks read in one answer: weights against a softmax by hand, and nothing reaches who does not read it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_index import config, make_bank, normal
from texts import ENDLESS, FACTS, full_bank
from texts import tiny as tiny_text_model

from longmem.attribution import attribute
from longmem.bank import BankEntry
from longmem.batch import generate_batch
from longmem.errors import BankMismatchError, ConfigError
from longmem.generation import GenerationConfig, generate
from longmem.group import BankGroup, Readable, members
from longmem.index import BankReader, GroupReader
from longmem.model import LongMem
from longmem.recall import PassageIndex, recall
from longmem.retrieved import PLACES, place_of

MODEL = tiny.model()
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "namespaces.py"


def logits(banks: list[Readable | None] | Readable | None, rows: int = 1, model: LongMem = MODEL) -> torch.Tensor:
    return model.forward(tiny.tokens(rows, 6, seed=3), banks).logits_BTV


# ---- what a group is ---------------------------------------------------------------------------------------


def test_a_group_says_what_is_wrong_with_it() -> None:
    one, two = tiny.bank(MODEL, 5), tiny.bank(MODEL, 7, seed=1)
    for banks, weights, message in (
        ([], None, "at least one bank"),
        ([one], [1.0, 1.0], "1 banks and 2 weights"),
        ([one], [-0.5], "0 .not read. or more"),
        ([one], [float("inf")], "inf"),
        ([one, two], [1.0, float("nan")], "nan"),
        ([one, one], None, "twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            BankGroup(banks, weights)
    with pytest.raises(BankMismatchError, match="longmem copy"):
        BankGroup([one, tiny.bank(tiny.model(seed=5), 3)])
    group = BankGroup([one, two], [0, 2])
    assert (group.first, len(group), [bank for bank, _ in members(group)]) == (one, 7, [two])
    assert members(one) == ((one, 1.0),)


def test_a_group_of_another_model_is_refused() -> None:
    other = tiny.model(seed=5)
    with pytest.raises(BankMismatchError):
        logits(BankGroup([tiny.bank(other, 3), tiny.bank(other, 4, seed=1)]))


# ---- what is read --------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0.1, 4)), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.integers(0, 99),
)
def test_weights_multiply_exponentiated_scores(banks: list[tuple[int, float]], layer: int, seed: int) -> None:
    row = [(make_bank(size, seed + n), weight) for n, (size, weight) in enumerate(banks)]
    heads = 2 if layer == 1 else 1
    query_BKGTE = normal(1, heads, 2, 3, 4, seed=seed)
    found = GroupReader([row], config())(layer, query_BKGTE)
    output_BKGTE, logsumexp_BKGT = found.attend(query_BKGTE, 0.5)
    apart = [BankReader([bank], config())(layer, query_BKGTE) for bank, _ in row]
    scores = torch.cat([part.scores(query_BKGTE, 0.5) for part in apart], -1)
    values = torch.cat([part.rows(part.values_PNE) for part in apart], -2)
    weight_R = torch.cat([torch.full((4,), weight) for _, weight in row])
    exponentiated = weight_R * scores.exp()
    torch.testing.assert_close(logsumexp_BKGT, exponentiated.sum(-1).log())
    if any(size for size, _ in banks):
        expected = (exponentiated / exponentiated.sum(-1, keepdim=True))[..., None] * values
        torch.testing.assert_close(output_BKGTE, expected.nan_to_num().sum(-2))
        share = exponentiated / exponentiated.sum(-1, keepdim=True)
        torch.testing.assert_close(found.scores(query_BKGTE, 0.5).softmax(-1), share)
    else:
        assert not output_BKGTE.any()
    assert found.valid_BKGTR.sum(-1).max() == sum(min(4, size) for size, _ in banks)
    torch.testing.assert_close(found.bank_size_B, torch.tensor([sum(n * w for n, w in banks)]))
    numbers = {place_of(int(place))[0] for place in found.index_BKGTR[found.valid_BKGTR]}
    assert numbers == {n for n, (size, _) in enumerate(banks) if size}


def test_one_bank_in_a_group_is_that_bank() -> None:
    one, two, three = (tiny.bank(MODEL, size, seed=size) for size in (30, 20, 9))
    alone = logits(one)
    assert torch.equal(logits(BankGroup([one])), alone)
    assert torch.equal(logits(BankGroup([one, two], [1, 0])), alone)
    assert torch.equal(logits(BankGroup([two, one, three], [0, 1, 0])), alone)
    assert torch.equal(logits(BankGroup([one, MODEL.new_bank()])), alone)
    assert torch.equal(logits(BankGroup([one, two], [0, 0])), logits(None))
    both = logits(BankGroup([one, two]))
    assert not torch.equal(both, alone)
    torch.testing.assert_close(logits(BankGroup([two, one])), both)
    # A row that reads one bank, in a batch where another reads several.
    mixed = logits([one, BankGroup([two, three], [0.5, 2])], rows=2)
    assert torch.equal(mixed[0], logits([one, two], rows=2)[0])
    assert torch.equal(mixed[0], logits([one, None], rows=2)[0])


def test_a_small_weight_is_nearly_absent_and_a_large_one_nearly_alone() -> None:
    one, two = tiny.bank(MODEL, 30), tiny.bank(MODEL, 20, seed=1)
    torch.testing.assert_close(logits(BankGroup([one, two], [1, 1e-9])), logits(one))
    weight = logits(BankGroup([one], [1e-9]))
    torch.testing.assert_close(weight, logits(None))


def test_large_enough_banks_are_read_like_their_union() -> None:
    """With room for every token, reading two banks is reading one that holds both."""
    model = tiny.model(top_k=64)
    one, two = tiny.bank(model, 20), tiny.bank(model, 12, seed=1)
    union = tiny.bank(model, 20)
    rows = (two.token_ids_N, two.offsets_N2, two.keys_HNE, two.values_HNE)
    union.append(BankEntry("other", "x" * 12, 0, *rows))
    torch.testing.assert_close(logits(BankGroup([one, two]), model=model), logits(union, model=model))


def test_a_token_counts_as_often_as_its_weight_says() -> None:
    model = tiny.model(top_k=64)
    one, twice = tiny.bank(model, 20), tiny.bank(model, 20)
    twice.append(BankEntry("again", "x" * 20, 0, one.token_ids_N, one.offsets_N2, one.keys_HNE, one.values_HNE))
    torch.testing.assert_close(logits(BankGroup([one], [2.0]), model=model), logits(twice, model=model))


# ---- nothing leaks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def namespaces():
    if not SCRIPT.exists():
        pytest.skip("benchmarks are not part of this installation")
    spec = importlib.util.spec_from_file_location("namespaces", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["namespaces"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["namespaces"]


def test_nothing_of_a_bank_reaches_who_does_not_read_it(namespaces) -> None:
    found = namespaces.run(60)
    assert set(found["holds"].values()) == {60} and found["reading"] > 30


# ---- generation ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attribution_names_the_bank() -> None:
    one, two = tiny.bank(MODEL, 30), tiny.bank(MODEL, 20, seed=1)
    one.name, two.name = "user/1", "domain"
    group = BankGroup([one, two], [1, 1])
    reads = MODEL.forward(tiny.tokens(1, 6, seed=3), group).reads
    found = attribute(reads, group, spans=99)
    assert {span.bank for span in found} == {"user/1", "domain"}
    for span in found:
        bank = one if span.bank == "user/1" else two
        assert span.text == bank.text_of("source", span.start, span.end)
    mass = float(torch.cat([read.mass_BKGT[0, :, :, -1].flatten() for read in reads]).mean())
    assert 0 < sum(span.weight for span in found) <= mass + 1e-5
    # Banks that are not read have no number.
    without = BankGroup([one, two], [0, 1])
    reads = MODEL.forward(tiny.tokens(1, 6, seed=3), without).reads
    assert {span.bank for span in attribute(reads, without)} == {"domain"}
    assert PLACES > 10**12


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_a_group_is_read_and_its_first_bank_is_written(weights: tuple[float, float]) -> None:
    model = tiny_text_model()
    texts, lengths = [], []
    for cache in (True, False):
        one, two = full_bank(model), model.new_bank()
        group = BankGroup([two, one], weights)
        before = len(one)
        settings_ = GenerationConfig(**{**ENDLESS.__dict__, "cache": cache, "attribute": True})
        texts.append("".join(piece.text for piece in generate(model, FACTS, bank=group, config=settings_)))
        lengths.append(len(two))
        assert len(one) == before and two.sources == ("generated/1",)
    assert texts[0] == texts[1] and lengths[0] == lengths[1] > 0
    one, two = full_bank(model), model.new_bank()
    side = list(generate_batch(model, [FACTS, FACTS], banks=[BankGroup([two, one], weights), None], config=ENDLESS))
    assert "".join(piece.text for number, piece in side if number == 0) == texts[0]


# ---- recall ----------------------------------------------------------------------------------------------------


def test_recall_ranks_passages_of_several_banks(tiny_model_dir: Path) -> None:
    model = LongMem.from_pretrained(str(tiny_model_dir), device="cpu")
    one, two = model.new_bank(), model.new_bank()
    one.name, two.name = "user/1", "domain"
    model.write_text(one, "Ada keeps bees on the roof.\n\nHer brother paints boats in Brest.", source="a")
    model.write_text(two, "Wax melts at low heat.\n\nBees make honey in March.", source="a")
    group = BankGroup([one, two])
    hits = recall(model, group, "Where are bees and honey?", top_k=9)
    assert {hit.bank for hit in hits} == {"user/1", "domain"}
    for hit in hits:
        bank = one if hit.bank == "user/1" else two
        assert hit.text == bank.text_of(hit.source, hit.start, hit.end)
    index = PassageIndex(group)
    assert recall(model, group, "Where are bees and honey?", top_k=9, index=index) == hits
    light = recall(model, BankGroup([one, two], [1, 1e-6]), "Where are bees and honey?", top_k=9, words=1.0)
    assert light[0].bank == "user/1"
    assert {hit.bank for hit in recall(model, BankGroup([one, two], [0, 1]), "bees", top_k=9)} == {"domain"}
    alone = recall(model, BankGroup([one, two], [0, 1]), "bees and honey", top_k=9)
    assert alone == recall(model, two, "bees and honey", top_k=9)
