"""Decode search as it is and as it was before (`search_before.py`), in one run; and settings of its first kernel.

    python benchmarks/compare_search.py [--out FILE.csv] [--settings] [--sizes …] [--tiny]

First both are checked against plain PyTorch. Times are medians of recorded steps; below each, the kernels that it
consists of. `--settings` tries tiles at once, stages and programs of the first kernel.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path
from typing import Any

import search_before
import torch
import triton
from kernels import (
    DEVICE,
    check_banks_that_lie_apart,
    check_coded_search,
    check_search,
    normal,
    quantiles,
    torch_search,
)
from torch import Tensor

from longmem.ops import triton as kernels
from longmem.ops.triton import search
from longmem.sketch import Basis, Sketch, recall

TOP_K = 64


def recorded(run: Any) -> tuple[float, list[str]]:
    """Median milliseconds of a recorded run, and the kernels in it with their microseconds."""
    if DEVICE != "cuda":
        run()
        return float("nan"), []
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    p50, repeats = quantiles(graph.replay)[1], 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            graph.replay()
        torch.cuda.synchronize()
    parts = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
    del held, graph
    return p50, [f"{e.key[:24]} {e.device_time_total / repeats:.1f}" for e in parts if e.device_time_total]


def cases(keys: int) -> Any:
    """(name, queries, keys, coder and codes or None, bytes of the first pass)."""
    query_XQE, pool_XNE = normal(3, 3, 64), normal(3, keys, 64)
    yield "bfloat16", query_XQE, pool_XNE, None, pool_XNE.numel() * pool_XNE.element_size()
    for size, variance_E in ((64, torch.ones(64)), (32, torch.exp(-torch.arange(64) / 12))):
        scale_E = variance_E.sqrt().to(pool_XNE)
        pool_XNE *= scale_E
        sketch = Sketch.build(pool_XNE, Basis.fit(pool_XNE, normal(3, 512, 64) * scale_E), size)
        codes = sketch.coder_XES, sketch.codes_XNS
        yield f"int8, {size}", normal(3, 3, 64) * scale_E, pool_XNE, codes, sketch.codes_XNS.numel()


def searching(module: Any, query_XQE: Tensor, keys_XNE: Tensor, codes: Any) -> Any:
    if codes is None:
        return lambda: module.topk_scan(query_XQE, keys_XNE, TOP_K)
    coder_XES, codes_XNS = codes
    return lambda: module.topk_coded(query_XQE, keys_XNE, kernels.code_queries(query_XQE, coder_XES), codes_XNS, TOP_K)


def with_settings(at_once: int, stages: int, programs: int) -> Any:
    """`_streaming_few` with other settings."""

    def streaming(self: Any) -> Any:
        searches = self.query_XQE.shape[0]
        each = triton.cdiv(self.tiles, triton.cdiv(programs * search._processors(self.query_XQE.device), searches))
        chunk_tiles = at_once * triton.cdiv(max(at_once, each), at_once)
        settings = {
            "BQ": 8 if self.queries <= 8 else search.FEW,
            "TILES": at_once,
            "PRECISION": self._precision,
            "num_warps": 1,
            "num_stages": stages,
        }
        return (triton.cdiv(self.tiles, chunk_tiles), searches), chunk_tiles * search.TILE.value, settings

    return streaming


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", action="store_true", help="try settings of the first kernel")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 16, 1 << 20, 1 << 24])
    parser.add_argument("--tiny", action="store_true", help="to see that the script runs")
    parser.add_argument("--no-check", action="store_true", help="kernels.py has checked already")
    args = parser.parse_args()
    torch.manual_seed(0)
    if not args.no_check:
        for check in (check_search, check_banks_that_lie_apart, check_coded_search):
            check(args.tiny)
            print(f"{check.__name__}: passed", flush=True)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    file = args.out.open("w", newline="", buffering=1) if args.out else None
    out = csv.writer(file) if file else None
    ours = search._Keys._streaming_few

    def tell(*row: Any) -> None:
        print("  ".join(f"{cell:9.4f}" if isinstance(cell, float) else f"{cell}" for cell in row), flush=True)
        if out is not None:
            out.writerow((*row, name))

    for keys in [900] if args.tiny else args.sizes:
        for case, query_XQE, pool_XNE, codes, bytes_ in cases(keys):
            exact_XQR = kernels.topk_scan(query_XQE, pool_XNE, TOP_K)[0]
            torch_ms = recorded(lambda q=query_XQE, k=pool_XNE: torch_search(q, k, TOP_K))[0]
            for way, module in (("now", search), ("before", search_before)):
                run = searching(module, query_XQE, pool_XNE, codes)
                found = float(recall(run()[0], exact_XQR).mean())
                assert found > (0.9 if codes else 0.999), f"{way}, {case}, {keys} keys: recall {found}"
                ms, parts = recorded(run)
                tell(keys, case, way, ms, "x torch", torch_ms / ms, "TB/s", bytes_ / ms / 1e9, "recall", found)
                print("      µs: " + ", ".join(parts), flush=True)
            if not args.settings:
                continue
            tries = itertools.product((1, 2, 4), (4, 6), (8, 16, 32))
            for at_once, stages, programs in [(2, 3, 16)] if args.tiny else tries:
                if at_once * search.TILE.value * stages * bytes_ // (3 * keys) > 200_000:
                    continue
                try:
                    search._Keys._streaming_few = with_settings(at_once, stages, programs)
                    run = searching(search, query_XQE, pool_XNE, codes)
                    found = float(recall(run()[0], exact_XQR).mean())
                    ms, parts = recorded(run)
                    first = next((part.split()[-1] for part in parts if part.startswith("_few_maxima")), "")
                    tell(
                        keys, case, f"{at_once} tiles, {stages} stages, {programs} programs", ms, "first", first, found
                    )
                except Exception as error:  # one that does not fit is no reason to lose the others
                    print(f"{at_once} tiles, {stages} stages: {type(error).__name__}: {error}"[:200], flush=True)
                finally:
                    search._Keys._streaming_few = ours


if __name__ == "__main__":
    main()
