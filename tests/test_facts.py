"""Generated conversations keep their promises, stand in banks as chats do, and are scored by what was told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from longmem.chat import ChatSession
from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError
from longmem.evals import answers, chats, facts
from longmem.evals.answers import CONDITIONS, Outcome
from longmem.evals.chats import ATTRIBUTES, KINDS, SPLITS, TALK, Chat, ChatConfig, generate_chats
from longmem.evals.facts import FactsConfig, labels_of, opening_and_turn, session_text
from longmem.generation import GenerationConfig
from longmem.model import LongMem

CONFIGS = st.builds(
    ChatConfig, sessions=st.integers(2, 5), facts=st.integers(0, 23), small_talk=st.integers(1, 4), seed=st.integers(0)
)
SMALL = FactsConfig(cases=3, remembered=96, passage=32, sessions=2, facts=1, small_talk=1)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


@pytest.fixture(scope="module")
def filler(model: LongMem) -> TokenizedDocuments:
    return TokenizedDocuments.from_documents([Document("a", TINY_TEXT * 2)], model.tokenizer)


def said_by_user(sessions: Any) -> list[str]:
    return [turn.content for session in sessions for turn in session if turn.role == "user"]


# ---- conversations -------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(CONFIGS, st.sampled_from(SPLITS))
def test_facts_are_told_where_they_are_said_to_be(config: ChatConfig, split: chats.Split) -> None:
    for chat in generate_chats(3, split, config):
        assert len(chat.sessions) == len(chat.wrong_sessions) == config.sessions
        values = [telling.value for telling in chat.tellings]
        assert len(set(values)) == len(values)
        for telling in chat.tellings:
            turn = chat.sessions[telling.session][telling.turn]
            assert turn.role == "user"
            assert turn.content[slice(*telling.span)] == telling.value
            assert telling.value in turn.content[slice(*telling.evidence)]
        asked = [telling for telling in chat.tellings if telling.attribute == chat.attribute]
        told = {"once": [True], "corrected": [False, True], "silent": []}[chat.kind]
        assert [telling.current for telling in asked] == told
        if chat.kind == "silent":
            assert chat.answer not in values and chat.stale is chat.wrong is None
        else:
            assert asked[-1].value == chat.answer and chat.wrong not in values
            assert chat.wrong is not None and any(chat.wrong in text for text in said_by_user(chat.wrong_sessions))
        if chat.kind == "corrected":
            first, second = asked
            assert first.session < second.session  # in a later session, so the newest one is known
            assert first.value == chat.stale != chat.answer
        # The wrong sessions say the same with other values.
        for session, other in zip(chat.sessions, chat.wrong_sessions, strict=True):
            for place, (turn, changed) in enumerate(zip(session, other, strict=True)):
                told_here = any(t.turn == place and session is chat.sessions[t.session] for t in chat.tellings)
                assert (turn != changed) == told_here and turn.role == changed.role


def sentences(split: chats.Split) -> set[str]:
    worded = [text for a in ATTRIBUTES for text in dataclasses.astuple(getattr(a, split))]
    talk = TALK[split]
    spoken = [text for exchange in talk.exchanges for text in exchange]
    return {*worded, *spoken, *talk.told, *talk.corrected, *talk.replies} - {""}


def test_nothing_unseen_is_seen() -> None:
    assert sentences("seen") & sentences("unseen") == set()
    assert len(sentences("unseen")) == len(sentences("seen"))


def test_templates_are_well_formed() -> None:
    assert len({attribute.name for attribute in ATTRIBUTES}) == len(ATTRIBUTES)
    for attribute in ATTRIBUTES:
        assert len(set(attribute.values)) == len(attribute.values) >= 7, attribute.name
        for wording in (attribute.seen, attribute.unseen):
            assert wording.told.count("{}") == wording.corrected.count("{}") == 1 and wording.told != wording.corrected
            assert "{" not in wording.question + wording.begun and wording.question.endswith("?")
            assert wording.begun == wording.begun.strip()


@settings(max_examples=20)
@given(CONFIGS, st.sampled_from(SPLITS))
def test_a_seed_gives_the_same_conversations(config: ChatConfig, split: chats.Split) -> None:
    many = list(generate_chats(6, split, config))
    assert list(generate_chats(4, split, config)) == many[:4]
    assert [chat.kind for chat in many] == [*KINDS, *KINDS]
    assert many[0] != many[3]
    other = dataclasses.replace(config, seed=config.seed + 1)
    assert list(generate_chats(6, split, other)) != many


# ---- in banks and windows ------------------------------------------------------------------------------------


def one_conversation(tokenizer: Any, chat: Chat) -> str:
    messages = [{"role": t.role, "content": t.content} for session in chat.sessions for t in session]
    messages.append({"role": "user", "content": chat.question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + chat.begun


def check_template(model: LongMem) -> None:
    for chat in generate_chats(6, "unseen"):
        question = facts.question_of(chat, model.tokenizer)
        assert question.opening + question.evidence + question.prompt == one_conversation(model.tokenizer, chat)
        session = ChatSession(model, None, "a")
        assert opening_and_turn(model.tokenizer, chat.question) == session._first_turn(chat.question)


def test_sessions_and_question_make_one_conversation(model: LongMem) -> None:
    check_template(model)


def test_a_template_with_a_system_prompt_and_ends_of_turns(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{% if loop.first %}<|endoftext|>system\nBe kind.<|end|>\n{% endif %}"
        "<|endoftext|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    check_template(model)
    opening, _ = opening_and_turn(model.tokenizer, "Hello")
    assert "Be kind." in opening
    assert "Be kind." not in session_text(model.tokenizer, next(generate_chats(1, "seen")).sessions[0])


def test_the_template_of_the_embedded_model(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for chat in generate_chats(3, "seen"):
        question = facts.question_of(chat, tokenizer)
        assert question.opening + question.evidence + question.prompt == one_conversation(tokenizer, chat)


def test_a_session_is_remembered_as_a_chat_would_be(model: LongMem) -> None:
    bank = model.new_bank()
    session = ChatSession(model, bank, "a", GenerationConfig(max_new_tokens=5))
    reply = "".join(piece.text for piece in session.send("Ada keeps bees."))
    turns = (chats.Turn("user", "Ada keeps bees."), chats.Turn("assistant", reply))
    remembered = model.tokenizer.decode(bank.tokens_of("chat/a"), clean_up_tokenization_spaces=False)
    assert session_text(model.tokenizer, turns).startswith(remembered)


def test_a_backbone_without_template_reads_a_dialogue() -> None:
    turns = next(generate_chats(1, "seen")).sessions[0]
    text = session_text(None, turns)
    assert text == "".join(f"{turn.role.capitalize()}: {turn.content}\n" for turn in turns)
    assert opening_and_turn(None, "Why?") == ("", "User: Why?\nAssistant: ")


def test_filler_lies_between_the_sessions() -> None:
    mixed = facts.between(list("abcdefg"), list("012"))  # type: ignore[arg-type]
    assert "".join(mixed) == "0ab1cd2efg"  # type: ignore[arg-type]
    assert facts.between([], list("012")) == list("012")  # type: ignore[arg-type]


# ---- figures -------------------------------------------------------------------------------------------------


def test_sharing_the_filler_equals_writing_everything_anew(model: LongMem, filler: TokenizedDocuments) -> None:
    result = facts.facts(model, filler, SMALL)
    assert result.bank_tokens > 64 and len(result.cases) == 3
    texts, _ = answers.passages(filler, model.tokenizer, tokens=96, size=32, rng=np.random.default_rng(0))
    for chat, row in zip(generate_chats(3, "unseen", SMALL.chats), result.cases, strict=True):
        question = facts.question_of(chat, model.tokenizer)
        for name, sessions in (("bank_on", chat.sessions), ("bank_wrong", chat.wrong_sessions)):
            bank = model.new_bank()
            parts = [session_text(model.tokenizer, session) for session in sessions]
            order = [parts[0], texts[0], parts[1], texts[1], texts[2]]
            for number, text in enumerate(order):
                model.write_text(bank, text, source=str(number))
            anew = answers.ask(model, question, question.opening + question.prompt, bank)
            assert row["outcomes"][name]["given"] == anew.given
            assert row["outcomes"][name]["log_probability"] == pytest.approx(anew.log_probability, abs=1e-3)


def test_results_add_up(
    model: LongMem, filler: TokenizedDocuments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that repeats the first fitting value it was told, be it corrected later or not."""

    def first_told(model: LongMem, question: Any, text: str, bank: Any = None, *, memory: float = 1.0) -> Outcome:
        told = text + "".join(bank.text_of(source) for source in bank.sources) if bank else text
        places = {value: told.find(f" {value}") for value, label in question.labels.items() if label != "borrowed"}
        found = [value for value, place in places.items() if place >= 0]
        value = min(found, key=lambda value: places[value], default=None)
        return Outcome(None if value is None else question.labels[value], -1.0)

    monkeypatch.setattr(
        answers,
        "ask_all",
        lambda model, asks: [first_told(model, a.question, a.text, a.bank, memory=a.memory) for a in asks],
    )
    progress: list[int] = []
    config = dataclasses.replace(SMALL, cases=12, facts=0)
    result = facts.facts(model, filler, config, on_case=progress.append)
    assert sum(progress) == facts.steps(config)
    rates = {kind: {c: result.groups[kind].scores[c].rates for c in CONDITIONS} for kind in KINDS}
    for condition in ("bank_on", "window", "backbone_window"):
        assert rates["once"][condition]["answer"] == 1
        assert rates["corrected"][condition]["stale"] == 1 and rates["corrected"][condition]["answer"] == 0
    assert rates["once"]["bank_wrong"]["wrong"] == 1
    assert result.groups["once"].relative == 1 and result.groups["corrected"].relative is None
    for condition in CONDITIONS:
        assert rates["silent"][condition]["answer"] == 0
        assert condition != "bank_off" or not any(rates["once"][condition].values())
    result.save(tmp_path / "facts.json")
    assert json.loads((tmp_path / "facts.json").read_text())["groups"]["once"]["relative"] == 1


@pytest.mark.parametrize("focus", [0, 4096])
def test_of_a_large_bank_what_the_question_is_about_is_read(
    model: LongMem, filler: TokenizedDocuments, asked: list[answers.Ask], focus: int
) -> None:
    config = dataclasses.replace(SMALL, cases=6, remembered=6144, passage=128, focus=focus)
    facts.facts(model, filler, config)
    banks = [(each.question, each.bank) for each in asked if each.bank is not None]
    assert len(banks) == 2 * 6
    found: list[bool] = []
    for question, bank in banks:
        assert (3840 < len(bank) <= 4096) if focus else len(bank) > 6000
        read = set(zip(bank.source_index_N.tolist(), bank.place_N.tolist(), strict=True))
        for number, source in enumerate(bank.sources):
            text, offsets_M2 = bank.text_of(source), bank.offsets_of(source)
            for value in (value for value, label in question.labels.items() if label == "answer" and value in text):
                place = text.index(value)
                inside_M = (offsets_M2[:, 1] > place) & (offsets_M2[:, 0] < place + len(value))
                found.append({(number, n) for n in inside_M.nonzero()[:, 0].tolist()} <= read)
    # But where nothing of the kind was told. Of so few stretches two are chosen by the question's words.
    assert len(found) >= 4 and sum(found) >= (0.7 if focus else 1) * len(found)


def test_labels() -> None:
    for chat in generate_chats(9, "unseen"):
        labels = labels_of(chat)
        assert ("answer" in labels.values()) == (chat.kind != "silent")
        assert labels[chat.answer] == ("stray" if chat.kind == "silent" else "answer")
        assert chat.stale is None or labels[chat.stale] == "stale"
        assert chat.wrong is None or labels[chat.wrong] == "wrong"
        others = {telling.value for telling in chat.tellings if telling.attribute != chat.attribute}
        assert {value for value, label in labels.items() if label == "borrowed"} == others


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cases": 2}, "cases must be at least 3; got 2"),
        ({"remembered": -1}, "remembered must be at least 0"),
        ({"sessions": 1}, "sessions must be at least 2; got 1"),
        ({"facts": 24}, "facts must be from 0 to 23; got 24"),
        ({"small_talk": 13}, "small_talk must be from 1 to 12; got 13"),
        ({"focus": 1}, "focus must be 0 .* at least 2048 tokens; got 1"),
    ],
)
def test_mistakes(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FactsConfig(**settings)


def test_more_mistakes(model: LongMem) -> None:
    with pytest.raises(ConfigError, match="Unknown split 'both'; choose seen or unseen"):
        next(generate_chats(1, "both"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="need documents"):
        facts.facts(model, None, SMALL)
