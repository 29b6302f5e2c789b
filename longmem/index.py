"""Search in memory banks: what a SideNet calls when it asks its bank.

B batch rows, K memory heads of one layer, G query heads that share one of them, T tokens, R retrieved tokens,
N remembered tokens, E head size; P pools of keys and values, X = B · K searches of Q = G · T queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.config import SideNetConfig
from longmem.data import to_device
from longmem.ops import attend_rows, gather_rows, row_scores, topk_scan


@dataclass(frozen=True)
class Retrieved:
    """What a layer's memory heads found, and where its keys and values lie.

    Attributes:
        keys_PNE, values_PNE: pools of remembered rows.
        pool_BK: which pool a head draws on.
        slot_BKGTR: which rows of its pool each query found.
        valid_BKGTR: False where the bank held fewer than R tokens.
        index_BKGTR: position in the row's bank.
        bank_size_B: float32, remembered tokens N of each row's bank.
        order_BKGTR: int64, larger is newer.
    """

    keys_PNE: Tensor
    values_PNE: Tensor
    pool_BK: Tensor
    slot_BKGTR: Tensor
    valid_BKGTR: Tensor
    index_BKGTR: Tensor
    bank_size_B: Tensor
    order_BKGTR: Tensor

    def attend(self, query_BKGTE: Tensor, scaling: float, discount_BKGT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention over what each query found: outputs (B, K, G, T, E) and log-sum-exps (B, K, G, T).

        Args:
            discount_BKGT: what being older costs, in nats for the whole of the attention.
        """
        shape_BKGT = query_BKGTE.shape[:-1]
        output_XQE, logsumexp_XQ = attend_rows(
            _flat(query_BKGTE), self.keys_PNE, self.values_PNE, *self._places, scaling, *self._newest(discount_BKGT)
        )
        return output_XQE.view(*shape_BKGT, -1), logsumexp_XQ.view(shape_BKGT)

    def scores(self, query_BKGTE: Tensor, scaling: float, discount_BKGT: Tensor | None = None) -> Tensor:
        """Scaled scores (B, K, G, T, R) of what each query found, −inf where nothing was."""
        score_XQR = row_scores(_flat(query_BKGTE), self.keys_PNE, *self._places, scaling, *self._newest(discount_BKGT))
        return score_XQR.view(self.slot_BKGTR.shape)

    def rows(self, rows_PNE: Tensor) -> Tensor:
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
    """Positions (X, Q, R) of the retrieved tokens, and whether each is real.

    With `chunk_size` c > 1, queries rank the mean keys of c consecutive tokens and whole chunks are retrieved
    (paper, section 2.3); a last chunk that is not full cannot be found.
    """
    if chunk_size == 1:
        index_XQR, score_XQR = topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
        return index_XQR, score_XQR > -torch.inf
    chunks = keys_PNE.shape[1] // chunk_size
    means_PNE = keys_PNE[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size)).mean(2)
    chunks_X = None if length_X is None else length_X // chunk_size
    chunk_XQR, score_XQR = topk_scan(query_XQE, means_PNE, top_k // chunk_size, chunks_X, pool_X)
    within_c = torch.arange(chunk_size, device=keys_PNE.device)
    valid_XQR = (score_XQR > -torch.inf).repeat_interleave(chunk_size, dim=-1)
    # A bank of less than a chunk has no token at the places that a missing chunk would have.
    index_XQR = (chunk_XQR[..., None] * chunk_size + within_c).flatten(-2).masked_fill(~valid_XQR, 0)
    return index_XQR, valid_XQR


class BankReader:
    """Reads one bank a batch row (None is an empty one) for a SideNet, by the bank's index if it has one.

    Each row is searched by itself and its result has a fixed shape, so nothing in a row depends on what another row's
    bank holds.
    """

    def __init__(self, banks: Sequence[MemoryBank | None], config: SideNetConfig) -> None:
        self.banks = banks
        self.config = config

    @torch.no_grad()
    def __call__(self, layer: int, query_BKGTE: Tensor) -> Retrieved:
        bank = self.banks[0]
        shared = all(other is bank for other in self.banks)
        if bank is not None and shared and len(bank) and bank.device == query_BKGTE.device:
            return self._read_one(bank, layer, query_BKGTE)
        return self._read_each(layer, query_BKGTE)

    def _search(
        self, row: int, bank: MemoryBank, heads: slice, query_KQE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values (K, N, E) of a row's bank, and which of them the queries found: indices and validity KQR."""
        config, keys_KNE, values_KNE = self.config, bank.keys_HNE[heads], bank.values_HNE[heads]
        if bank.index is not None and config.chunk_size == 1:
            index_KQR, score_KQR = bank.index.search(heads, query_KQE, keys_KNE, config.top_k)
            return keys_KNE, values_KNE, index_KQR, score_KQR > -torch.inf
        return keys_KNE, values_KNE, *search_tokens(query_KQE, keys_KNE, config.top_k, config.chunk_size)

    def _sizes(self, device: torch.device) -> Tensor:
        """Remembered tokens of each row's bank, (B,)."""
        return torch.tensor([0.0 if bank is None else float(len(bank)) for bank in self.banks], device=device)

    def _read_one(self, bank: MemoryBank, layer: int, query_BKGTE: Tensor) -> Retrieved:
        """All rows read one bank: its keys are read once, and found rows where they lie."""
        batch, kv_heads, group, tokens, _ = query_BKGTE.shape
        query_KQE = query_BKGTE.transpose(0, 1).flatten(1, 3)
        keys_KNE, values_KNE, *found = self._search(0, bank, self.config.heads_of(layer), query_KQE)
        index, valid = (part_KQR.unflatten(1, (batch, group, tokens)).transpose(0, 1) for part_KQR in found)
        pool_BK = torch.arange(kv_heads, device=bank.device).expand(batch, kv_heads)
        return Retrieved(keys_KNE, values_KNE, pool_BK, index, valid, index, self._sizes(bank.device), index)

    def _read_each(self, layer: int, query_BKGTE: Tensor) -> Retrieved:
        heads = self.config.heads_of(layer)
        batch, kv_heads, group, tokens, head_dim = query_BKGTE.shape
        shape = (batch, kv_heads, group, tokens, self.config.top_k)
        device, found = query_BKGTE.device, group * tokens * self.config.top_k
        # A pool for each row and head, of what its queries found: banks differ in size and may lie on another device.
        keys_BKFE = torch.zeros(batch, kv_heads, found, head_dim, dtype=query_BKGTE.dtype, device=device)
        values_BKFE = torch.zeros_like(keys_BKFE)
        valid = torch.zeros(shape, dtype=torch.bool, device=device)
        index = torch.zeros(shape, dtype=torch.int64, device=device)
        for row, bank in enumerate(self.banks):
            if bank is None or len(bank) == 0:
                continue
            query_KQE = query_BKGTE[row].flatten(1, 2).to(bank.device)
            keys_KNE, values_KNE, index_KQR, valid_KQR = self._search(row, bank, heads, query_KQE)
            keys_BKFE[row] = gather_rows(keys_KNE, index_KQR).flatten(1, 2).to(keys_BKFE)
            values_BKFE[row] = gather_rows(values_KNE, index_KQR).flatten(1, 2).to(values_BKFE)
            valid[row] = valid_KQR.unflatten(1, (group, tokens)).to(device)
            index[row] = index_KQR.unflatten(1, (group, tokens)).to(device)
        pool_BK = torch.arange(batch * kv_heads, device=device).view(batch, kv_heads)
        slot_BKGTR = torch.arange(found, device=device).view(shape[2:]).expand(shape)
        pools = keys_BKFE.flatten(0, 1), values_BKFE.flatten(0, 1), pool_BK
        return Retrieved(*pools, slot_BKGTR, valid, index, self._sizes(device), index)


class PlacedReader(BankReader):
    """As `BankReader`, for a recorded step: how many tokens a bank holds lies on the device and may change from step to
    step, as long as its memory stays where it was when the step was recorded (`places`).

    Args:
        banks: on `device`, or None.
    """

    def __init__(self, banks: Sequence[MemoryBank | None], config: SideNetConfig, device: torch.device) -> None:
        super().__init__(banks, config)
        self._length_B = torch.zeros(len(banks), dtype=torch.int64, device=device)
        self.read(banks)

    @staticmethod
    def places(banks: Sequence[MemoryBank | None]) -> tuple[tuple[int, int, int, int] | None, ...]:
        """Where the banks lie: a step recorded over banks of the same places may be replayed.

        Also which row is the first that reads the same bank, since one bank of all rows is searched once.
        """

        def place(bank: MemoryBank | None) -> tuple[int, int, int, int] | None:
            if not bank:
                return None
            keys_HCE, values_HCE = bank.buffers_HCE
            first = next(row for row, other in enumerate(banks) if other is bank)
            return keys_HCE.data_ptr(), values_HCE.data_ptr(), bank.capacity, first

        return tuple(map(place, banks))

    def read(self, banks: Sequence[MemoryBank | None]) -> None:
        """From now on read these banks, which lie where the first ones did."""
        self.banks = banks
        lengths = [0 if bank is None else len(bank) for bank in banks]
        self._length_B.copy_(to_device(torch.tensor(lengths), self._length_B.device))

    def _search(
        self, row: int, bank: MemoryBank, heads: slice, query_KQE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keys_KCE, values_KCE = (buffer_HCE[heads] for buffer_HCE in bank.buffers_HCE)
        length_K = self._length_B[row : row + 1].expand(len(keys_KCE))
        found = search_tokens(query_KQE, keys_KCE, self.config.top_k, self.config.chunk_size, length_K)
        return keys_KCE, values_KCE, *found

    def _sizes(self, device: torch.device) -> Tensor:
        return self._length_B.float()


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

    def reader(
        self, source_B: Tensor | None = None, crowded: Sequence[int] = (), crowd: int = 1, filled: int | None = None
    ) -> StreamReader:
        """A retrieve callable in which row b reads the bank of row `source_B[b]`; its own if None.

        Args:
            crowded: rows that read their own bank together with those of the other rows of their crowd.
            crowd: rows of a crowd: the first so many are one, the next so many another.
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
        slot, valid = self._search(query_BKGTE, keys_KBNE, self.source_B, length_BK)
        slot = slot + (self.source_B * streams.capacity).view(-1, 1, 1, 1, 1)
        if self.crowded_M is not None:
            # Rows of a crowd lie side by side: to a search they are one long pool.
            crowds_KCNE = keys_KBNE[:, :, : self.filled].unflatten(1, (-1, self.crowd)).flatten(2, 3)
            crowd_M = self.crowded_M // self.crowd
            at, real = self._search(query_BKGTE[self.crowded_M], crowds_KCNE, crowd_M, None)
            first = (crowd_M * self.crowd).view(-1, 1, 1, 1, 1)
            at = (first + at // self.filled) * streams.capacity + at % self.filled
            slot, valid = slot.index_copy(0, self.crowded_M, at), valid.index_copy(0, self.crowded_M, real)
        pool_BK = torch.arange(kv_heads, device=slot.device).expand(batch, kv_heads)
        rows = keys_KBNE.flatten(1, 2), values_KBNE.flatten(1, 2)
        return Retrieved(*rows, pool_BK, slot, valid, slot, self.size_B, self._order(slot))

    def _order(self, slot: Tensor) -> Tensor:
        """How many of the tokens that a ring can hold were written before, or would have been."""
        capacity = self.streams.capacity
        if not self.streams.config.newest_wins:
            return slot
        return (slot - self.streams.written_B[slot // capacity]) % capacity

    def _search(
        self, query_BKGTE: Tensor, keys_KPNE: Tensor, pool_B: Tensor, length_BK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Where in its pool each query found what, and whether it is real; each (B, K, G, T, R)."""
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
        slot, valid = (part_XQR.view(*query_BKGTE.shape[:-1], config.top_k) for part_XQR in found)
        return slot, valid

    def token_ids(self, index_BKGTR: Tensor) -> Tensor:
        """Which token each retrieved position holds."""
        return self.streams.token_ids_BN.flatten()[index_BKGTR]
