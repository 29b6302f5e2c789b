"""Passage evidence: what lies where other queries found something counts for more.

Of a large bank every single query finds near misses, but only the right passage matches query after query: a question
finds its words there one by one, and a text that is read on finds its own earlier pages. So each passage of the bank
(`PASSAGE` consecutive tokens) has a running sum of the attention that it drew, from the tokens before and from the
memory layers below, which fades by `FADING` a token; scores of what a query found are raised by

    gain · log(1 + sum / reference)

where gain, which may depend on the query, and reference are learned (`longmem.attention.MemoryAttention`). It is what
retrieval of text calls passage-level evidence; the sums need no gradient and no room that grows with the bank.

The attention that counts is that of plain matches, without evidence: all tokens of a window at once, as one by one.

B batch, K memory heads of a layer, G query heads each, T tokens, R retrieved, P places of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longmem.ops import FADING, PASSAGE, PLACES, UNIT, PassageTables

# Tokens whose sums are one product of matrices, where there are more than twice as many.
_CHUNK = 64


class PassageSums:
    """What passages drew of attention, for the tokens of a local window.

    Args:
        ends_B: tokens of each row of the first forward pass that are more than padding; None is all.
    """

    def __init__(self, ends_B: Tensor | None = None) -> None:
        self.kept: dict[int, Tensor] = {}  # by layer, (B, P) after the last token
        self._ends_B = ends_B
        self._starts = 0
        # Of the layers below in this pass: of all tokens, or of one in a table that kernels change.
        self._below_BTP: Tensor | None = None
        self._tables: PassageTables | None = None
        self._lowest = True

    def start(self) -> None:
        """A forward pass begins, at the lowest layer."""
        self._starts += 1
        self._below_BTP = None
        self._lowest = True

    def tables(self, layer: int, rows: int, device: torch.device) -> PassageTables:
        """The sums of a layer for `longmem.retrieved.Retrieved.raised`, which adds one token to them. A forward pass
        goes either this way in all layers, or by `evidence`.

        Args:
            rows: B.
        """
        if self._tables is None:
            takes_B = torch.ones(rows, dtype=torch.bool, device=device)
            self._tables = PassageTables.zeros(rows, takes_B)
        if layer not in self.kept:
            self.kept[layer] = torch.zeros(rows, PLACES, device=device)
        lowest, self._lowest = self._lowest, False
        return self._tables._replace(kept_BP=self.kept[layer], lowest=lowest)

    @torch.no_grad()
    def evidence(self, layer: int, index_BKGTR: Tensor, weight_BKGTR: Tensor) -> Tensor:
        """Sums (B, K, G, T, R), float32, of the passages in which a layer's tokens were found, up to each query.

        Args:
            index_BKGTR: where each token lies in the row's bank.
            weight_BKGTR: share of the attention of each by plain match, 0 … 1.
        """
        passage_BTC = (index_BKGTR // PASSAGE).permute(0, 3, 1, 2, 4).flatten(2)
        place_BTC = passage_BTC % PLACES
        drawn_BTP = _placed(place_BTC, weight_BKGTR.float().permute(0, 3, 1, 2, 4).flatten(2))
        kept_BP = self.kept.get(layer)
        with_own_BTP = faded_sums(drawn_BTP, kept_BP)
        # A token's own attention must not confirm itself.
        before_BTP = torch.zeros_like(with_own_BTP)
        if kept_BP is not None:
            before_BTP[:, 0] = kept_BP
        before_BTP[:, 1:] = with_own_BTP[:, :-1]
        before_BTP *= FADING
        if self._below_BTP is not None:
            before_BTP += self._below_BTP
        self._below_BTP = before_BTP + drawn_BTP
        self._keep(layer, with_own_BTP)
        sum_BTC = before_BTP.gather(2, place_BTC)
        for beside in (-1, 1):
            sum_BTC += before_BTP.gather(2, (passage_BTC + beside) % PLACES)
        batch, kv_heads, group, tokens, found = index_BKGTR.shape
        return sum_BTC.view(batch, tokens, kv_heads, group, found).permute(0, 2, 3, 1, 4)

    def _keep(self, layer: int, sum_BTP: Tensor) -> None:
        if self._ends_B is None or self._starts > 1:
            self.kept[layer] = sum_BTP[:, -1].clone()
        else:
            rows_B = torch.arange(len(sum_BTP), device=sum_BTP.device)
            self.kept[layer] = sum_BTP[rows_B, self._ends_B - 1]


class SteadyPassageSums(PassageSums):
    """The same for steps of one token, in memory that never moves, so that a step can be recorded.

    Args:
        layers: that remember.
        rows: B.
        takes_B: bool, rows whose token counts; shared, and set by whoever owns it before each step.
    """

    def __init__(self, layers: tuple[int, ...], rows: int, takes_B: Tensor) -> None:
        super().__init__()
        self._takes_B1 = takes_B[:, None]
        self._tables = PassageTables.zeros(rows, takes_B)
        self.kept = {layer: torch.zeros(rows, PLACES, device=takes_B.device) for layer in layers}

    def begin(self, row: int, sums: PassageSums, at: int) -> None:
        """A row goes on where row `at` of other sums ended."""
        for layer, kept_BP in self.kept.items():
            if layer in sums.kept:
                kept_BP[row] = sums.kept[layer][at]
            else:
                kept_BP[row] = 0.0

    def _keep(self, layer: int, sum_BTP: Tensor) -> None:
        kept_BP = self.kept[layer]
        torch.where(self._takes_B1, sum_BTP[:, -1], kept_BP, out=kept_BP)


def _placed(place_BTC: Tensor, weight_BTC: Tensor) -> Tensor:
    """Sums (B, T, P) of weights by place."""
    unit_BTC = (weight_BTC / UNIT).round().int()
    drawn_BTP = torch.zeros(*place_BTC.shape[:2], PLACES, dtype=torch.int32, device=place_BTC.device)
    return drawn_BTP.scatter_add_(2, place_BTC, unit_BTC) * UNIT


def faded_sums(drawn_BTP: Tensor, before_BP: Tensor | None = None) -> Tensor:
    """sum[t] = FADING · sum[t − 1] + drawn[t], from `before` on (0 if None): (B, T, P) float32."""
    batch, tokens, places = drawn_BTP.shape
    if tokens == 1:
        return drawn_BTP if before_BP is None else drawn_BTP + FADING * before_BP[:, None]
    size = tokens if tokens <= 2 * _CHUNK else _CHUNK
    chunks = -(-tokens // size)
    padded_BTP = torch.nn.functional.pad(drawn_BTP, (0, 0, 0, chunks * size - tokens))
    # In training all around is bfloat16, which knows no small sums beside large ones.
    with torch.autocast(drawn_BTP.device.type, enabled=False):
        within_BNCP = torch.matmul(_powers(size, drawn_BTP.device), padded_BTP.unflatten(1, (chunks, size)))
        last_BNP = within_BNCP[:, :, -1]
        begin_BP = drawn_BTP.new_zeros(batch, places) if before_BP is None else before_BP
        # What earlier chunks leave to each, by the end of the one before.
        left_BNP = torch.cat((begin_BP[:, None], last_BNP[:, :-1]), dim=1)
        left_BNP = torch.matmul(_powers(chunks, drawn_BTP.device, FADING**size), left_BNP)
        faded_C = FADING ** torch.arange(1, size + 1, device=drawn_BTP.device)
        within_BNCP.addcmul_(faded_C[:, None], left_BNP[:, :, None])
    return within_BNCP.flatten(1, 2)[:, :tokens]


def _powers(size: int, device: torch.device, base: float = FADING) -> Tensor:
    """(size, size): base to the number of steps since, 0 for what is to come."""
    place = torch.arange(size, device=device)
    since = place[:, None] - place
    return torch.where(since >= 0, base ** since.clamp(min=0).float(), 0.0)
