"""Reading in one go or bit by bit is the same, windows hold what they should, and costs are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

import longmem.contenders
from longmem.bank import MemoryBank
from longmem.contenders import rag_dense, together
from longmem.contenders.chunks import Retriever, chunks
from longmem.contenders.contender import Contender, ContenderConfig, Prompt, joined
from longmem.contenders.extended_rope import ExtendedRope
from longmem.contenders.longmem import LongMemContender
from longmem.contenders.longmem_paper import LongMemPaper
from longmem.contenders.longmem_rag import LongMemRag
from longmem.contenders.longmem_recall import LongMemRecall
from longmem.contenders.memgpt import MemGpt
from longmem.contenders.oracle import Oracle
from longmem.contenders.rag_bm25 import RagBm25
from longmem.contenders.rag_hybrid import RagHybrid
from longmem.contenders.reader import Reader
from longmem.contenders.window import Window
from longmem.data import Document
from longmem.errors import ConfigError, UnavailableError
from longmem.model import LongMem
from longmem.recall import Recaller, as_told
from longmem.registry import found

CONFIG = ContenderConfig(window=96, extended=256, chunk=16, chunks=2)
DOCUMENTS = [Document("bees", TINY_TEXT * 2), Document("cellar", "The key to the cellar is under the blue pot.")]
PROMPT = Prompt("Where is the key? It is", "Where is the key to the cellar?", room=4)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


@settings(max_examples=15)
@given(st.integers(0, 999), st.sampled_from([0.0, 1.0]))
def test_reading_windows_in_a_row_is_reading_each_anew(seed: int, memory: float) -> None:
    random = np.random.default_rng(seed)
    windows = [random.integers(2, 90, size=size).tolist() for size in random.integers(1, 40, size=3)]
    more = random.integers(2, 90, size=random.integers(1, 40)).tolist()
    bank = _MODEL.new_bank() if memory else None
    if bank is not None:
        # No more than every query finds: among more, two that match alike to within rounding may change places.
        few = _MODEL.tokenizer(TINY_TEXT)["input_ids"][: _MODEL.config.top_k]
        _MODEL.write_text(bank, _MODEL.tokenizer.decode(few), source="bees")
        assert 4 < len(bank) <= _MODEL.config.top_k
    reader = Reader(_MODEL, memory)
    reader.forget(bank)
    for number, window in enumerate(windows):
        # Every other window continues the one before.
        window = windows[number - 1] + window if number % 2 else window
        assert 1 <= reader.read(window) <= 1 + len(window)
        losses, greedy = reader.log_likelihoods(more)
        assert reader.read(window) == 0
        whole_1T = _MODEL.with_prefix(torch.tensor(window + more))[None]
        logits_TV = _MODEL(whole_1T, bank, memory=memory).logits_BTV[0, len(window) : -1].log_softmax(-1)
        assert greedy == bool((logits_TV.argmax(-1) == torch.tensor(more)).all())
        wanted_A = logits_TV.gather(-1, torch.tensor(more)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(losses), wanted_A, atol=1e-3, rtol=1e-3)
        anew = Reader(_MODEL, memory)
        anew.forget(bank)
        anew.read(window)
        assert reader.say(3) == anew.say(3)


def test_what_windows_have_in_common_is_read_once() -> None:
    reader = Reader(tiny.model(), 0.0)
    assert reader.read(range(2, 42)) == 41
    assert reader.read([*range(2, 42), 50, 51]) == 2
    assert reader.read([*range(2, 22), 60]) == 1
    reader.forget()
    assert reader.read(range(2, 42)) == 41


def test_a_stop_string_ends_an_answer(model: LongMem) -> None:
    reader = Reader(model, 0.0)
    reader.read(reader.tokenize("Ada keeps"))
    text, tokens = reader.say(12)
    assert tokens == 12
    stopped, fewer = reader.say(12, (text[3:5],))
    assert stopped == text[: text.find(text[3:5])] and fewer <= 12


@given(st.integers(0, 400), st.integers(1, 300), st.integers(1, 20))
def test_a_window_holds_the_ends_of_both(told: int, prompt: int, room: int) -> None:
    window = Window(_MODEL, CONFIG)
    tokens = list(range(told))
    view = window.fitted(tokens, Prompt("bees " * prompt, room=room), CONFIG.window)
    whole = window.reader.tokenize("bees " * prompt)
    assert 1 + len(view.told) + len(view.asked) + room <= CONFIG.window
    assert view.asked == whole[len(whole) - len(view.asked) :]
    assert view.told == tokens[len(tokens) - len(view.told) :]
    # Nothing is left out without need.
    if len(view.asked) < len(whole):
        assert view.told == [] and 1 + len(view.asked) + room == CONFIG.window
    if len(view.told) < told:
        assert 1 + len(view.told) + len(view.asked) + room > CONFIG.window - 64


@pytest.fixture(scope="module", autouse=True)
def _shared(model: LongMem) -> None:
    global _MODEL
    _MODEL = model


_MODEL: LongMem


def test_no_room_is_an_error(model: LongMem) -> None:
    with pytest.raises(ConfigError, match="window of 96 tokens has no room"):
        Window(model, CONFIG).view(Prompt("Where?", room=90))
    with pytest.raises(ConfigError, match="window must be at least 64; got 3"):
        ContenderConfig(window=3)
    with pytest.raises(ConfigError, match=r"focus must be 0 .* at least 2048 tokens; got 9"):
        ContenderConfig(focus=9)


def test_longmem_reads_its_bank(model: LongMem) -> None:
    contender = LongMemContender(model, CONFIG)
    contender.prepare(DOCUMENTS)
    bank = model.new_bank()
    for number, document in enumerate(DOCUMENTS):
        model.write_text(bank, document.text, source=str(number))
    assert torch.equal(contender.bank.keys_HNE, bank.keys_HNE)
    assert contender.cost.told_tokens == len(bank)
    losses = contender.log_likelihood(PROMPT, " under")
    # The last of it stands in the window as well, as much as in that of `window`.
    window = Window(model, CONFIG)
    window.prepare(DOCUMENTS)
    view = contender.view(PROMPT)
    assert view.told and view == window.view(PROMPT)
    prompt, answer = view.told + view.asked, contender.reader.tokenize(" under")
    logits_TV = model(model.with_prefix(torch.tensor(prompt + answer))[None], bank).logits_BTV[0].log_softmax(-1)
    assert sum(losses) == pytest.approx(
        sum(float(logits_TV[len(prompt) + i, a]) for i, a in enumerate(answer)), abs=1e-3
    )
    # Told the same again, nothing is encoded anew, and it counts all the same.
    entry, told = contender._encoded.get(DOCUMENTS[0].text), contender.cost.told_tokens
    assert told == len(bank) + len(view.told) + 1
    contender.prepare(DOCUMENTS[:1])
    assert entry is not None and contender._encoded.get(DOCUMENTS[0].text) is entry
    assert contender.cost.told_tokens == told + len(contender.bank)
    assert contender.log_likelihood(PROMPT, " under") != losses


def test_what_an_answer_was_drawn_from(model: LongMem) -> None:
    config = ContenderConfig(window=400, chunk=48, chunks=1)
    prompt = Prompt(PROMPT.text, PROMPT.query, evidence=("under the pot",), room=4)
    told = joined(DOCUMENTS)
    for kind in (Window, RagBm25, LongMemContender, LongMemRag):
        contender = kind(model, config)
        contender.prepare(DOCUMENTS)
        contender.generate(prompt)
        drawn = contender.drawn_on()
        assert drawn
        assert all(" ".join(text.split()) in " ".join(told.split()) for text in drawn)
        if kind in (RagBm25, LongMemRag):
            assert DOCUMENTS[1].text in drawn
        if kind is LongMemRag:
            assert len(drawn) > 1
    oracle = Oracle(model, config)
    oracle.generate(prompt)
    assert oracle.drawn_on() == prompt.evidence


@pytest.mark.parametrize("kind", [LongMemContender, LongMemRag])
def test_of_a_large_bank_a_part_is_read(kind: type[LongMemContender], model: LongMem) -> None:
    told = [Document(f"{n}", (sentence + ".\n") * 70) for n, sentence in enumerate(TINY_TEXT.split(".")[:5])]
    prompts = [Prompt("Who keeps bees?", room=6), Prompt("Her brother paints", room=6), Prompt("Is it winter?", room=6)]
    contender, whole = kind(model, dataclasses.replace(CONFIG, focus=2048)), kind(model, CONFIG)
    for each in (contender, whole):
        each.prepare(told)
    assert len(contender.bank) > 2500
    posed = [contender.pose(prompt) for prompt in prompts]
    for prompt, each in zip(prompts, posed, strict=True):
        assert isinstance(each.bank, MemoryBank) and 1792 < len(each.bank) <= 2048
        everything = whole.pose(prompt)
        assert everything.bank is whole.bank and everything.token_ids == each.token_ids
    # Side by side as one by one.
    contender.rehearse(prompts[0])
    before, after = contender.cost.told_tokens, contender.reader.tokenize(" the roof")
    losses = together.log_likelihoods(model, kind.memory, [(each, after) for each in posed])
    said = together.Speaker(model, kind.memory).say(posed, 6)
    for prompt, each, some, (answer, drawn_on) in zip(prompts, posed, losses, said, strict=True):
        alone = contender.log_likelihood(prompt, " the roof")
        assert alone == pytest.approx(some, abs=1e-3)
        assert alone != pytest.approx(whole.log_likelihood(prompt, " the roof"), abs=1e-5)
        assert contender.generate(prompt) == answer and contender.drawn_on() == drawn_on
        found = drawn_on[: len(drawn_on) - len(each.seen)]
        assert found and all(any(text in document.text for document in told) for text in found)
    # What is read beside a part is read when the prompt has come.
    assert contender.cost.told_tokens == before
    assert contender.cost.asked_tokens >= sum(1 + len(each.token_ids) for each in posed)


def test_the_oracle_sees_the_evidence(model: LongMem) -> None:
    oracle = Oracle(model, CONFIG)
    oracle.prepare(DOCUMENTS)
    with pytest.raises(UnavailableError, match="does not say where"):
        oracle.generate(PROMPT)
    view = oracle.view(Prompt("Where?", evidence=("Under the pot.",), room=4))
    assert model.tokenizer.decode(view.asked) == "Under the pot.\n\nWhere?"


def test_chunks_hold_all_words_in_order(model: LongMem) -> None:
    pieces = [piece for document in DOCUMENTS for piece in chunks(document.text, model.tokenizer, 16)]
    assert " ".join(pieces).split() == joined(DOCUMENTS).split()
    assert all(len(model.tokenizer(piece)["input_ids"]) <= 16 for piece in pieces)


def test_bm25_shows_the_right_piece_last(model: LongMem) -> None:
    contender = RagBm25(model, ContenderConfig(window=320, chunk=48, chunks=2))
    contender.prepare(DOCUMENTS)
    view = contender.view(PROMPT)
    shown = model.tokenizer.decode(view.told + view.asked)
    assert shown.endswith(f"{DOCUMENTS[1].text}\n\n{PROMPT.text}")
    assert len(shown) > len(DOCUMENTS[1].text) + len(PROMPT.text) + 20
    contender.prepare([])
    assert model.tokenizer.decode(contender.view(PROMPT).asked) == PROMPT.text


@pytest.mark.parametrize("name", list(found(longmem.contenders, Contender)))
def test_every_contender_answers_and_counts(name: str, model: LongMem) -> None:
    try:
        contender = found(longmem.contenders, Contender)[name](model, CONFIG)
    except UnavailableError as error:
        assert len(str(error)) > 20
        pytest.skip(str(error))
    prompt = Prompt(PROMPT.text, PROMPT.query, evidence=("The key is under the pot.",), room=4)
    if name == "extended-rope":
        contender.trained = 16  # so that what is told needs it
        contender.size = 256
    contender.prepare(DOCUMENTS, [Document("boats", "Her brother paints boats in the harbour.")])
    assert all(loss < 0 for loss in contender.log_likelihood(prompt, " under the pot"))
    read = contender.cost.asked_tokens
    assert read > 0
    answer = contender.generate(prompt, ("\n",))
    assert contender.cost.asked_tokens == read, "an answer reads nothing again"
    assert len(contender.cost.first_seconds) == 1
    assert 0 <= contender.cost.said_tokens <= 3
    assert (contender.kept_bytes() > 0) == (name != "oracle")
    # A view is no longer than its window, whatever is asked.
    for text in ("Where?", "Where is it? " * 60):
        view = contender.view(Prompt(text, evidence=(TINY_TEXT,), room=4))
        window = getattr(contender, "size", CONFIG.window)
        assert 1 + len(view.told) + len(view.asked) + 4 <= window
        ended = model.tokenizer.decode(view.asked)
        assert ended.endswith(text[-20:])
    # Told the same again, it answers the same.
    contender.prepare(DOCUMENTS[:1], DOCUMENTS)
    contender.prepare(DOCUMENTS, [Document("boats", "Her brother paints boats in the harbour.")])
    assert contender.generate(prompt, ("\n",)) == answer


def test_retrievers_take_no_more_than_half_of_the_window(model: LongMem) -> None:
    contender = RagBm25(model, ContenderConfig(window=96, chunk=64, chunks=4))
    assert isinstance(contender, Retriever)
    view = contender.shown(["bees " * 20, "boats " * 40], Prompt("Where? " * 40, room=4))
    text = model.tokenizer.decode(view.asked)
    assert "bees" in text and "boats" not in text
    assert len(model.tokenizer("Where? " * 12)["input_ids"]) <= len(view.asked)


def test_memgpt_keeps_notes_and_searches(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = MemGpt(model, ContenderConfig(window=400, chunk=32, chunks=2))
    windows: list[str] = []
    lines = iter(f"note {number}" for number in range(100))
    monkeypatch.setattr(contender, "_choose", lambda options: contender.reader.read_on([5]) and 0)
    read = contender.reader.read
    monkeypatch.setattr(
        contender.reader, "read", lambda ids: windows.append(model.tokenizer.decode(list(ids))) or read(ids)
    )
    monkeypatch.setattr(contender.reader, "say", lambda most, stop: (next(lines), 1))
    told = [Document("bees", TINY_TEXT * 14)]
    contender.prepare([*told, DOCUMENTS[1]])
    blocks = [window for window in windows if "New line:" not in window and window.endswith('{"function": "')]
    assert len(blocks) > 4
    # The newest lines stay where the oldest is always the one that goes.
    assert contender.core == [f"note {number}" for number in range(len(blocks) - 4, len(blocks))]
    monkeypatch.setattr(contender.reader, "say", lambda most, stop: ("key cellar", 1))
    view = contender.view(PROMPT)
    shown = model.tokenizer.decode(view.asked)
    assert all(line in shown for line in contender.core)
    assert "under the blue pot" in shown and shown.endswith(PROMPT.text)
    assert contender.cost.told_tokens > len(model.tokenizer(joined(told))["input_ids"])
    assert contender.cost.asked_tokens > 0


def test_calls_are_chosen_among_those_there_are(model: LongMem) -> None:
    contender = MemGpt(model, CONFIG)
    contender.reader.read(contender.reader.tokenize("Call: "))
    options = ["search", "answer", "nothing at all"]
    scores = []
    for option in options:
        losses, _ = contender.reader.log_likelihoods(contender.reader.tokenize(option))
        scores.append(sum(losses) / len(losses))
    best = contender._choose(options)
    assert scores[best] == max(scores)
    # What was chosen stands in the window now.
    after, _ = contender.reader.log_likelihoods([7])
    contender.reader.forget()
    contender.reader.read(contender.reader.tokenize("Call: ") + contender.reader.tokenize(options[best]))
    assert contender.reader.log_likelihoods([7])[0] == pytest.approx(after, abs=1e-4)


def test_longmem_with_pieces_differs_by_the_bank_alone(model: LongMem) -> None:
    both, words = LongMemRag(model, CONFIG), RagBm25(model, CONFIG)
    for contender in (both, words):
        contender.prepare(DOCUMENTS)
    assert both.view(PROMPT) == words.view(PROMPT)
    assert both.bank.sources and both.log_likelihood(PROMPT, " under") != words.log_likelihood(PROMPT, " under")


def test_what_is_recalled_stands_in_the_window(model: LongMem) -> None:
    contender = LongMemRecall(model, dataclasses.replace(CONFIG, window=400))
    contender.prepare(DOCUMENTS)
    hits = as_told(Recaller(model).recall(contender.bank, PROMPT.query, CONFIG.chunks), contender.bank)
    view = contender.view(PROMPT)
    assert contender.seen == tuple(hit.text for hit in hits) and DOCUMENTS[1].text in contender.seen
    assert model.tokenizer.decode(view.asked).endswith(PROMPT.text)
    assert contender.bank.sources and contender.log_likelihood(PROMPT, " under")
    # What it asks its bank with is read as well.
    before = contender.cost.asked_tokens
    contender.view(PROMPT)
    assert contender.cost.asked_tokens - before == len(model.tokenizer(PROMPT.query)["input_ids"])
    # Told something else, it finds that; of a blank prompt, and in nothing, it finds nothing.
    contender.prepare(DOCUMENTS[:1])
    contender.view(PROMPT)
    assert DOCUMENTS[1].text not in contender.seen
    contender.view(Prompt(" ", room=4))
    assert contender.seen == ()
    contender.prepare([])
    contender.view(PROMPT)
    assert contender.seen == ()


def test_the_paper_needs_its_weights(model: LongMem, tiny_model_dir: Path) -> None:
    with pytest.raises(UnavailableError, match="no weights: none ship; train them"):
        LongMemPaper(model, CONFIG)
    paper = LongMemPaper(model, ContenderConfig(window=96, paper=tiny_model_dir))
    assert paper.model is not model and paper.model.backbone is model.backbone
    # What its bank remembers is read whole.
    paper = LongMemPaper(model, ContenderConfig(window=96, focus=2048, paper=tiny_model_dir))
    paper.prepare([Document("bees", TINY_TEXT * 30)])
    assert len(paper.bank) > 2048 and paper.pose(PROMPT).bank is paper.bank


def test_a_stretched_window_has_the_same_weights_and_other_positions(model: LongMem) -> None:
    contender = ExtendedRope(model, ContenderConfig(stretched=4096))
    longer = contender.model.backbone
    assert longer.max_positions == 4096 == 4 * model.backbone.max_positions
    for name, weight in model.backbone.model.state_dict().items():
        assert torch.equal(weight, longer.model.state_dict()[name]), name
    ids_1T = torch.arange(2, 80)[None]
    top = model.backbone.num_layers
    plain, scaled = (b(ids_1T, boundaries={top}).hidden_states[top] for b in (model.backbone, longer))
    torch.testing.assert_close(plain[:, 0], scaled[:, 0])
    assert not torch.allclose(plain[:, -1], scaled[:, -1], atol=1e-3)
    with pytest.raises(UnavailableError, match="fits the trained window"):
        contender.prepare(DOCUMENTS)
    with pytest.raises(UnavailableError, match="--stretched must be more"):
        ExtendedRope(model, ContenderConfig(stretched=1024))


def test_hybrid_ranks_fuse_both(monkeypatch: pytest.MonkeyPatch, model: LongMem) -> None:
    class Letters:
        """Stands for the sentence model: texts are alike that begin alike."""

        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, texts: list[str]) -> np.ndarray:
            return np.array([[text[0] == letter for letter in "abk"] for text in texts], dtype=np.float32)

    monkeypatch.setattr(rag_dense, "Sentences", Letters)
    pieces = ["apple on a roof", "boat", "kettle", "a key in the kettle"]
    dense, hybrid = rag_dense.RagDense(model, CONFIG), RagHybrid(model, CONFIG)
    for contender in (dense, hybrid):
        contender.pieces = pieces
        contender.index(pieces)
    assert dense.scores("kettle").argmax() == 2
    # The only one that both like stands first, those that one of them likes before what none does.
    order = np.argsort(-hybrid.scores("kettle"), kind="stable").tolist()
    assert order[0] == 2 and order[1] == 3
    assert hybrid.kept_bytes() > 0
