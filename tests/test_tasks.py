"""Tasks ask what was told, the same for a seed, and score what they should."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_TEXT
from hypothesis import given
from hypothesis import strategies as st

import longmem.tasks
from longmem.contenders.contender import Prompt, joined
from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, UnavailableError
from longmem.model import LongMem
from longmem.registry import found
from longmem.tasks import language, many_shot, summaries
from longmem.tasks import task as task_module
from longmem.tasks.facts import Facts
from longmem.tasks.needles import Pairs, PassKey
from longmem.tasks.scoring import exact, f1, normalised
from longmem.tasks.scoring import found as stands_in
from longmem.tasks.task import Answer, Case, Round, Task, TaskConfig
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
    rounds = list(XQuad(config, tokenizer).rounds())
    assert rounds == list(XQuad(config, tokenizer).rounds())
    assert [len(each.cases) for each in rounds] == [2, 3]
    one, other = ({document.text for document in each.documents} for each in rounds)
    assert len(one) >= 2 and len(other) >= 2 and not one & other
    for each, told in zip(rounds, (one, other), strict=True):
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


# ---- data sets, in their formats ---------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, xquad: Path) -> Path:
    """Small files in the formats of every data set."""

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")

    turns = [{"speaker": "Ada", "dia_id": f"D1:{n}", "text": f"I saw {n} bees."} for n in range(1, 4)]
    asked = [
        {"question": "How many bees did Ada see last?", "answer": 3, "evidence": ["D1:3"], "category": 4},
        {"question": "How many boats?", "adversarial_answer": "x", "evidence": ["D1:1"], "category": 5},
        {"question": "What came much later?", "answer": "wax", "evidence": ["D9:1"], "category": 1},
    ]
    conversation = {
        "session_1_date_time": "noon on 1 May",
        "session_1": turns,
        "session_2_date_time": "",
        "session_2": [],
    }
    write("locomo/l.json", json.dumps([{"conversation": conversation, "qa": asked}]))
    records = [[f"{n:08d}-key", f"{n:08d}-value"] for n in range(6)]
    row = {"ordered_kv_records": records, "key": records[2][0], "value": records[2][1]}
    write("lost_in_the_middle/kv_retrieval_data/kv.jsonl.gz", json.dumps(row) + "\n")
    story = "1 Ada is on the roof.\n2 Ben is in the garden.\n3 Where is Ada? \troof\t1\n"
    write(
        "babi/en/qa1_single-supporting-fact_test.txt",
        story + story.replace("Ada?", "Ben?").replace("roof\t1", "garden\t2"),
    )
    write(
        "babi/en/qa4_two-arg-relations_test.txt",
        "1 The roof is east of the pond.\n2 What is east of the pond?\troof\t1\n",
    )
    examples = [(n % 2, f"bees are {'good' if n % 2 else 'bad'} {n}") for n in range(40)]
    rows = "".join(f"{text}\t{label}\n" for label, text in examples)
    for name in ("train", "dev"):
        write(f"icl_classification/SST-2/{name}.tsv", "sentence\tlabel\n" + rows)
    for folder in ("mr", "subj", "sst-5", "mpqa"):
        for name in ("train", "test"):
            write(f"icl_classification/{folder}/{name}.csv", "".join(f'{label},"{text}"\n' for label, text in examples))
    responses = [{"response_text": "Ada keeps bees."}, {"response_text": "Bees on a roof."}]
    questions = [{"question_text": "What is the plot?", "responses": responses}]
    write("squality/dev.jsonl", json.dumps({"document": TINY_TEXT, "questions": questions}) + "\n")
    transcripts = [{"speaker": "Ada", "content": f"Point {n} is about wax."} for n in range(5)]
    query = {"query": "What is point 3?", "answer": "Point 3 is wax.", "relevant_text_span": [["3", "3"]]}
    write(
        "qmsum/ALL_val.jsonl", json.dumps({"meeting_transcripts": transcripts, "specific_query_list": [query]}) + "\n"
    )
    write("books/a.txt", "".join(f"On day {n} the bees flew to field {n * 7 % 50}. " for n in range(400)))
    return tmp_path


@pytest.mark.parametrize("name", list(found(longmem.tasks, Task)))
def test_every_task_asks_the_same_for_a_seed_and_scores_its_right_answers(
    name: str, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right answer scores better than a wrong one in the first measure, and evidence holds what is told."""
    monkeypatch.setattr(summaries, "find_spec", lambda name: True)
    monkeypatch.setattr(
        summaries, "rouge", lambda text, reference: dict.fromkeys(summaries._TYPES, f1(text, [reference]))
    )

    def made(seed: int = 0) -> Task:
        return found(longmem.tasks, Task)[name](TaskConfig(data, cases=4, told=512, draws=2, seed=seed), tokenizer)

    task = made()
    rounds = list(task.rounds())
    assert rounds == list(made().rounds())
    cases = [(each, case) for each in rounds for case in each.cases]
    assert 1 <= len(cases) <= 24
    first = task.measures[0]
    for each, case in cases:
        assert each.documents and case.prompt.text
        assert case.continuation or not case.prompt.text.endswith(" ")
        assert not case.choices or set(case.answers) <= set(case.choices)
        for text in case.answers or ("",):
            values = task.score(case, Answer(text, -1.0, 1))
            assert set(values) <= {measure.name for measure in task.measures}
        if case.answers and case.kind != "silent":
            right, wrong = (task.score(case, Answer(text, -1.0, 1))[first.name] for text in (case.answers[0], "zzz"))
            assert right == 1 and wrong == 0
            room = len(tokenizer(" " + case.answers[0])["input_ids"])
            assert room <= case.prompt.room + 64  # a tiny vocabulary takes more tokens than a real one
        if case.prompt.evidence and name not in ("locomo",):
            words = set(joined(each.documents).replace(",", " ").split())
            assert set(" ".join(case.prompt.evidence).replace(",", " ").split()) <= words
    if case.continuation:
        longer = task.score(case, Answer("", -20.0, 10))[first.name]
        assert longer == 2.0


def test_locomo_asks_what_was_told(data: Path, tokenizer: Any) -> None:
    (each,) = found(longmem.tasks, Task)["locomo"](TaskConfig(data, cases=4, told=512), tokenizer).rounds()
    (case,) = each.cases
    assert case.answers == ("3",) and case.kind == "one session"
    assert case.prompt.evidence == ("Conversation at noon on 1 May:\nAda: I saw 3 bees.",)


def test_many_shots_are_not_in_the_bank(data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_shot, "_BANK", 10)
    for shots in (4, 20):
        task = found(longmem.tasks, Task)[f"many-shot-{shots}"](TaskConfig(data, cases=4, told=512, draws=2), tokenizer)
        rounds = list(task.rounds())
        assert len(rounds) == 2 * 2
        for each in rounds:
            told = joined(each.documents)
            for case in each.cases:
                *examples, asked = case.prompt.text.split("\n\n")
                assert len(examples) == shots
                assert asked.endswith("Sentiment:")
                assert not [example for example in examples if f"{example}\n" in told]
        assert len({each.documents for each in rounds}) == 4


def test_language_is_one_text(data: Path, tokenizer: Any) -> None:
    task = found(longmem.tasks, Task)["language"](TaskConfig(data, cases=4, told=2048), tokenizer)
    rounds = list(task.rounds())
    book = (data / "books" / "a.txt").read_text()
    kinds = {}
    for each in rounds:
        (case,) = each.cases
        kinds[case.kind] = case.continuation
        assert each.documents[0].text + case.prompt.text + case.continuation in book
    # More is told of the same place.
    assert len(kinds) == 2 and len(set(kinds.values())) == 1
    with pytest.raises(UnavailableError, match="no text has the"):
        list(found(longmem.tasks, Task)["language"](TaskConfig(data, told=100_000), tokenizer).rounds())


def test_language_tells_other_texts_beyond_the_past(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "c"):
        (data / "books" / f"{name}.txt").write_text((data / "books" / "a.txt").read_text().replace("bees", name * 3))
    monkeypatch.setattr(language, "_PAST", 1024)

    def rounds(told: int) -> list[Round]:
        return list(language.Language(TaskConfig(data, cases=2, told=told), tokenizer).rounds())

    near, far = rounds(3000)
    assert [len(each.documents) for each in (near, far)] == [1, 2]
    own = far.documents[-1]
    assert own == near.documents[0] and far.cases[0].continuation == near.cases[0].continuation
    (other,) = far.documents[:-1]
    assert other.name != own.name
    counts = [len(tokenizer(each.text)["input_ids"]) for each in (other, own)]
    # A text that is cut may end in other tokens.
    assert sum(counts) == pytest.approx(3000, abs=2) and counts[1] == pytest.approx(1024, abs=1)
    # With less, the same is told as before there were others.
    assert rounds(1024)[0].documents == near.documents
    task = language.Language(TaskConfig(data, cases=2, told=3000), tokenizer)
    assert not task.strange(near, far) and not task.strange(far, near)
    mixed = Round((own, other), far.cases)
    assert not task.strange(Round((other,), far.cases), mixed) and not task.strange(far, mixed)
    assert task.strange(far, Round((other,), far.cases))
    with pytest.raises(UnavailableError, match="the texts are too few"):
        rounds(10_000_000)


def test_rouge_needs_its_library(data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"longmem\[rouge\]"):
        list(found(longmem.tasks, Task)["qmsum"](TaskConfig(data), tokenizer).rounds())


def test_rouge() -> None:
    pytest.importorskip("rouge_score")
    assert summaries.rouge("bees on the roof", "bees on the roof") == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert summaries.rouge("roof", "bees on the roof")["rouge1"] == pytest.approx(0.4)


def test_fluency_counts_what_is_said_again(tokenizer: Any) -> None:
    task = found(longmem.tasks, Task)["fluency"](TaskConfig(), tokenizer)
    case = Case(Prompt("Once"))
    assert task.score(case, answered("a b c d e f")) == {"distinct-2": 1.0, "repeated": 0.0}
    again = task.score(case, answered("a b c d a b c d"))
    assert again["distinct-2"] == pytest.approx(4 / 7) and again["repeated"] == pytest.approx(1 / 5)
    assert task.score(case, answered("")) == {"distinct-2": 0.0, "repeated": 0.0}


def test_found_is_a_matter_of_whole_words() -> None:
    assert stands_in(["The key is under a Blue pot."], ["the blue pot", "x"]) == 1
    assert stands_in(["A bluebell", "pots"], ["blue", "pot"]) == 0
    assert stands_in([], ["pot"]) == 0


def test_what_is_covered_of_the_evidence() -> None:
    evidence = ("Ada: the bees sleep until March", "Ben: yes")
    assert summaries.covered(evidence, ("x ADA: the bees sleep until March y",)) == 1.0
    assert summaries.covered(evidence, ("the bees sleep until", "March")) == pytest.approx(1 / 3)
    assert summaries.covered(evidence, ()) == 0.0 == summaries.covered(("yes",), ("yes",))


def test_more_shots_are_of_the_same_draw(data: Path, tokenizer: Any) -> None:
    four, twenty = (
        list(kind(TaskConfig(data, cases=4, draws=2, told=256), tokenizer).rounds())
        for kind in (many_shot.ManyShot, many_shot.ManyShot20)
    )
    for few, many in zip(four, twenty, strict=True):
        assert few.documents == many.documents
        assert [case.answers for case in few.cases] == [case.answers for case in many.cases]
        assert [case.prompt.query for case in few.cases] == [case.prompt.query for case in many.cases]
