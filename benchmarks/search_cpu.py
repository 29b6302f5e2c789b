"""Search for one decode step on a CPU: what each way costs and what it finds.

    python benchmarks/search_cpu.py --texts DIR --vectors real.safetensors      # makes the vectors first, if missing

A step is one token: each look-up head of SmolLM2-135M in turn (one a layer) searches its keys for the 64 best of each
of its three query heads. Vectors are real: keys of books, and the queries the SideNet asks as it reads on in the same
books. Recall is measured on these alone, with tokens of books that chose no setting. Sizes beyond them are for time
only: real keys tiled with slight noise, and above two million tokens the keys of the last head for all three searches.
There an inverted file reads the share of lists that the largest real size needed (the share falls as banks grow).
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.ivf import InvertedFile, default_lists
from longmem.ops import NativeOps, cpu, reference
from longmem.sketch import Basis, Sketch, recall

RESULTS = Path(__file__).parent / "results" / "search_cpu.csv"
TOP_K, GROUP = 64, 3
LARGE = 1 << 21  # tokens from which on all searches read the keys of one head
PER_TEXT, READ_ON, CONTEXT = 60_000, 1_024, 6_144

Search = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # (head, (1, G, E)) → index and score, (1, G, R)


def make_vectors(texts: Path, model_name: str, tokens: int) -> dict[str, Tensor]:
    """Keys of the look-up heads (X, N, E) of some texts, how many are of each (D,), and queries (D, X, G, T, E) of
    the tokens that follow them.

    A text's queries are asked with the last `CONTEXT` of its remembered tokens as the bank.
    """
    from longmem.bank import BankEntry
    from longmem.index import BankReader
    from longmem.model import LongMem
    from longmem.retrieved import Retrieved

    model = LongMem.from_pretrained(model_name, device="cpu", dtype="float32")
    layers = model.config.memory_layers[:3]
    heads = [model.config.heads_of(layer).start for layer in layers]
    keys, queries, total = [], [], 0
    for path in sorted(texts.rglob("*.txt")):
        if total >= tokens:
            break
        ids_N = torch.tensor(model.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
        length = min(PER_TEXT, len(ids_N) - READ_ON)
        if length < CONTEXT:
            continue
        key_HNE, value_HNE = model.encode(ids_N[:length])
        last = slice(-CONTEXT, None)
        bank = model.new_bank()
        offsets_N2 = torch.zeros(CONTEXT, 2, dtype=torch.int64)
        bank.append(BankEntry(path.name, "", 0, ids_N[:length][last], offsets_N2, key_HNE[:, last], value_HNE[:, last]))
        read, asked = BankReader([bank], model.config), {}

        def retrieve(layer: int, query_BKGTE: Tensor, read: Any = read, asked: dict = asked) -> Retrieved:
            asked[layer] = query_BKGTE[0, 0].float()
            return read(layer, query_BKGTE)

        with torch.no_grad():
            model.read(model.with_prefix(ids_N[length : length + READ_ON - 1])[None], retrieve)
        keys.append(key_HNE[heads].clone())
        queries.append(torch.stack([asked[layer] for layer in layers]))
        total += length
        print(f"{total} tokens, {len(queries)} texts", flush=True)
    lengths_D = torch.tensor([keys_XNE.shape[1] for keys_XNE in keys])
    return {"keys_XNE": torch.cat(keys, dim=1), "query_DXGTE": torch.stack(queries), "lengths_D": lengths_D}


def tiled(keys_XNE: Tensor, size: int) -> Tensor:
    """Keys repeated to a size, each repetition with noise of 2 % of a channel's spread."""
    generator = torch.Generator().manual_seed(0)
    spread_X1E = 0.02 * keys_XNE[:, ::16].float().std(1, keepdim=True)
    out_XNE = torch.empty(keys_XNE.shape[0], size, keys_XNE.shape[2], dtype=keys_XNE.dtype)
    for first in range(0, size, keys_XNE.shape[1]):
        part_XnE = keys_XNE[:, : size - first]
        noise_XnE = torch.randn(part_XnE.shape, generator=generator).mul_(spread_X1E)
        out_XNE[:, first : first + part_XnE.shape[1]] = part_XnE + noise_XnE
    return out_XNE


def bandwidth() -> tuple[float, float]:
    """Bytes a second of a copy (read and written) and of a sum (read), the best of ten."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    best = []
    for run, passes in ((lambda: target.copy_(source), 2), (source.sum, 1)):
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        best.append(passes * 4 * source.numel() / min(seconds))
    return best[0], best[1]


def timed(search: Search, query_TXGE: Tensor, budget: float) -> tuple[float, float, float, int]:
    """p20, p50 and p95 of a step in milliseconds over different tokens, and how many were timed."""
    steps: list[float] = []
    until = time.perf_counter() + budget
    for run in range(203):
        query_XGE = query_TXGE[run % len(query_TXGE)]
        start = time.perf_counter()
        for x in range(query_XGE.shape[0]):
            search(x, query_XGE[x : x + 1])
        if run >= 3:
            steps.append(1000 * (time.perf_counter() - start))
        if time.perf_counter() > until and len(steps) >= 10:
            break
    p20, p50, p95 = torch.tensor(steps).quantile(torch.tensor([0.2, 0.5, 0.95])).tolist()
    return p20, p50, p95, len(steps)


def found(search: Search, query_TXGE: Tensor) -> Tensor:
    """What a way finds for tokens: (X, T · G, R)."""
    return torch.stack(
        [
            torch.cat([search(x, query_XGE[x : x + 1])[0][0] for query_XGE in query_TXGE])
            for x in range(query_TXGE.shape[1])
        ]
    )


def faiss_search(indexes: list[Any]) -> Search:
    def search(x: int, query_1GE: Tensor) -> tuple[Tensor, Tensor]:
        score, index = indexes[x].search(query_1GE[0].numpy(), TOP_K)
        return torch.from_numpy(index)[None], torch.from_numpy(score)[None]

    return search


def tune(indexes: list[Any], setting: str, query_XQE: Tensor, truth_XQR: Tensor, settings: list[int]) -> str:
    """The least value of a faiss setting with a recall of .98 (or the largest there is), set in place."""
    chosen = []
    for x, index in enumerate(indexes):
        owner = index.hnsw if setting == "efSearch" else index
        for value in settings:
            setattr(owner, setting, value)
            answer = torch.from_numpy(index.search(query_XQE[x].numpy(), TOP_K)[1])
            if recall(answer[None], truth_XQR[x : x + 1]) >= 0.98:
                break
        chosen.append(str(value))
    return f"{setting} {'/'.join(chosen)}"


def ways(
    keys_XNE: Tensor, recorded_XQE: Tensor, known: dict[str, Any], real: bool, target: float, wanted: list[str]
) -> Iterator[tuple[str, str, float, Search]]:
    """(name, settings, bytes a key, search) of each way, made when it is its turn. `known`: settings of real keys."""
    native = NativeOps.load()
    searches, size, head_dim = keys_XNE.shape
    head = [slice(x % searches, x % searches + 1) for x in range(3)]

    def searching(index: Sketch, **options: bool) -> Search:
        parts = [index[one] for one in head]
        return lambda x, q: parts[x].search(q, keys_XNE[head[x]], TOP_K, **options)

    def searching_files(files: list[InvertedFile], native: NativeOps | None = None) -> Search:
        return lambda x, q: files[x % searches].search(q, keys_XNE[head[x]], TOP_K, native)

    if "topk_scan" in wanted:
        for precision in (torch.bfloat16, torch.float32):
            yield (
                "topk_scan",
                f"{str(precision)[6:]} queries",
                2 * head_dim,
                lambda x, q, p=precision: cpu.topk_scan(q.to(p), keys_XNE[head[x]], TOP_K),
            )
    if "sketch" in wanted:
        if real:
            sketch = Sketch.choose(keys_XNE, recorded_XQE, top_k=TOP_K)
            known["basis"], known["size"] = sketch.basis, sketch.size
        basis: Basis = known["basis"]
        sketch = Sketch.build(keys_XNE, basis, head_dim)
        yield "sketch, exact", f"{head_dim} coordinates", head_dim, searching(sketch, exact=True)
        for size_kept in sorted({32, known["size"]}):
            sketch = Sketch.build(keys_XNE, basis, size_kept)
            yield "sketch", f"{size_kept} coordinates", size_kept, searching(sketch)
        del sketch
    if "inverted file" not in wanted:
        files = []
    elif real:
        index = BankIndex.choose(keys_XNE, recorded_XQE, top_k=TOP_K, target=target, lists=True, together=GROUP)
        files = known["files"] = [file for file in index.heads if isinstance(file, InvertedFile)]
    else:
        files = []
        for x, file in enumerate(known["files"][-searches:]):
            probes = round(file.probes[0] / len(file.lists[0]) * default_lists(size))
            settings = {"together": GROUP, "probes": (probes,), "basis": file.basis, "size": file.size}
            files.append(InvertedFile.build(keys_XNE[x : x + 1], **settings))
    if len(files) == searches:
        probes = "/".join(str(file.probes[0]) for file in files)
        sizes = "/".join(str(file.size) for file in files)
        settings = f"{sizes} coordinates, {probes} of {len(files[0].lists[0])} lists"
        # At least: each of the three query heads chooses its own lists.
        width = sum(file.size * file.probes[0] / len(file.lists[0]) for file in files) / searches
        yield "inverted file", settings, width, searching_files(files)
        if native is not None:
            yield "inverted file, compiled", settings, width, searching_files(files, native)
    del files
    if size >= LARGE or "peers" not in wanted:
        return  # what follows needs more memory, or more time

    yield "reference", "", 2 * head_dim, lambda x, q: reference.topk_scan(q, keys_XNE[head[x]], TOP_K)
    wide_XNE = keys_XNE.float()

    def matmul(x: int, query_1GE: Tensor) -> tuple[Tensor, Tensor]:
        score, index = (query_1GE @ wide_XNE[head[x]].mT).topk(TOP_K)
        return index, score

    yield "matmul + topk", "float32 keys", 4 * head_dim, matmul
    flat = [faiss.IndexFlatIP(head_dim) for _ in keys_XNE]
    for index, keys_NE in zip(flat, wide_XNE, strict=True):
        index.add(keys_NE.numpy())
    yield "faiss flat", "float32 keys", 4 * head_dim, faiss_search(flat)
    del flat
    if not real:
        return
    choosing_XQE = recorded_XQE[:, : recorded_XQE.shape[1] // 2 : 8].contiguous()
    truth_XQR = reference.topk_scan(choosing_XQE, keys_XNE, TOP_K)[0]
    # A shift of all keys changes no ranking, and graphs of keys far from zero find next to nothing.
    wide_XNE -= wide_XNE.mean(1, keepdim=True)
    files = faiss_lists(wide_XNE, round(4 * size**0.5))
    settings = tune(files, "nprobe", choosing_XQE, truth_XQR, [16, 32, 64, 96, 128, 192, 256, 384, 512])
    yield "faiss IVF", settings, 4 * head_dim, faiss_search(files)
    del files
    if size > 1 << 17:
        return  # the graph takes minutes to build, and finds less the larger it is
    graphs = faiss_graphs(wide_XNE)
    settings = tune(graphs, "efSearch", choosing_XQE, truth_XQR, [128, 512, 1024])
    yield "faiss HNSW", settings, 4 * head_dim, faiss_search(graphs)


def faiss_lists(keys_XNE: Tensor, num_lists: int) -> list[Any]:
    """An inverted file of faiss a head."""
    files = []
    for keys_NE in keys_XNE:
        index: Any = faiss.index_factory(keys_NE.shape[1], f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = 64
        index.train(keys_NE.numpy())
        index.add(keys_NE.numpy())
        files.append(index)
    return files


def faiss_graphs(keys_XNE: Tensor) -> list[Any]:
    """A graph (HNSW) of faiss a head."""
    graphs = []
    for keys_NE in keys_XNE:
        index = faiss.IndexHNSWFlat(keys_NE.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        index.add(keys_NE.numpy())
        graphs.append(index)
    return graphs


def check(keys_XNE: Tensor, query_TXGE: Tensor) -> None:
    """Exact ways find what the reference finds, in float32 and in bfloat16 queries."""
    recorded_XQE = query_TXGE.permute(1, 0, 2, 3).flatten(1, 2)
    sketch = Sketch.build(keys_XNE, Basis.fit(keys_XNE, recorded_XQE), keys_XNE.shape[-1])
    for query_XGE in query_TXGE[:20]:
        for query in (query_XGE, query_XGE.bfloat16()):
            truth = reference.topk_scan(query, keys_XNE, TOP_K)[1]
            torch.testing.assert_close(cpu.topk_scan(query, keys_XNE, TOP_K)[1], truth, atol=1e-3, rtol=1e-5)
            exactly = sketch.search(query, keys_XNE, TOP_K, exact=True)[1]
            torch.testing.assert_close(exactly, truth, atol=1e-3, rtol=1e-5)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Search for one decode step on a CPU.")
    parser.add_argument("--texts", type=Path, help="folder of .txt files to make vectors of")
    parser.add_argument("--vectors", type=Path, required=True, help="file that keeps the vectors between runs")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=400_000, help="to encode, at least")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1 << 16, 400_000, 1 << 20, 10_000_000],
        help="remembered tokens; settings for sizes beyond the real keys are those of the largest that is not",
    )
    parser.add_argument("--recall", type=float, default=0.99, help="asked of an inverted file")
    parser.add_argument("--prefill", action="store_true", help="a step is 1,024 tokens")
    kinds = ["topk_scan", "sketch", "inverted file", "peers"]
    parser.add_argument("--ways", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a way, at most (after ten steps)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    set_threads(max(arguments.threads))
    if not arguments.vectors.exists():
        save_file(make_vectors(arguments.texts, arguments.model, arguments.tokens), arguments.vectors)
    vectors = load_file(arguments.vectors)
    real_XNE, query_DXGTE = vectors["keys_XNE"], vectors["query_DXGTE"]
    texts = len(query_DXGTE)
    # The first texts' queries are those a bank would have recorded (a token in six); the others' are searched for.
    recorded_XQE = query_DXGTE[: texts // 2, ..., 1::6, :].permute(1, 0, 3, 2, 4).flatten(1, 3)
    asked_TXGE = query_DXGTE[texts // 2 :, ..., 1:, :].permute(0, 3, 1, 2, 4).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    asked_TXGE = asked_TXGE[torch.randperm(len(asked_TXGE), generator=generator)[:100]].contiguous()
    timed_TXGE = query_DXGTE[texts // 2 :].flatten(2, 3).contiguous() if arguments.prefill else asked_TXGE

    check(real_XNE[:, : 1 << 16], asked_TXGE)
    copied, read = bandwidth()
    print(
        f"exact searches agree; {arguments.threads} threads, copy {copied / 1e9:.1f} GB/s, read {read / 1e9:.1f} GB/s"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "faiss-cpu"))
    common = {"commit": commit, "device": processor(), "versions": versions}
    common |= {"read_gb_per_s": round(read / 1e9, 1)}
    rows: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    for size in sorted(set(arguments.sizes)):
        real = size <= real_XNE.shape[1]
        keys_XNE = real_XNE[:, :size].contiguous() if real else tiled(real_XNE if size < LARGE else real_XNE[-1:], size)
        if not real and size >= LARGE and "basis" in known:
            known["basis"] = Basis(*(part[-1:] for part in known["basis"]))
        truth_XQR = None
        if real:
            query_XQE = asked_TXGE.permute(1, 0, 2, 3).flatten(1, 2)
            truth_XQR = reference.topk_scan(query_XQE, keys_XNE, TOP_K)[0]
        vectors_are = "real" if real else "tiled" if size < LARGE else "tiled, one head"
        print(f"\n{size} tokens, keys {vectors_are}; milliseconds of a step, and recall of each head")
        made = ways(keys_XNE, recorded_XQE, known, real, arguments.recall, arguments.ways)
        for (name, settings, width, search), threads in ((way, n) for way in made for n in arguments.threads):
            set_threads(threads)
            p20, p50, p95, steps = timed(search, timed_TXGE, arguments.seconds)
            set_threads(max(arguments.threads))
            shares = (
                "" if truth_XQR is None else "/".join(f"{r:.4f}" for r in recall(found(search, asked_TXGE), truth_XQR))
            )
            floor = 3 * size * width / read * 1000
            times = {"p20_ms": p20, "p50_ms": p50, "p95_ms": p95, "floor_ms": floor}
            row = {
                **common,
                "threads": threads,
                "load": round(os.getloadavg()[0], 1),
                "keys": vectors_are,
                "N": size,
                "tokens": 1024 if arguments.prefill else 1,
            }
            row |= {"way": name, "settings": settings}
            row |= {key: round(value, 3) for key, value in times.items()}
            rows.append(row | {"steps": steps, "recall": shares})
            print(
                f"{name:<15}{settings:<36} {threads} p20 {p20:8.2f}  p50 {p50:8.2f}  p95 {p95:8.2f}  "
                f"(memory alone {floor:6.2f})  {shares}",
                flush=True,
            )
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
