"""The local window: cached as uncached, what leaves it is remembered, what it reads of banks and shows of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import ENDLESS, FACTS, FAMILIES, VOCABULARY, full_bank, notes, text_of, tiny, token_ids, tokenizer

from longmem.batch import generate_batch
from longmem.decoding import RowDecoder
from longmem.focus import Focus
from longmem.generation import Continuation, GenerationConfig, begun, generate
from longmem.group import BankGroup
from longmem.local_window import LocalWindow
from longmem.model import LongMem
from longmem.steps import BatchDecoder


def endless(model: LongMem, *, cached: bool) -> tuple[torch.Tensor, list[int], int]:
    """Logits of a greedy text through a window that moves many times, what the bank then holds of it, tokens moved."""
    prompt = torch.randint(2, VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(ENDLESS, cache=cached)
    bank = full_bank(model)
    window = LocalWindow(model, bank, config)
    moved = window.extend(prompt.tolist())
    steps = []
    for _ in range(config.max_new_tokens):
        logits_V, _ = window.logits()
        steps.append(logits_V)
        moved += window.extend([int(logits_V.argmax())])
    return torch.stack(steps), bank.tokens_of("generated/1").tolist(), moved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["eager", "compiled", "recorded"])
def test_cached_generation_equals_the_uncached_loop(family, way, monkeypatch):
    model = tiny(family)
    plain, plain_bank, _ = endless(model, cached=False)
    # Steps as a GPU records them, without recording them.
    monkeypatch.setattr("longmem.local_window.records", lambda device: way == "recorded")
    try:
        # Steps of single tokens as compiled decoding takes them, without compiling them.
        model.decode_by(RowDecoder(model.backbone.family, compile=False) if way == "compiled" else None)
        cached, cached_bank, moved = endless(model, cached=True)
    finally:
        model.decode_by(None)
    assert moved > 80
    assert torch.equal(cached.argmax(-1), plain.argmax(-1))
    assert (cached - plain).abs().max() < 1e-3
    assert cached_bank == plain_bank and len(cached_bank) == moved


@pytest.mark.parametrize("family", FAMILIES)
def test_without_memory_greedy_equals_hugging_face(family):
    model = tiny(family)
    prompt = torch.tensor(tokenizer()(FACTS[:60], add_special_tokens=False)["input_ids"])
    config = GenerationConfig(max_new_tokens=30, window=128, memory=0.0)
    ours = [piece.token_id for piece in generate(model, prompt, bank=full_bank(model), config=config)]
    inputs = model.with_prefix(prompt)[None]
    theirs = model.backbone.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=0,
    )
    assert ours == theirs[0, inputs.shape[1] :].tolist()


def test_memory_changes_what_is_said():
    model = tiny()
    logits = [LocalWindow(model, bank, ENDLESS) for bank in (None, full_bank(model))]
    for window in logits:
        window.extend([5, 6, 7])
    assert not torch.equal(logits[0].logits()[0], logits[1].logits()[0])


@settings(max_examples=10)
@given(prompt=token_ids, more=token_ids, size=st.integers(8, 20))
def test_what_leaves_the_window_is_remembered_token_for_token(prompt, more, size):
    model = tiny()
    bank = full_bank(model)
    window = LocalWindow(model, bank, GenerationConfig(window=size), source="stream")
    moved = window.extend(prompt) + window.extend(more)
    assert len(window.token_ids) < size
    assert bank.tokens_of("stream").tolist() + window.token_ids == prompt + more
    assert len(bank.tokens_of("stream")) == moved
    window.remember()
    assert window.remember() == 0
    assert bank.tokens_of("stream").tolist() == prompt + more
    if prompt + more:
        own = bank.source_index_N == bank.sources.index("stream")
        offsets = bank.offsets_N2[own]
        assert (offsets[:, 0] <= offsets[:, 1]).all() and (offsets[1:, 0] >= offsets[:-1, 0]).all()
        assert int(offsets[-1, 1]) == bank.length_of("stream")


def test_moved_text_reads_like_the_original():
    model = tiny()
    bank = model.new_bank()
    window = LocalWindow(model, bank, GenerationConfig(window=16), source="stream")
    window.extend(tokenizer()(FACTS, add_special_tokens=False)["input_ids"])
    window.remember()
    assert bank.text_of("stream") == FACTS
    # Same keys as if the text had been written at once: encoding is a function of the source's tokens.
    written = model.new_bank()
    model.write_text(written, FACTS, source="stream")
    if torch.equal(written.token_ids_N, bank.token_ids_N):
        torch.testing.assert_close(written.keys_HNE.float(), bank.keys_HNE.float(), atol=0.05, rtol=0.05)


def test_remembered_tokens_in_the_window_are_not_read_from_the_bank():
    model = tiny()
    plain, remembered = (LocalWindow(model, full_bank(model), ENDLESS) for _ in range(2))
    for window in (plain, remembered):
        window.extend([5, 6, 7])
    remembered.remember()
    assert torch.equal(plain.logits()[0], remembered.logits()[0])
    # Something written by others in the meantime must be seen.
    for window in (plain, remembered):
        model.write_text(window.bank, "Ada moved to Brest.", source="news")
        window.extend([8])
    assert not torch.equal(plain.logits()[0], remembered.logits()[0])


def test_nothing_is_written_without_leave():
    model = tiny()
    bank = full_bank(model)
    size = len(bank)
    pieces = list(generate(model, FACTS, bank=bank, config=dataclasses.replace(ENDLESS, remember=False)))
    assert len(bank) == size and sum(piece.moved for piece in pieces) > 0
    assert len(list(generate(model, FACTS, config=ENDLESS))) == 60


def test_each_text_gets_its_own_source():
    model = tiny()
    bank = full_bank(model)
    for _ in range(2):
        list(generate(model, FACTS, bank=bank, config=ENDLESS))
    assert bank.sources == ("facts", "generated/1", "generated/2")
    list(generate(model, FACTS, bank=bank, config=ENDLESS, source="facts"))
    assert bank.text_of("facts").startswith(FACTS + FACTS[:20])


# ---- what is read of a large bank ----

FOCUSED = dataclasses.replace(ENDLESS, focus=2048, remember=False)


def large_bank(model: LongMem):
    """Three texts, each of words of its own, longer together than what is read at most."""
    bank = model.new_bank()
    for number, sentence in enumerate(FACTS.split(". ")[:3]):
        model.write_text(bank, (sentence + ". ") * 50, source=f"text {number}")
    assert len(bank) > 2500
    return bank


def test_a_large_bank_is_read_by_what_the_window_says():
    model, config = tiny(), FOCUSED
    bank = large_bank(model)
    window = LocalWindow(model, bank, config)
    window.extend(tokenizer()(" Who keeps bees?", add_special_tokens=False)["input_ids"])
    logits_V, _ = window.logits()
    part = Focus(2048).on(bank, window.token_ids)
    assert len(part) <= 2048
    torch.testing.assert_close(logits_V, model(window.tokens_N[None], part).logits_BTV[0, -1], atol=1e-4, rtol=1e-4)
    everything = LocalWindow(model, bank, dataclasses.replace(config, focus=0))
    everything.extend(window.token_ids)
    assert everything.visible is bank and not torch.equal(everything.logits()[0], logits_V)


def test_what_is_read_is_chosen_anew_by_each_prompt_and_when_the_window_moves():
    model = tiny()
    window = LocalWindow(model, large_bank(model), dataclasses.replace(FOCUSED, window=40))
    chosen = []
    for text in ("bees on the roof", "boats in Brest", "The roof is green." * 4):
        Continuation(window, tokenizer()(text, add_special_tokens=False)["input_ids"])
        window.logits()
        chosen.append(window.visible)
        window.extend([7])
        window.logits()
        assert window.visible is chosen[-1]  # not by each token
    assert len({id(part) for part in chosen}) == 3
    while window.visible is chosen[-1]:
        assert window.extend([9]) == 0 or window.visible is not chosen[-1]
        window.logits()


def test_texts_side_by_side_read_what_each_is_about():
    model = tiny()
    bank, prompts = large_bank(model), ["Who keeps bees on the roof?", "Who paints boats in Brest?"]
    config = dataclasses.replace(FOCUSED, max_new_tokens=12)
    alone = [[piece.token_id for piece in generate(model, prompt, bank=bank, config=config)] for prompt in prompts]
    together: list[list[int]] = [[], []]
    for number, piece in generate_batch(model, prompts, banks=bank, config=config):
        together[number].append(piece.token_id)
    assert together == alone


def test_attributions_and_attention_of_a_part_are_those_of_the_whole():
    model = tiny()
    bank = large_bank(model)
    config = dataclasses.replace(FOCUSED, attribute=True, max_new_tokens=8)
    pieces = list(generate(model, "Who paints boats in Brest?", bank=bank, config=config))
    spans = [span for piece in pieces for span in piece.sources]
    assert spans and all(bank.text_of(span.source, span.start, span.end) == span.text for span in spans)
    # What was counted lies where the spans say.
    counted = bank.take_attention()
    for span in spans:
        offsets_M2 = bank.offsets_of(span.source)
        inside_M = (offsets_M2[:, 1] > span.start) & (offsets_M2[:, 0] < span.end)
        assert float(counted[span.source][inside_M].sum()) > 0


def test_text_that_is_in_the_window_is_not_read_of_a_large_bank_either():
    model = tiny()
    bank = large_bank(model)
    window = LocalWindow(model, bank, dataclasses.replace(FOCUSED, remember=True), source="talk")
    window.extend([5, 6, 7])
    window.remember()
    window.look_anew()
    assert (
        window.visible is not None
        and len(bank) - 3 == window.visible.in_whole(torch.tensor([-1 + len(window.visible)])) + 1
    )


def test_a_bank_that_grows_large_is_read_whole_until_the_window_is_read_anew():
    model, bank = tiny(), tiny().new_bank()
    model.write_text(bank, FACTS * 10, source="facts")
    assert len(bank) < 2048
    window = LocalWindow(model, bank, FOCUSED)
    window.extend([5, 6, 7])
    assert window.visible is bank
    model.write_text(bank, FACTS * 30, source="more")
    assert len(bank) > 2500 and window.visible is bank
    window.look_anew()
    part = window.visible
    assert part is not None and len(part) <= 2048
    # Nor does a part change while a bank grows.
    model.write_text(bank, FACTS, source="last")
    assert window.visible is part


@pytest.mark.parametrize("kept", [0, 3])
def test_what_is_forgotten_is_read_no_more_in_the_midst_of_a_text(kept: int):
    model = tiny()
    bank = large_bank(model)
    for number in range(kept):
        model.write_text(bank, "The roof is green. " * 50, source=f"roof {number}")
    drew_on: list[set[str]] = []
    config = dataclasses.replace(FOCUSED, attribute=True, max_new_tokens=12)
    for piece in generate(model, "Who paints boats in Brest?", bank=bank, config=config):
        drew_on.append({span.source for span in piece.sources})
        if len(drew_on) == 4:
            bank.forget("text 1")
        if len(drew_on) == 8:
            bank.thin(torch.arange(len(bank)) % 9 > 0)
    assert (len(bank) > 2048) == bool(kept)
    assert "text 1" in set.union(*drew_on[:4]) and "text 1" not in set.union(*drew_on[4:])


def test_banks_of_a_group_are_read_and_counted_each_for_itself():
    model = tiny()
    large, small, left_out = large_bank(model), full_bank(model), large_bank(model)
    config = dataclasses.replace(FOCUSED, attribute=True, max_new_tokens=8)
    for number, bank in enumerate((large, small, left_out)):
        bank.name = f"bank {number}"
    for first, counted in ((large, True), (small, True), (left_out, False)):
        banks = [first, *(bank for bank in (large, small, left_out) if bank is not first)]
        group = BankGroup(banks, [0.0 if bank is left_out else 1.0 for bank in banks])
        pieces = list(generate(model, "Who paints boats in Brest?", bank=group, config=config))
        spans = [span for piece in pieces for span in piece.sources]
        assert {span.bank for span in spans} == {"bank 0", "bank 1"}
        of = {bank.name: bank for bank in banks}
        assert all(of[span.bank].text_of(span.source, span.start, span.end) == span.text for span in spans)
        assert [bool(bank.take_attention()) for bank in banks] == [counted, False, False]


# ---- what is recalled into the window ----

RECALLING = GenerationConfig(window=90, recall=2)
QUIET = dataclasses.replace(ENDLESS, remember=False)


@settings(max_examples=10)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["bees on the roof", "boats in Brest", "zebra", " "]), token_ids), max_size=4
    ),
    opening=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    size=st.integers(8, 90),
)
def test_what_is_recalled_is_shown_and_never_written(turns, opening, size):
    model = tiny()
    bank = notes(model)
    window = LocalWindow(model, bank, dataclasses.replace(RECALLING, window=size), source="stream")
    window.extend(opening[: size // 3], remember=False)
    said: list[int] = []
    for query, more in turns:
        window.recollect(query, room=len(more))
        shown = "".join(hit.text + "\n\n" for hit in window.recalled)
        assert text_of(window.token_ids[window._unremembered - window._shown : window._unremembered]) == shown
        assert window._shown <= size // 3
        moved = window.extend(more)
        said += more
        assert moved >= 0 and len(window.token_ids) < size
        window.remember()
        assert bank.tokens_of("stream").tolist() == said


def test_a_window_that_recalls_reads_what_it_shows():
    model = tiny()
    window = LocalWindow(model, notes(model), RECALLING)
    for turn in ("Who keeps bees on the roof?", "Who paints boats in Brest?"):
        ids = begun(window, turn)
        window.extend(ids)
        (hit,) = window.recalled[-1:]
        assert hit.text in tokenizer().decode(window.token_ids)
        logits_V, _ = window.logits()
        whole_1T = window.tokens_N[None]
        assert window.visible is not None
        torch.testing.assert_close(logits_V, model(whole_1T, window.visible).logits_BTV[0, -1], atol=1e-4, rtol=1e-4)
    assert window.token_ids[-len(ids) :] == ids
    # What is shown already is not read again.
    shown, read = window.recalled, window._read
    window.recollect(turn, room=4)
    assert window.recalled == shown and window._read == read > 0
    window.recollect("Who keeps bees on the roof?", room=4)
    assert window.recalled != shown and window._read == 0


def test_what_hardly_fits_is_not_recalled():
    model = tiny()
    for bank, prompt in ((notes(model), "zebra"), (model.new_bank(), "bees"), (None, "bees")):
        pieces = [
            [piece.token_id for piece in generate(model, prompt, bank=bank, config=config)]
            for config in (QUIET, dataclasses.replace(QUIET, recall=3))
        ]
        assert pieces[0] == pieces[1]


def test_window_defaults_to_what_the_backbone_can_take():
    assert LocalWindow(tiny(), None, GenerationConfig()).size == 128


@pytest.mark.parametrize("more", [1, 32, 33])
def test_a_few_tokens_are_read_in_steps_and_many_at_once(more, monkeypatch):
    monkeypatch.setattr("longmem.local_window.records", lambda device: True)
    steps, begun = [], []
    for name, calls in (("step", steps), ("begin", begun)):
        original = getattr(BatchDecoder, name)
        monkeypatch.setattr(
            BatchDecoder, name, lambda self, *given, do=original, calls=calls: calls.append(given) or do(self, *given)
        )
    model = tiny()
    window = LocalWindow(model, full_bank(model), GenerationConfig())
    window.extend([5, 6, 7])
    window.logits()
    assert (len(begun), len(steps)) == (1, 0)
    window.extend(list(range(8, 8 + more)))
    logits_V, _ = window.logits()
    assert (len(begun), len(steps)) == ((1, more) if more <= 32 else (2, 0))
    plain = LocalWindow(model, window.bank, GenerationConfig(cache=False))
    plain.extend(window.token_ids)
    assert (logits_V - plain.logits()[0]).abs().max() < 1e-3
    assert torch.equal(window.logits()[0].argmax(-1), logits_V.argmax(-1))  # asked again, with nothing new
