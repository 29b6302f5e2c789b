"""The index of a bank: for each memory head, a small copy of the keys that is searched instead of all of them.

An index is a cache. It says how much it finds, measured on queries that had no part in making it; scores are always
those of the bank's own keys, and tokens that it does not know are searched exactly.

H memory heads (K of a layer), N tokens that the index knows, Q queries, E head size, R retrieved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError
from longmem.ivf import InvertedFile
from longmem.lists import GpuLists, KeyLists
from longmem.ops import NativeOps, Pools, reads_apart
from longmem.sketch import GpuSketch, Sketch

# From so many tokens on, reading some lists is faster than reading a few numbers of every key (docs/search.md).
LISTS_FROM = {"cpu": 1 << 17, "cuda": 1 << 20}
# Keys that numbers of coordinates are tried on. (On a CPU, among few keys fewer would seem enough.)
_TRIED = {"cpu": 1 << 20, "cuda": 1 << 17}
# Coordinates that lists on a CPU need beyond those of a sketch.
_MORE = 8
# An index of fewer tokens for each retrieved one would save nothing.
LEAST = 16
# The part of a bank that its index does not know may grow to this share of what it knows.
TAIL = 0.25
KINDS = {"sketch": Sketch, "lists": InvertedFile, "key lists": KeyLists}


@dataclass(frozen=True)
class BankIndex:
    """How a bank's first N tokens are searched without reading all of their keys.

    Attributes:
        heads: an index of one search for each memory head, in the order of the bank's spec.
        top_k: R, what recall was measured at.
        target: the recall that was asked for.
        fingerprint: of the keys that it was made from (`fingerprint`).
    """

    heads: tuple[Sketch | InvertedFile | KeyLists, ...]
    top_k: int
    target: float
    fingerprint: str

    def __len__(self) -> int:
        """Tokens that the index knows."""
        return len(self.heads[0])

    @classmethod
    def choose(
        cls,
        keys_HNE: Tensor,
        query_HQE: Tensor,
        *,
        top_k: int,
        target: float = 0.99,
        lists: bool | None = None,
        together: int = 1,
        on_head: Callable[[int], None] | None = None,
    ) -> BankIndex:
        """The least index of each head that reaches a target recall.

        Args:
            keys_HNE: of a bank.
            query_HQE: recorded queries, at least two, better hundreds. The first half chooses, the second measures.
            top_k: R, what recall is measured at.
            target: recall among the R true nearest, of the queries that choose. What is then measured may fall short by
                a per cent: ask for more than you need.
            lists: inverted files or sketches; by default what is faster for so many keys.
            together: queries that follow each other and are asked at once, as the query heads of a memory head are.
            on_head: called with 1 for each head that is done.

        Raises:
            ConfigError: too few keys, or a target that is no share.
        """
        check(keys_HNE.shape[1], top_k, target)
        require_searchable(keys_HNE.device, top_k)
        if lists is None:
            lists = keys_HNE.shape[1] >= LISTS_FROM[keys_HNE.device.type]
        heads = []
        for head in range(len(keys_HNE)):
            one = slice(head, head + 1)
            heads.append(_choose(keys_HNE[one], query_HQE[one], top_k, target, lists, together))
            if on_head is not None:
                on_head(1)
        return cls(tuple(heads), top_k, target, fingerprint(keys_HNE))

    @property
    def recall(self) -> tuple[float, ...]:
        """Share of the true nearest keys that each head finds."""
        return tuple(head.recall[0] for head in self.heads)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each head's index is, in words."""
        return tuple(
            f"{head.size} coordinates"
            if isinstance(head, Sketch)
            else f"{head.size} coordinates, {head.share:.1%} of {len(head.centroid_LS):,} lists"
            if isinstance(head, KeyLists)
            else f"{head.size} coordinates, {head.probes[0]:,} of {len(head.lists[0]):,} lists"
            for head in self.heads
        )

    @property
    def device(self) -> torch.device:
        """Where it is searched."""
        movable = (head for head in self.heads if not isinstance(head, InvertedFile))
        return next((head.basis.centre_XE.device for head in movable), torch.device("cpu"))

    def to(self, device: torch.device) -> BankIndex:
        """The index on a device; itself if it is there.

        Raises:
            ConfigError: it cannot be searched there, or has inverted files, which are searched on a CPU.
        """
        if device.type == self.device.type:
            return self
        require_searchable(device, self.top_k)
        heads = [head.to(device) for head in self.heads if not isinstance(head, InvertedFile)]
        if len(heads) < len(self.heads):
            raise ConfigError(
                f"This index has inverted files, which are searched on a CPU; the bank is on {device}. Make "
                "an index for the bank where it is, open it with device='cpu' (--device cpu), or search it exactly."
            )
        return replace(self, heads=tuple(heads))

    def outgrown(self, num_tokens: int) -> bool:
        """Whether a bank of so many tokens deserves a new index: what was appended is read whole at every search."""
        return num_tokens - len(self) > TAIL * len(self)

    def search(
        self,
        heads: slice,
        query_KQE: Tensor,
        keys_KNE: Tensor | Pools,
        top_k: int,
        length_K: Tensor | None = None,
        native: NativeOps | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The `top_k` keys of largest dot product for each query of some heads, but for the share that `recall` says.

        Args:
            heads: which of the memory heads.
            query_KQE: their queries.
            keys_KNE: the bank's keys of these heads: those indexed, and any that were appended since.
            top_k: R.
            length_K: how many keys there are, if `keys_KNE` has room for more (on a GPU).
            native: searches inverted files in one call each.

        Returns:
            index_KQR and score_KQR as `ops.topk_scan` returns them.
        """
        if isinstance(keys_KNE, Pools):
            assert length_K is not None
            found = [
                sketches.search(query_KQE[some], keys_KNE.some(some), top_k, length_K[some])
                for some, sketches in self._at_once(heads)
            ]
        else:
            ones = [slice(k, k + 1) for k in range(len(keys_KNE))]
            found = [
                index.search(query_KQE[one], keys_KNE[one], top_k, native)
                if isinstance(index, InvertedFile)
                else index.search(query_KQE[one], keys_KNE[one], top_k)
                for one, index in zip(ones, self.heads[heads], strict=True)
            ]
        if len(found) == 1:
            return found[0]
        index_KQR, score_KQR = (torch.cat(parts) for parts in zip(*found, strict=True))
        return index_KQR, score_KQR

    def _at_once(self, heads: slice) -> list[tuple[slice, GpuSketch | GpuLists]]:
        """Some heads on a GPU: neighbours whose indexes are of one kind and size are searched at once. Made once, since
        where codes lie has to be told to the device."""
        if (heads.start, heads.stop) not in self._made:
            made, first = [], 0
            for _, group in groupby(self.heads[heads], key=lambda head: (type(head), head.size)):
                alike = list(group)
                sketches = [head for head in alike if isinstance(head, Sketch)]
                lists = [head for head in alike if isinstance(head, KeyLists)]
                at_once = GpuSketch.of(sketches) if sketches else GpuLists.of(lists)
                made.append((slice(first, first + len(alike)), at_once))
                first += len(alike)
            self._made[heads.start, heads.stop] = made
        return self._made[heads.start, heads.stop]

    @cached_property
    def _made(self) -> dict[tuple[int, int], list[tuple[slice, GpuSketch | GpuLists]]]:
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `from_state` makes the same index of: tensors by name, on the CPU, and settings for JSON."""
        tensors: dict[str, Tensor] = {}
        heads = []
        for head, index in enumerate(self.heads):
            parts, settings = index.state()
            tensors |= {f"{head}.{name}": part.cpu() for name, part in parts.items()}
            heads.append({"kind": next(kind for kind in KINDS if isinstance(index, KINDS[kind])), **settings})
        settings = {"top_k": self.top_k, "target": self.target, "fingerprint": self.fingerprint, "heads": heads}
        return tensors, settings

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> BankIndex:
        """An index as `state` gave it; KeyError if something is missing."""
        heads = []
        for head, its in enumerate(settings["heads"]):
            prefix = f"{head}."
            parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            heads.append(KINDS[its["kind"]].from_state(parts, its))
        return cls(tuple(heads), settings["top_k"], settings["target"], settings["fingerprint"])


def _choose(
    keys_1NE: Tensor, query_1QE: Tensor, top_k: int, target: float, lists: bool, together: int
) -> Sketch | InvertedFile | KeyLists:
    if not lists:
        return Sketch.choose(keys_1NE, query_1QE, top_k=top_k, target=target)
    kind, head_dim = keys_1NE.device.type, keys_1NE.shape[-1]
    # With every list read, lists find what a sketch does. On a CPU that must be well above the target: what too few
    # coordinates miss has to be made up for by lists, and those are made and chosen by the same coordinates.
    above = (3 + target) / 4 if kind == "cpu" else (1 + target) / 2
    some_1nE = keys_1NE[:, :: -(-keys_1NE.shape[1] // _TRIED[kind])].contiguous()
    least = Sketch.choose(some_1nE, query_1QE, top_k=top_k, target=above).size
    if kind == "cpu":
        lists_of, sizes = InvertedFile.choose, (*range(least + _MORE, head_dim, 8), head_dim)
    else:
        lists_of, sizes = KeyLists.choose, range(least, head_dim + 1, 16)
    for size in sizes:
        try:
            return lists_of(keys_1NE, query_1QE, top_k=top_k, target=target, size=size, together=together)
        except ConfigError:
            continue  # out of reach with so few
    return Sketch.choose(keys_1NE, query_1QE, top_k=top_k, target=target)


def check(num_tokens: int, top_k: int, target: float) -> None:
    """Raise `ConfigError` unless so many tokens can have an index of such recall."""
    if not 0.0 < target <= 1.0:
        raise ConfigError(f"The recall of an index is a share, above 0 and at most 1; got {target}. 0.99 is usual.")
    if num_tokens < LEAST * top_k:
        raise ConfigError(
            f"The bank remembers {num_tokens:,} tokens; an index is worth making from {LEAST * top_k:,} on. "
            "Search it exactly."
        )


def require_searchable(device: torch.device, top_k: int) -> None:
    """Raise `ConfigError` unless an index can be searched on a device."""
    if device.type != "cpu" and not reads_apart(device, top_k):
        raise ConfigError(
            f"An index is searched on a CPU, or for up to 64 keys on an NVIDIA GPU; this bank is on {device}, and "
            f"{top_k} are asked for. Open it with device='cpu' (--device cpu), or search it exactly."
        )


def fingerprint(keys_HNE: Tensor) -> str:
    """sha256 of keys: an index fits a bank if it was made from these very keys in this order."""
    digest = hashlib.sha256(str(tuple(keys_HNE.shape)).encode())
    for keys_NE in keys_HNE:
        digest.update(keys_NE.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = ["BankIndex", "check", "fingerprint", "require_searchable"]
