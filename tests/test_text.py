"""Streamed text is the text of the whole, and offsets are the tokenizer's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import VOCABULARY, text_of, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
)

from longmem.text import StopStrings, TextDecoder


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
