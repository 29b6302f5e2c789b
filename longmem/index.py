"""Search in memory banks: what a SideNet calls when it asks its bank.

B batch rows, K memory heads of one layer, G query heads that share one of them, T tokens, R retrieved tokens,
N remembered tokens, E head size; P pools of keys and values, X = B · K searches of Q = G · T queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.bank import MemoryBank
from longmem.config import BankSpec, SideNetConfig
from longmem.data import to_device
from longmem.ops import (
    FoundRows,
    JointHeads,
    NativeOps,
    PassageTables,
    Pools,
    attend_rows,
    gather_rows,
    joins_at_once,
    joint_rows,
    raise_rows,
    reads_apart,
    row_scores,
    topk_scan,
)

# Tokens that a recorded step has room for at least.
_LEAST_ROOM = 1 << 14


class Retrieved:
    """What a layer's memory heads found.

    Attributes:
        valid_BKGTR: False where the bank held fewer than R tokens.
        index_BKGTR: position in the row's bank; of several banks that are read together, see `place_of`.
        bank_size_B: remembered tokens N of each row's bank.
    """

    valid_BKGTR: Tensor
    index_BKGTR: Tensor
    bank_size_B: Tensor

    def attend(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over what each query found: outputs (B, K, G, T, E) and log-sum-exps (B, K, G, T).

        Args:
            discount_BKGT: what being older costs, in nats for the whole of the attention.
            bias_BKGTR: what is added to scores.
        """
        raise NotImplementedError

    def scores(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> Tensor:
        """Scaled scores (B, K, G, T, R) of what each query found, −inf where nothing was."""
        raise NotImplementedError

    def matches(self, scaling_KG: Tensor) -> Tensor:
        """Scores (B, K, G, T, R) as the search gave them, times `scaling_KG`: no query, no gradient."""
        raise NotImplementedError

    def join(
        self,
        query_BKGTE: Tensor,
        local_BKGTE: Tensor,
        local_logsumexp_BKGT: Tensor,
        heads: JointHeads,
        bias_BKGTR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """All of joint attention in one launch (`ops.joint_rows`); None where it takes more than one."""
        return None

    def raises_at_once(self, query_BKGTE: Tensor) -> bool:
        """Whether `raised` takes such queries: of single tokens, where no gradient is wanted."""
        return False

    def raised(
        self, query_BKGTE: Tensor, local_logsumexp_BKGT: Tensor, heads: JointHeads, tables: PassageTables
    ) -> Tensor:
        """What passage evidence adds to the scores of one token a row (`ops.raise_rows`)."""
        raise NotImplementedError

    def log_weights(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> Tensor:
        """log of each retrieved token's share (B, K, G, T, R) among those that its query found; where it found nothing,
        all have the same."""
        score_BKGTR = self.scores(query_BKGTE, scaling, discount_BKGT, bias_BKGTR)
        return score_BKGTR.masked_fill(~self.valid_BKGTR.any(-1, keepdim=True), 0.0).log_softmax(-1)


@dataclass(frozen=True)
class RetrievedRows(Retrieved):
    """What was found in one bank a row, and where its keys and values lie.

    Attributes:
        keys_PNE, values_PNE: pools of remembered rows. Those that lie apart may change with the reader's next step.
        pool_BK: which pool a head draws on.
        slot_BKGTR: which rows of its pool each query found.
        score_BKGTR: float32, what the search scored them; −inf where the bank held fewer than R tokens.
        index_BKGTR: position in the row's bank.
        bank_size_B: remembered tokens N of each row's bank.
        order_BKGTR: int64, larger is newer.
        native: joins in one call what it takes.
    """

    keys_PNE: Tensor | Pools
    values_PNE: Tensor | Pools
    pool_BK: Tensor
    slot_BKGTR: Tensor
    score_BKGTR: Tensor
    index_BKGTR: Tensor
    bank_size_B: Tensor
    order_BKGTR: Tensor
    native: NativeOps | None = None

    @property
    def valid_BKGTR(self) -> Tensor:
        """False where the bank held fewer than R tokens."""
        return self.score_BKGTR > -torch.inf

    def attend(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape_BKGT = query_BKGTE.shape[:-1]
        extra = *self._newest(discount_BKGT), None if bias_BKGTR is None else _flat(bias_BKGTR)
        output_XQE, logsumexp_XQ = attend_rows(
            _flat(query_BKGTE), self.keys_PNE, self.values_PNE, *self._places, scaling, *extra
        )
        return output_XQE.view(*shape_BKGT, -1), logsumexp_XQ.view(shape_BKGT)

    def join(
        self,
        query_BKGTE: Tensor,
        local_BKGTE: Tensor,
        local_logsumexp_BKGT: Tensor,
        heads: JointHeads,
        bias_BKGTR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if joins_at_once(query_BKGTE.device):
            join = joint_rows
        elif self.native is not None and self._native(query_BKGTE):
            join = self.native.joint_rows
        else:
            return None
        return join(query_BKGTE, local_BKGTE, local_logsumexp_BKGT, self._found, heads, bias_BKGTR)

    def raises_at_once(self, query_BKGTE: Tensor) -> bool:
        if query_BKGTE.shape[3] != 1:
            return False
        return joins_at_once(query_BKGTE.device) or self._native(query_BKGTE)

    def raised(
        self, query_BKGTE: Tensor, local_logsumexp_BKGT: Tensor, heads: JointHeads, tables: PassageTables
    ) -> Tensor:
        native = None if joins_at_once(query_BKGTE.device) else self.native
        step = raise_rows if native is None else native.raise_rows
        return step(query_BKGTE, local_logsumexp_BKGT, self._found, heads, tables)

    @property
    def _found(self) -> FoundRows:
        found = self.slot_BKGTR, self.score_BKGTR, self.index_BKGTR, self.order_BKGTR
        return FoundRows(self.keys_PNE, self.values_PNE, self.pool_BK, *found, self.bank_size_B)

    def _native(self, query_BKGTE: Tensor) -> bool:
        """Whether compiled functions of a CPU take such queries."""
        return self.native is not None and self.native.takes(query_BKGTE, self.keys_PNE)

    def scores(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> Tensor:
        pool_X, slot_XQR, valid_XQR = self._places
        key_XQRE = gather_rows(self.keys_PNE, slot_XQR, pool_X)
        extra = *self._newest(discount_BKGT), None if bias_BKGTR is None else _flat(bias_BKGTR)
        return row_scores(_flat(query_BKGTE), key_XQRE, valid_XQR, scaling, *extra).view(self.slot_BKGTR.shape)

    def matches(self, scaling_KG: Tensor) -> Tensor:
        found_BKGTR = self.score_BKGTR * scaling_KG.detach().float()[..., None, None]
        return found_BKGTR.masked_fill(~self.valid_BKGTR, -torch.inf)

    def rows(self, rows_PNE: Tensor | Pools) -> Tensor:
        """Rows (B, K, G, T, R, E) of `keys_PNE` or `values_PNE`."""
        pool_X, slot_XQR, _ = self._places
        return gather_rows(rows_PNE, slot_XQR, pool_X).view(*self.slot_BKGTR.shape, -1)

    @property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pools X, slots XQR and validity XQR."""
        return self.pool_BK.flatten(), _flat(self.slot_BKGTR), _flat(self.valid_BKGTR)

    def _newest(self, discount_BKGT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Orders XQR and discounts XQ."""
        if discount_BKGT is None:
            return None, None
        return _flat(self.order_BKGTR), _flat(discount_BKGT)


# Positions in the banks of a group: bank number · PLACES + position in that bank.
PLACES = 1 << 40


def place_of(index: int) -> tuple[int, int]:
    """Number of the bank in its group (`longmem.group.members`) and position in it, of an entry of `index_BKGTR`."""
    return divmod(index, PLACES)


@dataclass(frozen=True)
class RetrievedTogether(Retrieved):
    """What was found in several banks a row: each gives its own R tokens, and weights multiply exponentiated scores.

    Where all banks but one are absent, everything is, bit for bit, what that one gives by itself: its log-sum-exp is
    their sum, and its share is exactly 1.

    Attributes:
        parts: one a bank.
        log_weight_BS: float32, log of each bank's weight in each row; anything where a row has no such bank.
    """

    parts: tuple[RetrievedRows, ...]
    log_weight_BS: Tensor

    @cached_property
    def valid_BKGTR(self) -> Tensor:
        return torch.cat([part.valid_BKGTR for part in self.parts], dim=-1)

    @cached_property
    def index_BKGTR(self) -> Tensor:
        return torch.cat([part.index_BKGTR + number * PLACES for number, part in enumerate(self.parts)], dim=-1)

    @cached_property
    def bank_size_B(self) -> Tensor:
        """Tokens of all banks, each counted as often as its weight says."""
        size_BS = torch.stack([part.bank_size_B for part in self.parts], dim=-1)
        return (size_BS * self.log_weight_BS.exp()).sum(-1)

    def attend(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        outputs, logsumexps = zip(
            *(
                part.attend(query_BKGTE, scaling, discount_BKGT, bias)
                for part, bias in zip(self.parts, self._split(bias_BKGTR), strict=True)
            ),
            strict=True,
        )
        logsumexp_BKGTS = torch.stack(logsumexps, dim=-1) + self.log_weight_BS[:, None, None, None]
        logsumexp_BKGT = logsumexp_BKGTS.logsumexp(-1)
        nothing_BKGT1 = logsumexp_BKGT[..., None] == -torch.inf
        share_BKGTS = (logsumexp_BKGTS - logsumexp_BKGT[..., None]).exp().masked_fill(nothing_BKGT1, 0.0)
        output_BKGTE = torch.zeros_like(outputs[0])
        for number, part_BKGTE in enumerate(outputs):
            output_BKGTE = output_BKGTE + share_BKGTS[..., number, None].to(part_BKGTE.dtype) * part_BKGTE
        return output_BKGTE, logsumexp_BKGT

    def scores(
        self,
        query_BKGTE: Tensor,
        scaling: float,
        discount_BKGT: Tensor | None = None,
        bias_BKGTR: Tensor | None = None,
    ) -> Tensor:
        biases = self._split(bias_BKGTR)
        return self._weighted(
            [
                part.scores(query_BKGTE, scaling, discount_BKGT, bias)
                for part, bias in zip(self.parts, biases, strict=True)
            ]
        )

    def matches(self, scaling_KG: Tensor) -> Tensor:
        return self._weighted([part.matches(scaling_KG) for part in self.parts])

    def _weighted(self, scores: list[Tensor]) -> Tensor:
        """Scores (B, K, G, T, R) of all banks together."""
        log_weights = self.log_weight_BS[:, None, None, None, :, None].unbind(-2)
        return torch.cat([score + weight for score, weight in zip(scores, log_weights, strict=True)], dim=-1)

    def _split(self, bias_BKGTR: Tensor | None) -> Sequence[Tensor | None]:
        """One bias a bank."""
        if bias_BKGTR is None:
            return [None] * len(self.parts)
        return bias_BKGTR.split([part.index_BKGTR.shape[-1] for part in self.parts], dim=-1)


def _flat(per_query: Tensor) -> Tensor:
    """(B, K, G, T, …) → (X, Q, …)."""
    return per_query.flatten(0, 1).flatten(1, 2)


class Retrieve(Protocol):
    """Queries of one memory layer in, remembered keys and values out."""

    def __call__(self, layer: int, query_BKGTE: Tensor) -> Retrieved: ...


def search_tokens(
    query_XQE: Tensor,
    keys_PNE: Tensor,
    top_k: int,
    chunk_size: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions (X, Q, R) of the retrieved tokens, and their scores: −inf where there is none, and position 0.

    With `chunk_size` c > 1, queries rank the mean keys of c consecutive tokens and whole chunks are retrieved
    (paper, section 2.3), each token with its chunk's score; a last chunk that is not full cannot be found.
    """
    if chunk_size == 1:
        return topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
    chunks = keys_PNE.shape[1] // chunk_size
    means_PNE = keys_PNE[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size)).mean(2)
    chunks_X = None if length_X is None else length_X // chunk_size
    chunk_XQR, score_XQR = topk_scan(query_XQE, means_PNE, top_k // chunk_size, chunks_X, pool_X)
    within_c = torch.arange(chunk_size, device=keys_PNE.device)
    score_XQR = score_XQR.repeat_interleave(chunk_size, dim=-1)
    # A bank of less than a chunk has no token at the places that a missing chunk would have.
    index_XQR = (chunk_XQR[..., None] * chunk_size + within_c).flatten(-2)
    return index_XQR.masked_fill(score_XQR == -torch.inf, 0), score_XQR


def _shared(banks: Sequence[MemoryBank | None]) -> bool:
    """Whether all rows read one bank."""
    return all(bank is banks[0] for bank in banks)


def _capacity(banks: Sequence[MemoryBank | None]) -> int:
    """Tokens that the largest bank has room for."""
    return max((bank.capacity for bank in banks if bank is not None), default=0)


def _index(banks: Sequence[MemoryBank | None]) -> BankIndex | None:
    """Of the bank that all rows read."""
    return banks[0].index if banks[0] is not None and _shared(banks) else None


def _late(banks: Sequence[MemoryBank | None], index: BankIndex | None) -> int:
    """Tokens of the bank that all rows read which its index does not know."""
    return 0 if index is None or banks[0] is None else len(banks[0]) - len(index)


def _room(tokens: int) -> int:
    """Room for so many tokens in powers of two: a few more are no reason to record a step again."""
    return max(_LEAST_ROOM, 1 << (tokens - 1).bit_length())


def _dtype(banks: Sequence[MemoryBank | None]) -> torch.dtype | None:
    """Of the keys; None if there is no bank."""
    return next((bank.buffers_HCE[0].dtype for bank in banks if bank is not None), None)


class BankReader:
    """Reads one bank a batch row (None is an empty one) for a SideNet, by the bank's index if it has one.

    Each row is searched by itself and its result has a fixed shape, so nothing in a row depends on what another row's
    bank holds.

    Args:
        native: of a model whose decoding is compiled: reads in fewer operations, without gradients.
    """

    def __init__(
        self, banks: Sequence[MemoryBank | None], config: SideNetConfig, native: NativeOps | None = None
    ) -> None:
        self.banks, self.config, self.native = banks, config, native

    @torch.no_grad()
    def __call__(self, layer: int, query_BKGTE: Tensor) -> RetrievedRows:
        bank = self.banks[0]
        if bank is not None and _shared(self.banks) and len(bank) and bank.device == query_BKGTE.device:
            return self._read_one(bank, layer, query_BKGTE)
        if len(self.banks) > 1 and PlacedReader.takes(self.banks, self.config, query_BKGTE.device):
            return PlacedReader(self.banks, self.config, query_BKGTE.device)(layer, query_BKGTE)
        return self._read_each(layer, query_BKGTE)

    def _search(self, bank: MemoryBank, heads: slice, query_KQE: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of a bank the queries found, and how they score: each KQR."""
        config, keys_KNE = self.config, bank.keys_HNE[heads]
        if bank.index is not None and config.chunk_size == 1:
            return bank.index.search(heads, query_KQE, keys_KNE, config.top_k, None, self.native)
        return search_tokens(query_KQE, keys_KNE, config.top_k, config.chunk_size)

    def _sizes(self, device: torch.device) -> Tensor:
        """Remembered tokens of each row's bank, (B,)."""
        return torch.tensor([0.0 if bank is None else float(len(bank)) for bank in self.banks], device=device)

    def _read_one(self, bank: MemoryBank, layer: int, query_BKGTE: Tensor) -> RetrievedRows:
        """All rows read one bank: its keys are read once, and found rows where they lie."""
        batch, kv_heads, group, tokens, _ = query_BKGTE.shape
        heads, query_KQE = self.config.heads_of(layer), query_BKGTE.transpose(0, 1).flatten(1, 3)
        found = self._search(bank, heads, query_KQE)
        index, score = (part_KQR.unflatten(1, (batch, group, tokens)).transpose(0, 1) for part_KQR in found)
        pool_BK = torch.arange(kv_heads, device=bank.device).expand(batch, kv_heads)
        rows = bank.keys_HNE[heads], bank.values_HNE[heads]
        return RetrievedRows(*rows, pool_BK, index, score, index, self._sizes(bank.device), index, self.native)

    def _read_each(self, layer: int, query_BKGTE: Tensor) -> RetrievedRows:
        heads = self.config.heads_of(layer)
        batch, kv_heads, group, tokens, head_dim = query_BKGTE.shape
        shape = (batch, kv_heads, group, tokens, self.config.top_k)
        device, found = query_BKGTE.device, group * tokens * self.config.top_k
        # A pool for each row and head, of what its queries found: banks differ in size and may lie on another device.
        keys_BKFE = torch.zeros(batch, kv_heads, found, head_dim, dtype=query_BKGTE.dtype, device=device)
        values_BKFE = torch.zeros_like(keys_BKFE)
        score = torch.full(shape, -torch.inf, device=device)
        index = torch.zeros(shape, dtype=torch.int64, device=device)
        for row, bank in enumerate(self.banks):
            if bank is None or len(bank) == 0:
                continue
            query_KQE = query_BKGTE[row].flatten(1, 2).to(bank.device)
            index_KQR, score_KQR = self._search(bank, heads, query_KQE)
            keys_BKFE[row] = gather_rows(bank.keys_HNE[heads], index_KQR).flatten(1, 2).to(keys_BKFE)
            values_BKFE[row] = gather_rows(bank.values_HNE[heads], index_KQR).flatten(1, 2).to(values_BKFE)
            score[row] = score_KQR.unflatten(1, (group, tokens)).to(device)
            index[row] = index_KQR.unflatten(1, (group, tokens)).to(device)
        pool_BK = torch.arange(batch * kv_heads, device=device).view(batch, kv_heads)
        slot_BKGTR = torch.arange(found, device=device).view(shape[2:]).expand(shape)
        pools = keys_BKFE.flatten(0, 1), values_BKFE.flatten(0, 1), pool_BK
        return RetrievedRows(*pools, slot_BKGTR, score, index, self._sizes(device), index)


class GroupReader:
    """Reads several banks a batch row, each by itself (`RetrievedTogether`).

    Args:
        rows: of each row its banks and their weights above 0; none is an empty one.
        native: as of `BankReader`.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[tuple[MemoryBank, float]]],
        config: SideNetConfig,
        native: NativeOps | None = None,
    ) -> None:
        most = max(len(row) for row in rows)
        self._readers = [
            BankReader([row[number][0] if number < len(row) else None for row in rows], config, native)
            for number in range(most)
        ]
        padded = [[weight for _, weight in row] + [1.0] * (most - len(row)) for row in rows]
        self._log_weight_BS = torch.tensor(padded, dtype=torch.float32).log()

    @torch.no_grad()
    def __call__(self, layer: int, query_BKGTE: Tensor) -> RetrievedTogether:
        parts = tuple(reader(layer, query_BKGTE) for reader in self._readers)
        return RetrievedTogether(parts, self._log_weight_BS.to(query_BKGTE.device))


class PlacedReader:
    """As `BankReader`, all banks in one search. What kernels are told of a bank, where it lies and how many tokens it
    holds, lies on the device itself.

    So a step that is recorded over some banks can be replayed over others (`read`), as long as `fits` says so: none of
    them has room for more than the largest had, all rows read the same bank or they do not, as they did, and of a bank
    with an index few tokens are newer than that.

    Args:
        banks: on `device`, or None.

    Attributes:
        room: tokens that a bank may have room for.
        late: tokens that a bank may hold beyond those that its index knows.
    """

    def __init__(self, banks: Sequence[MemoryBank | None], config: SideNetConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.shared, self.dtype, self.index = _shared(banks), _dtype(banks), _index(banks)
        self.room, self.late = _room(_capacity(banks)), _room(_late(banks, self.index))
        # Where the keys of each head and bank begin, where its values do, and its length; once if all read one bank.
        heads, self._searched = len(config.memory_heads), 1 if self.shared else len(banks)
        self._place_3HB = torch.zeros(3, heads, self._searched, dtype=torch.int64, device=device)
        self._length_B = torch.zeros(len(banks), dtype=torch.int64, device=device)
        row_B1 = torch.zeros(len(banks), 1) if self.shared else torch.arange(len(banks))[:, None]
        self._pool_BH = to_device((torch.arange(heads) * self._searched + row_B1).long(), device)
        self._buffers: list[tuple[Tensor, Tensor] | None] = []
        self._told: tuple[list[list[tuple[int, int]]], list[int]] | None = None
        self.read(banks)

    @staticmethod
    def takes(banks: Sequence[MemoryBank | None], config: SideNetConfig, device: torch.device) -> bool:
        """Whether such banks can be read so: on a GPU, single tokens, exactly or all rows by one index."""
        real = [bank for bank in banks if bank is not None]
        return (
            reads_apart(device, config.top_k)
            and config.chunk_size == 1
            and all(bank.device == device for bank in real)
            and (_shared(banks) or all(bank.index is None for bank in real))
            and len({bank.buffers_HCE[0].dtype for bank in real}) <= 1
        )

    def fits(self, banks: Sequence[MemoryBank | None]) -> bool:
        """Whether a step that was recorded with this reader can be replayed over these banks."""
        alike = self.shared == _shared(banks) and self.index is _index(banks) and _dtype(banks) in (None, self.dtype)
        enough = _capacity(banks) <= self.room and _late(banks, self.index) <= self.late
        return alike and enough and len(banks) == len(self._length_B)

    def read(self, banks: Sequence[MemoryBank | None]) -> None:
        """From now on read these banks, which `fits` has agreed to."""
        # Held until the next step: what was found lies there, even if a bank grows out of it meanwhile.
        searched = banks[: self._searched]
        self._buffers[:] = [bank.buffers_HCE if bank is not None and bank.capacity else None for bank in searched]
        lengths = [0 if bank is None else len(bank) for bank in searched]
        # Where the keys of the first head begin, where its values do, and bytes from head to head: a part of a bank
        # has the strides of the whole.
        places = [
            [(rows_HCE.data_ptr(), rows_HCE.stride(0) * rows_HCE.element_size()) for rows_HCE in buffers]
            if buffers
            else [(0, 0), (0, 0)]
            for buffers in self._buffers
        ]
        # Nearly always nothing has changed since the step before, and the device would wait for what it knows.
        if (places, lengths) == self._told:
            return
        self._told = places, lengths
        place_B22 = torch.tensor(places)
        length_B = torch.tensor(lengths)
        head_H1 = torch.arange(self._place_3HB.shape[1])[:, None]
        address_2HB = (place_B22[..., 0] + head_H1[..., None] * place_B22[..., 1]).permute(2, 0, 1)
        length_1HB = length_B.expand(1, len(head_H1), -1)
        self._place_3HB.copy_(to_device(torch.cat((address_2HB, length_1HB)), self.device))
        self._length_B.copy_(to_device(length_B.expand(len(banks)), self.device))

    @torch.no_grad()
    def __call__(self, layer: int, query_BKGTE: Tensor) -> RetrievedRows:
        batch, kv_heads, group, tokens, head_dim = query_BKGTE.shape
        heads, top_k = self.config.heads_of(layer), self.config.top_k
        keys_X, values_X, length_X = (part_HB[heads].flatten() for part_HB in self._place_3HB)
        keys, values = (self._pools(i, address_X, heads, head_dim) for i, address_X in enumerate((keys_X, values_X)))
        # Searches are counted as places are: heads first, then banks.
        query_XQE = query_BKGTE.transpose(0, 1).reshape(len(length_X), -1, head_dim)
        if self.index is None:
            found = topk_scan(query_XQE, keys, top_k, length_X)
        else:
            known_and_late = keys.between(0, min(self.room, len(self.index) + self.late))
            found = self.index.search(heads, query_XQE, known_and_late, top_k, length_X)
        index, score = (part_XQR.view(kv_heads, batch, group, tokens, top_k).transpose(0, 1) for part_XQR in found)
        pool_BK = self._pool_BH[:, :kv_heads]
        return RetrievedRows(keys, values, pool_BK, index, score, index, self._length_B, index)

    def _pools(self, which: int, address_X: Tensor, heads: slice, head_dim: int) -> Pools:
        """The keys (0) or values (1) of some heads."""
        dtype, rows = self.dtype or torch.bfloat16, []
        if self.device.type == "cpu":
            # An empty bank has no row, not even one to be masked.
            nothing_H1E = torch.zeros(len(self._pool_BH[0]), 1, head_dim, dtype=dtype)
            held = [buffers[which] if buffers else nothing_H1E for buffers in self._buffers]
            rows = [rows_HCE[head] for head in range(heads.start, heads.stop) for rows_HCE in held]
        return Pools(address_X, self.room, head_dim, dtype, tuple(rows), self._buffers)


class StreamBanks:
    """One bank a training stream, all in one tensor: a ring that keeps the last `capacity` tokens of each row.

    Training has no need of text, provenance or disk, and searches every row in one batched product.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        config: SideNetConfig,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if capacity % config.chunk_size:
            raise ValueError(f"capacity {capacity} is not a multiple of chunk_size {config.chunk_size}")
        shape = (len(config.memory_heads), rows, capacity, head_dim)
        self.config = config
        self.capacity = capacity
        self.keys_HBNE = torch.zeros(shape, dtype=dtype, device=device)
        self.values_HBNE = torch.zeros(shape, dtype=dtype, device=device)
        self.token_ids_BN = torch.full((rows, capacity), -1, dtype=torch.int64, device=device)
        self.written_B = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def length_B(self) -> Tensor:
        return self.written_B.clamp(max=self.capacity)

    def append(self, keys_HBTE: Tensor, values_HBTE: Tensor, token_ids_BT: Tensor) -> None:
        """Remember T tokens of every row, over the oldest where the ring is full."""
        tokens = token_ids_BT.shape[1]
        # Of more tokens than the ring holds only the last are written: two writes to one slot have no order on a GPU.
        last = slice(max(0, tokens - self.capacity), tokens)
        slot_BT = (self.written_B[:, None] + torch.arange(tokens, device=self.written_B.device)[last]) % self.capacity
        rows_B1 = torch.arange(slot_BT.shape[0], device=slot_BT.device)[:, None]
        self.keys_HBNE[:, rows_B1, slot_BT] = keys_HBTE[:, :, last]
        self.values_HBNE[:, rows_B1, slot_BT] = values_HBTE[:, :, last]
        self.token_ids_BN[rows_B1, slot_BT] = token_ids_BT[:, last]
        self.written_B += tokens

    def reset(self, rows_B: Tensor) -> None:
        """Empty the banks of the rows where `rows_B` (bool) is True."""
        self.written_B.masked_fill_(rows_B, 0)

    def together(self, filled: int, spec: BankSpec) -> MemoryBank:
        """The first `filled` tokens of every ring as one bank, one ring after another; a copy."""
        keys_HNE, values_HNE = (
            torch.cat(rows_HBNE[:, :, :filled].unbind(1), dim=1) for rows_HBNE in (self.keys_HBNE, self.values_HBNE)
        )
        return MemoryBank.of_rows(spec, keys_HNE, values_HNE, torch.cat(self.token_ids_BN[:, :filled].unbind()))

    def reader(
        self, source_B: Tensor | None = None, crowded: Sequence[int] = (), crowd: int = 1, filled: int | None = None
    ) -> StreamReader:
        """A retrieve callable in which row b reads the bank of row `source_B[b]`; its own if None.

        Args:
            crowded: rows that read their bank together with the others of its crowd.
            crowd: banks of a crowd: the first so many are one, the next so many another.
            filled: tokens that every ring holds, at least; all its capacity if None. Crowds are read so far.
        """
        return StreamReader(self, source_B, crowded, crowd, self.capacity if filled is None else filled)


class StreamReader:
    """Reads `StreamBanks`, possibly with banks swapped between rows, or many read as one (for the regulariser).

    `Retrieved.index_BKGTR` counts positions in the rings of all rows, one ring after another.
    """

    def __init__(
        self, streams: StreamBanks, source_B: Tensor | None, crowded: Sequence[int], crowd: int, filled: int
    ) -> None:
        rows, device = streams.written_B.shape[0], streams.written_B.device
        if rows % crowd or filled % streams.config.chunk_size:
            raise ValueError(
                f"{rows} rows are not whole crowds of {crowd}, or {filled} tokens not whole chunks of "
                f"{streams.config.chunk_size}"
            )
        self.streams, self.crowd, self.filled = streams, crowd, filled
        self.source_B = torch.arange(rows, device=device) if source_B is None else source_B
        self.length_B = streams.length_B[self.source_B]
        self.crowded_M = to_device(torch.tensor(crowded, dtype=torch.int64), device) if crowded else None
        self.size_B = self.length_B.float()
        if self.crowded_M is not None:
            self.size_B = self.size_B.index_fill(0, self.crowded_M, crowd * filled)

    @torch.no_grad()
    def __call__(self, layer: int, query_BKGTE: Tensor) -> Retrieved:
        streams, heads = self.streams, self.streams.config.heads_of(layer)
        batch, kv_heads = query_BKGTE.shape[:2]
        keys_KBNE, values_KBNE = streams.keys_HBNE[heads], streams.values_HBNE[heads]
        length_BK = self.length_B[:, None].expand(batch, kv_heads)
        slot, score = self._search(query_BKGTE, keys_KBNE, self.source_B, length_BK)
        slot = slot + (self.source_B * streams.capacity).view(-1, 1, 1, 1, 1)
        if self.crowded_M is not None:
            # Rows of a crowd lie side by side: to a search they are one long pool.
            crowds_KCNE = keys_KBNE[:, :, : self.filled].unflatten(1, (-1, self.crowd)).flatten(2, 3)
            crowd_M = self.source_B[self.crowded_M] // self.crowd
            at, best = self._search(query_BKGTE[self.crowded_M], crowds_KCNE, crowd_M, None)
            first = (crowd_M * self.crowd).view(-1, 1, 1, 1, 1)
            at = (first + at // self.filled) * streams.capacity + at % self.filled
            slot, score = slot.index_copy(0, self.crowded_M, at), score.index_copy(0, self.crowded_M, best)
        pool_BK = torch.arange(kv_heads, device=slot.device).expand(batch, kv_heads)
        rows = keys_KBNE.flatten(1, 2), values_KBNE.flatten(1, 2)
        return RetrievedRows(*rows, pool_BK, slot, score, slot, self.size_B, self._order(slot))

    def _order(self, slot: Tensor) -> Tensor:
        """How many of the tokens that a ring can hold were written before, or would have been."""
        capacity = self.streams.capacity
        if not self.streams.config.newest_wins:
            return slot
        return (slot - self.streams.written_B[slot // capacity]) % capacity

    def _search(
        self, query_BKGTE: Tensor, keys_KPNE: Tensor, pool_B: Tensor, length_BK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Where in its pool each query found what, and how it scores; each (B, K, G, T, R)."""
        config, (kv_heads, pools) = self.streams.config, keys_KPNE.shape[:2]
        pool_BK = torch.arange(kv_heads, device=pool_B.device) * pools + pool_B[:, None]
        found = search_tokens(
            _flat(query_BKGTE),
            keys_KPNE.flatten(0, 1),
            config.top_k,
            config.chunk_size,
            None if length_BK is None else length_BK.flatten(),
            pool_BK.flatten(),
        )
        slot, score = (part_XQR.view(*query_BKGTE.shape[:-1], config.top_k) for part_XQR in found)
        return slot, score

    def token_ids(self, index_BKGTR: Tensor) -> Tensor:
        """Which token each retrieved position holds."""
        return self.streams.token_ids_BN.flatten()[index_BKGTR]
