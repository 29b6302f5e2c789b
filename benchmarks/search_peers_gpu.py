"""Search on a GPU beside its peers, in one run: what each costs and what it finds.

    python benchmarks/search_peers_gpu.py [--out FILE.csv] [--jax] [--sizes …]
    TRITON_INTERPRET=1 python benchmarks/search_peers_gpu.py --tiny      # on a CPU, to see that the script runs

Two regimes, three look-up heads with three query heads each, the 64 best keys of every query:

* segment: 1,024 tokens, so 3,072 queries a head, over 65,536 keys;
* decode: one token, so three queries a head.

Keys are random, but of few directions that matter, as those of look-up heads are (an inverted file could do nothing
with keys that are all alike far apart). Queries, keys and results lie on the GPU for all ways, and each way holds its
keys as it likes them best. faiss is given torch's tensors (`faiss.contrib.torch_utils`), so nothing is copied to the
host. An inverted file is asked for .95 and for .99: the fewest lists that find as much of what other queries look for.
All are timed as they are called; longmem and torch also as recorded steps, which faiss cannot be. Recall is counted for
all before anything is timed. A way that fails is told and left out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernels import DEVICE, by_codes, normal, quantiles, recorded, torch_search
from torch import Tensor

from longmem.ops import reference
from longmem.ops import triton as kernels
from longmem.sketch import Basis, Sketch, recall

# X heads, Q queries of each, N keys, E head size, R retrieved.
TOP_K = 64
Search = Callable[[Tensor], Tensor]  # (X, Q, E) → index (X, Q, R)


class Way(NamedTuple):
    name: str
    settings: str
    search: Search
    records: bool = False


def directions() -> Tensor:
    """How much the coordinates of keys and queries vary."""
    return torch.exp(-torch.arange(64) / 24).to(DEVICE)


def import_faiss() -> Any:
    import faiss
    import faiss.contrib.torch_utils

    return faiss


def flat(faiss: Any, resources: Any, keys_XNE: Tensor, half: bool) -> Search:
    """A flat index a head."""
    indexes = []
    for keys_NE in keys_XNE:
        if DEVICE == "cuda":
            config = faiss.GpuIndexFlatConfig()
            config.useFloat16, config.device = half, torch.cuda.current_device()
            index = faiss.GpuIndexFlatIP(resources, keys_NE.shape[1], config)
        else:
            index = faiss.IndexFlatIP(keys_NE.shape[1])
        for part_NE in keys_NE.split(1 << 20):
            index.add(part_NE.float().contiguous())
        indexes.append(index)
    return by_indexes(indexes)


def by_indexes(indexes: list[Any]) -> Search:
    def search(query_XQE: Tensor) -> Tensor:
        pairs = zip(indexes, query_XQE, strict=True)
        return torch.stack([index.search(query_QE.float().contiguous(), TOP_K)[1] for index, query_QE in pairs])

    return search


def without_index(faiss: Any, resources: Any, keys_XNE: Tensor, dtype: torch.dtype) -> Search:
    """`faiss.knn_gpu`, which takes keys as they are."""
    keys_XNE = keys_XNE.to(dtype)

    def search(query_XQE: Tensor) -> Tensor:
        found = [
            faiss.knn_gpu(resources, query_QE.to(dtype), keys_NE, TOP_K, metric=faiss.METRIC_INNER_PRODUCT)[1]
            for query_QE, keys_NE in zip(query_XQE, keys_XNE, strict=True)
        ]
        return torch.stack(found)

    return search


def inverted_files(
    faiss: Any, resources: Any, keys_XNE: Tensor, asking_XQE: Tensor, truth_XQR: Tensor, half: bool
) -> Iterator[tuple[float, str, Search]]:
    """For each recall that is asked for: settings and search."""
    size, head_dim = keys_XNE.shape[1:]
    number, indexes = min(4096, round(4 * size**0.5)), []
    for keys_NE in keys_XNE:
        if DEVICE != "cuda":
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(head_dim), head_dim, number, faiss.METRIC_INNER_PRODUCT)
        elif half:
            config = faiss.GpuIndexIVFScalarQuantizerConfig()
            config.device = torch.cuda.current_device()
            kind = faiss.ScalarQuantizer.QT_fp16
            metric = faiss.METRIC_INNER_PRODUCT
            index = faiss.GpuIndexIVFScalarQuantizer(resources, head_dim, number, kind, metric, False, config)
        else:
            config = faiss.GpuIndexIVFFlatConfig()
            config.device = torch.cuda.current_device()
            index = faiss.GpuIndexIVFFlat(resources, head_dim, number, faiss.METRIC_INNER_PRODUCT, config)
        index.train(keys_NE[:: max(1, size // (64 * number))].float().contiguous())
        for part_NE in keys_NE.split(1 << 20):
            index.add(part_NE.float().contiguous())
        indexes.append(index)
    search, asked = by_indexes(indexes), [0.95, 0.99]
    for probes in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        if not asked or probes > number:
            return
        for index in indexes:
            index.nprobe = probes
        found = float(recall(search(asking_XQE), truth_XQR).amin())
        while asked and found >= asked[0]:
            yield asked.pop(0), f"{probes} of {number} lists", search


def by_jax(keys_XNE: Tensor, approximate: bool) -> Search:
    """XLA's own `approx_max_k` or `top_k` over a product in bfloat16."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax, dlpack, lax = map(importlib.import_module, ("jax", "jax.dlpack", "jax.lax"))
    keys = dlpack.from_dlpack(keys_XNE)

    @jax.jit
    def run(query: Any, keys: Any) -> Any:
        score = jax.numpy.einsum("xqe,xne->xqn", query, keys)
        return lax.approx_max_k(score, TOP_K)[1] if approximate else lax.top_k(score, TOP_K)[1]

    def search(query_XQE: Tensor) -> Tensor:
        found = run(dlpack.from_dlpack(query_XQE.to(keys_XNE.dtype).contiguous()), keys)
        return torch.from_dlpack(found.block_until_ready()).long()

    return search


def ways(keys_XNE: Tensor, asking_XQE: Tensor, truth_XQR: Tensor, segment: bool, with_jax: bool) -> Iterator[Way]:
    yield Way("longmem, exact", "bfloat16", lambda query: kernels.topk_scan(query, keys_XNE, TOP_K)[0], True)
    if not segment:
        sketch = Sketch.build(keys_XNE, Basis.fit(keys_XNE, asking_XQE), 32)
        coder = sketch.coder_XES
        yield Way("longmem, int8", "32 of 64", lambda query: by_codes(sketch, coder, query, keys_XNE)[0], True)

    def by_torch(keys_XNE: Tensor) -> Search:
        return lambda query: torch.cat([i for _, i in torch_search(query.to(keys_XNE.dtype), keys_XNE, TOP_K)], dim=1)  # type: ignore[misc, union-attr]

    yield Way("torch matmul + topk", "bfloat16", by_torch(keys_XNE), True)
    yield Way("torch matmul + topk", "float32", by_torch(keys_XNE.float()), True)
    # What faiss shares between searches: scratch memory that is taken once.
    faiss = import_faiss()
    resources = faiss.StandardGpuResources() if DEVICE == "cuda" else None
    if resources is not None:
        resources.setTempMemory(2 << 30)
    halves = (False, True) if DEVICE == "cuda" else (False,)
    for half in halves:
        yield Way("faiss flat", "float16" if half else "float32", flat(faiss, resources, keys_XNE, half))
    if DEVICE == "cuda":
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield Way("faiss knn_gpu", str(dtype)[6:], without_index(faiss, resources, keys_XNE, dtype))
    if not segment:
        for half in halves:
            for asked, told, search in inverted_files(faiss, resources, keys_XNE, asking_XQE, truth_XQR, half):
                kind = "float16" if half else "float32"
                yield Way(f"faiss IVF, asked for {asked}", f"{kind}, {told}", search)
    if with_jax:
        for approximate in (False, True):
            name = f"jax {'approx_max_k' if approximate else 'top_k'}"
            yield Way(name, "bfloat16", by_jax(keys_XNE, approximate))


def one_by_one(iterator: Iterator[Way]) -> Iterator[Way]:
    """All ways up to one that cannot be made, which is told."""
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as error:
            print(f"  FAILED to make the next way: {type(error).__name__}: {str(error)[:500]}", flush=True)
            return


def measure(regime: str, queries: int, keys: int, arguments: argparse.Namespace, tell: Callable[..., None]) -> None:
    scale_E = directions()
    keys_XNE = normal(3, keys, 64)
    keys_XNE *= scale_E.to(keys_XNE)
    query_XQE, asking_XQE = (
        (normal(3, count, 64) * scale_E).to(keys_XNE.dtype) for count in (queries, arguments.asked)
    )
    truth_XQR = (reference if DEVICE == "cpu" else kernels).topk_scan(asking_XQE, keys_XNE, TOP_K)[0]
    # The truth itself, of a few queries, by plain products in float32.
    plain_QR = (asking_XQE[0, :8].float() @ keys_XNE[0].float().T).topk(TOP_K).indices
    assert recall(truth_XQR[:1, :8], plain_QR[None]).item() > 0.99, "exact search is not exact"
    print(f"{regime}, 3 × {queries} queries, {keys:,} keys", flush=True)
    base: dict[str, float] = {}
    for way in one_by_one(ways(keys_XNE, asking_XQE, truth_XQR, regime == "segment", arguments.jax)):
        try:
            # An inverted file changes its number of lists when the next is asked for: each is timed as it comes.
            found = float(recall(way.search(asking_XQE), truth_XQR).mean())
            p20, p50, p80 = quantiles(lambda way=way: way.search(query_XQE))
            replayed = recorded(lambda way=way: way.search(query_XQE)) if way.records else None
        except Exception as error:
            print(f"  FAILED: {way.name}, {way.settings}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        if not base:
            base = {"called": p50, "recorded": replayed or p50}
        tell(
            regime=regime, queries=3 * queries, keys=keys, way=way.name, settings=way.settings, p20_ms=p20, p50_ms=p50,
            p80_ms=p80, recorded_ms=replayed, times_longmem=p50 / base["called"],
            times_longmem_recorded=(replayed or p50) / base["recorded"], recall=found,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 16, 1 << 20], help="keys a head, of decode")
    parser.add_argument("--segment-keys", type=int, default=1 << 16)
    parser.add_argument("--asked", type=int, default=512, help="queries that recall is counted of")
    parser.add_argument("--jax", action="store_true", help="also XLA's top_k and approx_max_k")
    parser.add_argument("--tiny", action="store_true", help="to see that the script runs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        version = import_faiss().__version__
    except Exception as error:
        version = "none"
        print(f"faiss cannot be imported and is left out: {error}", flush=True)
    about = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": f"torch {torch.__version__} faiss {version}",
    }
    file = arguments.out.open("w", newline="", buffering=1) if arguments.out else None
    writer: csv.DictWriter[str] | None = None

    def tell(**row: Any) -> None:
        nonlocal writer
        figures = (
            f"{row['p50_ms']:9.3f} ms, {row['times_longmem']:6.2f} × ours as called, "
            f"{row['times_longmem_recorded']:6.2f} × ours recorded, recall {row['recall']:.4f}"
        )
        recorded_ms = "        –" if row["recorded_ms"] is None else f"{row['recorded_ms']:9.3f}"
        print(f"  {row['way']:<26}{row['settings']:<28}{figures}, recorded {recorded_ms} ms", flush=True)
        if file is not None:
            if writer is None:
                writer = csv.DictWriter(file, [*row, *about])
                writer.writeheader()
            writer.writerow(row | about)

    if arguments.tiny:
        measure("segment", 20, 700, arguments, tell)
        measure("decode", 3, 900, arguments, tell)
        return
    measure("segment", 3072, arguments.segment_keys, arguments, tell)
    for size in arguments.sizes:
        measure("decode", 3, size, arguments, tell)


if __name__ == "__main__":
    main()
