"""Frozen settings, saved as JSON beside every checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longmem.errors import CheckpointError, ConfigError


class MemoryHead(NamedTuple):
    """A key-value head of the backbone whose keys and values are remembered."""

    layer: int
    kv_head: int


Precision = Literal["full", "int8", "int4"]
RetentionPolicy = Literal["oldest", "spread", "duplicates", "attention", "surprise"]


@dataclass(frozen=True)
class EncodeConfig:
    """How a source is cut into windows when it is written.

    Token p of a source is always encoded in the same window: the `stride` tokens of its cell
    `p // stride`, behind up to `overlap` tokens of left context from the same source, behind a prefix token
    that is never stored and serves as attention sink. The keys and values of a token are therefore a
    pure function of the source's own tokens up to it, whenever and in however many pieces it is written.
    """

    stride: int = 768
    overlap: int = 256

    def __post_init__(self) -> None:
        if self.stride < 1 or self.overlap < 0:
            raise ConfigError(
                f"Encoding windows need stride >= 1 and overlap >= 0; got stride={self.stride}, overlap={self.overlap}."
            )

    @classmethod
    def from_text(cls, text: str) -> EncodeConfig:
        """Stride and overlap as `str` gives them: 768+256.

        Raises:
            ConfigError: it is something else.
        """
        parts = text.split("+")
        if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
            raise ConfigError(f"Encoding windows are given as new tokens + context, such as 768+256; got {text!r}.")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.stride}+{self.overlap}"

    def windows(self, start: int, total: int) -> list[tuple[int, int, int]]:
        """The windows in which tokens [start, total) of a source are encoded, one for each cell: first token of the
        window, first one to keep, and end."""
        found = []
        for cell in range(start // self.stride, -(-total // self.stride)):
            begin, end = cell * self.stride, min((cell + 1) * self.stride, total)
            found.append((max(0, begin - self.overlap), max(begin, start), end))
        return found


@dataclass(frozen=True)
class BankSpec:
    """What a bank's tensors mean: two banks are compatible only if their specs are equal.

    The backbone's name is for people and not compared: the same weights may be loaded by another name.
    `weights` is the sha256 of the backbone's parameters (`Backbone.weights_hash`): stored keys are only
    meaningful to the very weights that produced them. `precision`, `centre` and `grid` say how a bank keeps what it
    is given and are chosen when it is made (`LongMem.bank_spec_in`), like `encode`; they are not compared, since any
    model of the right weights reads and writes all precisions, in all windows.

    Attributes:
        dtype: of keys and values as they are given and read.
        precision: "full" keeps them as they are; "int8" and "int4" round them (`longmem.codec`).
        centre: what is subtracted before rounding: little-endian float32 in base64, of shape (2, H, E), for keys and
            values of H memory heads of size E. None is 0. It must not depend on what the bank will remember, or a
            trace of the first text would outlive its being forgotten.
        grid: how the coordinates of int4 keys are coded (`longmem.grid`), H · E little-endian float32 units and as many
            bytes of bits in base64; it must not depend on what the bank will remember either. None codes keys as values
            are.
        encode: how its sources are cut, whichever model writes them, and encodes again what is left of them.
    """

    backbone: str = field(compare=False)
    weights: str
    memory_heads: tuple[MemoryHead, ...]
    head_dim: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    precision: Precision = field(default="full", compare=False)
    centre: str | None = field(default=None, compare=False, repr=False)
    grid: str | None = field(default=None, compare=False, repr=False)
    encode: EncodeConfig = field(default=EncodeConfig(768, 256), compare=False)

    def __post_init__(self) -> None:
        if self.precision not in ("full", "int8", "int4"):
            raise ConfigError(f"A bank keeps keys and values in full, int8 or int4; got {self.precision!r}.")
        if self.precision != "full" and self.head_dim % 2:
            raise ConfigError(
                f"Heads of size {self.head_dim} cannot be kept in {self.precision}: it takes an even size. "
                "Make the bank with precision full."
            )

        if self.grid is not None and self.precision != "int4":
            raise ConfigError(f"Only int4 keys have a grid; a bank of {self.precision} was given one. Leave it out.")

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        if self.grid is None:
            del fields["grid"]
        if self.precision == "full":
            # As it was before there was a choice, for programs that know of none.
            del fields["precision"], fields["centre"]
        if self.encode == EncodeConfig(768, 256):
            del fields["encode"]  # as all banks were written
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BankSpec:
        fields = json.loads(text)
        fields["memory_heads"] = tuple(MemoryHead(*head) for head in fields["memory_heads"])
        fields["encode"] = EncodeConfig(**fields.get("encode", {"stride": 768, "overlap": 256}))
        return cls(**fields)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one remembered token costs on disk."""
        return 2 * len(self.memory_heads) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """P: bytes of the keys, or the values, of one token and head."""
        if self.precision == "full":
            return self.head_dim * (2 if self.dtype == "bfloat16" else 4)
        return self.head_dim * self.bits // 8 + 2

    @property
    def bits(self) -> int:
        """Of a rounded number.

        Raises:
            ConfigError: nothing is rounded.
        """
        if self.precision == "full":
            raise ConfigError("A bank of precision full rounds nothing.")
        return 8 if self.precision == "int8" else 4


@dataclass(frozen=True)
class SideNetConfig:
    """Shape of a SideNet, and how it reads memory.

    Attributes:
        spans: backbone layers [lo, hi) that each SideNet layer stands for, in ascending order.
        memory_heads: the heads whose keys and values are remembered. The layer of each must be the
            `lo` of a span: there the SideNet queries the bank.
        update: how a SideNet layer changes the difference d that is carried to the backbone.
            "alpha": d + α ⊙ (layer(x) − x) + Δ_mem with x = H[lo] + d, α per channel and zero at the start.
            "difference": d + layer(H[lo] + d) − layer(H[lo]) + Δ_mem; an empty bank leaves d = 0 for ever.
        init: which backbone layer of its span a SideNet layer is copied from. Memory layers always
            take the first.
        top_k: remembered tokens that each query head retrieves.
        chunk_size: 1 searches single tokens; c > 1 searches the mean keys of c consecutive tokens and
            retrieves whole chunks (paper, section 2.3).
        fusion: "joint" is one softmax over local and retrieved keys; "gate" mixes the two attention
            outputs by a learned static gate a head (paper, equation 5).
        newest_wins: heads may learn to discount what they found by how much of the attention goes to what was
            remembered later ("joint" only). A bank has no other sense of order.
        passage_evidence: what lies in a passage that other queries found counts for more ("joint" only; see
            `longmem.evidence`), by how much is learned.
        encode: how sources are cut when they are written.
    """

    spans: tuple[tuple[int, int], ...]
    memory_heads: tuple[MemoryHead, ...]
    update: Literal["alpha", "difference"] = "alpha"
    init: Literal["first", "last"] = "last"
    top_k: int = 64
    chunk_size: int = 1
    fusion: Literal["joint", "gate"] = "joint"
    newest_wins: bool = False
    passage_evidence: bool = False
    encode: EncodeConfig = EncodeConfig()

    def __post_init__(self) -> None:
        if not self.spans:
            raise ConfigError("A SideNet needs at least one span of backbone layers; got none.")
        for (lo, hi), (next_lo, _) in zip(self.spans, (*self.spans[1:], (self.spans[-1][1], 0)), strict=True):
            if not lo < hi <= next_lo:
                raise ConfigError(
                    f"SideNet spans must be ascending [lo, hi) pairs that do not overlap; got {list(self.spans)}."
                )
        starts = {lo for lo, _ in self.spans}
        stray = sorted({head.layer for head in self.memory_heads} - starts)
        if stray:
            raise ConfigError(
                f"Memory layers {stray} are not the start of any SideNet span {list(self.spans)}. "
                "Begin a span at every memory layer."
            )
        if len(set(self.memory_heads)) != len(self.memory_heads):
            raise ConfigError(f"Memory heads are listed twice: {list(self.memory_heads)}.")
        if list(self.memory_heads) != sorted(self.memory_heads):
            raise ConfigError(f"List memory heads in ascending order; got {list(self.memory_heads)}.")
        if self.top_k < 1 or self.chunk_size < 1 or self.top_k % self.chunk_size:
            raise ConfigError(
                f"top_k must be a positive multiple of chunk_size; got top_k={self.top_k}, "
                f"chunk_size={self.chunk_size}."
            )
        if self.newest_wins and self.fusion != "joint":
            raise ConfigError(f"newest_wins discounts shares of a joint softmax; fusion is {self.fusion!r}.")
        if self.passage_evidence and self.fusion != "joint":
            raise ConfigError(f"passage_evidence raises scores of a joint softmax; fusion is {self.fusion!r}.")

    @property
    def memory_layers(self) -> tuple[int, ...]:
        return tuple(sorted({head.layer for head in self.memory_heads}))

    def heads_of(self, layer: int) -> slice:
        """Where the memory heads of a layer stand in `memory_heads` (they are contiguous)."""
        positions = [i for i, head in enumerate(self.memory_heads) if head.layer == layer]
        return slice(positions[0], positions[-1] + 1) if positions else slice(0, 0)

    @classmethod
    def around(
        cls,
        memory_heads: Sequence[tuple[int, int]],
        num_layers: int,
        *,
        below: int = 0,
        above: int = 2,
        **settings: Any,
    ) -> SideNetConfig:
        """A SideNet for given memory heads: a span from each memory layer to the next.

        Args:
            below: equal spans under the first memory layer, where there is nothing to read yet.
            above: equal spans from the last memory layer to the top.
        """
        heads = tuple(sorted(MemoryHead(*head) for head in memory_heads))
        layers = sorted({head.layer for head in heads})
        first, last = layers[0], layers[-1]
        lower = [round(first * i / below) for i in range(below)]
        upper = [last + round((num_layers - last) * i / above) for i in range(1, above)]
        starts = sorted({*lower, *layers, *upper} - {num_layers})
        return cls(spans=tuple(zip(starts, [*starts[1:], num_layers], strict=True)), memory_heads=heads, **settings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SideNetConfig:
        fields = dict(fields)
        try:
            fields["spans"] = tuple((lo, hi) for lo, hi in fields["spans"])
            fields["memory_heads"] = tuple(MemoryHead(*head) for head in fields["memory_heads"])
            fields["encode"] = EncodeConfig(**fields["encode"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"This is not the configuration of a SideNet: {error}. Fields given: {sorted(fields)}."
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint, or a `CheckpointError` that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing. Expected a folder written by `longmem train` or `LongMem.save`."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Restore it, or train again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object.")
    return value
