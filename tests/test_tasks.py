"""Tasks ask what was told, the same for a seed, and score what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_TEXT
from hypothesis import given
from hypothesis import strategies as st

from longmem.contenders.contender import joined
from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, UnavailableError
from longmem.model import LongMem
from longmem.tasks import task as task_module
from longmem.tasks.facts import Facts
from longmem.tasks.needles import Pairs, PassKey
from longmem.tasks.scoring import exact, f1, normalised
from longmem.tasks.task import Answer, Task, TaskConfig
from longmem.tasks.xquad import XQuad


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return LongMem.from_pretrained(tiny_model_dir, device="cpu").tokenizer


@pytest.fixture(autouse=True)
def short_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's documentation takes seconds to read."""

    def few(tokenizer: Any) -> TokenizedDocuments:
        return TokenizedDocuments.from_documents([Document("bees", TINY_TEXT * 40)], tokenizer)

    monkeypatch.setattr(task_module, "default_documents", few)


def answered(text: str) -> Answer:
    return Answer(text, -1.0, 1)


@pytest.mark.parametrize("kind", [PassKey, Pairs])
def test_needles_are_hidden_in_what_is_told(kind: type[Task], tokenizer: Any) -> None:
    task = kind(TaskConfig(cases=4, told=1024), tokenizer)
    rounds = list(task.rounds())
    assert rounds == list(kind(TaskConfig(cases=4, told=1024), tokenizer).rounds())
    assert len({each.cases[0].answers for each in rounds}) == 4
    for each in rounds:
        (case,) = each.cases
        assert joined(each.documents).count(case.answers[0]) == 1
        assert case.prompt.evidence is not None and case.answers[0] in case.prompt.evidence[0]
        assert case.prompt.evidence[0] in {document.text for document in each.documents}
        assert task.score(case, answered(f" {case.answers[0]}. And"))["right"] == 1
        assert task.score(case, answered("something else"))["right"] == 0


def test_facts_know_what_is_right_stale_and_invented(tokenizer: Any) -> None:
    task = Facts(TaskConfig(cases=6, told=512), tokenizer)
    rounds = list(task.rounds())
    kinds = set()
    for each in rounds:
        (case,) = each.cases
        kinds.add(case.kind)
        values = task.score(case, answered(case.answers[0] + "."))
        assert task.score(case, answered("nothing"))[next(iter(values))] == 0
        if case.kind == "silent":
            assert values == {"invented": 1}
            continue
        assert values["right"] == 1 and case.answers[0] in joined(each.documents)
        stale = [value for value, label in case.notes.items() if label == "stale"]
        assert bool(stale) == (case.kind == "corrected")
        for value in stale:
            assert task.score(case, answered(value))["stale"] == 1
            # The newest value stands last.
            assert joined(each.documents).rindex(value) < joined(each.documents).rindex(case.answers[0])
    assert kinds == {"once", "corrected", "silent"}


@pytest.fixture
def xquad(tmp_path: Path) -> Path:
    """Six paragraphs in the data set's format, with three questions each."""
    paragraphs = [
        {
            "context": f"Ada has {number} bees in house {number}. The weather is fine and the boats are painted.",
            "qas": [
                {"question": f"{q} bees has house {number}?", "answers": [{"text": str(number), "answer_start": 8}]}
                for q in ("How many", "What number of", "Which count of")
            ],
        }
        for number in range(6)
    ]
    (tmp_path / "xquad").mkdir()
    (tmp_path / "xquad" / "en.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return tmp_path


def test_xquad_asks_about_what_it_told(xquad: Path, tokenizer: Any) -> None:
    config = TaskConfig(xquad, cases=5, told=100)
    (each,) = XQuad(config, tokenizer).rounds()
    assert [each] == list(XQuad(config, tokenizer).rounds())
    assert len(each.cases) == 5 and 2 <= len(each.documents) < 6
    told = {document.text for document in each.documents}
    for case in each.cases:
        assert case.prompt.evidence is not None and case.prompt.evidence[0] in told
        assert case.answers[0] in case.prompt.evidence[0]
    (whole,) = XQuad(TaskConfig(xquad, cases=100, told=10_000), tokenizer).rounds()
    assert len(whole.documents) == 6 and len(whole.cases) == 18


def test_missing_data_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UnavailableError, match="give --data DIR with xquad in it"):
        list(XQuad(TaskConfig(), tokenizer).rounds())
    with pytest.raises(UnavailableError, match="xquad is not in"):
        list(XQuad(TaskConfig(tmp_path), tokenizer).rounds())
    with pytest.raises(ConfigError, match="cases must be at least 1; got 0"):
        TaskConfig(cases=0)


words = st.lists(st.sampled_from(["a", "the", "bee", "roof", "ada", "boat"]), max_size=6).map(" ".join)


@given(words, words)
def test_f1_is_a_mean_of_precision_and_recall(one: str, other: str) -> None:
    assert 0 <= f1(one, [other]) <= 1
    assert f1(one, [other]) == f1(other, [one])
    assert f1(one, [one, other]) == (1 if normalised(one) else f1(one, [other]))
    if exact(one, [other]) and normalised(one):
        assert f1(one, [other]) == 1
    assert exact(f"The {one.upper()}!", [one]) == 1


def test_f1_counts_words() -> None:
    assert f1("the blue pot", ["under the blue pot"]) == pytest.approx(0.8)
    assert f1("pot pot", ["pot"]) == pytest.approx(2 / 3)
    assert f1("", ["pot"]) == 0
