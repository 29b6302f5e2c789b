"""Search on a CPU beside its peers, in one run: what each costs and what it finds.

    python benchmarks/search_peers.py --vectors real.safetensors --texts DIR     # makes the vectors first, if missing

Vectors are real, and made as benchmarks/search_cpu.py makes them: keys of the three look-up layers of SmolLM2-135M,
and what its SideNet asks as it reads on in the same texts. Two regimes:

* decode: a step is one token, each layer in turn with its three query heads;
* segment: a step is 1,024 tokens, so 3,072 queries a layer.

A step looks for the 64 keys of largest dot product for every query. Ways take turns on the same step, so that each
finds the caches as cold as a model leaves them between two searches. Milliseconds are processor time (of all threads),
which other programs on the machine change least; the median by the wall stands beside it. A bank of N tokens is the
last part of every text. Queries of half of the texts choose settings, those of the others are timed and counted. Sizes
beyond the real keys are tiled with slight noise: for time only, with the settings of the largest real size.
`benchmarks/plot_search.py` draws the result.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import faiss  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import load_file, save_file
from search_cpu import TOP_K, faiss_graphs, faiss_lists, make_vectors, processor, tiled, tune
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.ivf import InvertedFile, default_lists
from longmem.ops import reference, topk_scan
from longmem.sketch import Basis, recall

# X layers (one memory head each), N keys, n of a part, G query heads a layer, T tokens, Q queries, E head size,
# R retrieved, D texts.

RESULTS = Path(__file__).parent / "results" / "search_peers.csv"
SCORES = 1 << 27  # of a block of queries, where all are kept at once
SEGMENT = 1024

Search = Callable[[int, Tensor], Tensor]  # (layer, (G, T, E)) → index (G, T, R)


class Way(NamedTuple):
    name: str
    settings: str
    search: Search


@dataclass
class Settings:
    """What was chosen at the largest real size, for tiled ones."""

    basis: Basis | None = None
    coordinates: int = 32
    lists_read: list[float] = field(default_factory=list)
    faiss_lists_read: list[float] = field(default_factory=list)


class HNSWMemory:
    """What Memorizing Transformers (Wu et al. 2022) is usually rebuilt with: a faiss graph a head, at its defaults."""

    def __init__(self, heads: int, head_dim: int, neighbours: int = 15) -> None:
        self.graphs = [faiss.IndexHNSWFlat(head_dim, neighbours, faiss.METRIC_INNER_PRODUCT) for _ in range(heads)]

    def add(self, keys_XNE: Tensor) -> None:
        for graph, keys_NE in zip(self.graphs, keys_XNE, strict=True):
            graph.add(keys_NE.float().numpy())

    def search(self, head: int, query_GTE: Tensor) -> Tensor:
        _, index_QR = self.graphs[head].search(query_GTE.flatten(0, 1).numpy(), TOP_K)
        return torch.from_numpy(index_QR).unflatten(0, query_GTE.shape[:2])


class FlatIndexes:
    """The official LongMem code's scheme: a flat faiss index for each query head, all of a batch's queries of one head
    at a time, through numpy.

    Its backbone has a key head for each query head; here those of a group hold the same keys. It stores means of four
    tokens; here single ones, as everywhere in this table.
    """

    def __init__(self, keys_XNE: Tensor, group: int) -> None:
        self.indexes = [[faiss.IndexFlatIP(keys_XNE.shape[-1]) for _ in range(group)] for _ in keys_XNE]
        for heads, keys_NE in zip(self.indexes, keys_XNE, strict=True):
            for index in heads:
                index.add(keys_NE.float().numpy())

    def search(self, head: int, query_GTE: Tensor) -> Tensor:
        pairs = zip(self.indexes[head], query_GTE, strict=True)
        found = [index.search(query_TE.numpy(), TOP_K)[1] for index, query_TE in pairs]
        return torch.stack([torch.from_numpy(index_TR) for index_TR in found])


def by_faiss(indexes: list[Any]) -> Search:
    def search(x: int, query_GTE: Tensor) -> Tensor:
        _, index_QR = indexes[x].search(query_GTE.flatten(0, 1).numpy(), TOP_K)
        return torch.from_numpy(index_QR).unflatten(0, query_GTE.shape[:2])

    return search


def by_matmul(keys_XNE: Tensor) -> Search:
    def search(x: int, query_GTE: Tensor) -> Tensor:
        query_QE = query_GTE.flatten(0, 1).to(keys_XNE.dtype)
        blocks = query_QE.split(max(1, SCORES // keys_XNE.shape[1]))
        found = [(query_qE @ keys_XNE[x].T).topk(TOP_K).indices for query_qE in blocks]
        return torch.cat(found).unflatten(0, query_GTE.shape[:2])

    return search


def by_index(index: BankIndex | InvertedFile, keys_XNE: Tensor) -> Search:
    def search(x: int, query_GTE: Tensor) -> Tensor:
        one, query_1QE = slice(x, x + 1), query_GTE.flatten(0, 1)[None]
        if isinstance(index, BankIndex):
            found = index.search(one, query_1QE, keys_XNE[one], TOP_K)
        else:
            found = index[one].search(query_1QE, keys_XNE[one], TOP_K)
        return found[0][0].unflatten(0, query_GTE.shape[:2])

    return search


def ways(keys_XNE: Tensor, recorded_XQE: Tensor, known: Settings, real: bool, group: int, small: bool) -> Iterator[Way]:
    """All ways that make sense at this size. `small`: graphs, too."""
    layers, size, head_dim = keys_XNE.shape

    def exact(x: int, query_GTE: Tensor) -> Tensor:
        found = topk_scan(query_GTE.flatten(0, 1)[None], keys_XNE[x : x + 1], TOP_K)
        return found[0][0].unflatten(0, query_GTE.shape[:2])

    yield Way("longmem, exact", "", exact)
    if real:
        index = BankIndex.choose(keys_XNE, recorded_XQE, top_k=TOP_K, target=0.99, together=group)
        yield Way("longmem, index", "; ".join(index.kinds), by_index(index, keys_XNE))
        lists = [head for head in index.heads if isinstance(head, InvertedFile)]
        if len(lists) == layers:
            known.basis = Basis(*(torch.cat(parts) for parts in zip(*(head.basis for head in lists), strict=True)))
            known.coordinates = max(head.size for head in lists)
            known.lists_read = [head.probes[0] / len(head.lists[0]) for head in lists]
    elif known.basis is not None:
        number = default_lists(size)
        probes = tuple(round(share * number) for share in known.lists_read)
        index = InvertedFile.build(keys_XNE, known.basis, known.coordinates, probes, together=group)
        told = f"{known.coordinates} coordinates, {'/'.join(map(str, probes))} of {number} lists"
        yield Way("longmem, index", told, by_index(index, keys_XNE))

    yield Way("torch matmul + topk, bfloat16", "", by_matmul(keys_XNE))
    wide_XNE = keys_XNE.float()
    yield Way("torch matmul + topk", "", by_matmul(wide_XNE))
    flat = [faiss.IndexFlatIP(head_dim) for _ in keys_XNE]
    for index, keys_NE in zip(flat, wide_XNE, strict=True):
        index.add(keys_NE.numpy())
    yield Way("faiss flat", "", by_faiss(flat))
    yield Way("official scheme", f"{layers * group} flat indexes", FlatIndexes(keys_XNE, group).search)

    # A shift of all keys changes no ranking, and makes keys far from zero easier to divide.
    wide_XNE = wide_XNE - wide_XNE.mean(1, keepdim=True)
    choosing_XQE = recorded_XQE[:, : recorded_XQE.shape[1] // 2 : 8].contiguous()
    truth_XQR = reference.topk_scan(choosing_XQE, keys_XNE, TOP_K)[0] if real else None
    number = round(4 * size**0.5)
    files = faiss_lists(wide_XNE, number)
    if truth_XQR is not None:
        tune(files, "nprobe", choosing_XQE, truth_XQR, [16, 32, 64, 96, 128, 192, 256, 384, 512, 768])
        known.faiss_lists_read = [index.nprobe / number for index in files]
    for index, share in zip(files, known.faiss_lists_read, strict=True):
        index.nprobe = round(share * number)
    told = f"{'/'.join(str(index.nprobe) for index in files)} of {number} lists"
    yield Way("faiss IVF", told, by_faiss(files))
    if not (small and truth_XQR is not None):
        return
    graphs = faiss_graphs(wide_XNE)
    told = tune(graphs, "efSearch", choosing_XQE, truth_XQR, [128, 512, 1024])
    yield Way("faiss HNSW", f"32 neighbours, {told}", by_faiss(graphs))
    memory = HNSWMemory(layers, head_dim)
    memory.add(keys_XNE)
    yield Way("Memorizing Transformers HNSW", "15 neighbours, faiss' defaults", memory.search)


def in_turns(all_ways: list[Way], query_SXGTE: Tensor, seconds: float) -> list[list[tuple[float, float]]]:
    """Milliseconds of every step, of the processor and by the wall, a list a way. All ways take a step before any takes
    the next."""
    times: list[list[tuple[float, float]]] = [[] for _ in all_ways]
    until = time.perf_counter() + seconds
    for step, query_XGTE in enumerate(query_SXGTE):
        for way, mine in zip(all_ways, times, strict=True):
            start, wall = time.process_time(), time.perf_counter()
            for x, query_GTE in enumerate(query_XGTE):
                way.search(x, query_GTE)
            elapsed = 1000 * (time.process_time() - start), 1000 * (time.perf_counter() - wall)
            if step or query_XGTE.shape[2] > 1:  # the first token takes longer
                mine.append(elapsed)
        if time.perf_counter() > until and times[0]:
            break
    return times


def bank_of(keys_XNE: Tensor, lengths_D: list[int], size: int) -> Tensor:
    """The last tokens of every text, `size` in all: what a text's queries ask for is there at every size."""
    share, parts, end = size / keys_XNE.shape[1], [], 0
    for length in lengths_D:
        end += length
        parts.append(keys_XNE[:, end - math.ceil(share * length) : end])
    return torch.cat(parts, dim=1)[:, -size:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Search on a CPU, beside its peers.")
    parser.add_argument("--vectors", type=Path, required=True, help="file that keeps the vectors between runs")
    parser.add_argument("--texts", type=Path, help="folder of .txt files to make vectors of")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=400_000, help="to encode, at least")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 16, 1 << 17, 1 << 18, 1 << 20])
    parser.add_argument("--largest-segment", type=int, default=1 << 18, help="tokens up to which segments are timed")
    parser.add_argument(
        "--graphs",
        type=int,
        default=1 << 16,
        help="tokens up to which graphs are built: it takes minutes, and they find less the larger they are",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing a size and regime, about")
    parser.add_argument("--append", action="store_true", help="keep the rows of --out that are not measured again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    if not arguments.vectors.exists():
        save_file(make_vectors(arguments.texts, arguments.model, arguments.tokens), arguments.vectors)
    vectors = load_file(arguments.vectors)
    real_XNE, query_DXGTE, lengths_D = vectors["keys_XNE"], vectors["query_DXGTE"], vectors["lengths_D"].tolist()
    texts, group = len(query_DXGTE), query_DXGTE.shape[2]
    # A bank would have recorded a token in six. The prefix, which is first, is no text.
    recorded_XQE = query_DXGTE[: texts // 2, ..., 1::6, :].permute(1, 0, 3, 2, 4).flatten(1, 3)
    segment_SXGTE = query_DXGTE[texts // 2 :].contiguous()
    token_SXGTE = segment_SXGTE[..., 1:, :].permute(0, 3, 1, 2, 4).flatten(0, 1)[..., None, :]
    generator = torch.Generator().manual_seed(0)
    token_SXGTE = token_SXGTE[torch.randperm(len(token_SXGTE), generator=generator)[:200]].contiguous()
    asked_XGTE = token_SXGTE[:100].permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "faiss-cpu"))
    common = {"commit": commit, "device": processor(), "threads": arguments.threads, "versions": versions}
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    if arguments.append and arguments.out.exists():
        with arguments.out.open(newline="") as file:
            rows = {(row["N"], row["regime"], row["way"]): row for row in csv.DictReader(file)}
    known = Settings()
    for size in sorted(set(arguments.sizes)):
        real = size <= real_XNE.shape[1]
        keys_XNE = bank_of(real_XNE, lengths_D, size) if real else tiled(real_XNE, size)
        truth_XQR = reference.topk_scan(asked_XGTE.flatten(1, 2), keys_XNE, TOP_K)[0] if real else None
        all_ways, found = [], []
        for way in ways(keys_XNE, recorded_XQE, known, real, group, size <= arguments.graphs):
            all_ways.append(way)
            index_XQR = torch.stack([way.search(x, asked_GTE).flatten(0, 1) for x, asked_GTE in enumerate(asked_XGTE)])
            found.append("" if truth_XQR is None else "/".join(f"{r:.4f}" for r in recall(index_XQR, truth_XQR)))
        for regime, query_SXGTE in (("decode", token_SXGTE), ("segment", segment_SXGTE)):
            if regime == "segment" and size > arguments.largest_segment:
                continue
            times = in_turns(all_ways, query_SXGTE, arguments.seconds)
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
            print(
                f"\n{keys_XNE.shape[1]} tokens, {regime}, a load of {load:.1f}: milliseconds of a step, recall a layer"
            )
            for way, mine, shares in zip(all_ways, times, found, strict=True):
                spent, wall = (torch.tensor(column) for column in zip(*mine, strict=True))
                shown = spent.quantile(torch.tensor([0.2, 0.5, 0.8, 0.95])).tolist()
                row = {**common, "keys": "real" if real else "tiled", "N": keys_XNE.shape[1], "regime": regime}
                row |= {"queries": 3 * group * (SEGMENT if regime == "segment" else 1), "way": way.name}
                row |= {"settings": way.settings}
                row |= {f"p{p}_ms": f"{value:.3f}" for p, value in zip((20, 50, 80, 95), shown, strict=True)}
                row |= {"wall_p50_ms": f"{wall.median():.3f}", "steps": len(mine), "recall": shares}
                rows[str(row["N"]), regime, way.name] = row | {"load": f"{load:.1f}"}
                figures = "  ".join(f"{value:10.2f}" for value in shown)
                print(f"{way.name:<32}{figures}  {len(mine):4}  {shares}  {way.settings}", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, next(iter(rows.values())))
                writer.writeheader()
                writer.writerows(rows.values())
        del all_ways, keys_XNE
        gc.collect()


if __name__ == "__main__":
    main()
