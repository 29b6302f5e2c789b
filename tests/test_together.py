"""Side by side or one by one, the same follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem.contenders import together
from longmem.contenders.contender import Contender, ContenderConfig, Posed, Prompt
from longmem.contenders.longmem_rag import LongMemRag
from longmem.contenders.reader import Reader, Said
from longmem.contenders.window import Window
from longmem.data import Document
from longmem.model import LongMem
from longmem.steps import BatchDecoder


@pytest.fixture(scope="module", autouse=True)
def model(tiny_model_dir: Path) -> LongMem:
    global _MODEL
    _MODEL = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(_MODEL.sidenet, 0.1)
    return _MODEL


_MODEL: LongMem


@settings(max_examples=15)
@given(st.integers(0, 999), st.sampled_from([0.0, 1.0]), st.integers(1, 4))
def test_windows_side_by_side_are_windows_one_by_one(seed: int, memory: float, rows: int) -> None:
    random = np.random.default_rng(seed)
    banks = [None, None, _MODEL.new_bank(), _MODEL.new_bank()] if memory else [None] * 4
    for number, bank in enumerate(banks):
        if bank is not None:
            _MODEL.write_text(bank, TINY_TEXT[: 40 * number], source="bees")
    posed = [
        Posed(tuple(random.integers(2, 90, size=random.integers(1, 40)).tolist()), bank, ("seen",)) for bank in banks
    ]
    # Labels of one token, and longer ones.
    asked = [(each, random.integers(2, 90, size=size).tolist()) for each in posed for size in (1, 1, 5)]
    found = together.log_likelihoods(_MODEL, memory, asked)
    said = together.Speaker(_MODEL, memory, rows).say(posed, 6, ("a",))
    for number, each in enumerate(posed):
        reader = Reader(_MODEL, memory)
        reader.forget(each.bank)
        reader.read(each.token_ids)
        for (_, after), losses in list(zip(asked, found, strict=True))[3 * number : 3 * number + 3]:
            assert losses == pytest.approx(reader.log_likelihoods(after)[0], abs=1e-3)
        text, drawn_on = said[number]
        assert text == reader.say(6, ("a",))[0]
        assert drawn_on[-1] == "seen" and bool(drawn_on[:-1]) == bool(each.bank)


@pytest.mark.parametrize("kind", [Window, LongMemRag])
def test_a_posed_prompt_waits_while_other_things_are_told(kind: type[Contender], model: LongMem) -> None:
    contender = kind(model, ContenderConfig(window=160, chunk=32, chunks=2))
    told = [[Document("bees", TINY_TEXT)], [Document("cellar", "The key to the cellar is under the blue pot.")]]
    prompt = Prompt("Where is the key? It is", "key", room=6)
    wanted, posed = [], []
    for documents in told:
        contender.prepare(documents)
        posed.append(contender.pose(prompt))
        wanted.append((contender.log_likelihood(prompt, " under"), contender.generate(prompt), contender.drawn_on()))
    after = contender.reader.tokenize(" under")
    losses = together.log_likelihoods(model, kind.memory, [(each, after) for each in posed])
    said = together.Speaker(model, kind.memory).say(posed, prompt.room)
    for (losses_one, text, drawn_on), some, (answer, drawn) in zip(wanted, losses, said, strict=True):
        assert some == pytest.approx(losses_one, abs=1e-3)
        assert (answer, drawn) == (text, drawn_on)
    assert together.Speaker(model, kind.memory).say([], 6) == []


def test_no_more_windows_are_held_than_there_is_memory_for(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    posed = [Posed(tuple(range(2, 30 + number)), None) for number in range(5)]
    wanted = together.Speaker(model, 0.0, 5).say(posed, 4)
    held: list[int] = []

    def noted(model: LongMem, rows: int, capacity: int, *, memory: float) -> BatchDecoder:
        held.append(rows)
        return BatchDecoder(model, rows, capacity, memory=memory)

    monkeypatch.setattr(together, "BatchDecoder", noted)
    monkeypatch.setattr(together, "_HELD", 2 * 64)
    assert together.Speaker(model, 0.0, 5).say(posed, 4) == wanted
    assert held == [2]


def test_a_window_of_several_labels_is_read_once(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    padded = together.padded
    monkeypatch.setattr(together, "padded", lambda model, ids: rows.append(len(ids)) or padded(model, ids))
    posed = Posed((5, 6, 7), None)
    together.log_likelihoods(model, 0.0, [(posed, [8]), (posed, [9]), (posed, [8, 9])])
    assert sum(rows) == 2


def test_said_ends_where_it_should(model: LongMem) -> None:
    tokenizer = model.tokenizer
    ids = tokenizer("bees on the roof", add_special_tokens=False)["input_ids"]
    said = Said(tokenizer, len(ids))
    for token in ids:
        assert not said.done
        said.add(token)
    assert said.done and said.text == "bees on the roof"
    stopped = Said(tokenizer, 99, ("roof", "the"))
    for token in ids:
        if not stopped.done:
            stopped.add(token)
    assert stopped.text == "bees on "
    ended = Said(tokenizer, 99)
    ended.add(tokenizer.eos_token_id)
    assert ended.done and ended.text == "" and ended.token_ids == []


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(1, 6)), min_size=2, max_size=4))
def test_a_speaker_says_the_same_whatever_it_said_before(calls: list[tuple[int, int, int]]) -> None:
    bank = _MODEL.new_bank()
    _MODEL.write_text(bank, TINY_TEXT, source="bees")
    speaker = together.Speaker(_MODEL, 1.0, 3)
    for count, length, most in calls:
        posed = [Posed(tuple(range(2, 2 + length + n)), bank if n % 2 else None) for n in range(count)]
        assert speaker.say(posed, most) == together.Speaker(_MODEL, 1.0, 3).say(posed, most)
    speaker.release()
    assert speaker.say([Posed((5, 6), bank)], 2) == together.Speaker(_MODEL, 1.0).say([Posed((5, 6), bank)], 2)
