"""What a bank keeps when it may not grow: policies that choose which tokens lose their keys and values.

A bank that is full is *thinned*: units of a source's tokens lose their keys and values, and with them their place in
search. Their text and token ids stay (a few bytes a token), so that

* what stays is, bit for bit, what was encoded: nothing is encoded again behind other context, and nothing is averaged;
* a source still reads as it was written, quotations are right, and it can be continued;
* `repair` can still make every row again.

Thinning is therefore not forgetting. What has outlived a time-to-live is forgotten, source by source, text and all.

N rows of a bank (tokens that have keys and values), U units.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.config import RetentionPolicy
from longmem.errors import ConfigError

POLICIES: tuple[RetentionPolicy, ...] = get_args(RetentionPolicy)
# Of the tokens of a unit, how long a run must be seen elsewhere to be a repetition.
_GRAM = 5


@dataclass(frozen=True)
class Cap:
    """How large a bank may become, and what goes first when it is larger.

    Attributes:
        tokens: most tokens that have keys and values; None is no limit.
        bytes: most bytes of keys and values on disk; None is no limit.
        policy: what goes first. "oldest": what was written first. "spread": any unit, by a number that its name gives,
            so that what is left is an even sample of all that was ever written, however often the bank was thinned.
            "duplicates": what later units say as well, in the same tokens; of what is left, the oldest. "attention":
            what reads have attended to least. "surprise": what the backbone predicted well.
        unit: consecutive tokens of a source that stay or go together.
        days: sources written last longer ago than that are forgotten; None never.
        pinned: sources that are neither thinned nor forgotten; `*` and `?` stand for any characters.
    """

    tokens: int | None = None
    bytes: int | None = None
    policy: RetentionPolicy = "oldest"
    unit: int = 64
    days: float | None = None
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"Unknown policy {self.policy!r}; choose among {', '.join(POLICIES)}.")
        for name, value in (("tokens", self.tokens), ("bytes", self.bytes), ("days", self.days)):
            if value is not None and not value > 0:
                raise ConfigError(
                    f"A cap's {name} must be more than 0; got {value}. To empty a bank, forget its sources."
                )
        if self.unit < 1:
            raise ConfigError(f"A unit has at least one token; got {self.unit}.")

    def rows(self, bytes_per_token: int) -> int | None:
        """Most rows of a bank that takes so many bytes for each; None is no limit."""
        limits = [] if self.tokens is None else [self.tokens]
        if self.bytes is not None:
            limits.append(self.bytes // bytes_per_token)
        return min(limits, default=None)

    def is_pinned(self, source: str) -> bool:
        return any(fnmatchcase(source, pattern) for pattern in self.pinned)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Cap:
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "pinned": tuple(fields["pinned"])})


@dataclass(frozen=True)
class Plan:
    """What a cap would do to a bank.

    Attributes:
        keep_N: bool, the rows that stay.
        forgotten: sources that have outlived their time.
        thinned: how many rows each other source loses, of those that lose any.
    """

    keep_N: Tensor
    forgotten: tuple[str, ...]
    thinned: dict[str, int]

    @property
    def rows_before(self) -> int:
        return self.keep_N.numel()

    @property
    def rows(self) -> int:
        return int(self.keep_N.sum())


def plan(
    bank: MemoryBank,
    cap: Cap,
    score_N: Tensor | None = None,
    *,
    written: dict[str, datetime] | None = None,
    now: datetime | None = None,
) -> Plan:
    """Which rows of a bank stay. A pure function of its arguments; nothing is changed.

    Args:
        score_N: of each row, for "attention" (the mass it got) and "surprise" (nats).
        written: when each source was written last; only needed for `Cap.days`.
        now: the time.

    Raises:
        ConfigError: the policy needs scores that were not given.
    """
    old = set()
    if cap.days is not None:
        if written is None or now is None:
            raise ConfigError("A cap in days needs the times at which sources were written; only stored ones know.")
        old = {name for name in bank.sources if not cap.is_pinned(name) and now - written[name] > timedelta(cap.days)}
    names = bank.sources
    gone_N = _of_sources(bank, [name in old for name in names])
    pinned_N = _of_sources(bank, [cap.is_pinned(name) for name in names])
    keep_N = choose(bank, cap, score_N, gone_N=gone_N, pinned_N=pinned_N)
    lost_S = torch.bincount(bank.source_index_N[~keep_N], minlength=len(names)).tolist()
    thinned = {name: lost for name, lost in zip(names, lost_S, strict=True) if lost and name not in old}
    return Plan(keep_N, tuple(name for name in names if name in old), thinned)


def choose(bank: MemoryBank, cap: Cap, score_N: Tensor | None, *, gone_N: Tensor, pinned_N: Tensor) -> Tensor:
    """The rows that stay, bool: whole units, best first, until the next would be too much; pinned ones in any case."""
    limit = cap.rows(bank.spec.bytes_per_token)
    left = int((~gone_N).sum())
    if limit is None or left <= limit:
        return ~gone_N
    unit_N = units(bank, cap.unit)
    size_U = torch.bincount(unit_N)
    value_U = _values(bank, cap, score_N, unit_N)
    free_U = torch.bincount(unit_N, weights=(~(gone_N | pinned_N)).double()) > 0
    room = limit - int((pinned_N & ~gone_N).sum())
    # Of equal ones the newest first: units are counted in the order they were written.
    order_U = value_U.flip(0).argsort(descending=True, stable=True)
    order_U = len(size_U) - 1 - order_U
    order_U = order_U[free_U[order_U]]
    stays_U = torch.zeros(len(size_U), dtype=torch.bool)
    stays_U[order_U[size_U[order_U].cumsum(0) <= room]] = True
    return (stays_U[unit_N] | pinned_N) & ~gone_N


def units(bank: MemoryBank, unit: int) -> Tensor:
    """Which unit each row belongs to, (N,), counted from 0 in the order of the bank."""
    cell_N = bank.place_N // unit
    pair_N2 = torch.stack((bank.source_index_N, cell_N), dim=1)
    _, inverse_N = pair_N2.unique(dim=0, return_inverse=True)
    first_U = torch.full((int(inverse_N.max()) + 1 if len(inverse_N) else 0,), len(inverse_N), dtype=torch.int64)
    first_U.scatter_reduce_(0, inverse_N, torch.arange(len(inverse_N)), "amin")
    return first_U.argsort().argsort()[inverse_N]


def _values(bank: MemoryBank, cap: Cap, score_N: Tensor | None, unit_N: Tensor) -> Tensor:
    """What keeping a unit is worth, (U,), double."""
    size_U = torch.bincount(unit_N).double()
    if cap.policy == "oldest":
        return torch.arange(len(size_U)).double()
    if cap.policy == "spread":
        return _spread(bank, cap.unit, unit_N, len(size_U))
    if cap.policy == "duplicates":
        return -repeated(bank.token_ids_N.cpu(), unit_N)
    if score_N is None:
        raise ConfigError(f"Policy {cap.policy!r} needs a score of every row, which was not given.")
    return torch.bincount(unit_N, weights=score_N.cpu().double()) / size_U


def _spread(bank: MemoryBank, unit: int, unit_N: Tensor, count: int) -> Tensor:
    """A number in [0, 1) that depends on nothing but a unit's source and its place there, (U,)."""
    row_U = torch.full((count,), len(unit_N)).scatter_reduce_(0, unit_N, torch.arange(len(unit_N)), "amin")
    names = (
        f"{bank.sources[source]}\0{place // unit}".encode()
        for source, place in zip(bank.source_index_N[row_U].tolist(), bank.place_N[row_U].tolist(), strict=True)
    )
    numbers = [int.from_bytes(hashlib.blake2b(name, digest_size=6).digest()) / 2**48 for name in names]
    return torch.tensor(numbers, dtype=torch.float64)


def repeated(token_ids_N: Tensor, unit_N: Tensor) -> Tensor:
    """The share of each unit's runs of five tokens that a later unit has as well, (U,): old copies go first."""
    units_of: dict[tuple[int, ...], int] = {}
    ids, unit = token_ids_N.tolist(), unit_N.tolist()
    grams = [
        (unit[i], tuple(ids[i : i + _GRAM])) for i in range(len(ids) - _GRAM + 1) if unit[i] == unit[i + _GRAM - 1]
    ]
    for number, gram in grams:
        units_of[gram] = max(number, units_of.get(gram, 0))
    total_U, seen_U = torch.zeros(2, int(unit_N.max()) + 1 if len(unit_N) else 0, dtype=torch.float64)
    for number, gram in grams:
        total_U[number] += 1
        seen_U[number] += units_of[gram] > number
    return seen_U / total_U.clamp(min=1)


def _of_sources(bank: MemoryBank, chosen: Sequence[bool]) -> Tensor:
    """Rows of the sources that were chosen, bool."""
    return torch.tensor(chosen, dtype=torch.bool)[bank.source_index_N] if chosen else torch.zeros(0, dtype=torch.bool)
