"""Documents: read, checked, tokenised, and cut into training streams.

B rows of a batch, S tokens of a segment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ConfigError, SourceError

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".text"}


@dataclass(frozen=True)
class Document:
    """One text and its name."""

    name: str
    text: str


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        SourceError: the file is missing, empty, a folder, or not text.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist. Give the path of a UTF-8 text file.")
    if path.is_dir():
        raise SourceError(f"{path} is a folder, expected a text file. Name the files in it one by one.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    return decode_text(raw, str(path))


def decode_text(raw: bytes, name: str) -> str:
    """UTF-8 bytes as text; `name` is what errors call them.

    Raises:
        SourceError: they are empty, binary, or not UTF-8.
    """
    if b"\0" in raw:
        raise SourceError(f"{name} is binary (it holds zero bytes), expected UTF-8 text. Convert it to text first.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{name} is not UTF-8 text: byte {error.start} cannot be decoded. "
            "Convert it, e.g. `iconv -f latin1 -t utf-8`."
        ) from error
    if not text.strip():
        raise SourceError(f"{name} is empty. Expected text in it.")
    return text


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Documents of text files, JSONL files (a `text` field a line, `name` optional) and folders of them, in sorted
    order.

    Raises:
        SourceError: names the file, and in JSONL the line, that cannot be used.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES | {".jsonl"})
            if not files:
                raise SourceError(f"{path} holds no text: expected {', '.join(sorted(TEXT_SUFFIXES))} or .jsonl files.")
            yield from read_documents(files)
        elif path.suffix.lower() == ".jsonl":
            yield from _read_jsonl(path)
        else:
            yield Document(str(path), read_text(path))


def _read_jsonl(path: Path) -> Iterator[Document]:
    # Not `splitlines`: JSON strings may hold other line separators, such as U+2028, as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SourceError(
                f"{path}, line {number}: not JSON ({error}). Expected an object with a `text` field."
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise SourceError(f"{path}, line {number}: expected a JSON object with a `text` string, got {line[:60]!r}.")
        yield Document(str(row.get("name", f"{path}:{number}")), row["text"])


class TokenizedDocuments:
    """Token ids of many documents in one array, with their names: what training and evaluation read.

    On disk it is a folder with `tokens.npy` (uint16 or uint32, memory-mapped) and `documents.json`.
    """

    def __init__(self, tokens: np.ndarray, names: Sequence[str], lengths: Sequence[int]) -> None:
        self.tokens = tokens
        self.names = list(names)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.lengths)))[:-1]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index]]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @classmethod
    def from_documents(
        cls, documents: Iterable[Document], tokenizer: Any, *, on_document: Callable[[str], None] | None = None
    ) -> TokenizedDocuments:
        """Tokenise documents without special tokens.

        Raises:
            SourceError: there is no document.
        """
        dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        arrays, names = [], []
        for document in documents:
            arrays.append(np.asarray(tokenizer(document.text, add_special_tokens=False).input_ids, dtype=dtype))
            names.append(document.name)
            if on_document is not None:
                on_document(document.name)
        if not arrays:
            raise SourceError("No documents were given. Expected text files, .jsonl files or folders of them.")
        return cls(np.concatenate(arrays), names, [len(array) for array in arrays])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", self.tokens)
        rows = [{"name": n, "tokens": int(t)} for n, t in zip(self.names, self.lengths, strict=True)]
        (folder / "documents.json").write_text(json.dumps(rows))

    @classmethod
    def load(cls, folder: Path) -> TokenizedDocuments:
        """Open a folder written by `save`.

        Raises:
            SourceError: it is not such a folder.
        """
        try:
            rows = json.loads((folder / "documents.json").read_text())
            tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            names, lengths = [row["name"] for row in rows], [int(row["tokens"]) for row in rows]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{folder} is not a folder of tokenised documents ({error}). Make one with `longmem tokenize`."
            ) from error
        if sum(lengths) != len(tokens):
            raise SourceError(
                f"{folder} is damaged: documents.json counts {sum(lengths)} tokens, tokens.npy holds {len(tokens)}."
            )
        return cls(tokens, names, lengths)

    @staticmethod
    def is_saved(folder: Path) -> bool:
        return (folder / "tokens.npy").exists()


@dataclass(frozen=True)
class Segments:
    """One training step's text.

    Attributes:
        tokens_BS: the segment of each row, int64. It continues the row's segment of the step before, unless:
        starts_B: True where a row begins a new document, so that its bank must be emptied first.
    """

    tokens_BS: Tensor
    starts_B: Tensor


class Streams:
    """B endless streams of consecutive segments; row b of the next batch continues row b.

    Documents come in a shuffled order without repetition until all were read. One that is longer than `max_segments`
    is entered at a random place and left after that many segments, so that one long book does not fill a row.

    The state is a few numbers (`state`), so that training resumes to the bit.
    """

    def __init__(
        self, documents: TokenizedDocuments, rows: int, segment: int, *, max_segments: int = 64, seed: int = 0
    ) -> None:
        self.documents = documents
        self.rows = rows
        self.segment = segment
        self.max_segments = max_segments
        self.usable = np.flatnonzero(documents.lengths >= 2 * segment)
        if not len(self.usable):
            raise ConfigError(
                f"No document has two segments of {segment} tokens; the longest has {int(documents.lengths.max())} "
                "tokens. "
                "Training needs documents that span memory operations: give longer ones, or a smaller --segment."
            )
        self.rng = np.random.default_rng(seed)
        self.order: list[int] = []
        self.left = [0] * rows
        self.document = [0] * rows
        self.position = [0] * rows

    def __iter__(self) -> Iterator[Segments]:
        while True:
            yield self.next()

    def next(self) -> Segments:
        batch = np.empty((self.rows, self.segment), dtype=np.int64)
        starts = np.zeros(self.rows, dtype=bool)
        for row in range(self.rows):
            if not self.left[row]:
                self._open_document(row)
                starts[row] = True
            position = self.position[row]
            batch[row] = self.documents[self.document[row]][position : position + self.segment]
            self.position[row] += self.segment
            self.left[row] -= 1
        return Segments(torch.from_numpy(batch), torch.from_numpy(starts))

    def _open_document(self, row: int) -> None:
        if not self.order:
            self.order = [int(i) for i in self.rng.permutation(self.usable)]
        index = self.order.pop()
        length = int(self.documents.lengths[index])
        segments = min(length // self.segment, self.max_segments)
        spare = length - segments * self.segment
        self.document[row] = index
        self.position[row] = int(self.rng.integers(spare + 1)) if segments == self.max_segments else 0
        self.left[row] = segments

    @property
    def state(self) -> dict[str, Any]:
        return {
            "order": list(self.order),
            "left": list(self.left),
            "document": list(self.document),
            "position": list(self.position),
            "rng": self.rng.bit_generator.state,
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])
        self.left = list(state["left"])
        self.document = list(state["document"])
        self.position = list(state["position"])
        self.rng.bit_generator.state = state["rng"]
