"""What a token asks of a bank on a CPU, compiled: some hundred small operations in a call or two (`token.cpp`).

It takes the compiler that compiled decoding needs anyway. What it computes is written plainly elsewhere, for all
processors, and tests compare them: a search of lists in `longmem.ivf`, joint attention in `longmem.attention`.

X searches, Q queries (q asked together), N keys, E head size, S coordinates, L lists, M places, R retrieved; names of
attention as in `longmem.ops.joint`.
"""

from __future__ import annotations

import sys
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem.ops.joint import FoundRows, JointHeads
from longmem.ops.passages import FADING, PASSAGE, PLACES, PassageTables
from longmem.ops.pools import Pools

_SIGNATURES = {
    "search_lists": "plllpllppppl pppl pll ppl",
    "joint_rows": "ppplllll ppppplp ppppppp ff p ppp",
    "raise_rows": "pp llll ppp pppppppp ff ppp l llf p",
}
_TYPES = {"p": c_void_p, "l": c_int64, "f": c_float}


class ListsOfKeys(Protocol):
    """The keys of one search in lists, as `longmem.ivf.ListedKeys` describes them."""

    @property
    def promise_LP(self) -> Tensor: ...
    @property
    def promise_scale_P(self) -> Tensor: ...
    @property
    def first_L(self) -> Tensor: ...
    @property
    def blocks_L(self) -> Tensor: ...
    @property
    def codes_MS(self) -> Tensor: ...
    @property
    def row_M(self) -> Tensor: ...
    @property
    def scale_S(self) -> Tensor: ...


@dataclass(frozen=True)
class NativeOps:
    """Compiled functions; made by `load`."""

    library: Any

    @classmethod
    def load(cls) -> NativeOps | None:
        """Compile them, or take them from PyTorch's cache on disk. None on a processor without AVX-512 VNNI, and on
        Windows.

        Raises:
            What `longmem.decoding.compiling` explains: there is no working compiler.
        """
        if sys.platform == "win32" or not torch.cpu._is_vnni_supported():
            return None
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(files("longmem.ops").joinpath("token.cpp").read_text(encoding="utf-8"))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_TYPES[kind] for kind in signature.replace(" ", "")], None
        return cls(library)

    def search_lists(
        self,
        query_QE: Tensor,
        together: int,
        matrix_ES: Tensor,
        lists: ListsOfKeys,
        probes: int,
        keys_NE: Tensor,
        candidates: int,
        index_QR: Tensor,
        score_QR: Tensor,
    ) -> None:
        """One search of `longmem.ivf.InvertedFile`; what it finds is written into the last two, whose rest stays.

        Args:
            query_QE: float32.
            together: q, queries that follow each other and read what any of them chose.
            matrix_ES: a query times it is the query's coordinates; a row's numbers lie side by side.
            probes: lists that a query chooses.
            keys_NE: bfloat16, those listed.
            candidates: C, of each query, scored again from `keys_NE`.
        """
        assert matrix_ES.stride(1) == 1
        query_QE = query_QE.contiguous()
        self.library.search_lists(
            query_QE.data_ptr(),
            len(query_QE),
            together,
            query_QE.shape[1],
            matrix_ES.data_ptr(),
            matrix_ES.stride(0),
            matrix_ES.shape[1],
            lists.promise_LP.data_ptr(),
            lists.promise_scale_P.data_ptr(),
            lists.first_L.data_ptr(),
            lists.blocks_L.data_ptr(),
            len(lists.first_L),
            lists.codes_MS.data_ptr(),
            lists.row_M.data_ptr(),
            lists.scale_S.data_ptr(),
            probes,
            keys_NE.data_ptr(),
            candidates,
            index_QR.shape[1],
            index_QR.data_ptr(),
            score_QR.data_ptr(),
            torch.get_num_threads(),
        )

    def takes(self, query_QE: Tensor, rows_NE: Tensor | Pools) -> bool:
        """Whether queries and rows of a bank are such as these functions read, and no gradient is wanted."""
        return (
            not torch.is_grad_enabled()
            and isinstance(rows_NE, Tensor)
            and rows_NE.device.type == query_QE.device.type == "cpu"
            and (query_QE.dtype, rows_NE.dtype) == (torch.float32, torch.bfloat16)
            and rows_NE.stride()[-2:] == (rows_NE.shape[-1], 1)
        )

    def joint_rows(
        self,
        query_BKGTE: Tensor,
        local_BKGTE: Tensor,
        local_logsumexp_BKGT: Tensor,
        found: FoundRows,
        heads: JointHeads,
        bias_BKGTR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`ops.joint_rows` of float32 queries and keys and values in bfloat16, on a CPU, without gradients."""
        assert isinstance(found.keys_PNE, Tensor) and isinstance(found.values_PNE, Tensor)
        batch, kv_heads, group, tokens, head_dim = query_BKGTE.shape
        difference_BKGTE = torch.empty(query_BKGTE.shape)
        mass_BKGT, log_weight_BKGTR = torch.empty(query_BKGTE.shape[:-1]), torch.empty(found.slot_BKGTR.shape)
        keys_BK, values_BK = (
            rows_PNE.data_ptr() + found.pool_BK * (rows_PNE.stride(0) * rows_PNE.element_size())
            for rows_PNE in (found.keys_PNE, found.values_PNE)
        )
        asked = _Held(query_BKGTE, local_BKGTE, local_logsumexp_BKGT)
        lying = _Held(keys_BK, values_BK, found.slot_BKGTR, found.score_BKGTR, found.order_BKGTR)
        learned = _Held(found.bank_size_B, *heads.joining)
        made = _Held(bias_BKGTR, difference_BKGTE, mass_BKGT, log_weight_BKGTR)
        self.library.joint_rows(
            *asked.pointers,
            batch * kv_heads,
            kv_heads,
            group,
            tokens,
            head_dim,
            *lying.pointers,
            found.slot_BKGTR.shape[-1],
            *learned.pointers,
            heads.scaling,
            heads.reference_size,
            *made.pointers,
        )
        return difference_BKGTE, mass_BKGT, log_weight_BKGTR

    def raise_rows(
        self,
        query_BKG1E: Tensor,
        local_logsumexp_BKG1: Tensor,
        found: FoundRows,
        heads: JointHeads,
        tables: PassageTables,
    ) -> Tensor:
        """`ops.raise_rows` of float32 queries, on a CPU."""
        raised_BKG1R = torch.empty(found.score_BKGTR.shape)
        batch, kv_heads, group, _, head_dim = query_BKG1E.shape
        asked = _Held(query_BKG1E, local_logsumexp_BKG1)
        known = _Held(found.score_BKGTR, found.index_BKGTR, found.bank_size_B, *heads.raising)
        self.library.raise_rows(
            *asked.pointers,
            batch,
            kv_heads * group,
            head_dim,
            found.score_BKGTR.shape[-1],
            *known.pointers,
            heads.scaling,
            heads.reference_size,
            tables.kept_BP.data_ptr(),
            tables.below_BP.data_ptr(),
            tables.takes_B.data_ptr(),
            int(tables.lowest),
            PASSAGE,
            PLACES,
            FADING,
            raised_BKG1R.data_ptr(),
        )
        return raised_BKG1R


class _Held:
    """Tensors without gaps (copies of those that have some), which live as long as this does."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]

    @property
    def pointers(self) -> list[int | None]:
        return [None if tensor is None else tensor.data_ptr() for tensor in self._tensors]


__all__ = ["NativeOps"]
