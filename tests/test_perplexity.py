"""Held-out perplexity against loops that do the same by hand, one document at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.bank import BankEntry, MemoryBank
from longmem.config import SideNetConfig
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.evals.perplexity import CONDITIONS, USUAL_CONDITIONS, PerplexityConfig, perplexity
from longmem.focus import Focus
from longmem.model import LongMem

BLOCKS = PerplexityConfig("blocks", segment=16, prefill=32, segments=3)
SLIDING = PerplexityConfig("sliding", segment=16, prefill=32, segments=3, context=20, stride=12)
DOCUMENTS = tiny.documents(100, 130, 100)
MODEL = tiny.model("llama")


def tokens_of(document: int) -> Tensor:
    return torch.from_numpy(DOCUMENTS[document].astype(np.int64))


def bank_of(model: LongMem, texts: list[Tensor], size: int) -> MemoryBank:
    """The first `size` tokens of each text."""
    bank = model.new_bank()
    for number, ids_N in enumerate(texts):
        keys_HNE, values_HNE = model.encode(ids_N[:size])
        offsets_N2 = torch.stack([torch.arange(size), torch.arange(size) + 1], dim=1)
        bank.append(BankEntry(f"{number}", "x" * size, 0, ids_N[:size], offsets_N2, keys_HNE, values_HNE))
    return bank


@torch.no_grad()
def by_hand(model: LongMem, document: int, config: PerplexityConfig, *remembers: int, memory: float = 1.0) -> float:
    """Mean loss of a document's scored tokens, the bank holding what documents `remembers` say before the window."""
    ids_N = tokens_of(document)
    losses = []
    step, local = (config.segment, 0) if config.protocol == "blocks" else (config.stride, config.context)
    for first in range(config.first_scored, config.needed, step):
        window, last = first - local, first + step
        prefix_1 = torch.tensor([model.backbone.prefix_token_id])
        input_ids_BT = torch.cat((prefix_1, ids_N[window : last - 1]))[None]
        # Whole chunks of each, as rings side by side are read.
        size = window if len(remembers) == 1 else window // model.config.chunk_size * model.config.chunk_size
        bank = bank_of(model, [tokens_of(other) for other in remembers], size) if remembers else None
        logits_TV = model(input_ids_BT, bank, memory=memory).logits_BTV[0, -step:]
        losses.append(F.cross_entropy(logits_TV.float(), ids_N[first:last], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("config", [BLOCKS, SLIDING], ids=lambda config: config.protocol)
@pytest.mark.parametrize(
    "form", [{"update": "alpha"}, {"update": "difference"}, {"fusion": "gate", "chunk_size": 4}], ids=str
)
def test_every_condition_is_what_a_loop_by_hand_gives(config: PerplexityConfig, form: dict[str, Any]) -> None:
    model = tiny.model("llama", **form)
    result = perplexity(model, DOCUMENTS, dataclasses.replace(config, conditions=CONDITIONS))
    assert result.documents == DOCUMENTS.names and result.tokens == 3 * config.scored
    # Three documents in batches of two at least: one batch, in which each reads its neighbour's bank.
    expected = {
        "bank_on": [by_hand(model, i, config, i) for i in range(3)],
        "bank_off": [by_hand(model, i, config) for i in range(3)],
        "bank_wrong": [by_hand(model, i, config, (i - 1) % 3) for i in range(3)],
        "bank_crowded": [by_hand(model, i, config, 0, 1, 2) for i in range(3)],
        "bank_focused": [by_hand(model, i, config, 0, 1, 2) for i in range(3)],  # nothing is left out of so few
        "backbone_local": [by_hand(model, i, config, memory=0.0) for i in range(3)],
    }
    for condition, losses in expected.items():
        assert result.losses[condition] == pytest.approx(losses, abs=2e-4), condition
        assert result.perplexity[condition] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert len({round(losses[0], 3) for losses in expected.values()}) >= 3  # they do differ


@torch.no_grad()
@pytest.mark.parametrize("config", [BLOCKS, SLIDING], ids=["blocks", "sliding"])
def test_a_part_is_read_of_a_large_crowd(config: PerplexityConfig) -> None:
    documents = tiny.documents(1250, 1300, 1250)
    config = dataclasses.replace(config, prefill=1100, focus=2048, conditions=("bank_focused", "bank_crowded"))
    result = perplexity(MODEL, documents, config)
    ids = [torch.from_numpy(documents[i].astype(np.int64)) for i in range(3)]
    step, local = (config.segment, 0) if config.protocol == "blocks" else (config.stride, config.context)
    losses = []
    for first in range(config.first_scored, config.needed, step):
        bank = bank_of(MODEL, ids, first - local)
        part = Focus(2048).on(bank, ids[1][first - config.context : first].tolist())
        assert len(part) <= 2048 < len(bank)
        input_ids_BT = torch.cat((torch.tensor([0]), ids[1][first - local : first + step - 1]))[None]
        logits_TV = MODEL(input_ids_BT, part).logits_BTV[0, -step:]
        losses.append(F.cross_entropy(logits_TV.float(), ids[1][first : first + step]))
    assert result.losses["bank_focused"][1] == pytest.approx(float(torch.stack(losses).mean()), abs=2e-4)
    assert result.losses["bank_focused"] != pytest.approx(result.losses["bank_crowded"], abs=1e-4)


@torch.no_grad()
def test_the_backbones_whole_window_is_the_backbone_over_all_that_fits() -> None:
    model = tiny.model("llama")
    model.backbone.config.max_position_embeddings = 50
    result = perplexity(model, DOCUMENTS, BLOCKS)
    losses = []
    for first in range(32, 80, 16):
        last = first + 16
        ids_N = tokens_of(0)[max(0, last - 50) : last]
        logits = model.backbone.model(torch.cat((torch.tensor([0]), ids_N[:-1]))[None]).logits[0, -16:]
        losses.append(F.cross_entropy(logits, ids_N[-16:]))
    assert result.losses["backbone_window"][0] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


@torch.no_grad()
def test_the_sidenets_whole_window_and_what_the_bank_recovers_of_it() -> None:
    config = dataclasses.replace(BLOCKS, conditions=("bank_off", "bank_on", "sidenet_window"))
    model = tiny.model("llama")
    tiny.randomise(model.sidenet, 0.1)
    model.backbone.config.max_position_embeddings = 50
    result = perplexity(model, DOCUMENTS, config)
    losses = []
    for first in range(32, 80, 16):
        last = first + 16
        ids_N = tokens_of(0)[max(0, last - 50) : last]
        logits_TV = model(torch.cat((torch.tensor([0]), ids_N[:-1]))[None]).logits_BTV[0, -16:]
        losses.append(F.cross_entropy(logits_TV.float(), ids_N[-16:]))
    assert result.losses["sidenet_window"][0] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    off, on, whole = (np.mean(result.losses[name]) for name in config.conditions)
    assert result.recovered == pytest.approx((off - on) / (off - whole), rel=1e-3)
    assert perplexity(model, DOCUMENTS, BLOCKS).recovered is None


def test_the_difference_form_with_an_empty_bank_scores_as_its_backbone() -> None:
    result = perplexity(tiny.model("llama", update="difference"), DOCUMENTS, BLOCKS)
    assert result.losses["bank_off"] == result.losses["backbone_local"]


@pytest.mark.parametrize("rows", [2, 3])
def test_how_many_documents_share_a_batch_does_not_matter(rows: int) -> None:
    documents = tiny.documents(*[90] * 5)
    results = [
        perplexity(MODEL, documents, PerplexityConfig("blocks", segment=16, prefill=32, segments=2, rows=n))
        for n in (rows, 5)
    ]
    for condition in ("bank_on", "bank_off", "backbone_local"):
        assert results[0].losses[condition] == pytest.approx(results[1].losses[condition], abs=1e-4)


def test_figures_fit_together() -> None:
    result = perplexity(MODEL, DOCUMENTS, BLOCKS)
    on, off = result.perplexity["bank_on"], result.perplexity["bank_off"]
    assert on is not None and off is not None and result.gain_percent == pytest.approx(100 * (1 - on / off), rel=1e-4)
    assert result.gain_interval is not None and result.gain_interval[0] <= result.gain_interval[1]
    for condition in USUAL_CONDITIONS:
        interval, value = result.intervals[condition], result.perplexity[condition]
        assert interval is not None and value is not None and interval[0] <= value <= interval[1]
        assert len(result.by_position[condition]) == BLOCKS.segments
        # All segments are equally long, so the whole is their geometric mean.
        assert math.exp(np.mean(np.log(result.by_position[condition]))) == pytest.approx(value, rel=1e-5)


def test_one_document_has_neither_interval_nor_wrong_bank() -> None:
    result = perplexity(MODEL, tiny.documents(100), BLOCKS)
    assert result.perplexity["bank_wrong"] is None and "bank_wrong" not in result.losses
    assert result.gain_interval is None and set(result.intervals.values()) == {None}
    assert result.gain_percent is not None


def test_only_what_is_asked_for_is_measured() -> None:
    config = PerplexityConfig("blocks", segment=16, prefill=32, segments=2, conditions=("bank_off",))
    result = perplexity(MODEL, DOCUMENTS, config)
    assert list(result.perplexity) == list(result.losses) == ["bank_off"] and result.gain_percent is None
    assert result.losses["bank_off"] == pytest.approx([by_hand(MODEL, i, config) for i in range(3)], abs=1e-4)


def test_a_model_without_memory_heads_is_measured_without_bank() -> None:
    model = LongMem(tiny.backbone("llama"), SideNetConfig(((0, 2), (2, 4)), ())).eval()
    result = perplexity(model, DOCUMENTS, BLOCKS)
    assert result.perplexity["bank_on"] is None and result.perplexity["bank_wrong"] is None
    assert result.losses["bank_off"] == result.losses["backbone_local"]


def test_documents_that_are_too_short_are_left_out_and_counted() -> None:
    documents = tiny.documents(100, 79, 80)
    seen: list[int] = []
    result = perplexity(MODEL, documents, BLOCKS, on_tokens=seen.append)
    assert result.documents == ["document 0", "document 2"]
    assert sum(seen) == 2 * BLOCKS.needed == 160
    with pytest.raises(SourceError, match=r"has the 80 tokens .* longest has 79"):
        perplexity(MODEL, TokenizedDocuments(documents.tokens[:179], ["a", "b"], [79, 79]), BLOCKS)


def test_a_bank_with_nothing_in_it_yet_is_allowed() -> None:
    config = PerplexityConfig("blocks", segment=16, prefill=0, segments=2)
    result = perplexity(MODEL, DOCUMENTS, config)
    # Nothing is remembered of the first segment, and the bank is on in name alone.
    assert result.by_position["bank_on"][0] == result.by_position["bank_off"][0]
    assert result.by_position["bank_on"][1] != result.by_position["bank_off"][1]


def test_measuring_changes_nothing() -> None:
    before = {name: parameter.clone() for name, parameter in MODEL.named_parameters()}
    first, second = perplexity(MODEL, DOCUMENTS, SLIDING), perplexity(MODEL, DOCUMENTS, SLIDING)
    assert first == second
    assert all(torch.equal(parameter, before[name]) for name, parameter in MODEL.named_parameters())


def test_a_result_survives_json(tmp_path: Path) -> None:
    result = perplexity(MODEL, DOCUMENTS, BLOCKS)
    result.save(tmp_path / "new" / "perplexity.json")
    row = json.loads((tmp_path / "new" / "perplexity.json").read_text())
    assert {condition: row[condition] for condition in USUAL_CONDITIONS} == result.perplexity
    assert row["documents"] == 3 and row["config"]["protocol"] == "blocks"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"protocol": "books"}, "'books'; choose blocks or sliding"),
        ({"prefill": -1}, "prefill must be >= 0"),
        ({"segments": 0}, "segments >= 1"),
        ({"segment": 1}, "segment >= 2"),
        ({"segments": 1, "segment": 100, "stride": 33}, "stride 33 does not divide the 100"),
        ({"conditions": ("bank_on", "bank_up")}, r"\['bank_up'\]"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PerplexityConfig(**settings)
