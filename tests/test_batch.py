"""Texts generated together: each is what it would be alone."""

from __future__ import annotations

import pytest
import torch
from texts import FACTS, full_bank, notes
from texts import tiny as talking

from longmem.errors import ConfigError
from longmem.recall import PassageIndex


def test_texts_generated_together_are_those_generated_alone():
    model = talking()
    prompts = ["Ada keeps bees in", "The ferry", "", FACTS[:90], "Ada keeps bees in"]
    for chosen in ({}, {"temperature": 0.8, "seed": 3}, {"stop": ("e",)}, {"memory": 0.0}):
        settings = {"max_new_tokens": 40, "window": 24, **chosen}
        expected = []
        for prompt in prompts:
            bank = full_bank(model)
            pieces = list(model.generate(prompt, bank=bank, source="own", attribute=True, **settings))
            expected.append((pieces, len(bank), bank.text_of("own") if bank.length_of("own") else ""))
        banks = [full_bank(model) for _ in prompts]
        found: list[list] = [[] for _ in prompts]
        together = model.generate_batch(
            prompts, banks=banks, sources=["own"] * len(prompts), rows=3, attribute=True, **settings
        )
        for number, piece in together:
            found[number].append(piece)
        for pieces, bank, (alone, remembered, text) in zip(found, banks, expected, strict=True):
            assert [(p.token_id, p.text, p.moved) for p in pieces] == [(p.token_id, p.text, p.moved) for p in alone]
            assert len(bank) == remembered and (bank.text_of("own") if bank.length_of("own") else "") == text
            for mine, others in zip(pieces, alone, strict=True):
                assert [s.text for s in mine.sources] == [s.text for s in others.sources]


def test_one_bank_may_serve_all_and_no_prompt_is_no_text():
    model, bank = talking(), None
    assert list(model.generate_batch([])) == []
    pieces = list(model.generate_batch(["Ada", "The"], banks=bank, max_new_tokens=3, stop_token_ids=()))
    assert [number for number, _ in pieces] == [0, 1] * 3
    bank = full_bank(model)
    assert len(list(model.generate_batch(["Ada", "The"], banks=bank, max_new_tokens=3, stop_token_ids=()))) == 6


def test_texts_of_one_bank_are_attributed_to_what_they_read_though_others_thin_it(monkeypatch):
    """Both windows move at the same step, and what the first writes makes the bank small."""
    model = talking()
    bank = full_bank(model)
    monkeypatch.setattr(type(model), "keep_to_cap", lambda self, bank: bank.thin(torch.arange(len(bank)) < 5))
    settings = {"max_new_tokens": 30, "window": 24, "attribute": True, "stop_token_ids": ()}
    first, sizes = {}, [len(bank)]
    for number, piece in model.generate_batch(["Ada keeps", "Ada keeps"], banks=bank, **settings):
        if number == 0:
            first = {source.text: source.weight for source in piece.sources}
        elif len(bank) != sizes[-1]:  # the first has just moved, so this one has read what it has read
            assert {source.text: source.weight for source in piece.sources} == pytest.approx(first)
        sizes.append(len(bank))
    assert len(set(sizes)) > 1


def test_mistakes_in_a_batch_show_before_the_first_token():
    model = talking()
    with pytest.raises(ConfigError, match="2 banks and 1 sources were given for 1 prompts"):
        model.generate_batch(["Ada"], banks=[None, None])
    with pytest.raises(ConfigError, match="1 banks and 2 sources"):
        model.generate_batch(["Ada"], sources=["a", "b"])
    with pytest.raises(ConfigError, match="local window"):
        model.generate_batch(["Ada"], window=100_000)


def test_texts_recall_as_each_would_alone_and_a_bank_is_cut_once(monkeypatch):
    model = talking()
    bank, made = notes(model), []
    cut = PassageIndex.__init__
    monkeypatch.setattr(PassageIndex, "__init__", lambda self, *given: (made.append(1), cut(self, *given))[1])
    prompts = ["Who keeps bees on the roof?", "Who paints boats in Brest?", "A zebra"]
    settings = {"max_new_tokens": 5, "window": 90, "recall": 1, "remember": False, "stop_token_ids": ()}
    said: dict[int, list[int]] = {number: [] for number in range(3)}
    for number, piece in model.generate_batch(prompts, banks=bank, rows=2, **settings):
        said[number].append(piece.token_id)
    assert len(made) == 1
    for number, prompt in enumerate(prompts):
        assert said[number] == [piece.token_id for piece in model.generate(prompt, bank=bank, **settings)]
