"""Texts that can be read and those that cannot, and streams of segments against the documents they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longmem.data import Document, Mixture, Streams, TokenizedDocuments, read_documents, read_text
from longmem.errors import ConfigError, SourceError

# ---- reading -----------------------------------------------------------------------------------------------


@given(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text and text[0] != "\ufeff"))
@settings(max_examples=50)
def test_a_text_file_is_read_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    assert read_text(path) == text
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(path) == text  # a byte order mark is no part of it


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
        ("caf\xe9 au lait".encode("latin-1"), "not UTF-8 text: byte 3"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_a_file_that_is_no_text_is_named(raw: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=words) as refused:
        read_text(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"missing\.txt does not exist"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(SourceError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        list(read_documents([tmp_path / "missing"]))


def test_a_folder_is_read_in_order_and_only_its_texts(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "b/a.md", "b/c.rst", "a.TEXT", "photo.png", "b/code.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "m.jsonl").write_text('{"text": "m1", "name": "first"}\n\n{"text": "m2"}\n')
    found = list(read_documents([tmp_path]))
    assert [document.text for document in found] == ["a.TEXT", "b/a.md", "b/c.rst", "m1", "m2", "z.txt"]
    assert [document.name for document in found[3:5]] == ["first", f"{tmp_path / 'm.jsonl'}:3"]
    assert found == list(read_documents(sorted(p for p in tmp_path.rglob("*") if p.suffix not in (".png", ".py", ""))))


def test_a_folder_without_texts_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\0")
    with pytest.raises(SourceError, match=r"holds no text: expected .*\.txt"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize(
    "line", ["{'text': 'single quotes'}", '{"text": ', '["text"]', '{"words": "a"}', '{"text": 3}', "null", "plain"]
)
def test_a_malformed_line_is_named_by_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(SourceError, match=r"documents\.jsonl, line 3: ") as refused:
        list(read_documents([path]))
    assert "text" in str(refused.value)


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"]))
@example(["a\u2028b\u2029c\x85d\x0be\x1cf"], "\n")
@settings(max_examples=50)
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str], newline: str) -> None:
    path = tmp_path_factory.getbasetemp() / "documents.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(newline.join(lines).encode())
    assert [document.text for document in read_documents([path])] == texts


def test_answers_are_read_from_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "Ada has bees.", "answers": [[0, 3], [8, 12]]}\n{"text": "Nothing."}\n')
    assert [document.answers for document in read_documents([path])] == [((0, 3), (8, 12)), ()]


@pytest.mark.parametrize("answers", ["[[0]]", "[[2, 1]]", "[[3, 3]]", "[[0, 14]]", "[[4, 6], [0, 2]]", '"0-3"', "[3]"])
def test_answers_that_are_no_spans_of_the_text_are_named(answers: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "Ada has bees.", "answers": ' + answers + "}\n")
    with pytest.raises(SourceError, match=r"line 1: expected `answers` as \[start, end\] pairs"):
        list(read_documents([path]))


# ---- tokenised documents -----------------------------------------------------------------------------------


class Characters:
    """A tokenizer of one token a character."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return self.vocabulary

    def __call__(self, text: str, *, add_special_tokens: bool) -> Characters:
        assert not add_special_tokens
        self.input_ids = [ord(character) for character in text]
        return self


texts = st.lists(st.text(st.characters(max_codepoint=255), max_size=20), min_size=1, max_size=5)


@given(texts, st.sampled_from([256, 100_000]))
def test_documents_come_back_token_by_token(
    tmp_path_factory: pytest.TempPathFactory, given_texts: list[str], vocabulary: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    named = [Document(f"name {i}", text) for i, text in enumerate(given_texts)]
    seen: list[str] = []
    documents = TokenizedDocuments.from_documents(named, Characters(vocabulary), on_document=seen.append)
    assert seen == documents.names == [document.name for document in named]
    assert not TokenizedDocuments.is_saved(folder)
    documents.save(folder)
    assert TokenizedDocuments.is_saved(folder)
    if not documents.num_tokens:
        return  # numpy cannot map an empty file
    again = TokenizedDocuments.load(folder)
    assert len(again) == len(named) and again.names == documents.names
    assert again.num_tokens == sum(map(len, given_texts))
    assert again.tokens.dtype == (np.uint16 if vocabulary == 256 else np.uint32)
    for i, text in enumerate(given_texts):
        assert again[i].tolist() == documents[i].tolist() == [ord(character) for character in text]


class Words:
    """A tokenizer of one token a word with the space before it, which says where its tokens stand."""

    def __len__(self) -> int:
        return 1 << 10

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool = False) -> Words:
        self.offset_mapping = [match.span() for match in re.finditer(r" ?\S+", text)]
        self.input_ids = list(range(len(self.offset_mapping)))
        return self


def test_tokens_of_answers_are_marked_and_kept(tmp_path: Path) -> None:
    plain, told = Document("plain", "a b c"), Document("told", "My dog is Rex the Third. Yes", ((10, 23), (25, 28)))
    assert TokenizedDocuments.from_documents([plain], Words()).answers is None
    documents = TokenizedDocuments.from_documents([plain, told], Words())
    assert documents.answers is not None and documents.answers.dtype == np.uint8
    assert documents.answers.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    documents.save(tmp_path)
    again = TokenizedDocuments.load(tmp_path)
    assert again.answers is not None and again.answers.tolist() == documents.answers.tolist()
    both = TokenizedDocuments.concatenate([numbered([2]), again])
    assert both.answers is not None and both.answers.tolist() == [0, 0, *documents.answers.tolist()]
    assert both.lengths.tolist() == [2, 3, 7] and both.names == ["0", "plain", "told"]
    assert TokenizedDocuments.concatenate([numbered([2]), numbered([3])]).answers is None
    np.save(tmp_path / "answers.npy", documents.answers[1:])
    with pytest.raises(SourceError, match=r"damaged: answers\.npy marks 9 tokens"):
        TokenizedDocuments.load(tmp_path)
    numbered([4]).save(tmp_path)
    assert TokenizedDocuments.load(tmp_path).answers is None


def test_no_documents_are_an_error() -> None:
    with pytest.raises(SourceError, match="No documents were given"):
        TokenizedDocuments.from_documents([], Characters(256))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    TokenizedDocuments(np.arange(30, dtype=np.uint16), ["a", "b"], [10, 20]).save(tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.mark.parametrize(
    ("file", "raw"),
    [
        ("documents.json", b"{"),
        ("documents.json", b"{}"),
        ("documents.json", b'[{"name": "a"}]'),
        ("documents.json", b"[3]"),
        ("documents.json", b'[{"name": "a", "tokens": 29}]'),
        ("documents.json", b'[{"name": "a", "tokens": "many"}]'),
        ("tokens.npy", b""),
        ("tokens.npy", b"not numpy"),
        ("tokens.npy", None),
        ("documents.json", None),
    ],
)
def test_a_damaged_folder_is_named(saved: Path, file: str, raw: bytes | None) -> None:
    if raw is None:
        (saved / file).unlink()
    else:
        (saved / file).write_bytes(raw)
    with pytest.raises(SourceError, match=str(saved)):
        TokenizedDocuments.load(saved)


def test_truncated_tokens_are_named(saved: Path) -> None:
    raw = (saved / "tokens.npy").read_bytes()
    (saved / "tokens.npy").write_bytes(raw[:-10])
    with pytest.raises(SourceError, match=str(saved)):
        TokenizedDocuments.load(saved)


# ---- streams -----------------------------------------------------------------------------------------------


def numbered(lengths: list[int]) -> TokenizedDocuments:
    """Every token of every document is a number of its own, so that a segment shows where it is from."""
    return TokenizedDocuments(np.arange(sum(lengths), dtype=np.uint32), [str(i) for i in range(len(lengths))], lengths)


@st.composite
def streams(draw: st.DrawFn) -> Streams:
    segment = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda n: max(n) >= 2 * segment))
    return Streams(
        numbered(lengths),
        draw(st.integers(1, 4)),
        segment,
        max_segments=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 9)),
    )


def take(source: Streams, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for segments in islice(source, steps):
        assert segments.tokens_BS.dtype == torch.int64 and segments.starts_B.dtype == torch.bool
        yield segments.tokens_BS.numpy(), segments.starts_B.numpy()


@settings(max_examples=100)
@given(streams())
def test_each_row_reads_on_until_it_says_that_it_starts_again(stream: Streams) -> None:
    bounds = np.concatenate((stream.documents.starts, [stream.documents.num_tokens]))
    previous_BS, since_start_B = None, np.zeros(stream.rows, dtype=int)
    for step, (tokens_BS, starts_B) in enumerate(take(stream, 30)):
        assert starts_B.all() or step > 0
        assert (np.diff(tokens_BS, axis=1) == 1).all()  # consecutive tokens …
        document_BS = np.searchsorted(bounds, tokens_BS, side="right") - 1
        assert (document_BS == document_BS[:, :1]).all()  # … of one document
        since_start_B = np.where(starts_B, 1, since_start_B + 1)
        assert (since_start_B <= stream.max_segments).all()
        if previous_BS is not None:
            goes_on_B = tokens_BS[:, 0] == previous_BS[:, -1] + 1
            assert goes_on_B[~starts_B].all()
        previous_BS = tokens_BS


@settings(max_examples=50)
@given(streams(), st.integers(0, 20), st.integers(1, 20))
def test_the_state_is_the_whole_future(stream: Streams, before: int, after: int) -> None:
    list(take(stream, before))
    state = json.loads(json.dumps(stream.state))
    expected = list(take(stream, after))
    resumed = Streams(stream.documents, stream.rows, stream.segment, max_segments=stream.max_segments, seed=12345)
    resumed.state = state
    for mine, theirs in zip(take(resumed, after), expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@settings(max_examples=50)
@given(streams(), st.integers(1, 3))
def test_every_document_that_is_long_enough_is_read_once_an_epoch(stream: Streams, epochs: int) -> None:
    lengths = stream.documents.lengths
    usable = {i for i in range(len(lengths)) if lengths[i] >= 2 * stream.segment}
    opened: list[int] = []
    while len(opened) < epochs * len(usable):
        tokens_BS, starts_B = next(take(stream, 1))
        first_B = tokens_BS[starts_B, 0]
        opened += (np.searchsorted(stream.documents.starts, first_B, side="right") - 1).tolist()
    for epoch in range(epochs):
        names = opened[epoch * len(usable) : (epoch + 1) * len(usable)]
        # Empty documents begin where their successor does, and are none of these.
        assert set(names) == usable


def test_a_document_is_read_to_its_last_whole_segment() -> None:
    stream = Streams(numbered([17]), 1, 4, max_segments=9)
    read = np.concatenate([tokens_BS[0] for tokens_BS, _ in take(stream, 4)])
    assert read.tolist() == list(range(16))


def test_a_long_document_is_entered_anywhere_and_left_in_time() -> None:
    stream = Streams(numbered([1000]), 1, 4, max_segments=2)
    entries = [int(tokens_BS[0, 0]) for tokens_BS, starts_B in take(stream, 60) if starts_B[0]]
    assert len(entries) == 30 and len(set(entries)) > 20
    assert 0 <= min(entries) < 300 and 700 < max(entries) <= 992


def test_the_order_is_the_seeds() -> None:
    def first(seed: int) -> list:
        made = Streams(numbered([20] * 9), 2, 4, seed=seed)
        return [tokens_BS.tolist() for tokens_BS, _ in take(made, 12)]

    assert first(0) == first(0) != first(1)


def test_documents_too_short_for_memory_are_named() -> None:
    with pytest.raises(ConfigError, match="two segments of 11 tokens; the longest has 21 tokens"):
        Streams(numbered([5, 21]), 1, 11)


# ---- mixtures ----------------------------------------------------------------------------------------------


def mixed(*shares: float) -> Mixture:
    """Kinds of long and short documents; the kind of a token is its number // 1000."""
    lengths = ([80] * 6, [24] * 9, [40] * 3)
    sources = [
        TokenizedDocuments(
            np.arange(sum(some), dtype=np.uint32) + 1000 * kind, [str(i) for i in range(len(some))], some
        )
        for kind, some in enumerate(lengths[: len(shares)])
    ]
    return Mixture(tuple(sources), shares)


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.75, 0.25), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_each_kind_gives_its_share(shares: tuple[float, ...], rows: int) -> None:
    stream = Streams(mixed(*shares), rows, 4)
    steps = 400
    kinds = np.concatenate([tokens_BS[:, 0] // 1000 for tokens_BS, _ in take(stream, steps)])
    counts = np.bincount(kinds)
    # What is behind its share is read next, so what is ahead is at most the documents that are being read.
    assert np.abs(counts - np.array(shares) * steps * rows).max() <= 20 * rows
    assert counts.tolist() == stream.read
    early = np.bincount(kinds[: 4 * rows], minlength=len(shares)) / (4 * rows)
    assert rows < 16 or np.abs(early - shares).max() < 0.1


def test_the_state_of_a_mixture_is_its_whole_future() -> None:
    stream = Streams(mixed(0.7, 0.3), 3, 4, seed=3)
    list(take(stream, 17))
    state = json.loads(json.dumps(stream.state))
    expected = list(take(stream, 60))
    resumed = Streams(mixed(0.7, 0.3), 3, 4, seed=12345)
    resumed.state = state
    for mine, theirs in zip(take(resumed, 60), expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_answers_go_with_their_tokens() -> None:
    plain, marked = mixed(0.5, 0.5).sources
    marked.answers = (marked.tokens % 3 == 0).astype(np.uint8)
    stream = Streams(Mixture((plain, marked), (0.5, 0.5)), 4, 4)
    for segments in islice(stream, 50):
        assert segments.answers_BS is not None
        tokens_BS = segments.tokens_BS.numpy()
        assert np.array_equal(segments.answers_BS.numpy(), (tokens_BS >= 1000) & (tokens_BS % 3 == 0))
    assert Streams(plain, 4, 4).next().answers_BS is None


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.4), (1.0, 0.0), (1.2, -0.2), (0.5, 0.3, 0.2)])
def test_shares_that_make_no_mixture_are_named(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="mixture of 2 kinds of documents needs as many shares above 0"):
        Mixture((numbered([9]), numbered([9])), shares)


def test_a_kind_too_short_for_memory_is_named() -> None:
    with pytest.raises(ConfigError, match="No document of kind 2 of the mixture has two segments of 11 tokens"):
        Streams(Mixture((numbered([40]), numbered([21])), (0.5, 0.5)), 1, 11)
