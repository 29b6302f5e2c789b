"""MemoryBank: remembered keys, values and where they came from. No model inside, no disk inside.

H memory heads (in the order of `BankSpec.memory_heads`), N remembered tokens, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longmem.approximate import BankIndex, fingerprint
from longmem.config import BankSpec
from longmem.errors import BankError, BankIndexError, ConfigError, SourceError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class BankEntry:
    """Consecutive tokens of one source, as `LongMem.encode` produces and `MemoryBank.append` takes them.

    Attributes:
        source: name of the text the tokens belong to.
        text: the piece of the source that the tokens cover.
        char_start: where `text` begins in the source, in characters.
        token_ids_N: int64.
        offsets_N2: int64, [start, end) of each token in the source, in characters.
        keys_HNE, values_HNE: the backbone's keys (before rotary) and values of the memory heads.
    """

    source: str
    text: str
    char_start: int
    token_ids_N: Tensor
    offsets_N2: Tensor
    keys_HNE: Tensor
    values_HNE: Tensor

    def __len__(self) -> int:
        return self.token_ids_N.numel()


@dataclass(frozen=True)
class SourceSpan:
    """A stretch of remembered text."""

    source: str
    start: int
    end: int
    text: str


class MemoryBank:
    """Remembered tokens, in the order they were written; grows without limit.

    Memory doubles when it is full, so that appending N tokens one at a time copies O(N) in all.
    """

    def __init__(self, spec: BankSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._length = 0
        heads, dtype = len(spec.memory_heads), DTYPES[spec.dtype]
        self._keys_HCE = torch.empty(heads, 0, spec.head_dim, dtype=dtype, device=self.device)
        self._values_HCE = torch.empty(heads, 0, spec.head_dim, dtype=dtype, device=self.device)
        self._token_ids_C = torch.empty(0, dtype=torch.int64, device=self.device)
        self._source_C = torch.empty(0, dtype=torch.int64)
        self._offsets_C2 = torch.empty(0, 2, dtype=torch.int64)
        self._sources: dict[str, int] = {}
        self._texts: dict[int, list[tuple[int, str]]] = {}
        self._index: BankIndex | None = None

    def __len__(self) -> int:
        """Remembered tokens."""
        return self._length

    def __repr__(self) -> str:
        sizes = f"{len(self)} tokens, {len(self.sources)} sources"
        return f"{type(self).__name__}({sizes}, backbone {self.spec.backbone!r})"

    @property
    def keys_HNE(self) -> Tensor:
        return self._keys_HCE[:, : self._length]

    @property
    def values_HNE(self) -> Tensor:
        return self._values_HCE[:, : self._length]

    @property
    def capacity(self) -> int:
        """C: tokens that fit before memory has to grow."""
        return self._keys_HCE.shape[1]

    @property
    def buffers_HCE(self) -> tuple[Tensor, Tensor]:
        """The memory behind `keys_HNE` and `values_HNE`; what lies beyond N tokens means nothing."""
        return self._keys_HCE, self._values_HCE

    @property
    def token_ids_N(self) -> Tensor:
        return self._token_ids_C[: self._length]

    @property
    def source_index_N(self) -> Tensor:
        """Which of `sources` each token belongs to (on the CPU)."""
        return self._source_C[: self._length]

    @property
    def offsets_N2(self) -> Tensor:
        """[start, end) of each token in its source, in characters (on the CPU)."""
        return self._offsets_C2[: self._length]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the remembered sources, in the order they were first written."""
        return tuple(self._sources)

    @property
    def index(self) -> BankIndex | None:
        """What the bank is searched with; None searches exactly."""
        return self._index

    def use_index(self, index: BankIndex | None) -> None:
        """Search with an index from now on (`longmem.indexing.make_index`); None searches exactly.

        Tokens that are appended later are searched exactly. Forgetting drops the index. It goes to the bank's device.

        Raises:
            BankIndexError: the index was not made from this bank's tokens.
            ConfigError: the bank is not on the CPU, and the index has inverted files.
        """
        if index is not None:
            index = index.to(self.device)
            keys_HNE = self.keys_HNE[:, : len(index)]
            if len(index) > len(self) or fingerprint(keys_HNE) != index.fingerprint:
                raise BankIndexError(
                    f"This index was made for {len(index):,} tokens that are not the first of the bank's "
                    f"{len(self):,}: it belongs to another bank, or something was forgotten since. "
                    "Make a new one, or search exactly."
                )
        self._index = index

    def between(self, first: int, last: int) -> MemoryBank:
        """Tokens [first, last) as a bank that can only be read by a model: it shares memory and has no text."""
        part = MemoryBank(self.spec, self.device)
        part._keys_HCE, part._values_HCE = self._keys_HCE[:, first:], self._values_HCE[:, first:]
        part._length = last - first
        if first == 0 and self._index is not None and len(self._index) <= last:
            part._index = self._index
        return part

    def append(self, entry: BankEntry) -> None:
        """Remember `entry`. It must continue its source: pieces of one source are written in order.

        Raises:
            BankError: if shapes or dtype are not those of the bank's spec, or the piece does not follow the last one.
        """
        self.check(entry)
        self._remember(entry)

    def check(self, entry: BankEntry) -> None:
        """Raise the `BankError` that `append` would, and change nothing."""
        tokens = len(entry)
        expected = (len(self.spec.memory_heads), tokens, self.spec.head_dim)
        for name, tensor in (("keys_HNE", entry.keys_HNE), ("values_HNE", entry.values_HNE)):
            if tuple(tensor.shape) != expected or tensor.dtype != DTYPES[self.spec.dtype]:
                raise BankError(
                    f"{name} of source {entry.source!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; "
                    f"this bank expects {expected} and {DTYPES[self.spec.dtype]}. "
                    "Encode the text with the model the bank was made for."
                )
        for name, tensor, shape in (
            ("token_ids_N", entry.token_ids_N, (tokens,)),
            ("offsets_N2", entry.offsets_N2, (tokens, 2)),
        ):
            if tuple(tensor.shape) != shape:
                raise BankError(
                    f"{name} of source {entry.source!r} has shape {tuple(tensor.shape)}, expected {shape}. "
                    "Give one token id and one [start, end) pair a token."
                )
        end = self.length_of(entry.source)
        if entry.char_start != end:
            raise BankError(
                f"Source {entry.source!r} is remembered up to character {end}, the new piece begins at "
                f"{entry.char_start}. Continue where the source ends, or write under a new source name."
            )

    def length_of(self, source: str) -> int:
        """Characters of `source` that are remembered (0 if it is unknown)."""
        index = self._sources.get(source)
        if index is None:
            return 0
        start, text = self._texts[index][-1]
        return start + len(text)

    def text_of(self, source: str, start: int = 0, end: int | None = None) -> str:
        """The remembered text of a source, or characters [start, end) of it."""
        if source not in self._sources:
            raise SourceError(f"No source {source!r} in this bank. It remembers: {self._listed_sources()}.")
        # A source written in many pieces keeps them apart; only those that overlap the span are read.
        pieces = []
        for piece_start, text in self._texts[self._sources[source]]:
            if piece_start + len(text) > start and (end is None or piece_start < end):
                lo = max(0, start - piece_start)
                hi = len(text) if end is None else end - piece_start
                pieces.append(text[lo:hi])
        return "".join(pieces)

    def tokens_of(self, source: str) -> Tensor:
        """Token ids of a source, int64 on the CPU."""
        index = self._sources.get(source)
        if index is None:
            return torch.empty(0, dtype=torch.int64)
        return self.token_ids_N.cpu()[self.source_index_N == index]

    def span(self, first: int, last: int) -> SourceSpan:
        """The text that remembered tokens `first` … `last` (inclusive, of one source) cover."""
        source = self.sources[int(self._source_C[first])]
        start, end = int(self._offsets_C2[first, 0]), int(self._offsets_C2[last, 1])
        return SourceSpan(source, start, end, self.text_of(source, start, end))

    def to(self, device: torch.device | str) -> MemoryBank:
        """Move keys and values to a device, in place. An index goes along, unless it has inverted files: that is
        dropped, since only a CPU searches it."""
        self.device = torch.device(device)
        if self._index is not None:
            try:
                self._index = self._index.to(self.device)
            except ConfigError:
                self._index = None
        self._keys_HCE = self._keys_HCE.to(self.device)
        self._values_HCE = self._values_HCE.to(self.device)
        self._token_ids_C = self._token_ids_C.to(self.device)
        return self

    def forget(self, source: str) -> int:
        """Forget a whole source; returns how many tokens went. Sources are encoded apart from each other, so nothing
        that stays has ever seen the forgotten text."""
        if source not in self._sources:
            raise SourceError(f"No source {source!r} to forget. This bank remembers: {self._listed_sources()}.")
        gone = self._sources[source]
        self._index = None
        keep_N = self.source_index_N != gone
        on_device = keep_N.to(self.device)
        forgotten = int((~keep_N).sum())
        self._keys_HCE = self.keys_HNE[:, on_device].contiguous()
        self._values_HCE = self.values_HNE[:, on_device].contiguous()
        self._token_ids_C = self.token_ids_N[on_device]
        self._offsets_C2 = self.offsets_N2[keep_N]
        index_N = self.source_index_N[keep_N]
        self._source_C = index_N - (index_N > gone).long()
        self._length -= forgotten
        names = [name for name in self._sources if name != source]
        self._texts = {new: self._texts[self._sources[name]] for new, name in enumerate(names)}
        self._sources = {name: new for new, name in enumerate(names)}
        return forgotten

    def _listed_sources(self) -> str:
        names = self.sources
        listed = ", ".join(names[:20]) or "nothing yet"
        return f"{listed} and {len(names) - 20} more" if len(names) > 20 else listed

    def _remember(self, entry: BankEntry) -> None:
        tokens = len(entry)
        self._reserve(self._length + tokens)
        new = slice(self._length, self._length + tokens)
        index = self._sources.get(entry.source, len(self._sources))
        self._keys_HCE[:, new] = entry.keys_HNE.to(self.device)
        self._values_HCE[:, new] = entry.values_HNE.to(self.device)
        self._token_ids_C[new] = entry.token_ids_N.to(self.device)
        self._source_C[new] = index
        self._offsets_C2[new] = entry.offsets_N2.cpu()
        # Registered last: if a copy above fails, the bank is what it was.
        self._sources[entry.source] = index
        self._texts.setdefault(index, []).append((entry.char_start, entry.text))
        self._length += tokens

    def _reserve(self, tokens: int) -> None:
        capacity = self._token_ids_C.numel()
        if tokens <= capacity:
            return
        capacity = max(tokens, 2 * capacity)

        def grown(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = capacity
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            new.narrow(dim, 0, self._length).copy_(old.narrow(dim, 0, self._length))
            return new

        self._keys_HCE = grown(self._keys_HCE, 1)
        self._values_HCE = grown(self._values_HCE, 1)
        self._token_ids_C = grown(self._token_ids_C, 0)
        self._source_C = grown(self._source_C, 0)
        self._offsets_C2 = grown(self._offsets_C2, 0)
