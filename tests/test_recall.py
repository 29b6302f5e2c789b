from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import tiny

from longmem.errors import BankMismatchError, ConfigError
from longmem.recall import PassageIndex, Recaller, as_told, cut, recall

NOTES = "Ada keeps bees on the roof.\n\nHer brother paints boats in Brest. He sells them in spring."
RECIPE = "Bake the bread for forty minutes. Let it cool."


@pytest.fixture
def bank():
    bank = tiny().new_bank()
    tiny().write_text(bank, NOTES, source="notes")
    tiny().write_text(bank, RECIPE, source="recipe")
    return bank


# ---- passages ----

prose = st.text(st.sampled_from("ab. \n!é"), max_size=120)


@given(text=prose, longest=st.integers(3, 12), short=st.integers(0, 3))
def test_passages_hold_all_text_in_order(text, longest, short):
    starts = list(range(len(text)))  # a token a character
    spans = cut(text, starts, longest, short)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    assert all(a < b for a, b in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(text[a:b] == text[a:b].strip() for a, b in spans)
    assert all(b - a <= max(longest, short) for a, b in spans)


def test_paragraphs_are_joined_if_short_and_cut_at_sentences_if_long():
    text = "One.\n\nTwo.\n\n" + "A sentence of some words. " * 10 + "\n\nEnd."
    starts = [n for n in range(len(text)) if n == 0 or text[n - 1].isspace()]
    passages = [text[a:b] for a, b in cut(text, starts, 20, 4)]
    assert passages[0] == "One.\n\nTwo."
    assert passages[-1] == "End."
    assert len(passages) == 5 and all(p.endswith(".") and p.startswith("A sent") for p in passages[1:-1])
    assert {len(p.split()) for p in passages[1:-1]} <= {15, 20}


@settings(max_examples=10)
@given(texts=st.lists(prose.filter(str.strip), min_size=1, max_size=3))
def test_every_token_belongs_to_a_passage_of_its_source(texts):
    model, bank = tiny(), tiny().new_bank()
    for number, text in enumerate(texts):
        model.write_text(bank, text, source=str(number))
    index = PassageIndex(bank)
    for place, source, (start, end) in zip(
        index.passage_N.tolist(), bank.source_index_N.tolist(), bank.offsets_N2.tolist(), strict=True
    ):
        passage = index.passages[place]
        assert passage.source == str(source)
        if bank.text_of(passage.source, start, end).strip():
            assert start < passage.end and end > passage.start
    for passage in index.passages:
        assert passage.text == bank.text_of(passage.source, passage.start, passage.end) == passage.text.strip()


def test_sources_written_in_turns():
    model, bank = tiny(), tiny().new_bank()
    for text in ("First we met. ", "Then we sang. ", "At last we slept."):
        for source in ("one", "other"):
            model.write_text(bank, text, source=source, append=True)
    index = PassageIndex(bank)
    assert [p.source for p in index.passages] == ["one", "other"]
    for number in range(2):
        assert (index.passage_N[bank.source_index_N == number] == number).all()


# ---- hits ----


def test_words_find_their_passage(bank):
    hits = recall(tiny(), bank, "Who paints boats?", words=1.0)
    assert [hit.source for hit in hits] == ["notes"]
    assert "boats" in hits[0].text and hits[0].word_score == hits[0].score == 1.0 and hits[0].memory_score == 0.0
    assert recall(tiny(), bank, "zebra", words=1.0) == []


@pytest.mark.parametrize("words", [None, 0.0, 0.3, 1.0])
def test_scores_add_up_and_are_sorted(bank, words):
    hits = recall(tiny(), bank, "Who keeps bees on the roof?", words=words)
    share = hits[0].score if words is None else words
    assert hits and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.text == bank.text_of(hit.source, hit.start, hit.end)
        assert 0 <= hit.memory_score <= 1 and 0 <= hit.word_score <= 1
        if words is not None:
            assert hit.score == pytest.approx((1 - share) * hit.memory_score + share * hit.word_score)


def test_memory_alone_needs_no_words(bank):
    hits = recall(tiny(), bank, "zebra", words=0.0)
    assert hits and all(hit.word_score == 0.0 for hit in hits)
    assert hits[0].memory_score == 1.0


def test_recall_is_repeatable_with_and_without_an_index(bank):
    index = PassageIndex(bank)
    one, two = (recall(tiny(), bank, "bees", index=i) for i in (index, None))
    assert one == two
    tiny().write_text(bank, "Bees sleep in winter.", source="news")
    assert "news" in {hit.source for hit in recall(tiny(), bank, "bees", index=index)}


def test_top_k_and_progress(bank):
    seen = []
    hits = recall(tiny(), bank, "bees and bread", top_k=1, on_progress=lambda done, total: seen.append((done, total)))
    assert len(hits) == 1
    assert seen == [(1, 2), (2, 2)]


def test_a_long_query(bank):
    assert recall(tiny(), bank, "Who keeps the bees on the roof? " * 40)


def test_the_bank_is_not_changed(bank):
    before = bank.keys_HNE.clone()
    recall(tiny(), bank, "bees")
    assert torch.equal(before, bank.keys_HNE) and bank.sources == ("notes", "recipe")


def test_nothing_remembered_nothing_found():
    assert recall(tiny(), tiny().new_bank(), "bees") == []


def test_text_without_words():
    bank = tiny().new_bank()
    tiny().write_text(bank, "? !", source="a")
    assert recall(tiny(), bank, "bees", words=1.0) == []
    assert recall(tiny(), bank, "the of", words=1.0) == []


def test_mistakes(bank):
    for query in ("", " \n"):
        with pytest.raises(ConfigError, match="empty"):
            recall(tiny(), bank, query)
    with pytest.raises(ConfigError, match="top_k"):
        recall(tiny(), bank, "bees", top_k=0)
    with pytest.raises(ConfigError, match="words"):
        recall(tiny(), bank, "bees", words=2.0)
    with pytest.raises(BankMismatchError):
        recall(tiny("neox"), bank, "bees")


def test_a_recaller_follows_a_bank_that_grows():
    model, bank = tiny(), tiny().new_bank()
    for number in range(40):
        model.write_text(bank, f"Note topic{number} says nothing in particular, as most do.", source=f"{number}")
    recaller = Recaller(model)
    assert recaller.recall(bank, "  ", 4) == recaller.recall(bank, "zebra", 4) == []
    (hit,) = recaller.recall(bank, "Anything on topic7?", 2)
    assert hit.source == "7"
    assert recaller.recall(bank, "Anything on topic7?", 2, skip=lambda hit: hit.source == "7") == []
    index = recaller._index
    model.write_text(bank, "A zebra.", source="zebra")  # little: not seen yet, and its tokens belong to no passage
    assert recaller.recall(bank, "zebra", 4) == [] and recaller._index is index
    assert recaller.recall(bank, "Anything on topic7?", 2)
    model.write_text(bank, "Where zebras live there is grass. " * 9, source="zebras")
    assert [hit.source for hit in recaller.recall(bank, "zebra", 1)] == ["zebra"]
    bank.forget(source="zebra")  # its places move
    assert [hit.source for hit in recaller.recall(bank, "zebras", 1)] == ["zebras"]
    # What is forgotten is not recalled, though as much and more is remembered since.
    size = len(bank)
    bank.forget(source="zebras")
    model.write_text(bank, "Where gnus live there is grass. " * 9 + "And some trees stand there.", source="gnus")
    assert size <= len(bank) <= size * 33 / 32
    assert recaller.recall(bank, "zebras", 4) == []
    index, size = PassageIndex(bank), len(bank)
    assert index.behind(bank) == 0 and index.behind(tiny().new_bank()) is None
    assert index.behind(bank.between(0, size)) is index.behind(bank.between(1, size)) is None
    model.write_text(bank, "Gone.", source="gone")
    assert index.behind(bank) == len(bank) - size > 0
    bank.forget(source="gone")
    assert index.behind(bank) is None
    assert recaller.recall(tiny().new_bank(), "Anything on topic7?", 2) == []


def test_hits_as_they_were_told(bank):
    hits = recall(tiny(), bank, "Who keeps bees and bread on the roof, and paints boats?", top_k=20)
    told = as_told(hits, bank)
    places = [(bank.sources.index(hit.source), hit.start) for hit in told]
    assert set(told) == set(hits) and places == sorted(places)
