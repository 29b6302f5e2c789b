"""Banks of a training run: one a stream of text, each a ring on the device, searched together.

B batch rows, K memory heads of one layer, G query heads that share one of them, T tokens, R retrieved tokens,
N remembered tokens, E head size; P pools of keys and values, X = B · K searches of Q = G · T queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.config import BankSpec, SideNetConfig
from longmem.data import to_device
from longmem.index import search_tokens
from longmem.retrieved import Retrieved, RetrievedRows, flat


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
            flat(query_BKGTE),
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
