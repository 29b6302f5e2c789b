from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from longmem.backbone import Backbone
from longmem.batch import generate_batch
from longmem.config import EncodeConfig, SideNetConfig
from longmem.decoding import RowDecoder
from longmem.errors import BankMismatchError, ConfigError
from longmem.focus import Focus
from longmem.generation import (
    Continuation,
    GenerationConfig,
    LocalWindow,
    StopStrings,
    TextDecoder,
    attribute,
    begun,
    continue_text,
    generate,
    sample,
    sampler,
)
from longmem.group import BankGroup
from longmem.model import LongMem
from longmem.steps import BatchDecoder

FACTS = "Ada keeps bees on the roof. Her brother Émile paints boats in Brest 🎨. The roof is green.\n" * 3
VOCABULARY = 300
FAMILIES = ("llama", "mistral", "neox", "gpt2")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that any token sequence decodes, often to incomplete characters."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        [FACTS],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", bos_token="<|endoftext|>")


@cache
def tiny(family: str = "llama") -> LongMem:
    """A random model whose SideNet has left its initial state, so that memory changes what it says."""
    torch.manual_seed(0)
    llama = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    plain = dict(vocab_size=VOCABULARY, initializer_range=0.2)
    if family == "llama":
        backbone = LlamaForCausalLM(LlamaConfig(**llama))
    elif family == "mistral":
        backbone = MistralForCausalLM(MistralConfig(**llama, sliding_window=16))
    elif family == "neox":
        backbone = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=128,
                **plain,
            )
        )
    else:
        backbone = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, **plain))
    config = SideNetConfig.around([(1, 0), (1, 1), (2, 1)], 4, below=1, top_k=8, encode=EncodeConfig(24, 8))
    model = LongMem(Backbone(backbone, tokenizer(), name=family), config).eval()
    for layer in model.sidenet.layers:
        layer.alpha_D.data.fill_(0.3)
    return model


def full_bank(model: LongMem):
    bank = model.new_bank()
    model.write_text(bank, FACTS, source="facts")
    return bank


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


ENDLESS = GenerationConfig(max_new_tokens=60, window=24, stop_token_ids=())
token_ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


# ---- window and cache ----


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
    monkeypatch.setattr("longmem.generation.records", lambda device: way == "recorded")
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


def notes(model: LongMem):
    bank = model.new_bank()
    for number, text in enumerate(FACTS.split(". ")[:3]):
        model.write_text(bank, text, source=f"note {number}")
    return bank


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


# ---- text ----


@given(ids=st.lists(st.integers(0, VOCABULARY - 1) | st.sampled_from(tokenizer()("🎨é漢")["input_ids"]), max_size=60))
def test_streamed_text_equals_the_whole(ids):
    decoder = TextDecoder(tokenizer())
    pieces = []
    for token_id in ids:
        decoder.push(token_id)
        pieces.append(decoder.take())
    decoder.flush()
    pieces.append(decoder.take())
    assert "".join(pieces) == decoder.text == text_of(ids)
    assert len(decoder.offsets) == len(ids)


@given(text=st.text(max_size=40))
def test_characters_come_out_whole(text):
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    decoder = TextDecoder(tokenizer())
    shown = ""
    for token_id in ids:
        decoder.push(token_id)
        shown += decoder.take()
        assert text.startswith(shown)


def test_offsets_agree_with_the_tokenizers():
    text = "É 🎨 漢 bat"
    encoded = tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    decoder = TextDecoder(tokenizer())
    for token_id in encoded["input_ids"]:
        decoder.push(token_id)
    assert decoder.text == text
    # A token that ends inside a character shares the range of the tokens that complete it.
    for (start, end), (low, high) in zip(decoder.offsets, encoded["offset_mapping"], strict=True):
        assert start <= low <= high <= end <= start + 2


@pytest.mark.parametrize("text", ["bees and boats", "caf漢 é🎨 x", "  two  spaces"])
def test_byte_fallback_and_leading_spaces(text):
    """SentencePiece style: a space before the first word, unknown characters as runs of byte tokens."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words |= {piece: 256 + n for n, piece in enumerate(["▁", *"abcdefghijklmnopqrstuvwxyz"])}
    fast = Tokenizer(models.BPE(words, [], byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=fast)
    ids = sentencepiece(text, add_special_tokens=False)["input_ids"]
    decoder = TextDecoder(sentencepiece)
    for token_id in ids:
        decoder.push(token_id)
    decoder.flush()
    assert decoder.text == sentencepiece.decode(ids, clean_up_tokenization_spaces=False)


def test_pieces_join_to_the_decoded_tokens():
    model = tiny()
    prompt = torch.tensor(tokenizer()("Ada keeps", add_special_tokens=False)["input_ids"])
    config = GenerationConfig(max_new_tokens=80, window=32, temperature=1.5, seed=3, stop_token_ids=())
    pieces = list(generate(model, prompt, bank=full_bank(model), config=config))
    whole = text_of([*prompt.tolist(), *(piece.token_id for piece in pieces)])
    assert "Ada keeps" + "".join(piece.text for piece in pieces) == whole


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_the_text_before_the_first(text, stops):
    stream = StopStrings(stops)
    shown = ""
    for character in text:
        shown += stream.push(character)
        if stream.found:
            break
    shown += stream.flush()
    # The first stop string to be complete decides, as a reader of the stream would see it.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if ends:
        first = min(end for end, _ in ends)
        assert shown == text[: min(start for end, start in ends if end == first)]
    else:
        assert shown == text


def test_generation_ends_at_stop_tokens_and_strings():
    model = tiny()
    config = GenerationConfig(max_new_tokens=30, window=64, stop_token_ids=())
    pieces = list(generate(model, "Ada", config=config))
    text = "".join(piece.text for piece in pieces)
    fifth = pieces[4].token_id
    first = next(n for n, piece in enumerate(pieces) if piece.token_id == fifth)
    stopped = list(generate(model, "Ada", config=dataclasses.replace(config, stop_token_ids=(fifth,))))
    assert [piece.token_id for piece in stopped] == [piece.token_id for piece in pieces[: first + 1]]
    assert stopped[-1].text == "" or stopped[-1].text == "\ufffd" * len(stopped[-1].text)
    stop = text[5:8]
    cut = "".join(piece.text for piece in generate(model, "Ada", config=dataclasses.replace(config, stop=(stop,))))
    assert cut == text[: text.index(stop)]


# ---- sampling ----


def test_sampling_is_a_function_of_the_seed():
    model = tiny()

    def run(seed: int | None) -> list[int]:
        config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=seed, stop_token_ids=())
        return [piece.token_id for piece in generate(model, "Ada", config=config)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
def test_samples_come_from_the_likely_tokens(logits, top_k, top_p, seed):
    logits_V = torch.tensor(logits)
    config = GenerationConfig(temperature=0.7, top_k=top_k, top_p=top_p, seed=seed)
    token = sample(logits_V, config, sampler(config))
    assert int((logits_V > logits_V[token]).sum()) < (top_k or len(logits))
    assert sample(logits_V, GenerationConfig(temperature=0.7, top_k=1), sampler(config)) == int(logits_V.argmax())
    probability_V = (logits_V / 0.7).softmax(-1)
    assert float(probability_V[logits_V > logits_V[token]].sum()) <= top_p + 1e-4


# ---- attribution ----


def test_attribution_names_remembered_text():
    model = tiny()
    bank = full_bank(model)
    model.write_text(bank, "Boats are painted green in Brest.", source="more")
    config = GenerationConfig(max_new_tokens=12, attribute=True, stop_token_ids=())
    for piece in generate(model, "Ada keeps", bank=bank, config=config):
        assert 0 < len(piece.sources) <= 3
        assert 0 < sum(a.weight for a in piece.sources) <= 1
        assert [a.weight for a in piece.sources] == sorted((a.weight for a in piece.sources), reverse=True)
        for one in piece.sources:
            assert one.text == bank.text_of(one.source, one.start, one.end) != ""
        places = [(a.source, a.start, a.end) for a in piece.sources]
        assert all(a[0] != b[0] or a[2] <= b[1] or b[2] <= a[1] for a in places for b in places if a != b)


def test_attribution_weights_add_up_to_the_mass_on_memory():
    model = tiny()
    bank = full_bank(model)
    window = LocalWindow(model, bank, ENDLESS)
    window.extend([9, 8, 7])
    _, reads = window.logits()
    mass = torch.cat([read.mass_BKGT[0, :, :, -1].flatten() for read in reads]).mean()
    found = attribute(reads, bank, spans=1000)
    assert sum(a.weight for a in found) <= float(mass) * 1.001
    assert attribute([], bank) == ()


def test_nothing_remembered_nothing_attributed():
    config = GenerationConfig(max_new_tokens=3, attribute=True)
    model = tiny()
    assert all(piece.sources == () for piece in generate(model, "Ada", config=config))
    assert all(piece.sources == () for piece in generate(model, "Ada", bank=model.new_bank(), config=config))


# ---- errors ----


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"window": 4},
        {"memory": 1.5},
        {"stop": ("",)},
        {"stop": "abc"},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GenerationConfig(**settings)


def test_mistakes_show_before_the_first_token():
    model = tiny()
    with pytest.raises(ConfigError, match="at most 128"):
        generate(model, "Ada", config=GenerationConfig(window=1000))
    with pytest.raises(BankMismatchError):
        generate(model, "Ada", bank=tiny("neox").new_bank())


def test_an_empty_prompt_continues_from_the_prefix():
    assert len(list(generate(tiny(), "", config=dataclasses.replace(ENDLESS, max_new_tokens=3)))) == 3


def test_window_defaults_to_what_the_backbone_can_take():
    assert LocalWindow(tiny(), None, GenerationConfig()).size == 128


@pytest.mark.parametrize("more", [1, 32, 33])
def test_a_few_tokens_are_read_in_steps_and_many_at_once(more, monkeypatch):
    monkeypatch.setattr("longmem.generation.records", lambda device: True)
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


def test_continue_text_keeps_every_token_in_the_window():
    window = LocalWindow(tiny(), None, GenerationConfig(max_new_tokens=5, stop_token_ids=()))
    pieces = list(continue_text(window, [5, 6], sampler(window.config)))
    assert window.token_ids == [5, 6, *(piece.token_id for piece in pieces)]
