"""Windows of several prompts read side by side, each with its own bank; what follows is that of one by one, but for
rounding.

B rows of a batch, T tokens, D hidden size, V vocabulary, X tokens that are scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from longmem.backbone import BackboneOutput
from longmem.contenders.contender import Posed, drawn_on
from longmem.contenders.reader import Said
from longmem.evals.answers import batches, padded
from longmem.model import LongMem
from longmem.steps import BatchDecoder

_PIECE = 1024  # tokens whose logits are held at once
_HELD = 1 << 18  # tokens of all windows whose keys and values are held at once


@torch.no_grad()
def log_likelihoods(model: LongMem, memory: float, asked: Sequence[tuple[Posed, Sequence[int]]]) -> list[list[float]]:
    """Log-probability of each of the tokens that would follow each window, in nats.

    A window that several continuations share but for their last token, as labels of one token do, is read once.
    """
    windows: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, (posed, after) in enumerate(asked):
        windows.setdefault(((*posed.token_ids, *after[:-1]), id(posed.bank)), []).append(number)
    found: list[list[float]] = [[] for _ in asked]
    for batch in batches(model, list(windows.items()), lambda each: 1 + len(each[0][0])):
        hidden_BTD = _read(model, memory, [ids for (ids, _), _ in batch], [asked[some[0]][0] for _, some in batch])
        for row, (_, some) in enumerate(batch):
            for number in some:
                posed, after = asked[number]
                # The prefix token stands first.
                first = len(posed.token_ids)
                found[number] = _scored(model, hidden_BTD[row, first : first + len(after)], after)
    return found


def _read(model: LongMem, memory: float, token_ids: Sequence[tuple[int, ...]], posed: Sequence[Posed]) -> torch.Tensor:
    """Hidden states (B, T, D) before the final norm. Rows are padded behind their end, where no token looks."""
    top = model.backbone.num_layers
    ids_BT = padded(model, token_ids)
    if not memory:
        return model.backbone(ids_BT, boundaries={top}).hidden_states[top]
    seen: BackboneOutput = model.backbone(ids_BT, boundaries={*model.sidenet.boundaries, top})
    retrieve = model.reader([each.bank for each in posed], rows=len(posed))
    return model.correct(seen, retrieve, memory=memory)[0]


def _scored(model: LongMem, hidden_XD: torch.Tensor, token_ids: Sequence[int]) -> list[float]:
    ids_X = torch.tensor(token_ids, dtype=torch.int64, device=hidden_XD.device)
    found: list[float] = []
    for some_XD, some_X in zip(hidden_XD.split(_PIECE), ids_X.split(_PIECE), strict=True):
        logits_XV = model.backbone.logits(some_XD[None])[0].float()
        found += logits_XV.log_softmax(-1).gather(-1, some_X[:, None])[:, 0].tolist()
    return found


class Speaker:
    """Says what most likely follows windows, side by side. Steps are recorded once for many calls.

    Args:
        rows: windows side by side at most; the next begins as soon as one is done.
    """

    def __init__(self, model: LongMem, memory: float, rows: int = 32) -> None:
        self.model, self.memory, self.rows = model, memory, rows
        self._decoder: BatchDecoder | None = None

    @torch.no_grad()
    def say(self, posed: Sequence[Posed], most: int, stop: Sequence[str] = ()) -> list[tuple[str, tuple[str, ...]]]:
        """What follows each window, as `Reader.say` says; and what the answers were drawn from."""
        if not posed:
            return []
        model, longest = self.model, self.model.backbone.max_positions
        needed = 1 + max(len(each.token_ids) for each in posed) + most
        # Room to spare, so that the next windows fit as well.
        capacity = min(1 << (needed - 1).bit_length(), longest)
        decoder = self._decoder_for(max(1, min(self.rows, len(posed), _HELD // capacity)), capacity)
        answers = [Said(model.tokenizer, min(most, longest - len(each.token_ids)), stop) for each in posed]
        drawn: list[tuple[str, ...]] = [each.seen for each in posed]
        waiting, of_row = deque(range(len(posed))), {}
        # A row that is done keeps its bank, so that a recorded step need not be recorded again without it; rows that
        # have nothing to do share the first one's.
        banks = [(posed[row] if row < len(posed) else posed[0]).bank for row in range(decoder.rows)]
        while waiting or of_row:
            new: dict[int, int] = {}
            for row in range(decoder.rows):
                if row not in of_row and waiting:
                    new[row] = of_row[row] = waiting.popleft()
                    banks[row] = posed[new[row]].bank
            # All but the last token, which takes the first step.
            texts = {row: [model.backbone.prefix_token_id, *posed[n].token_ids][:-1] for row, n in new.items()}
            for batch in batches(model, list(texts.items()), lambda each: len(each[1])):
                decoder.fill({row: torch.tensor(ids) for row, ids in batch}, banks)
            last = {row: (posed[n].token_ids if row in new else answers[n].token_ids)[-1] for row, n in of_row.items()}
            logits_BV, reads = decoder.step([last.get(row) for row in range(decoder.rows)], banks)
            for row, number in new.items():
                drawn[number] = drawn_on(reads, banks[row], row) + drawn[number]
            next_B = logits_BV.argmax(-1).tolist()
            for row, number in list(of_row.items()):
                answers[number].add(next_B[row])
                if answers[number].done:
                    del of_row[row]
        return [(said.text, some) for said, some in zip(answers, drawn, strict=True)]

    def release(self) -> None:
        """Give back the memory of windows and recorded steps."""
        if self._decoder is not None:
            self._decoder.release()
        self._decoder = None

    def _decoder_for(self, rows: int, capacity: int) -> BatchDecoder:
        """The last one if windows fit it, else a new one."""
        decoder = self._decoder
        if decoder is not None and decoder.rows >= rows and decoder.capacity >= capacity:
            decoder.empty()
            return decoder
        self.release()
        self._decoder = BatchDecoder(self.model, rows, capacity, memory=self.memory)
        return self._decoder
