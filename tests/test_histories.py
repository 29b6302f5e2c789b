"""Histories say what they claim to say, far enough apart, and nothing that is kept for evaluation."""

from __future__ import annotations

import copy
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
from longmem.histories import Asked, History, HistoryConfig, Reply, Told, generate_histories, wording
from longmem.histories.facts import FACTS, second_person
from longmem.histories.history import MOST_CHANGES, NEAR
from longmem.histories.instructions import CHANGE_ALL, INSTRUCTIONS
from longmem.histories.topics import article, exchange, fill, plain_exchange, refusal
from longmem.histories.values import VALUES

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
            assert asked.kind != "only" or len(before) == 1
            right = before[-2] if asked.kind == "earlier" else before[-1]
            assert words(right.value) == words(asked.answer), (asked, before)
            others = {words(told.value) for told in before if told is not right}
            assert words(asked.answer) not in others
    assert kinds == {"fact", "instruction", "earlier", "only", "secret", "pair", "quote", "unknown"}


def test_questions_are_far_from_what_they_ask_for(histories: list[History], tokenizer: Any) -> None:
    for history in histories:
        mentioned: dict[str, int] = {}
        records: list[Told | Asked] = sorted((*history.told, *history.asked), key=lambda record: record.start)
        for record in records:
            if isinstance(record, Asked) and record.answer is not None:
                between = history.text[mentioned[record.subject] : record.start]
                if record.near:
                    assert record.tokens_since < NEAR and record.kind not in ("earlier", "only")
                else:
                    assert record.tokens_since >= CONFIG.distance
                    assert len(tokenizer(between)["input_ids"]) >= CONFIG.distance
            mentioned[record.subject] = record.start


def test_some_questions_are_near(histories: list[History], filler: TokenizedDocuments, tokenizer: Any) -> None:
    asked = [asked for history in histories for asked in history.asked]
    assert abs(sum(each.near for each in asked) / len(asked) - CONFIG.near) < 0.04
    (history,) = generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=1, near=0.0))
    assert history.asked and not any(each.near for each in history.asked)
    (history,) = generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=1, near=0.5))
    assert sum(each.near for each in history.asked) > 0.2 * len(history.asked)


def test_segments_often_begin_with_a_question(histories: list[History], tokenizer: Any) -> None:
    """Where a window begins, nothing but the bank can help."""
    documents = TokenizedDocuments.from_documents((history.document for history in histories), tokenizer)
    begun, elsewhere = [], []
    for number in range(len(documents)):
        tokens = documents[number]
        for place in range(CONFIG.distance // 2, len(tokens) - 40, CONFIG.distance // 2):
            text = tokenizer.decode(tokens[place : place + 40].tolist())
            # A plain text stands behind an empty line, a session at its first special token.
            begins = text.startswith(("\n\n", "<|endoftext|>"))
            (elsewhere if place % CONFIG.distance else begun).append(begins)
    assert np.mean(begun) > 0.3 > 0.1 > np.mean(elsewhere)


def test_much_is_told_changed_and_asked(histories: list[History]) -> None:
    assert sum(history.text.count("<|endoftext|>user") for history in histories) > 200
    for history in histories:
        subjects = [told.subject for told in history.told]
        assert len(subjects) > 6 and len(history.asked) > 4
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
        far = [asked for asked in history.asked if not asked.near and asked.answer is not None]
        assert spans == [asked.answer for asked in far] and len(far) < len(history.asked)


def test_a_seed_gives_the_same_histories(filler: TokenizedDocuments, tokenizer: Any, histories: list[History]) -> None:
    fewer = list(generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=30_000)))
    assert 1 < len(fewer) < len(histories) and fewer == histories[: len(fewer)]
    (other,) = generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=1, seed=1))
    assert other.text != histories[0].text
    assert len({history.text for history in histories}) == len({history.name for history in histories})


REPLIES = [Reply(f"What is {number} and one?", f"It is {number + 1}, I think. So it is.") for number in range(30)]


@pytest.fixture(scope="module")
def talking(filler: TokenizedDocuments, tokenizer: Any) -> list[History]:
    return list(generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, reply_share=0.5), REPLIES))


def test_ordinary_talk_stands_in_the_template(talking: list[History], tokenizer: Any) -> None:
    replies = {each.reply: each.prompt for each in REPLIES}
    for history in talking:
        assert history.replied
        for each in history.replied:
            before, behind = history.text[: each.start], history.text[each.start + len(each.reply) :]
            turn = f"<|endoftext|>user\n{replies[each.reply]}<|end|>\n<|endoftext|>assistant\n"
            assert before.endswith(turn) and history.text[each.start :].startswith(each.reply)
            assert behind.startswith("<|end|>\n")
    everywhere = [
        history.text.startswith(f"<|endoftext|>user\n{reply.prompt}") for history in talking for reply in REPLIES
    ]
    assert any(everywhere)  # before anything was told


# As SmolLM2's: a system prompt nobody gave, and the end of a turn stands in front of the next one where both are split.
SYSTEM_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|endoftext|>system\nBe kind.<|end|>\n{% endif %}"
    "<|endoftext|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)


def test_every_reply_is_ended_whatever_follows(filler: TokenizedDocuments, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = SYSTEM_TEMPLATE
    for history in generate_histories(filler, tokenizer, dataclasses.replace(CONFIG, tokens=30_000), REPLIES):
        turns = history.text.split("<|endoftext|>assistant\n")[1:]
        assert len(turns) > 20
        assert all("<|end|>\n" in turn and "<|endoftext|>" not in turn.partition("<|end|>\n")[0] for turn in turns)
        assert "<|end|>\n<|end|>" not in history.text and "Be kind.<|end|>\n<|endoftext|>user" in history.text
        for asked in history.asked:
            assert history.text[asked.start :].startswith(asked.answer or "")
        for each in history.replied:
            assert history.text[each.start :].startswith(f"{each.reply}<|end|>\n")
        for told in history.told:
            assert words(history.text[told.start :]).startswith(words(told.value))


def test_what_begins_replies_is_marked_half_the_time(talking: list[History], histories: list[History]) -> None:
    assert not any(history.replied for history in histories)
    begun = [each.begun for history in talking for each in history.replied]
    assert 0.35 < np.mean(np.array(begun) > 0) < 0.65
    for history in talking:
        spans = history.document.answers
        assert list(spans) == sorted(spans)
        marked = [(each.start, each.start + each.begun) for each in history.replied if each.begun]
        assert set(marked) < set(spans)
        assert all(re.fullmatch(r"It is \d+,", history.text[slice(*span)]) for span in marked)


def test_nothing_is_replied_as_ever_once_an_instruction_says_otherwise(talking: list[History]) -> None:
    assert {fact.subject for fact in INSTRUCTIONS} >= CHANGE_ALL
    told = 0
    for history in talking:
        orders = [told.start for told in history.told if told.subject in CHANGE_ALL]
        told += bool(orders)
        if orders:
            end = history.text.index("<|end|>", orders[0])
            # The session that tells it may still talk as before.
            assert max(each.start for each in history.replied) < end + 2000
    assert told


def test_ordinary_talk_stands_where_segments_begin(talking: list[History], tokenizer: Any) -> None:
    documents = TokenizedDocuments.from_documents((history.document for history in talking), tokenizer)
    begun = []
    for number in range(len(documents)):
        for place in range(CONFIG.distance, len(documents[number]) - 60, CONFIG.distance):
            begun.append(
                re.search(r"What is \d+ and one", tokenizer.decode(documents[number][place : place + 60].tolist()))
            )
    assert np.mean([each is not None for each in begun]) > 0.1


def test_no_share_is_no_session_of_ordinary_talk(filler: TokenizedDocuments, tokenizer: Any) -> None:
    silent = dataclasses.replace(CONFIG, tokens=1)
    (without,) = generate_histories(filler, tokenizer, silent)
    (again,) = generate_histories(filler, tokenizer, dataclasses.replace(silent, reply_share=0.9))
    assert without == again


def test_what_was_not_told_is_often_like_what_was(histories: list[History]) -> None:
    """Of what may be taken for it, one thing was told: who answers must tell the dog from the cat."""
    facts = {fact.subject: fact for fact in FACTS}
    alike = []
    for history in histories:
        for asked in history.asked:
            if asked.kind == "unknown" and asked.subject in facts:
                told = [each.subject for each in history.told if each.start < asked.start]
                known = [facts[subject] for subject in told if subject in facts]
                alike.append(any(facts[asked.subject].resembles(each) for each in known))
    assert len(alike) > 15 and np.mean(alike) > 0.6
    by_name = {fact.subject: fact for fact in FACTS if fact.group == "seen"}
    assert by_name["seen, dog"].resembles(by_name["seen, cat"])
    assert not by_name["seen, dog"].resembles(by_name["seen, home"])


# ---- wording -------------------------------------------------------------------------------------------------


def unseen() -> list[str]:
    """What training text must not say: unseen sentences of conversations without their values, and those of recall; in
    the words of the user and in those of the assistant."""
    worded = [text for attribute in ATTRIBUTES for text in dataclasses.astuple(attribute.unseen)]
    talk = TALK["unseen"]
    spoken = [text for exchange in talk.exchanges for text in exchange]
    texts = [part for text in worded for part in text.split("{}")]
    texts += [second_person(text) for text in texts]
    recall = ["pass key", "passkey", "The value of", "What is the value of", "Remember it."]
    kept = [words(text) for text in (*texts, *spoken, *talk.told, *talk.corrected, *talk.replies, *recall)]
    return [text for text in kept if len(re.findall(r"\w+", text)) > 2 or text == "understood."]


def templates() -> list[str]:
    """All that is said, before frames are put around it."""
    facts = (*FACTS, *INSTRUCTIONS)
    texts = [text for fact in facts for text in (*fact.told, *fact.changed, *fact.asked, *fact.answered)]
    texts += [text for fact in facts for text in (*fact.clauses, *fact.names, *fact.unfinished)]
    texts += [text for fact in facts for both in fact.dialogue for text in both]
    tables = [value for name, value in vars(wording).items() if name.isupper() and isinstance(value, tuple)]
    flat = [text for table in tables for entry in table for text in (entry if isinstance(entry, tuple) else (entry,))]
    return list(dict.fromkeys([*texts, *flat, *(name for names in wording.SECRETS.values() for name in names)]))


def framed(draws: int) -> list[str]:
    """Questions and answers of random facts, with their frames."""
    random = np.random.default_rng(0)
    texts = []
    for _ in range(draws):
        fact = (*FACTS, *INSTRUCTIONS)[int(random.integers(len(FACTS) + len(INSTRUCTIONS)))]
        yours = [second_person(text) for text in (*fact.clauses, *fact.names)]
        texts += [*exchange(random, fact), plain_exchange(random, fact), refusal(random, fact, yours)]
    return texts


def flat(text: str) -> str:
    """In small letters, without values, punctuation and the difference between `it's` and `it is`."""
    text = re.sub(r"\{\w*\}", " ", text).lower().replace("’", "'")
    text = re.sub(r"\b(what|who|where|when|how|it|that|there|here)'s\b", r"\1 is", text).replace("'s", "")
    for short, long in (("i'm", "i am"), ("'re", " are"), ("'ve", " have"), ("n't", " not")):
        text = text.replace(short, long)
    return " ".join(re.findall(r"\w+", text))


def test_nothing_that_is_kept_for_evaluation_is_said(histories: list[History]) -> None:
    kept = unseen()
    assert len(kept) > 200
    said = [*templates(), *framed(20_000), *(history.text for history in histories)]
    assert len(said) > 60_000
    together = "\n".join(map(words, said))
    assert [part for part in kept if part in together] == []
    # Nor in other spelling.
    together = "|".join(f" {flat(text)} " for text in said)
    assert [part for part in kept if f" {flat(part)} " in together] == []
    for task in ("passkey", "pairs"):
        for needle in needles(task, RecallConfig(cases=3)):
            assert flat(needle.prompt)[:20] not in together


_EMPTY = (
    "a an the is are am was do does did i you my your our we me it of to in on at by for with what which who where "
    "when how this that as from be been now then not has have had s and or so"
)


def test_no_question_is_one_of_evaluation_in_other_order() -> None:
    """No sentence has all words with a meaning of one that is kept for evaluation, if that has more than one."""

    def meaning(text: str) -> set[str]:
        return set(flat(text).split()) - set(_EMPTY.split())

    seen = {text for fact in FACTS if fact.group == "seen" for text in (*fact.told, *fact.asked, *fact.answered)}
    said = [meaning(text) for text in templates() if text not in seen]
    kept = [text for each in ATTRIBUTES for text in dataclasses.astuple(each.unseen)]
    wanted = [meaning(text) for text in kept if len(meaning(text)) > 1]
    assert len(wanted) > 70
    assert [words for words in wanted if any(words <= each for each in said)] == []


def test_questions_are_many() -> None:
    texts = framed(40_000)
    questions, answers = set(texts[::4]), set(texts[1::4])
    assert len(questions) > 30_000 and len(answers) > 8_000
    assert len(set(texts[3::4])) > 5_000  # refusals
    assert not any("{" in text.replace("{v}", "").replace("{a}", "").replace("{A}", "") for text in answers)
    assert not any(re.search(r"\{[a-zN]\}", text) for text in questions)


def test_facts_are_many_and_well_formed() -> None:
    facts = (*FACTS, *INSTRUCTIONS)
    assert len({fact.subject for fact in facts}) == len(facts) > 1000
    own = [fact for fact in FACTS if fact.group != "seen"]
    # Each group of facts that are asked for alike is one attribute.
    attributes = {fact.group for fact in own if fact.group != "own"} | {f.subject for f in own if f.group == "own"}
    assert len(attributes) >= 115
    for fact in facts:
        for text in (*fact.told, *fact.changed, *fact.answered, *(reply for _, reply in fact.dialogue)):
            assert text.count("{v}") == 1 and not set(re.findall(r"{\w*}", text)) - {"{v}", "{a}", "{A}"}, text
        for text in (*fact.asked, *fact.clauses, *fact.names, *fact.unfinished):
            assert text and text == text.strip() and "{" not in text, text
        for text in (*fact.told, *fact.changed, *fact.answered, *fact.asked):
            assert text[0].isupper() or text.startswith("{"), text
        if fact.kind == "fact":
            assert all(text.endswith("?") for text in fact.asked)
            assert not any(re.search(r"\b(I|my|me|our|we)\b", text) for text in fact.answered), fact.subject
        assert not set(fact.told) & set(fact.changed)
        if fact.group not in ("seen", "instruction"):
            assert len(fact.told) >= 4 and min(map(len, (fact.changed, fact.asked, fact.answered))) >= 3, fact.subject
            assert len(fact.clauses) >= 2
        if fact.kind == "instruction":
            assert min(map(len, (fact.told, fact.changed, fact.dialogue))) >= 3
        drawn = {fact.draw(np.random.default_rng(seed)) for seed in range(200)}
        assert len(drawn) >= 7, fact.subject


def test_persons_are_turned() -> None:
    assert second_person("I fed my parrot. My aunt saw us.") == "You fed your parrot. Your aunt saw you."
    assert second_person("who I am and where I'm from") == "who you are and where you're from"
    assert second_person("I was late and we've paid.") == "You were late and you've paid."


def test_values_are_drawn_of_many() -> None:
    for name, draw in VALUES.items():
        drawn = [draw(np.random.default_rng(seed)) for seed in range(300)]
        assert all(value == value.strip() and value for value in drawn)
        assert len(set(drawn)) >= 7, name
    assert re.fullmatch(r"[0-9a-f]{8}", VALUES["hex8"](np.random.default_rng(0)))


def test_every_fact_has_a_value_left_for_each_change() -> None:
    random = np.random.default_rng(0)
    for fact in (*FACTS, *INSTRUCTIONS):
        assert len({fact.draw(random) for _ in range(400)}) > MOST_CHANGES + 1, fact.subject


def test_no_fact_changes_without_end(filler: TokenizedDocuments, tokenizer: Any) -> None:
    long = HistoryConfig(tokens=60_000, shortest=60_000, longest=60_000, distance=1500)
    for history in generate_histories(filler, tokenizer, long):
        tellings = Counter(told.subject for told in history.told)
        assert 1 < max(tellings.values()) <= MOST_CHANGES + 1


def test_sentences_are_filled() -> None:
    assert fill("I own {a} {v}.", "owl") == ("I own an owl.", (9, 12))
    assert fill("{v} is {a} name.", "rex") == ("Rex is a name.", (0, 3))
    assert fill("Sure. {v} it is.", "rex") == ("Sure. Rex it is.", (6, 9))
    assert fill("{v} is its hash.", "a9") == ("a9 is its hash.", (0, 2))
    assert fill("{A} {v} was seen.", "owl")[0] == "An owl was seen."
    assert article("Apple") == "an" and article("7") == "a"


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"tokens": 0}, {"shortest": 9, "longest": 8}, {"distance": -1}, {"shortest": 2000, "longest": 3000}]
)
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tokens must be at least 1" if "tokens" in settings else "longer than"):
        HistoryConfig(**settings)


@pytest.mark.parametrize("near", [-0.1, 1.0])
def test_a_share_is_a_share(near: float) -> None:
    with pytest.raises(ConfigError, match="near is a share of the questions"):
        HistoryConfig(near=near)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_replies_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="reply_share is a share of the questions"):
        HistoryConfig(reply_share=share)


def test_filler_without_text_is_named(tokenizer: Any) -> None:
    empty = TokenizedDocuments(np.empty(0, dtype=np.uint16), ["a"], [0])
    with pytest.raises(SourceError, match="Give documents with text in them"):
        next(generate_histories(empty, tokenizer, CONFIG))
