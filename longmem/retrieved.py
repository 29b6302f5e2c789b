"""What a layer's memory heads found in memory banks, and attention over it.

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
    row_scores,
)

# Positions in the banks of a group: bank number · PLACES + position in that bank.
PLACES = 1 << 40


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
        extra = *self._newest(discount_BKGT), None if bias_BKGTR is None else flat(bias_BKGTR)
        output_XQE, logsumexp_XQ = attend_rows(
            flat(query_BKGTE), self.keys_PNE, self.values_PNE, *self._places, scaling, *extra
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
        extra = *self._newest(discount_BKGT), None if bias_BKGTR is None else flat(bias_BKGTR)
        return row_scores(flat(query_BKGTE), key_XQRE, valid_XQR, scaling, *extra).view(self.slot_BKGTR.shape)

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
        return self.pool_BK.flatten(), flat(self.slot_BKGTR), flat(self.valid_BKGTR)

    def _newest(self, discount_BKGT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Orders XQR and discounts XQ."""
        if discount_BKGT is None:
            return None, None
        return flat(self.order_BKGTR), flat(discount_BKGT)


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


class Retrieve(Protocol):
    """Queries of one memory layer in, remembered keys and values out."""

    def __call__(self, layer: int, query_BKGTE: Tensor) -> Retrieved: ...


def flat(per_query: Tensor) -> Tensor:
    """(B, K, G, T, …) → (X, Q, …)."""
    return per_query.flatten(0, 1).flatten(1, 2)
