"""Agreement with the backbone is counted as greedy replies would count it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import TINY_TEXT

from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError
from longmem.evals import ordinary as module
from longmem.evals.ordinary import PROMPTS, OrdinaryConfig, conversation_ids, ordinary, same_tokens, steps
from longmem.focus import STRETCH
from longmem.model import LongMem

SMALL = OrdinaryConfig(prompts=4, tokens=6, remembered=96, passage=32)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.3)
    return made


@pytest.fixture(scope="module")
def filler(model: LongMem) -> TokenizedDocuments:
    return TokenizedDocuments.from_documents([Document("a", TINY_TEXT * 2)], model.tokenizer)


def said(model: LongMem, prompt: str, memory: float) -> list[int]:
    pieces = model.generate(conversation_ids(model, prompt), max_new_tokens=6, memory=memory)
    return [piece.token_id for piece in pieces]


def test_the_same_tokens_are_those_of_two_conversations(model: LongMem) -> None:
    counts = []
    for prompt in PROMPTS:
        own, other = said(model, prompt, 0.0), said(model, prompt, 1.0)
        expected = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(own))
        counts.append(same_tokens(model, conversation_ids(model, prompt), own, None))
        assert counts[-1] == expected, prompt
    assert len(set(counts)) > 1


def test_an_untrained_network_says_what_the_backbone_says(tiny_model_dir: Path, filler: TokenizedDocuments) -> None:
    result = ordinary(LongMem.from_pretrained(tiny_model_dir, device="cpu"), filler, SMALL)
    assert result.agreement["bank_off"].whole == result.agreement["bank_off"].first == 1.0


def test_figures_are_those_of_the_cases(model: LongMem, filler: TokenizedDocuments, tmp_path: Path) -> None:
    done: list[int] = []
    result = ordinary(model, filler, SMALL, on_case=done.append)
    assert sum(done) == steps(SMALL) == 3 + 4
    assert [case["prompt"] for case in result.cases] == list(PROMPTS[:4]) and result.bank_tokens > 96
    for name, agreement in result.agreement.items():
        same = [case["same"][name] for case in result.cases]
        assert agreement.tokens == sum(same) / 4 and agreement.first == sum(count > 0 for count in same) / 4
        assert agreement.whole_interval[0] <= agreement.whole <= agreement.whole_interval[1]
    result.save(tmp_path / "a" / "figures.json")
    assert (tmp_path / "a" / "figures.json").stat().st_size
    assert ordinary(model, None, OrdinaryConfig(prompts=1, tokens=2, chats=0, remembered=0)).bank_tokens == 0


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"prompts": 1000}, {"tokens": 0}, {"chats": -1}])
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be"):
        OrdinaryConfig(**settings)


def test_a_large_bank_is_read_as_it_is_when_something_is_said(
    model: LongMem, filler: TokenizedDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(module, "same_tokens", lambda *args: read.append(len(args[3] or ())) or 0)
    for focus in (2048, 0):
        result = ordinary(model, filler, dataclasses.replace(SMALL, prompts=1, remembered=4096, focus=focus))
    assert 2048 - STRETCH < read[0] <= 2048 < 4096 < read[2] == result.bank_tokens and read[1] == read[3] == 0


def test_other_text_needs_documents(model: LongMem) -> None:
    with pytest.raises(ConfigError, match="need documents"):
        ordinary(model, None, SMALL)
