"""Search in memory banks: what a SideNet calls when it asks its bank.

B batch rows, K memory heads of one layer, G query heads that share one of them, T tokens, R retrieved tokens,
N remembered tokens, E head size; P pools of keys and values, X = B · K searches of Q = G · T queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.bank import MemoryBank
from longmem.config import SideNetConfig
from longmem.data import to_device
from longmem.ops import NativeOps, Pools, gather_rows, reads_apart, topk_scan
from longmem.retrieved import RetrievedRows, RetrievedTogether

# Tokens that a recorded step has room for at least.
_LEAST_ROOM = 1 << 14


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
