"""Generation: sampling, where a text ends, mistakes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import ENDLESS, full_bank, text_of, tiny, tokenizer

from longmem.errors import BankMismatchError, ConfigError
from longmem.generation import GenerationConfig, continue_text, generate, sample, sampler
from longmem.local_window import LocalWindow


def test_pieces_join_to_the_decoded_tokens():
    model = tiny()
    prompt = torch.tensor(tokenizer()("Ada keeps", add_special_tokens=False)["input_ids"])
    config = GenerationConfig(max_new_tokens=80, window=32, temperature=1.5, seed=3, stop_token_ids=())
    pieces = list(generate(model, prompt, bank=full_bank(model), config=config))
    whole = text_of([*prompt.tolist(), *(piece.token_id for piece in pieces)])
    assert "Ada keeps" + "".join(piece.text for piece in pieces) == whole


def test_generation_ends_at_stop_tokens_and_strings():
    model = tiny()
    config = GenerationConfig(max_new_tokens=30, window=64, stop_token_ids=())
    pieces = list(generate(model, "Ada", config=config))
    text = "".join(piece.text for piece in pieces)
    fifth = pieces[4].token_id
    first = next(n for n, piece in enumerate(pieces) if piece.token_id == fifth)
    stopped = list(generate(model, "Ada", config=dataclasses.replace(config, stop_token_ids=(fifth,))))
    assert [piece.token_id for piece in stopped] == [piece.token_id for piece in pieces[: first + 1]]
    assert stopped[-1].text == "" or stopped[-1].text == "\ufffd" * len(stopped[-1].text)
    stop = text[5:8]
    cut = "".join(piece.text for piece in generate(model, "Ada", config=dataclasses.replace(config, stop=(stop,))))
    assert cut == text[: text.index(stop)]


# ---- sampling ----


def test_sampling_is_a_function_of_the_seed():
    model = tiny()

    def run(seed: int | None) -> list[int]:
        config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=seed, stop_token_ids=())
        return [piece.token_id for piece in generate(model, "Ada", config=config)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
def test_samples_come_from_the_likely_tokens(logits, top_k, top_p, seed):
    logits_V = torch.tensor(logits)
    config = GenerationConfig(temperature=0.7, top_k=top_k, top_p=top_p, seed=seed)
    token = sample(logits_V, config, sampler(config))
    assert int((logits_V > logits_V[token]).sum()) < (top_k or len(logits))
    assert sample(logits_V, GenerationConfig(temperature=0.7, top_k=1), sampler(config)) == int(logits_V.argmax())
    probability_V = (logits_V / 0.7).softmax(-1)
    assert float(probability_V[logits_V > logits_V[token]].sum()) <= top_p + 1e-4


# ---- errors ----


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"window": 4},
        {"memory": 1.5},
        {"stop": ("",)},
        {"stop": "abc"},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GenerationConfig(**settings)


def test_mistakes_show_before_the_first_token():
    model = tiny()
    with pytest.raises(ConfigError, match="at most 128"):
        generate(model, "Ada", config=GenerationConfig(window=1000))
    with pytest.raises(BankMismatchError):
        generate(model, "Ada", bank=tiny("neox").new_bank())


def test_an_empty_prompt_continues_from_the_prefix():
    assert len(list(generate(tiny(), "", config=dataclasses.replace(ENDLESS, max_new_tokens=3)))) == 3


def test_continue_text_keeps_every_token_in_the_window():
    window = LocalWindow(tiny(), None, GenerationConfig(max_new_tokens=5, stop_token_ids=()))
    pieces = list(continue_text(window, [5, 6], sampler(window.config)))
    assert window.token_ids == [5, 6, *(piece.token_id for piece in pieces)]
