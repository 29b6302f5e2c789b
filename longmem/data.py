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
    """One text.

    Attributes:
        name: of the text.
        text: of the document.
        answers: [start, end) in characters of what can only be known from earlier in the text, in order. Training may
            count it for more.
    """

    name: str
    text: str
    answers: tuple[tuple[int, int], ...] = ()


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
    """Documents of text files, JSONL files (a `text` field a line, `name` and `answers` optional) and folders of them,
    in sorted order.

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
        answers = row.get("answers", [])
        if not _are_spans(answers, len(row["text"])):
            raise SourceError(
                f"{path}, line {number}: expected `answers` as [start, end] pairs of characters inside the text, in "
                f"order; got {str(answers)[:60]}."
            )
        yield Document(str(row.get("name", f"{path}:{number}")), row["text"], tuple((a, b) for a, b in answers))


def _are_spans(spans: Any, length: int) -> bool:
    """Whether these are [start, end) pairs, none empty, one after the other, up to `length`."""
    if not isinstance(spans, list) or not all(isinstance(span, list) and len(span) == 2 for span in spans):
        return False
    bounds = [0, *(bound for span in spans for bound in span), length]
    whole = all(isinstance(bound, int) for bound in bounds)
    return whole and bounds == sorted(bounds) and all(start < end for start, end in spans)


class TokenizedDocuments:
    """Token ids of many documents in one array, with their names: what training and evaluation read.

    On disk it is a folder with `tokens.npy` (uint16 or uint32, memory-mapped), `documents.json` and, where answers are
    marked, `answers.npy` (uint8, memory-mapped).

    Args:
        tokens: of all documents, one after the other.
        names, lengths: of each document; lengths in tokens.
        answers: uint8, 1 for each token of an answer (see `Document`); None if none is marked.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        names: Sequence[str],
        lengths: Sequence[int],
        answers: np.ndarray | None = None,
    ) -> None:
        self.tokens = tokens
        self.answers = answers
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
        arrays, marks, names = [], [], []
        for document in documents:
            asked = {"return_offsets_mapping": True} if document.answers else {}
            encoded = tokenizer(document.text, add_special_tokens=False, **asked)
            arrays.append(np.asarray(encoded.input_ids, dtype=dtype))
            marks.append(np.zeros(len(arrays[-1]), dtype=np.uint8))
            if document.answers:
                starts, ends = np.asarray(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2).T
                for start, end in document.answers:
                    marks[-1][np.searchsorted(ends, start, side="right") : np.searchsorted(starts, end)] = 1
            names.append(document.name)
            if on_document is not None:
                on_document(document.name)
        if not arrays:
            raise SourceError("No documents were given. Expected text files, .jsonl files or folders of them.")
        answers = np.concatenate(marks)
        return cls(np.concatenate(arrays), names, [len(a) for a in arrays], answers if answers.any() else None)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenizedDocuments]) -> TokenizedDocuments:
        """The documents of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        answers = None
        if any(part.answers is not None for part in parts):
            marks = (np.zeros(len(p.tokens), dtype=np.uint8) if p.answers is None else p.answers for p in parts)
            answers = np.concatenate(list(marks))
        names = [name for part in parts for name in part.names]
        lengths = [int(length) for part in parts for length in part.lengths]
        return cls(np.concatenate([part.tokens for part in parts]), names, lengths, answers)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", self.tokens)
        if self.answers is not None:
            np.save(folder / "answers.npy", self.answers)
        else:
            # Of documents that were there before.
            (folder / "answers.npy").unlink(missing_ok=True)
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
            marked = (folder / "answers.npy").exists()
            answers = np.load(folder / "answers.npy", mmap_mode="r", allow_pickle=False) if marked else None
            names, lengths = [row["name"] for row in rows], [int(row["tokens"]) for row in rows]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{folder} is not a folder of tokenised documents ({error}). Make one with `longmem tokenize`."
            ) from error
        if sum(lengths) != len(tokens):
            raise SourceError(
                f"{folder} is damaged: documents.json counts {sum(lengths)} tokens, tokens.npy holds {len(tokens)}."
            )
        if answers is not None and answers.shape != tokens.shape:
            raise SourceError(
                f"{folder} is damaged: answers.npy marks {len(answers)} tokens, tokens.npy holds {len(tokens)}. "
                "Make the folder again."
            )
        return cls(tokens, names, lengths, answers)

    @staticmethod
    def is_saved(folder: Path) -> bool:
        return (folder / "tokens.npy").exists()


@dataclass(frozen=True)
class Mixture:
    """Documents of several kinds, and how much of the training text each kind gives.

    Attributes:
        sources: the kinds.
        shares: of the segments read, one a kind; they add up to 1.

    Raises:
        ConfigError: a share is missing, one too many, or not above 0, or they do not add up to 1.
    """

    sources: tuple[TokenizedDocuments, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.sources) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(
                f"A mixture of {len(self.sources)} kinds of documents needs as many shares above 0 that add up to 1; "
                f"got {', '.join(map(str, self.shares)) or 'none'}. Leave out what is to have no share."
            )

    def __len__(self) -> int:
        """Documents of all kinds."""
        return sum(map(len, self.sources))


@dataclass(frozen=True)
class Segments:
    """One training step's text.

    Attributes:
        tokens_BS: the segment of each row, int64. It continues the row's segment of the step before, unless:
        starts_B: True where a row begins a new document, so that its bank must be emptied first.
        answers_BS: True for tokens of answers (see `Document`); None where no document has marked any.
    """

    tokens_BS: Tensor
    starts_B: Tensor
    answers_BS: Tensor | None = None

    def to(self, device: torch.device) -> Segments:
        answers_BS = None if self.answers_BS is None else to_device(self.answers_BS, device)
        return Segments(to_device(self.tokens_BS, device), to_device(self.starts_B, device), answers_BS)

    def cut(self, tokens: int) -> Segments:
        """The same in windows of so many tokens, which divide a segment: those of a row are neighbours, in order."""
        windows_BS = self.tokens_BS.unflatten(1, (-1, tokens)).flatten(0, 1)
        answers_BS = None if self.answers_BS is None else self.answers_BS.unflatten(1, (-1, tokens)).flatten(0, 1)
        return Segments(windows_BS, self.starts_B.repeat_interleave(len(windows_BS) // len(self.starts_B)), answers_BS)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU, copied to a device without waiting for what the device has still to do."""
    if device.type != "cuda":
        return tensor.to(device)
    # Only from pinned memory: from elsewhere a copy waits for all that was begun before it. (A row that was expanded to
    # many is one row of memory, which cannot be pinned as it is.)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class Streams:
    """B endless streams of consecutive segments; row b of the next batch continues row b.

    Documents come in a shuffled order without repetition until all were read. One that is longer than `max_segments`
    is entered at a random place and left after that many segments, so that one long book does not fill a row. Of a
    mixture, a row that needs a document gets one of the kind that is furthest behind its share of the segments read.

    The state is a few numbers (`state`), so that training resumes to the bit.
    """

    def __init__(
        self,
        documents: TokenizedDocuments | Mixture,
        rows: int,
        segment: int,
        *,
        max_segments: int = 64,
        seed: int = 0,
    ) -> None:
        self.documents = documents
        self.mixture = documents if isinstance(documents, Mixture) else Mixture((documents,), (1.0,))
        self.rows = rows
        self.segment = segment
        self.max_segments = max_segments
        self.usable = [np.flatnonzero(source.lengths >= 2 * segment) for source in self.mixture.sources]
        for number, (source, usable) in enumerate(zip(self.mixture.sources, self.usable, strict=True), start=1):
            if not len(usable):
                kind = f" of kind {number} of the mixture" if len(self.usable) > 1 else ""
                raise ConfigError(
                    f"No document{kind} has two segments of {segment} tokens; the longest has "
                    f"{int(source.lengths.max())} tokens. "
                    "Training needs documents that span memory operations: give longer ones, or a smaller --segment."
                )
        self.marked = any(source.answers is not None for source in self.mixture.sources)
        self.rng = np.random.default_rng(seed)
        self.orders: list[list[int]] = [[] for _ in self.mixture.sources]
        self.read = [0] * len(self.mixture.sources)
        self.left = [0] * rows
        self.source = [0] * rows
        self.document = [0] * rows
        self.position = [0] * rows

    def __iter__(self) -> Iterator[Segments]:
        while True:
            yield self.next()

    def next(self) -> Segments:
        batch = np.empty((self.rows, self.segment), dtype=np.int64)
        starts = np.zeros(self.rows, dtype=bool)
        answers = np.zeros((self.rows, self.segment), dtype=bool) if self.marked else None
        for row in range(self.rows):
            if not self.left[row]:
                self._open_document(row)
                starts[row] = True
            documents = self.mixture.sources[self.source[row]]
            first = int(documents.starts[self.document[row]]) + self.position[row]
            batch[row] = documents.tokens[first : first + self.segment]
            if answers is not None and documents.answers is not None:
                answers[row] = documents.answers[first : first + self.segment]
            self.position[row] += self.segment
            self.left[row] -= 1
            self.read[self.source[row]] += 1
        marks = None if answers is None else torch.from_numpy(answers)
        return Segments(torch.from_numpy(batch), torch.from_numpy(starts), marks)

    def _open_document(self, row: int) -> None:
        total = sum(self.read) + 1
        behind = [share * total - read for share, read in zip(self.mixture.shares, self.read, strict=True)]
        source = behind.index(max(behind))
        if not self.orders[source]:
            self.orders[source] = [int(i) for i in self.rng.permutation(self.usable[source])]
        index = self.orders[source].pop()
        length = int(self.mixture.sources[source].lengths[index])
        segments = min(length // self.segment, self.max_segments)
        spare = length - segments * self.segment
        self.source[row] = source
        self.document[row] = index
        self.position[row] = int(self.rng.integers(spare + 1)) if segments == self.max_segments else 0
        self.left[row] = segments

    @property
    def state(self) -> dict[str, Any]:
        return {
            "orders": [list(order) for order in self.orders],
            "read": list(self.read),
            "left": list(self.left),
            "source": list(self.source),
            "document": list(self.document),
            "position": list(self.position),
            "rng": self.rng.bit_generator.state,
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.orders = [list(order) for order in state["orders"]]
        self.read = list(state["read"])
        self.left = list(state["left"])
        self.source = list(state["source"])
        self.document = list(state["document"])
        self.position = list(state["position"])
        self.rng.bit_generator.state = state["rng"]
