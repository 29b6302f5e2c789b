"""MemoryBank: remembered keys, values and where they came from. No model inside, no disk inside.

A bank that was thinned (`longmem.retention`) keeps the text and the token ids of all that was written, and keys and
values of some of its tokens: its rows.

H memory heads (in the order of `BankSpec.memory_heads`), N rows, M tokens of a text, E head size, P bytes of a rounded
row.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from longmem.approximate import BankIndex, fingerprint
from longmem.codec import PackedRows, pack_rows, unpack_rows
from longmem.config import BankSpec
from longmem.errors import BankError, BankIndexError, ConfigError, SourceError
from longmem.grid import Grid
from longmem.ops import empty_rows

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# Reads whose attention is noted before it is added up.
_MOST_PAID = 256


@dataclass(frozen=True)
class DrawnOn:
    """Remembered text that a generated text drew on.

    Attributes:
        bank: name of the bank that holds it; None is the bank that the generated text is written to.
        source, start, end: characters [start, end) of a source.
        weight: the largest share of the memory heads' attention that one token paid it, 0 … 1.
    """

    bank: str | None
    source: str
    start: int
    end: int
    weight: float


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
        kept_K: int64, which of the tokens the keys and values are of, ascending; None is all of them.
        drew_on: remembered text that the model drew on while it generated these tokens, if that was recorded.
    """

    source: str
    text: str
    char_start: int
    token_ids_N: Tensor
    offsets_N2: Tensor
    keys_HNE: Tensor
    values_HNE: Tensor
    kept_K: Tensor | None = None
    drew_on: tuple[DrawnOn, ...] = ()

    def __len__(self) -> int:
        return self.token_ids_N.numel()

    @property
    def rows(self) -> int:
        """Tokens that have keys and values."""
        return len(self) if self.kept_K is None else self.kept_K.numel()

    def thinned(self, keep_N: Tensor) -> BankEntry:
        """The same with fewer rows: those where `keep_N` (bool, one a row) is True."""
        kept_N = torch.arange(len(self)) if self.kept_K is None else self.kept_K
        rows = (self.keys_HNE[:, keep_N], self.values_HNE[:, keep_N])
        return dataclasses.replace(self, keys_HNE=rows[0], values_HNE=rows[1], kept_K=kept_N[keep_N])


def packed(entry: BankEntry, spec: BankSpec) -> BankEntry:
    """An entry as a bank of this spec keeps it on disk: keys and values of few bits are uint8, (H, N, P)."""
    if spec.precision == "full":
        return entry
    rows = zip((entry.keys_HNE, entry.values_HNE), _centres(spec), _grids(spec), strict=True)
    keys_HNP, values_HNP = (
        pack_rows(rows_HNE, spec.bits, centre_HE).to_bytes() if grid is None else grid.pack(rows_HNE, centre_HE)
        for rows_HNE, centre_HE, grid in rows
    )
    return dataclasses.replace(entry, keys_HNE=keys_HNP, values_HNE=values_HNP)


def unpacked(entry: BankEntry, spec: BankSpec) -> BankEntry:
    """What `packed` gave, as it is read.

    Raises:
        BankError: keys or values have another shape than the spec says.
    """
    if spec.precision == "full":
        return entry
    shape = (len(spec.memory_heads), entry.rows, spec.row_bytes)
    rows = []
    for bytes_HNP, centre_HE, grid in zip(
        (entry.keys_HNE, entry.values_HNE), _centres(spec), _grids(spec), strict=True
    ):
        if tuple(bytes_HNP.shape) != shape or bytes_HNP.dtype != torch.uint8:
            raise BankError(
                f"Keys or values of source {entry.source!r} have shape {tuple(bytes_HNP.shape)} and dtype "
                f"{bytes_HNP.dtype}; {shape} and {torch.uint8} were expected for {spec.precision}."
            )
        if grid is None:
            rows.append(unpack_rows(PackedRows.from_bytes(bytes_HNP, spec.bits, centre_HE), DTYPES[spec.dtype]))
        else:
            rows.append(grid.unpack(bytes_HNP, centre_HE, DTYPES[spec.dtype]))
    return dataclasses.replace(entry, keys_HNE=rows[0], values_HNE=rows[1])


def centre_text(centres_2HE: Tensor) -> str:
    """`BankSpec.centre` of the centres of keys and of values."""
    return base64.b64encode(centres_2HE.float().cpu().numpy().astype("<f4").tobytes()).decode()


def _centres(spec: BankSpec) -> Tensor:
    """(2, H, E), float32."""
    return _read_centre(spec.centre, len(spec.memory_heads), spec.head_dim)


def _grids(spec: BankSpec) -> tuple[Grid | None, None]:
    """That of keys, if they have one; values have none."""
    return None if spec.grid is None else _read_grid(spec.grid, len(spec.memory_heads), spec.head_dim), None


_read_grid = cache(Grid.from_text)


@cache
def _read_centre(centre: str | None, heads: int, head_dim: int) -> Tensor:
    if centre is None:
        return torch.zeros(2, heads, head_dim)
    try:
        numbers = np.frombuffer(base64.b64decode(centre, validate=True), "<f4").reshape(2, heads, head_dim)
    except ValueError as error:
        raise BankError(
            f"The centre in a bank's spec is not that of {heads} heads of size {head_dim}: {error}. "
            "Take the spec from `LongMem.bank_spec_in`."
        ) from error
    return torch.from_numpy(numbers.astype(np.float32))


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

    Attributes:
        name: in its store; None for a bank that is in none.
        layout: stands for the rows that there are; another object once rows have gone, moved or changed device, so that
            what was made of them (word and passage indexes) knows. New rows at the end leave it as it is.
    """

    name: str | None = None

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
        self._place_C = torch.empty(0, dtype=torch.int64)
        # By number and by name, since a bank may hold a hundred thousand.
        self._names: list[str] = []
        self._sources: dict[str, int] = {}
        self._texts: dict[int, list[tuple[int, str]]] = {}
        # Token ids and offsets of each piece of a source, also of tokens that have no row any more.
        self._tokens: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._written: dict[str, int] = {}
        self._index: BankIndex | None = None
        # Of a part, which rows of the whole it has: those behind so many, or these. None: it is the whole.
        self._in_whole: int | Tensor | None = None
        # And the layout of the whole as it was then.
        self._made_of: object = None
        self.layout = object()
        # Attention that nobody has taken yet: what rows got, and, once rows have gone, each token of a source.
        self._paid: list[tuple[Tensor, Tensor]] = []
        self._attended: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Rows: remembered tokens that have keys and values."""
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
    def place_N(self) -> Tensor:
        """Which token of its source each row is, counted from 0 (on the CPU)."""
        return self._place_C[: self._length]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the remembered sources, in the order they were first written."""
        return tuple(self._names)

    def source_number(self, source: str) -> int | None:
        """Which of `sources` a name is; None if nothing of it is remembered."""
        return self._sources.get(source)

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

    @classmethod
    def of_rows(cls, spec: BankSpec, keys_HNE: Tensor, values_HNE: Tensor, token_ids_N: Tensor) -> MemoryBank:
        """Rows as one bank that can only be read by a model: of what texts they are is not known."""
        bank = cls(spec, keys_HNE.device)
        bank._length = len(token_ids_N)
        bank._keys_HCE, bank._values_HCE, bank._token_ids_C = keys_HNE, values_HNE, token_ids_N
        bank._source_C = torch.zeros(bank._length, dtype=torch.int64)
        bank._offsets_C2 = torch.zeros(bank._length, 2, dtype=torch.int64)
        bank._place_C = torch.arange(bank._length)
        bank._in_whole = 0
        return bank

    def between(self, first: int, last: int) -> MemoryBank:
        """Tokens [first, last) as a bank that can only be read; it shares memory with the whole."""
        part = self._part(slice(first, None), slice(first, None), last - first)
        part._in_whole = first
        if first == 0 and self._index is not None and len(self._index) <= last:
            part._index = self._index
        return part

    def part(self, row_P: Tensor) -> MemoryBank:
        """Some rows as a bank that can only be read: copies of their keys and values.

        Args:
            row_P: int64, ascending.
        """
        part = self._part(row_P.to(self.device), row_P.cpu(), len(row_P))
        part._in_whole = row_P.cpu()
        return part

    def in_whole(self, position_X: Tensor) -> Tensor:
        """Rows of a part as rows of the bank that it is a part of (on the CPU); those of a whole bank are the same."""
        position_X = position_X.cpu()
        return self._in_whole[position_X] if isinstance(self._in_whole, Tensor) else position_X + (self._in_whole or 0)

    def still_has(self, part: MemoryBank) -> bool:
        """Whether a part that was made of this bank, or the bank itself, has rows of it still: none has gone since."""
        return part is self or part._made_of is self.layout

    def _part(self, on_device: slice | Tensor, on_cpu: slice | Tensor, length: int) -> MemoryBank:
        part = MemoryBank(self.spec, self.device)
        part.name, part._length, part._made_of = self.name, length, self.layout
        part._keys_HCE, part._values_HCE = self._keys_HCE[:, on_device], self._values_HCE[:, on_device]
        part._token_ids_C = self._token_ids_C[on_device]
        part._source_C, part._offsets_C2 = self._source_C[on_cpu], self._offsets_C2[on_cpu]
        part._place_C = self._place_C[on_cpu]
        part._names, part._sources, part._texts = self._names, self._sources, self._texts
        part._tokens, part._written = self._tokens, self._written
        return part

    def append(self, entry: BankEntry) -> None:
        """Remember `entry`. It must continue its source: pieces of one source are written in order.

        Raises:
            BankError: if shapes or dtype are not those of the bank's spec, or the piece does not follow the last one.
        """
        self.check(entry)
        self._remember(unpacked(packed(entry, self.spec), self.spec))

    def check(self, entry: BankEntry) -> None:
        """Raise the `BankError` that `append` would, and change nothing."""
        self._check_whole()
        tokens = len(entry)
        expected = (len(self.spec.memory_heads), entry.rows, self.spec.head_dim)
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

    def _check_whole(self) -> None:
        """A part has the texts of the whole bank, and may not change them."""
        if self._in_whole is not None:
            raise BankError("This is a part of a bank, which can only be read. Change the bank that it is a part of.")

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
        """Token ids of a source (M,), int64 on the CPU: all that were written."""
        pieces = self._tokens.get(self._sources.get(source, -1), [])
        return torch.cat([torch.empty(0, dtype=torch.int64), *(ids_M for ids_M, _ in pieces)])

    def written(self, source: str) -> int:
        """How many tokens of a source were written, with rows or without."""
        return self._written.get(source, 0)

    def offsets_of(self, source: str) -> Tensor:
        """[start, end) of each token of a source (M, 2), in characters, int64 on the CPU."""
        pieces = self._tokens.get(self._sources.get(source, -1), [])
        return torch.cat([torch.empty(0, 2, dtype=torch.int64), *(offsets_M2 for _, offsets_M2 in pieces)])

    def gap(self, one: int, other: int) -> int | None:
        """How many tokens row `other` is behind row `one`; None if they are of two sources."""
        if self._source_C[one] != self._source_C[other]:
            return None
        return int(self._place_C[other] - self._place_C[one])

    def span(self, first: int, last: int) -> SourceSpan:
        """The text that remembered tokens `first` … `last` (inclusive, of one source) cover."""
        source = self._names[int(self._source_C[first])]
        start, end = int(self._offsets_C2[first, 0]), int(self._offsets_C2[last, 1])
        return SourceSpan(source, start, end, self.text_of(source, start, end))

    def to(self, device: torch.device | str) -> MemoryBank:
        """Move keys and values to a device, in place. An index goes along, unless it has inverted files: that is
        dropped, since only a CPU searches it."""
        if torch.device(device) != self.device:
            self.device, self.layout = torch.device(device), object()
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
        return self.forget_all([source])

    def forget_all(self, sources: Collection[str]) -> int:
        """Forget whole sources at once, all or, if one of them is not there, none; returns how many tokens went."""
        self._check_whole()
        gone = set(sources)
        if not gone:
            return 0
        for source in sources:
            if source not in self._sources:
                raise SourceError(f"No source {source!r} to forget. This bank remembers: {self._listed_sources()}.")
        stays_S = torch.tensor([name not in gone for name in self._names], dtype=torch.bool)
        self._keep_rows(stays_S[self.source_index_N])
        # What is left is counted anew.
        self._source_C = (stays_S.long().cumsum(0) - 1)[self._source_C]
        self._names = [name for name in self._names if name not in gone]
        self._texts = {new: self._texts[self._sources[name]] for new, name in enumerate(self._names)}
        self._tokens = {new: self._tokens[self._sources[name]] for new, name in enumerate(self._names)}
        self._sources = {name: new for new, name in enumerate(self._names)}
        for source in gone:
            self._attended.pop(source, None)
        return sum(self._written.pop(source) for source in gone)

    def thin(self, keep_N: Tensor) -> None:
        """Drop the rows where `keep_N` (bool, on the CPU) is False. Texts and token ids stay (`longmem.retention`)."""
        self._check_whole()
        self._keep_rows(keep_N)

    def attend(self, position_X: Tensor, weight_X: Tensor) -> None:
        """Count that these rows got so much attention, for the policy "attention" of `longmem.retention`.

        Args:
            position_X: rows, in any order, some of them perhaps more than once.
            weight_X: shares of attention.
        """
        self._paid.append((position_X.cpu(), weight_X.float().cpu()))
        if len(self._paid) > _MOST_PAID:
            self._paid = [self._paid_to_rows()]

    def take_attention(self) -> dict[str, Tensor]:
        """What `attend` has counted since this was last called: of each token (M,), by source."""
        self._count_by_source()
        taken, self._attended = self._attended, {}
        return taken

    def _paid_to_rows(self) -> tuple[Tensor, Tensor]:
        """Rows that got attention, each once, ascending, and how much; (U,) each."""
        position_X, weight_X = (torch.cat(parts) for parts in zip(*self._paid, strict=True))
        position_U, inverse_X = position_X.unique(return_inverse=True)
        return position_U, torch.zeros(len(position_U)).index_add(0, inverse_X, weight_X)

    def _count_by_source(self) -> None:
        """From now on the attention counted so far is that of tokens of sources, wherever their rows are."""
        if not self._paid:
            return
        (position_U, weight_U), self._paid = self._paid_to_rows(), []
        source_U, order_U = self.source_index_N[position_U].sort(stable=True)
        numbers, counts = source_U.unique_consecutive(return_counts=True)
        for number, mine_U in zip(numbers.tolist(), order_U.split(counts.tolist()), strict=True):
            source = self._names[number]
            old_M, new_M = self._attended.get(source, torch.zeros(0)), torch.zeros(self.written(source))
            new_M[: len(old_M)] = old_M
            self._attended[source] = new_M.index_add(0, self.place_N[position_U[mine_U]], weight_U[mine_U])

    def save_attention(self) -> None:
        """Keep what `attend` has counted with the bank; one that is in memory alone has it there."""

    def _keep_rows(self, keep_N: Tensor) -> None:
        self._count_by_source()
        self._index, self.layout = None, object()
        on_device = keep_N.to(self.device)
        self._keys_HCE = self.keys_HNE[:, on_device].contiguous()
        self._values_HCE = self.values_HNE[:, on_device].contiguous()
        self._token_ids_C = self.token_ids_N[on_device]
        self._offsets_C2, self._place_C = self.offsets_N2[keep_N], self.place_N[keep_N]
        self._source_C = self.source_index_N[keep_N]
        self._length = int(keep_N.sum())

    def _listed_sources(self) -> str:
        names = self.sources
        listed = ", ".join(names[:20]) or "nothing yet"
        return f"{listed} and {len(names) - 20} more" if len(names) > 20 else listed

    def _remember(self, entry: BankEntry) -> None:
        self._reserve(self._length + entry.rows)
        new = slice(self._length, self._length + entry.rows)
        index = self._sources.get(entry.source, len(self._names))
        ids_M, offsets_M2 = entry.token_ids_N.cpu(), entry.offsets_N2.cpu()
        kept_K = torch.arange(len(entry)) if entry.kept_K is None else entry.kept_K
        before = self.written(entry.source)
        self._keys_HCE[:, new] = entry.keys_HNE.to(self.device)
        self._values_HCE[:, new] = entry.values_HNE.to(self.device)
        self._token_ids_C[new] = ids_M[kept_K].to(self.device)
        self._source_C[new] = index
        self._offsets_C2[new] = offsets_M2[kept_K]
        self._place_C[new] = before + kept_K
        # Registered last: if a copy above fails, the bank is what it was.
        if index == len(self._names):
            self._names.append(entry.source)
        self._sources[entry.source] = index
        self._texts.setdefault(index, []).append((entry.char_start, entry.text))
        self._tokens.setdefault(index, []).append((ids_M, offsets_M2))
        self._written[entry.source] = before + len(entry)
        self._length += entry.rows

    def _reserve(self, tokens: int) -> None:
        capacity = self._token_ids_C.numel()
        if tokens <= capacity:
            return
        capacity = max(tokens, 2 * capacity)

        def grown(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = capacity
            new = empty_rows(shape, old.dtype, old.device)
            new.narrow(dim, 0, self._length).copy_(old.narrow(dim, 0, self._length))
            return new

        self._keys_HCE = grown(self._keys_HCE, 1)
        self._values_HCE = grown(self._values_HCE, 1)
        self._token_ids_C = grown(self._token_ids_C, 0)
        self._source_C = grown(self._source_C, 0)
        self._offsets_C2 = grown(self._offsets_C2, 0)
        self._place_C = grown(self._place_C, 0)
