"""A model that reads windows of tokens and says what follows them.

What two windows in a row begin with is read once: several answers to one question, and several questions behind the
same text, cost what is new in them.

T tokens, V vocabulary, A tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.bank import MemoryBank
from longmem.model import LongMem
from longmem.steps import read_on

_PIECE = 256  # tokens whose logits are held at once


class Said:
    """What is said, token by token, up to so many tokens, a stop string (left out) or the end of the text.

    Attributes:
        token_ids: of it; a stop string's are among them.
        text: of it.
        done: nothing is to be added.
    """

    def __init__(self, tokenizer: Any, most: int, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._most, self._stop = tokenizer, most, stop
        self.token_ids: list[int] = []
        self.text = ""
        self.done = most < 1

    def add(self, token_id: int) -> None:
        if token_id == self._tokenizer.eos_token_id:
            self.done = True
            return
        self.token_ids.append(token_id)
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [end for end in (text.find(each) for each in self._stop) if end >= 0]
        self.text = text[: min(ends)] if ends else text
        self.done = bool(ends) or len(self.token_ids) == self._most


class Reader:
    """Reads a window after the other.

    Args:
        model: what reads.
        memory: 0 is the backbone alone.
        bank: what is remembered while it reads; a new one forgets what was read.

    Attributes:
        bank: what is remembered while it reads.
        reads: what the memory layers read for the last token of the window.
        bytes_a_token: of keys and values that are kept of a token that was read.
    """

    def __init__(self, model: LongMem, memory: float) -> None:
        self.model, self.memory = model, memory
        self.bank: MemoryBank | None = None
        self.forget()

    def forget(self, bank: MemoryBank | None = None) -> None:
        """Start anew, with another bank."""
        self.bank = bank
        self._cache = self.model.new_cache()
        self._ids: list[int] = []
        self._logits_V: Tensor | None = None
        self.reads: list[MemoryRead] = []

    @property
    def bytes_a_token(self) -> int:
        backbone = self.model.backbone
        size = torch.finfo(backbone.dtype).bits // 8
        layers = backbone.num_layers + (len(self.model.sidenet.layers) if self.memory else 0)
        return layers * backbone.num_key_value_heads * backbone.head_dim * 2 * size

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without the tokens a tokenizer would put around it."""
        return self.model.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def read(self, token_ids: Sequence[int]) -> int:
        """Read a window, from where it differs from the last one; returns how many tokens that took."""
        ids = [self.model.backbone.prefix_token_id, *token_ids]
        same = self._same(ids)
        if same == len(ids) == len(self._ids) and self._logits_V is not None:
            return 0
        # Logits are those of the last token, which is read again if need be.
        same = min(same, len(ids) - 1)
        self._keep(same)
        new_T = torch.tensor(ids[same:], dtype=torch.int64)
        self._logits_V, self.reads = read_on(self.model, new_T, self.bank, self._cache, self.memory)
        self._ids = ids
        return len(ids) - same

    def _same(self, token_ids: Sequence[int]) -> int:
        """How many tokens the window begins with as the last one did."""
        same = 0
        for old, new in zip(self._ids, token_ids, strict=False):
            if old != new:
                break
            same += 1
        return same

    def wait(self) -> None:
        """Until the device has done what it was given, so that a clock tells what that took."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def read_on(self, token_ids: Sequence[int]) -> int:
        """Read more behind what was read; returns how many tokens that took."""
        return self.read([*self._ids[1:], *token_ids])

    @torch.no_grad()
    def log_likelihoods(self, token_ids: Sequence[int]) -> tuple[list[float], bool]:
        """Log-probability of each of the tokens that would follow the window, in nats; and whether each is the most
        probable one."""
        assert self._logits_V is not None, "nothing was read"
        ids_A = torch.tensor(token_ids, dtype=torch.int64, device=self.model.device)
        logits_1V = self._logits_V[None]
        found: list[float] = []
        greedy = True
        for piece_T in ids_A.split(_PIECE):
            after_TV = self._forward(piece_T)
            before_TV = torch.cat((logits_1V, after_TV[:-1])).float()
            greedy = greedy and bool((before_TV.argmax(-1) == piece_T).all())
            found += before_TV.log_softmax(-1).gather(-1, piece_T[:, None])[:, 0].tolist()
            logits_1V = after_TV[-1:]
        self._keep(len(self._ids))
        return found, greedy

    def options(self, continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """`log_likelihoods` of several texts that might follow."""
        return [self.log_likelihoods(each)[0] for each in continuations]

    @torch.no_grad()
    def say(self, most: int, stop: Sequence[str] = ()) -> tuple[str, int]:
        """What most likely follows the window, token by token, up to a stop string (left out) or the end of the text;
        and how many tokens that took."""
        assert self._logits_V is not None, "nothing was read"
        logits_V, said = self._logits_V, Said(self.model.tokenizer, most, stop)
        while not said.done:
            said.add(int(logits_V.argmax()))
            if not said.done:
                logits_V = self._forward(torch.tensor(said.token_ids[-1:], device=self.model.device))[-1]
        self._keep(len(self._ids))
        return said.text, len(said.token_ids)

    def _forward(self, ids_T: Tensor) -> Tensor:
        """Logits (T, V) behind what was read."""
        return self.model.forward(ids_T[None], self.bank, memory=self.memory, cache=self._cache).logits_BTV[0]

    def _keep(self, tokens: int) -> None:
        """Drop what was read behind the first tokens."""
        if self._cache.length <= tokens:
            return
        if tokens == 0:
            self._cache = self.model.new_cache()
            return
        # Negative is so many tokens from the end, in every version of transformers.
        gone = tokens - self._cache.length
        self._cache.backbone.crop(gone)
        for _, layer in self._cache.sidenet.items():
            layer.crop(gone)
