"""What is hidden, and that sharing the filler changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import TINY_TEXT
from hypothesis import given
from hypothesis import strategies as st

from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError
from longmem.evals import answers, recall
from longmem.evals.answers import CONDITIONS, Outcome
from longmem.evals.recall import TASKS, RecallConfig, needles
from longmem.model import LongMem

CONFIG = RecallConfig(remembered=(64, 128), cases=2, pairs=2, passage=32)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


@pytest.fixture(scope="module")
def filler(model: LongMem) -> TokenizedDocuments:
    return TokenizedDocuments.from_documents([Document("a", TINY_TEXT * 3)], model.tokenizer)


@given(st.sampled_from(TASKS), st.integers(0, 10_000), st.integers(1, 25), st.text("ab \n"))
def test_needles(task: str, seed: int, pairs: int, passage: str) -> None:
    config = RecallConfig(cases=2, pairs=pairs, seed=seed)
    first, second = needles(task, config)
    assert needles(task, dataclasses.replace(config, cases=1)) == [first]  # the same for a seed
    assert first.answer != second.answer and first.prompt[-1] != " "
    for needle in (first, second):
        assert needle.labels[needle.answer] == "answer"
        assert needle.answer in needle.evidence and needle.answer not in needle.wrong
        (wrong,) = [value for value, label in needle.labels.items() if label == "wrong"]
        assert wrong in needle.wrong and wrong not in needle.evidence
        assert len(needle.labels) == (2 if task == "passkey" else 2 * pairs)
        hidden = needle.hidden_in(passage, needle.evidence)
        assert f"\n\n{needle.evidence}\n\n" in hidden
        assert hidden.replace(needle.evidence, "").split() == passage.split()
        if task == "pairs":
            key = needle.prompt.split()[-2]
            assert f"The value of {key} is {needle.answer}." in needle.evidence


@pytest.mark.parametrize("context", [0, 9])
def test_sharing_the_filler_equals_writing_everything_anew(
    model: LongMem, filler: TokenizedDocuments, context: int
) -> None:
    config = dataclasses.replace(CONFIG, cases=1, context=context)
    result = recall.recall(model, filler, config)
    assert len(result.cases) == 2 * 2
    rng = np.random.default_rng(config.seed)
    texts, _ = answers.passages(filler, model.tokenizer, tokens=160 if context else 128, size=32, rng=rng)
    opening = recall.last_tokens(model, texts[4], context) + "\n\n" if context else ""
    rows = iter(result.cases)
    for remembered in config.remembered:
        count = remembered // 32
        for task in TASKS:
            for needle in needles(task, config):
                row = next(rows)
                assert (row["task"], row["remembered"], row["answer"]) == (task, remembered, needle.answer)
                index = int(needle.depth * count)
                banks = []
                for evidence in (needle.evidence, needle.wrong):
                    bank = model.new_bank()
                    for place, text in enumerate(texts[:count]):  # the first case's stretch
                        hidden = needle.hidden_in(text, evidence) if place == index else text
                        model.write_text(bank, hidden, source=f"anything/{place}")
                    banks.append(bank)
                question = answers.Question(needle.prompt, needle.answer, needle.labels)
                prompt = opening + needle.prompt
                window = opening + needle.hidden_in(texts[index], needle.evidence) + "\n\n" + needle.prompt
                anew = {
                    "bank_on": answers.ask(model, question, prompt, banks[0]),
                    "bank_off": answers.ask(model, question, prompt, model.new_bank()),
                    "bank_wrong": answers.ask(model, question, prompt, banks[1]),
                    "window": answers.ask(model, question, window),
                    "backbone_window": answers.ask(model, question, window, memory=0.0),
                }
                for name, outcome in anew.items():
                    assert row["outcomes"][name]["given"] == outcome.given
                    probability = pytest.approx(outcome.log_probability, abs=1e-3)
                    assert row["outcomes"][name]["log_probability"] == probability


def test_results_add_up(
    model: LongMem, filler: TokenizedDocuments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that finds whatever its bank or window tells it, at the lesser size only."""

    def oracle(model: LongMem, question: Any, text: str, bank: Any = None, *, memory: float = 1.0) -> Outcome:
        told = text + "".join(bank.text_of(source) for source in bank.sources if bank) if bank else text
        told = told if bank is None or len(bank) < 192 else ""
        labels = [label for value, label in question.labels.items() if label != "other" and f"is {value}." in told]
        assert len(labels) <= 1
        return Outcome(labels[0] if labels else None, -1.0)

    monkeypatch.setattr(
        answers,
        "ask_all",
        lambda model, asks: [oracle(model, a.question, a.text, a.bank, memory=a.memory) for a in asks],
    )
    progress: list[int] = []
    result = recall.recall(model, filler, CONFIG, on_case=progress.append)
    assert sum(progress) == recall.steps(CONFIG)
    for task in TASKS:
        near, far = result.groups[task][64], result.groups[task][128]
        rates = {name: near.scores[name].rates["answer"] for name in CONDITIONS}
        assert rates == {"bank_on": 1, "bank_off": 0, "bank_wrong": 0, "window": 1, "backbone_window": 1}
        assert near.scores["bank_wrong"].rates["wrong"] == 1
        assert near.relative == 1
        assert far.relative in (0, 1)
    result.save(tmp_path / "new" / "figures.json")
    saved = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert saved["groups"]["passkey"]["64"]["scores"]["bank_on"]["rates"]["answer"] == 1
    assert saved["config"]["seed"] == 0


@pytest.mark.parametrize("focus", [0, 2048])
def test_of_a_large_bank_what_the_question_is_about_is_read(
    model: LongMem, filler: TokenizedDocuments, asked: list[answers.Ask], focus: int
) -> None:
    recall.recall(model, filler, RecallConfig(remembered=(6144,), cases=6, passage=128, focus=focus))
    banks = [(each, each.bank) for each in asked if each.bank is not None]
    assert len(banks) == 2 * 2 * 6
    for each, bank in banks:
        assert (1792 < len(bank) <= 2048) if focus else len(bank) > 6000
        # The value that is asked for, or the one in its place, is told once, and all of it is read.
        values = {value for value, label in each.question.labels.items() if label in ("answer", "wrong")}
        ((source, place, value),) = (
            (number, text.find(f" is {value}."), value)
            for number, text in enumerate(map(bank.text_of, bank.sources))
            for value in values
            if f" is {value}." in text
        )
        own_P2 = bank.offsets_N2[bank.source_index_N == source]
        read = set().union(*(range(start, end) for start, end in own_P2.tolist()))
        assert set(range(place, place + len(f" is {value}."))) <= read


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 12))
def test_every_case_has_its_stretch_of_the_pool(count: int, spare: int, cases: int) -> None:
    entries: Any = list(range(count + spare))
    stretches: list[Any] = recall._stretches(entries, count, cases)
    assert len(stretches) == cases
    assert all(part == list(range(part[0], part[0] + count)) for part in stretches)
    assert stretches[0][0] == 0 and (cases == 1 or stretches[-1][-1] == entries[-1])
    assert len({part[0] for part in stretches}) == min(cases, spare + 1) or cases == 1


def test_a_larger_pool(model: LongMem, filler: TokenizedDocuments) -> None:
    config = RecallConfig(("passkey",), (64,), cases=3, passage=32, pool=160)
    progress: list[int] = []
    result = recall.recall(model, filler, config, on_case=progress.append)
    assert sum(progress) == recall.steps(config) == 5 + 3
    alone = recall.recall(model, filler, dataclasses.replace(config, pool=0))
    given = [[case["outcomes"]["bank_on"]["log_probability"] for case in each.cases] for each in (result, alone)]
    assert given[0][0] == pytest.approx(given[1][0], abs=1e-4)  # the first stretch is the whole of the lesser pool
    assert given[0][2] != pytest.approx(given[1][2], abs=1e-4)


@given(st.integers(1, 60))
def test_the_last_tokens_of_a_text(model: LongMem, tokens: int) -> None:
    text = TINY_TEXT[:200].strip()
    end = recall.last_tokens(model, text, tokens)
    assert text.endswith(end) and end
    whole, ids = (model.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, end))
    assert len(ids) == min(tokens, len(whole))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ("passkeys",)}, "passkey, pairs; got passkeys"),
        ({"tasks": ()}, "got none"),
        ({"cases": 0}, "cases must be at least 1"),
        ({"remembered": (100,)}, "at least one passage of 512 tokens; got remembered=100"),
        ({"pairs": 26}, "words run out"),
        ({"context": 513}, "from 0 to the 512 tokens of a passage; got 513"),
        ({"focus": 2047}, "focus must be 0 .* at least 2048 tokens; got 2047"),
    ],
)
def test_mistakes(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RecallConfig(**settings)
