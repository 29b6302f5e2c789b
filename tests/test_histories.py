"""Histories say what they claim to say, far enough apart, and nothing that is kept for evaluation."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_TEXT
from transformers import AutoTokenizer

from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.evals.chats import ATTRIBUTES, TALK
from longmem.evals.recall import RecallConfig, needles
from longmem.histories import Asked, History, HistoryConfig, Told, generate_histories, wording
from longmem.histories.history import MOST_CHANGES
from longmem.histories.values import VALUES
from longmem.histories.wording import FACTS, article, fill

CONFIG = HistoryConfig(tokens=120_000, shortest=12_000, longest=20_000, distance=1500)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir.parent / "backbone")


@pytest.fixture(scope="module")
def filler(tokenizer: Any) -> TokenizedDocuments:
    days = (f"On day {number} of the journey nobody had seen the sea. The mules were slow." for number in range(200))
    texts = (TINY_TEXT * 40, " ".join(f"{day} It took {len(day) * i} steps up the hill." for i, day in enumerate(days)))
    return TokenizedDocuments.from_documents([Document(str(i), text) for i, text in enumerate(texts)], tokenizer)


@pytest.fixture(scope="module")
def histories(filler: TokenizedDocuments, tokenizer: Any) -> list[History]:
    return list(generate_histories(filler, tokenizer, CONFIG))


def words(text: str) -> str:
    """In one line, as a sentence may begin with it."""
    return " ".join(text.split()).lower()


def test_answers_are_true(histories: list[History]) -> None:
    """The newest value told before the question is the answer, and stands where it is said to be."""
    kinds = set()
    for history in histories:
        for told in history.told:
            assert words(history.text[told.start :]).startswith(words(told.value)), told
        for asked in history.asked:
            kinds.add(asked.kind)
            before = [told for told in history.told if told.subject == asked.subject and told.start < asked.start]
            if asked.answer is None:
                assert asked.kind == "unknown" and not before
                continue
            assert history.text[asked.start :].startswith(asked.answer)
            right = before[-2] if asked.kind == "earlier" else before[-1]
            assert words(right.value) == words(asked.answer), (asked, before)
            others = {words(told.value) for told in before if told is not right}
            assert words(asked.answer) not in others
    assert kinds == {"fact", "earlier", "secret", "pair", "quote", "unknown"}


def test_questions_are_far_from_what_they_ask_for(histories: list[History], tokenizer: Any) -> None:
    for history in histories:
        mentioned: dict[str, int] = {}
        records: list[Told | Asked] = sorted((*history.told, *history.asked), key=lambda record: record.start)
        for record in records:
            if isinstance(record, Asked) and record.answer is not None:
                assert record.tokens_since >= CONFIG.distance
                between = history.text[mentioned[record.subject] : record.start]
                assert len(between) > CONFIG.distance  # of characters: a token has at least one
            mentioned[record.subject] = record.start


def test_much_is_told_changed_and_asked(histories: list[History]) -> None:
    assert sum(history.text.count("<|endoftext|>user") for history in histories) > 200
    for history in histories:
        subjects = [told.subject for told in history.told]
        assert len(subjects) > 8 and len(history.asked) > 4
        # The beginning tells, the rest asks.
        late = [asked for asked in history.asked if asked.start > 0.4 * len(history.text)]
        assert len(late) > 0.6 * len(history.asked)
    assert any(len(history.told) > len({told.subject for told in history.told}) for history in histories)


def test_documents_mark_the_answers(histories: list[History], tokenizer: Any) -> None:
    documents = TokenizedDocuments.from_documents((history.document for history in histories), tokenizer)
    assert documents.answers is not None and 0.005 < documents.answers.mean() < 0.3
    for number, history in enumerate(histories):
        assert CONFIG.shortest <= len(documents[number]) <= CONFIG.longest + 3000
        spans = [history.text[slice(*span)] for span in history.document.answers]
        assert spans == [asked.answer for asked in history.asked if asked.answer is not None]


def test_a_seed_gives_the_same_histories(filler: TokenizedDocuments, tokenizer: Any, histories: list[History]) -> None:
    fewer = list(generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=30_000)))
    assert 1 < len(fewer) < len(histories) and fewer == histories[: len(fewer)]
    (other,) = generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=1, seed=1))
    assert other.text != histories[0].text
    assert len({history.text for history in histories}) == len({history.name for history in histories})


# ---- wording -------------------------------------------------------------------------------------------------


def unseen() -> list[str]:
    """What training text must not say: unseen sentences of conversations without their values, and those of recall."""
    worded = [text for attribute in ATTRIBUTES for text in dataclasses.astuple(attribute.unseen)]
    talk = TALK["unseen"]
    spoken = [text for exchange in talk.exchanges for text in exchange]
    texts = [part for text in worded for part in text.split("{}")]
    recall = ["pass key", "passkey", "The value of", "What is the value of", "Remember it."]
    kept = [words(text) for text in (*texts, *spoken, *talk.told, *talk.corrected, *talk.replies, *recall)]
    return [text for text in kept if len(re.findall(r"\w+", text)) > 2 or text == "understood."]


def templates() -> list[str]:
    facts = [text for fact in FACTS for text in (*fact.told, *fact.changed, *fact.asked, *fact.answered)]
    tables = [
        value
        for name, value in vars(wording).items()
        if name.isupper() and name[0] != "_" and name not in ("FACTS", "ATTRIBUTES")
    ]
    others: list[Any] = [table for table in tables if isinstance(table, tuple)]
    flat = [text for table in others for entry in table for text in (entry if isinstance(entry, tuple) else (entry,))]
    return facts + flat


def test_nothing_that_is_kept_for_evaluation_is_said(histories: list[History]) -> None:
    kept = unseen()
    assert len(kept) > 120
    said = [words(text) for text in (*templates(), *(history.text for history in histories))]
    assert len(said) > 3000
    assert [(part, text) for part in kept for text in said if part in text] == []
    for task in ("passkey", "pairs"):
        for needle in needles(task, RecallConfig(cases=3)):
            assert not any(words(needle.prompt)[:20] in text for text in said)


def test_facts_are_many_and_well_formed() -> None:
    assert len({fact.subject for fact in FACTS}) == len(FACTS) > 300
    own = [fact for fact in FACTS if fact.group != "seen"]
    # Each group of facts that are asked for alike is one attribute.
    attributes = {fact.group for fact in own if fact.group != "own"} | {f.subject for f in own if f.group == "own"}
    assert len(attributes) >= 50
    for fact in FACTS:
        for text in (*fact.told, *fact.changed, *fact.answered):
            assert text.count("{v}") == 1 and not set(re.findall(r"{\w+}", text)) - {"{v}", "{a}"}, text
        for text in fact.asked:
            assert text.endswith("?") and "{" not in text
        assert not set(fact.told) & set(fact.changed)
        assert fact.group == "seen" or min(map(len, (fact.told, fact.changed, fact.asked, fact.answered))) >= 2
        drawn = {fact.draw(np.random.default_rng(seed)) for seed in range(200)}
        assert len(drawn) >= 7, fact.subject


def test_values_are_drawn_of_many() -> None:
    for name, draw in VALUES.items():
        drawn = [draw(np.random.default_rng(seed)) for seed in range(300)]
        assert all(value == value.strip() and value for value in drawn)
        assert len(set(drawn)) >= 7, name
    assert re.fullmatch(r"[0-9a-f]{8}", VALUES["hex8"](np.random.default_rng(0)))


def test_every_fact_has_a_value_left_for_each_change() -> None:
    random = np.random.default_rng(0)
    for fact in FACTS:
        assert len({fact.draw(random) for _ in range(400)}) > MOST_CHANGES + 1, fact.subject


def test_no_fact_changes_without_end(filler: TokenizedDocuments, tokenizer: Any) -> None:
    long = HistoryConfig(tokens=60_000, shortest=60_000, longest=60_000, distance=1500)
    for history in generate_histories(filler, tokenizer, long):
        tellings = Counter(told.subject for told in history.told)
        assert 1 < max(tellings.values()) <= MOST_CHANGES + 1


def test_sentences_are_filled() -> None:
    assert fill("I own {a} {v}.", "owl") == ("I own an owl.", (9, 12))
    assert fill("{v} is {a} name.", "rex") == ("Rex is a name.", (0, 3))
    assert article("Apple") == "an" and article("7") == "a"


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"tokens": 0}, {"shortest": 9, "longest": 8}, {"distance": -1}, {"shortest": 2000, "longest": 3000}]
)
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tokens must be at least 1" if "tokens" in settings else "longer than"):
        HistoryConfig(**settings)


def test_filler_without_text_is_named(tokenizer: Any) -> None:
    empty = TokenizedDocuments(np.empty(0, dtype=np.uint16), ["a"], [0])
    with pytest.raises(SourceError, match="Give documents with text in them"):
        next(generate_histories(empty, tokenizer, CONFIG))
