"""How questions are asked, judged and counted, against the same done by hand and against a model that says a script."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import TINY_TEXT
from hypothesis import given
from hypothesis import strategies as st

from longmem.backbone import BackboneOutput
from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.evals import answers
from longmem.evals.answers import CONDITIONS, Ask, Outcome, Question, ask, ask_all, score_group, wilson
from longmem.model import LongMem


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    """Its SideNet moved at random, so that banks matter."""
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


def documents(model: LongMem, *texts: str) -> TokenizedDocuments:
    return TokenizedDocuments.from_documents((Document(str(i), t) for i, t in enumerate(texts)), model.tokenizer)


class Letters:
    """A tokenizer whose ids are letters; 1 ends texts."""

    eos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i) for i in ids if i > 1)


class Scripted:
    """Model and backbone in one: says a script behind a prompt, letter by letter."""

    device = torch.device("cpu")
    tokenizer = Letters()

    sidenet = SimpleNamespace(boundaries=())

    def __init__(self, prompt: str, script: str) -> None:
        self.script, self.begin = script, 1 + len(prompt)
        self.backbone = self
        self.passes = 0

    name, prefix_token_id, max_positions, num_layers = "script", 0, 500, 7

    def __call__(self, ids_BT: torch.Tensor, *, boundaries: set[int]) -> BackboneOutput:
        """Logits; they pass for hidden states."""
        assert boundaries == {7}
        self.passes += 1
        logits_BTV = torch.zeros(*ids_BT.shape, 128)
        for t in range(self.begin - 1, ids_BT.shape[1]):
            said = t + 1 - self.begin
            logits_BTV[:, t, ord(self.script[said]) if said < len(self.script) else 1] = 20
        return BackboneOutput({7: logits_BTV}, ids_BT)

    def reader(self, banks: Any, *, rows: int) -> None:
        assert banks == [None] * rows

    def correct(self, seen: BackboneOutput, retrieve: Any, *, memory: float) -> tuple[torch.Tensor, list[Any]]:
        return seen.hidden_states[7], []

    def logits(self, hidden_BTV: torch.Tensor) -> torch.Tensor:
        return hidden_BTV


LABELS = {"Biscuit": "answer", "12": "stale", "12 March": "wrong"}


@pytest.mark.parametrize(
    ("script", "label"),
    [
        (" Biscuit.", "answer"),
        (" Biscuit", "answer"),  # and then the text ends
        (" biscuit, of course", "answer"),
        (" Biscuits", None),
        (" a Biscuit", None),
        ("", None),
        (" 12.", "stale"),
        (" 123", None),
        (" 12 March", "wrong"),
        (" 12 Marches", "stale"),
        (" 12 May", "stale"),
    ],
)
def test_what_a_script_answers(script: str, label: str | None) -> None:
    outcome = ask(Scripted("My dog is", script), Question("", "Biscuit", LABELS), "My dog is")  # type: ignore[arg-type]
    assert outcome.given == label
    assert (outcome.log_probability > -0.01) == script.startswith(" Biscuit")


def test_nothing_is_said_beyond_what_decides() -> None:
    scripted = Scripted("My dog is", " Xenia and many more words")
    ask(scripted, Question("", "Biscuit", LABELS), "My dog is")  # type: ignore[arg-type]
    assert scripted.passes == 1  # the X is no beginning of an answer


@pytest.mark.parametrize(
    ("script", "passes"), [(" Biscuit.", 1), (" Biscuits", 1), (" 12 March.", 3), (" biscuit.", 2 + len("iscuit"))]
)
def test_a_pass_reads_as_far_as_its_guess_is_right(script: str, passes: int) -> None:
    """The right answer is guessed first; then what may still come; letter by letter what no candidate is spelt like."""
    scripted = Scripted("My dog is", script)
    ask(scripted, Question("", "Biscuit", LABELS), "My dog is")  # type: ignore[arg-type]
    assert scripted.passes == passes


@torch.no_grad()
@pytest.mark.parametrize("memory", [1.0, 0.0])
@pytest.mark.parametrize("remembers", [True, False])
def test_probability_and_greedy_text_are_what_a_loop_by_hand_gives(
    model: LongMem, memory: float, remembers: bool
) -> None:
    bank = answers.bank_of(model, [model.encode_text(TINY_TEXT, source="a")]) if remembers else None
    prompt, answer = "Ada keeps bees. What does she keep?", "bees and boats"
    ids = [0, *model.tokenizer(f"{prompt} {answer}")["input_ids"]]
    begin = 1 + len(model.tokenizer(prompt)["input_ids"])
    logits_TV = model(torch.tensor([ids]), bank, memory=memory).logits_BTV[0]
    by_hand = sum(float(logits_TV[t - 1].log_softmax(-1)[ids[t]]) for t in range(begin, len(ids)))
    pieces = model.generate(prompt, bank=bank, max_new_tokens=4, remember=False, memory=memory)
    said = "".join(piece.text for piece in pieces)
    outcome = ask(
        model, Question(prompt, answer, {said.strip(): "said", "bees": "answer"}), prompt, bank, memory=memory
    )
    assert outcome.log_probability == pytest.approx(by_hand, abs=1e-3)
    # What follows the fourth token decides whether its word is whole; its beginning is said in any case.
    assert outcome.given in ("said", None)
    assert answers.undecided(said, [said.strip()])


@torch.no_grad()
def token_by_token(model: LongMem, each: Ask) -> Outcome:
    """`ask` as one would write it: the prompt, the answer behind it, and what the model says, token by token."""
    prompt, answer = answers.prompt_and_answer(model, each.text, each.question.answer)
    options: dict[str, Any] = {"memory": each.memory}
    ids_1T = model.with_prefix(torch.tensor(prompt))[None]
    logits_1TV = model(torch.cat((ids_1T, torch.tensor([answer])), dim=1), each.bank, **options).logits_BTV
    behind_AV = logits_1TV[0, len(prompt) : len(prompt) + len(answer)].log_softmax(-1)
    probability = float(behind_AV.gather(-1, torch.tensor(answer)[:, None]).sum())
    cache, said, spoken = model.new_cache(), [], ""
    labels = each.question.labels
    step_1T = ids_1T
    while len(said) < 2 + max(map(len, labels)):
        said.append(int(model(step_1T, each.bank, cache=cache, last_only=True, **options).logits_BTV[0, -1].argmax()))
        step_1T = torch.tensor([said[-1:]])
        spoken = model.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if said[-1] == model.tokenizer.eos_token_id or not answers.undecided(spoken, list(labels)):
            break
    given = answers.answer_in(spoken, list(labels))
    return Outcome(None if given is None else labels[given], probability)


def test_batches_give_what_one_question_at_a_time_gives(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of many lengths, with banks of many sizes, whose labels the model comes near to."""
    entries = answers.encode_texts(model, [TINY_TEXT, TINY_TEXT[:90], "Boats are green."])
    banks = [None, model.new_bank(), *(answers.bank_of(model, [each]) for each in entries)]
    asks = []
    for number, prompt in enumerate(
        ("Ada", "Ada keeps", "Her brother paints boats in", TINY_TEXT, "The bees sleep until")
    ):
        for bank in banks:
            pieces = model.generate(prompt, bank=bank, max_new_tokens=6, remember=False)
            said = "".join(piece.text for piece in pieces).strip() or "nothing"
            labels = {said: "said", said[: 2 + number]: "begun", said[:-1] + "?": "near", "March": "answer"}
            question = Question(prompt, "March" if number % 2 else said, labels)
            asks += [Ask(question, prompt, bank), Ask(question, prompt, bank, memory=0.0)]
    alone = [token_by_token(model, each) for each in asks]
    assert len({outcome.given for outcome in alone}) >= 3
    for budget in (64, 4096):
        monkeypatch.setitem(answers._BATCH, "cpu", budget)
        for mine, theirs in zip(ask_all(model, asks), alone, strict=True):
            assert mine.given == theirs.given
            assert mine.log_probability == pytest.approx(theirs.log_probability, abs=1e-3)


def test_texts_are_encoded_in_batches_as_each_by_itself(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [TINY_TEXT, "Ada", TINY_TEXT[:70], "", "Ada", TINY_TEXT[5:]]
    progress: list[int] = []
    for budget in (16, 4096):
        monkeypatch.setitem(answers._BATCH, "cpu", budget)
        entries = answers.encode_texts(model, texts, on_text=progress.append)
        for text, entry in zip(texts, entries, strict=True):
            by_itself = model.encode_text(text, source="")
            assert (entry.source, entry.text, entry.char_start) == ("", text, 0)
            assert torch.equal(entry.token_ids_N, by_itself.token_ids_N)
            assert torch.equal(entry.offsets_N2, by_itself.offsets_N2)
            for name in ("keys_HNE", "values_HNE"):
                # Stored in bfloat16: a rounding may fall to the other side.
                torch.testing.assert_close(getattr(entry, name), getattr(by_itself, name), atol=2e-2, rtol=1e-2)
    assert sum(progress) == 2 * 5  # an empty text has nothing to encode


def test_the_bank_and_the_dial_matter(model: LongMem) -> None:
    question = Question("Ada keeps", "bees", {"bees": "answer"}, evidence=TINY_TEXT)
    on, wrong = ([model.encode_text(text, source="a")] for text in (TINY_TEXT, "Boats are green and quiet."))
    (found,) = answers.ask_everywhere(model, [answers.under_all_conditions(model, question, on, wrong)])
    assert tuple(found) == CONDITIONS
    assert len({round(outcome.log_probability, 4) for outcome in found.values()}) == len(CONDITIONS)


def test_a_window_too_small_says_so(model: LongMem) -> None:
    with pytest.raises(ConfigError, match=r"take \d+ tokens, but the window .* has 1024"):
        ask(model, Question("x", "y", {}), "x " * 1024)


def test_a_prompt_that_begins_with_the_prefix_has_it_once(model: LongMem) -> None:
    prompt, answer = answers.prompt_and_answer(model, "<|endoftext|>Ada keeps", "bees")
    assert prompt == model.tokenizer("Ada keeps")["input_ids"]
    assert model.tokenizer.decode(answer) == " bees"


@given(st.lists(st.text("ab1 ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6), st.data())
def test_the_longest_candidate_is_found_and_undecided_before(candidates: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(candidates))
    found = answers.answer_in(f" {chosen}.", candidates)
    assert found is not None and len(found) == len(chosen)
    for cut in range(len(chosen) + 1):
        assert answers.undecided(f" {chosen[:cut]}", candidates)
    assert answers.answer_in(f" {chosen}z", [chosen]) is None


def test_an_entry_is_what_write_text_writes(model: LongMem) -> None:
    written = model.new_bank()
    for source in ("a", "b"):
        model.write_text(written, TINY_TEXT + source, source=source)
    copied = answers.bank_of(model, [model.encode_text(TINY_TEXT + source, source=source) for source in ("a", "b")])
    assert copied.sources == written.sources and copied.text_of("b") == written.text_of("b")
    for name in ("keys_HNE", "values_HNE", "token_ids_N", "source_index_N", "offsets_N2"):
        assert torch.equal(getattr(copied, name), getattr(written, name)), name


def test_passages_are_repeated_only_if_they_must(model: LongMem) -> None:
    texts = documents(model, TINY_TEXT, TINY_TEXT[::-1], "short")
    available = sum(length // 16 for length in texts.lengths)
    rng = np.random.default_rng(0)
    some, repeats = answers.passages(texts, model.tokenizer, tokens=5 * 16 + 3, size=16, rng=rng)
    assert len(some) == len(set(some)) == 5 and repeats == 5 / available
    assert all(text in TINY_TEXT or text in TINY_TEXT[::-1] for text in some)
    many, repeats = answers.passages(texts, model.tokenizer, tokens=16 * 2 * available, size=16, rng=rng)
    assert (
        repeats == 2 and sorted(many[:available]) == sorted(many[available:]) and many[:available] != many[available:]
    )
    assert answers.passages(texts, model.tokenizer, tokens=0, size=16, rng=rng) == ([], 0.0)
    with pytest.raises(SourceError, match="No document has the 4096 tokens of a passage"):
        answers.passages(texts, model.tokenizer, tokens=5000, size=4096, rng=rng)


def test_repeated_filler_is_encoded_once(model: LongMem) -> None:
    entries = answers.encode_filler(model, ["Ada", "bees", "Ada"])
    assert [each.text for each in entries] == ["Ada", "bees", "Ada"]
    assert entries[0].keys_HNE is entries[2].keys_HNE
    assert len(answers.bank_of(model, entries).sources) == 3


def test_fewer_cases_are_held_with_larger_banks(model: LongMem) -> None:
    sizes = [answers.cases_at_once(model, tokens) for tokens in (0, 4096, 16384, 65536, 10**7)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 64 and sizes[-1] == 1


def test_intervals() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)


def test_outcomes_are_counted() -> None:
    def outcome(on: str | None, window: str | None) -> dict[str, Outcome]:
        given = dict.fromkeys(CONDITIONS, None) | {"bank_on": on, "window": window}
        return {name: Outcome(label, -2.0) for name, label in given.items()}

    some = [outcome("answer", "answer"), outcome("stale", "answer"), outcome(None, "answer"), outcome(None, None)]
    group = score_group(some * 5, ("answer", "stale"))
    on = group.scores["bank_on"]
    assert (on.cases, on.rates, on.log_probability) == (20, {"answer": 0.25, "stale": 0.25}, -2.0)
    assert on.intervals["stale"] == wilson(5, 20)
    assert group.scores["bank_off"].rates == {"answer": 0.0, "stale": 0.0}
    assert group.relative == pytest.approx(1 / 3)
    assert group.relative_interval is not None
    assert group.relative_interval[0] < 1 / 3 < group.relative_interval[1]
    never = score_group([outcome(None, "answer")], ("answer",))
    assert (never.relative, never.relative_interval) == (0, None)
    assert score_group([outcome("answer", None)], ("answer",)).relative is None
