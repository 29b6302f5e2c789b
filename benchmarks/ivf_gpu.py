"""Decoding with 16 million remembered tokens on one GPU: an inverted file against exact search, recall and speed.

    python benchmarks/ivf_gpu.py --tokens HELDOUT [TRAIN …] [--out FILE.csv] [--real TOKENS] [--size TOKENS]
        [--no-compile] [--check-only] [--search-only] [--profile] [--model NAME]

HELDOUT and TRAIN are folders of `longmem tokenize`. Keys are real: SmolLM2-135M encodes documents, on the device, until
there are `--real` tokens; up to `--size` tokens they are repeated with noise of 2 % of a channel's spread, where
neighbours are easier to find than in as much text. What is asked is real, too: the SideNet that ships reads on in every
document of HELDOUT, with the end of the document as its bank. Every other document chooses what is read, the others
measure recall against exact search of the whole bank, 64 neighbours of each of three query heads. Indexes do not know
the bank's last 1,000 tokens, as after a chat.

First the kernels are checked against their plain twin. Then rows are printed and written one by one: how long an index
takes to make, what each head finds; a step's searches alone (all memory heads, layer by layer, recorded); a step of one
text, greedy, against the backbone alone in the same runtime, and how many tokens of 32 are those that exact search
chooses. On a CPU nothing is recorded, which shows that the script runs: --real 3000 --size 9000 --no-compile.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decode_gpu import begin, error, quantiles
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.bank import MemoryBank
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError
from longmem.index import BankReader, PlacedReader
from longmem.lists import GpuLists, KeyLists
from longmem.model import LongMem
from longmem.ops import Lists, Pools, code_queries, reference, topk_listed, topk_scan
from longmem.retrieved import Retrieved
from longmem.sketch import Basis, Sketch, recall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOP_K, LATE, BLOCK = 64, 1000, 1 << 20
READ_ON, CONTEXT = 1_024, 6_144
TARGETS = (0.95, 0.97, 0.98, 0.99)
# Every so many tokens of what is read on records its queries; tokens that choose, and that measure.
EVERY, CHOOSING, MEASURING = 8, 128, 256


# ---- checks -----------------------------------------------------------------------------------------------------


def clumps(pools: int, keys: int, seed: int = 0) -> Tensor:
    """Keys (P, N, 64) in clumps far from zero."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    clump_PCE = 2 * torch.randn(pools, 100, 64, generator=random, device=DEVICE)
    which_N = torch.randint(100, (keys,), generator=random, device=DEVICE)
    keys_PNE = clump_PCE[:, which_N] + 0.5 * torch.randn(pools, keys, 64, generator=random, device=DEVICE) + 3.0
    return keys_PNE.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def asked(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator(DEVICE).manual_seed(seed)
    query = torch.randn(*shape, 64, generator=random, device=DEVICE) * torch.linspace(0.2, 2, 64, device=DEVICE)
    return query.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def check() -> None:
    """Kernels against their plain twin, and against exact search where everything is read; recorded against called."""
    cases = (3, 5001, 77, 3, 48, 300), (2, 40_000, 5000, 12, 64, 700), (3, 300_001, 9, 3, 48, 1500)
    for pools, keys, late, queries, size, num_lists in cases if DEVICE == "cuda" else cases[:1]:
        # What lies beyond the keys is never looked at, nor pools that no search reads.
        held_PNE = torch.full((pools, keys + late + 50, 64), torch.nan, device=DEVICE).to(clumps(1, 1).dtype)
        held_PNE[:, : keys + late] = clumps(pools, keys + late, seed=keys)
        query_XQE, length_X = asked(pools, queries, seed=1), torch.full((pools,), keys + late, device=DEVICE)
        pool_X = torch.arange(pools, device=DEVICE).flip(0)
        heads = [
            KeyLists.build(keys_1NE, Basis.fit(keys_1NE, asked(1, 256, seed=2)), size, 1, num_lists=num_lists)
            for keys_1NE in held_PNE[:, :keys].split(1)
        ]
        apart = Pools.of(list(held_PNE))
        for reads in (1, max(2, heads[0].tiles // 20), 1 << 30):
            lists = GpuLists.of([replace(head, reads=reads) for head in heads]).lists
            for keys_PNE in (held_PNE, apart) if size < 64 else (apart,):
                inputs = (query_XQE, keys_PNE, lists, TOP_K, length_X, pool_X)
                index_XQR, score_XQR = topk_listed(*inputs)
                _, plain_XQR = reference.topk_listed(*inputs, group=8 if held_PNE.shape[1] <= 1 << 15 else 16)
                # Where sums in another order round a query's code to another number, other lists may be read.
                coder_XES = lists.coder_PES[pool_X]
                codes = code_queries(query_XQE, coder_XES)[0], reference.code_queries(query_XQE, coder_XES)[0]
                alike_X = (codes[0] == codes[1]).all(-1).all(-1)
                assert alike_X.any(), "queries are coded differently"
                real_XQR, difference_XQR = score_XQR > -torch.inf, score_XQR - plain_XQR
                assert torch.equal(real_XQR[alike_X], (plain_XQR > -torch.inf)[alike_X])
                # Groups as good as the last are looked at as well: hardly ever less is found.
                difference_N = difference_XQR[alike_X][real_XQR[alike_X]]
                less = float((difference_N < -1e-2).float().mean())
                assert less < 0.005 and difference_N.mean() < 0.5, (less, difference_N.min(), difference_N.mean())
                found_XQRE = held_PNE[pool_X[:, None, None], index_XQR].float()
                true_XQR = torch.einsum("xqre,xqe->xqr", found_XQRE, query_XQE.float())
                torch.testing.assert_close(true_XQR[real_XQR], score_XQR[real_XQR], atol=1e-2, rtol=1e-4)
                for index_R, real_R in zip(index_XQR.flatten(0, 1), real_XQR.flatten(0, 1), strict=True):
                    assert len(index_R[real_R].unique()) == int(real_R.sum()) and (index_R < keys + late).all()
        # Everything was read.
        exact_XQR, _ = topk_scan(query_XQE, held_PNE, TOP_K, length_X, pool_X)
        share = float(recall(index_XQR, exact_XQR).mean())
        assert share > (0.9 if size < 64 else 0.99), share
        if DEVICE == "cuda":

            def search(
                query_XQE: Tensor, lists: Lists = lists, keys: Pools = apart, length_X: Tensor = length_X
            ) -> Any:
                return topk_listed(query_XQE, keys, lists, TOP_K, length_X)

            still_XQE = query_XQE.clone()
            replay, found = recorded(lambda search=search, query_XQE=still_XQE: search(query_XQE))
            for seed in (5, 6):
                still_XQE.copy_(asked(pools, queries, seed=seed))
                replay()
                for mine, its in zip(found, search(still_XQE), strict=True):
                    assert torch.equal(mine, its)
        print(f"checked {pools} × {keys:,} keys, {queries} queries, {size} coordinates: {share:.4f}", flush=True)


def check_index() -> None:
    """What `make_index` makes of a large bank on a GPU, and that it can be kept."""
    keys_HNE, query_HQE = clumps(2, 40_000, seed=3), asked(2, 600, seed=4).float()
    index = BankIndex.choose(keys_HNE, query_HQE, top_k=TOP_K, target=0.9, lists=True, together=3)
    assert all(isinstance(head, KeyLists) for head in index.heads), index.kinds
    kept = BankIndex.from_state(*index.state()).to(keys_HNE.device)
    given = slice(0, 2), query_HQE[:, :3], keys_HNE, TOP_K
    for mine, its in zip(index.search(*given), kept.search(*given), strict=True):
        assert torch.equal(mine, its)
    print(f"an index asked for .9: {', '.join(index.kinds)}; recall {index.recall}", flush=True)


def recorded(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A replay, and what it overwrites; on a CPU a call."""
    if DEVICE == "cpu":
        return lambda: run(), run()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


# ---- a bank of real keys ----------------------------------------------------------------------------------------


def documents(folder: Path) -> Iterator[Tensor]:
    """Token ids of each document of a folder."""
    held = TokenizedDocuments.load(folder)
    for number in range(len(held)):
        yield torch.from_numpy(held[number].astype("int64"))


def bank_of(model: LongMem, keys_HNE: Tensor, values_HNE: Tensor) -> MemoryBank:
    """A bank without texts, in place."""
    bank = MemoryBank(model.bank_spec, keys_HNE.device)
    bank._keys_HCE, bank._values_HCE, bank._length = keys_HNE, values_HNE, keys_HNE.shape[1]
    return bank


def queries_of(model: LongMem, tokens_T: Tensor, bank: MemoryBank) -> Tensor:
    """What the memory heads ask while the model reads on: (H, T, G, E), float32."""
    read, found = BankReader([bank], model.config), {}

    def retrieve(layer: int, query_BKGTE: Tensor) -> Retrieved:
        # Without those of the prefix, which is no text.
        found[layer] = query_BKGTE[0, :, :, 1:].float().transpose(1, 2)[:, ::EVERY]
        return read(layer, query_BKGTE)

    with torch.no_grad():
        model.read(model.with_prefix(tokens_T)[None].to(model.device), retrieve)
    return torch.cat([found[layer] for layer in model.config.memory_layers])


def real(model: LongMem, folders: Sequence[Path], tokens: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Keys and values (H, N, E) of documents, queries (H, T, G, E) of each document that was read on in, and a text."""
    keys, values, queries, total, prompt_T = [], [], [], 0, None
    for folder in folders:
        for ids_N in documents(folder):
            asks = folder == folders[0]
            length = min(len(ids_N) - (READ_ON if asks else 0), tokens - total, tokens // 4)
            if length < min(CONTEXT, tokens // 8):
                continue
            keys_HNE, values_HNE = model.encode(ids_N[:length], batch_size=64 if DEVICE == "cuda" else 1)
            if asks:
                last = slice(-CONTEXT, None)
                bank = bank_of(model, keys_HNE[:, last].contiguous(), values_HNE[:, last].contiguous())
                following_T = ids_N[length : length + READ_ON - 1]
                queries.append(queries_of(model, following_T, bank))
                prompt_T = following_T[:400] if prompt_T is None else prompt_T
            keys.append(keys_HNE)
            values.append(values_HNE)
            total += length
    assert prompt_T is not None and len(queries) > 1, "expected two documents at least"
    return torch.cat(keys, dim=1), torch.cat(values, dim=1), queries, prompt_T


def tiled(rows_HNE: Tensor, size: int, noise: float = 0.02) -> Tensor:
    """Rows repeated to a size, each repetition with noise of a share of a channel's spread."""
    random = torch.Generator(rows_HNE.device).manual_seed(0)
    out_HNE = torch.empty(rows_HNE.shape[0], size, rows_HNE.shape[2], dtype=rows_HNE.dtype, device=rows_HNE.device)
    real_tokens = rows_HNE.shape[1]
    for rows_NE, out_NE in zip(rows_HNE, out_HNE, strict=True):
        spread_E = noise * rows_NE[::16].float().std(0)
        for first in range(0, size, BLOCK):
            block_n = torch.arange(first, min(first + BLOCK, size), device=rows_HNE.device)
            block_nE = rows_NE[block_n % real_tokens].float()
            random_nE = torch.randn(block_nE.shape, generator=random, device=rows_HNE.device)
            out_NE[block_n] = (block_nE + random_nE * spread_E * (block_n >= real_tokens)[:, None]).to(out_NE.dtype)
    return out_HNE


# ---- what is measured -------------------------------------------------------------------------------------------


def spread(query_HTGE: Tensor, tokens: int) -> Tensor:
    """At most so many tokens, evenly."""
    return query_HTGE[:, :: -(-query_HTGE.shape[1] // tokens)]


def search_share(bank: MemoryBank, index: BankIndex, query_HTGE: Tensor) -> tuple[list[float], list[float]]:
    """Recall of each head among all of the bank's keys, a token's query heads being asked at once; and what share of
    the keys these read together."""
    found, share = [], []
    for head, keys_1NE, query_TGE in zip(index.heads, bank.keys_HNE.split(1), query_HTGE, strict=True):
        query_1QE = query_TGE.flatten(0, 1)[None]
        truth_1QR, _ = topk_scan(query_1QE, keys_1NE, TOP_K)
        if isinstance(head, KeyLists):
            lists = GpuLists.of([head]).lists
            zero_T = torch.zeros(len(query_TGE), dtype=torch.int64, device=query_TGE.device)
            parts = [
                topk_listed(part_tGE, keys_1NE, lists, TOP_K, zero_t + keys_1NE.shape[1], zero_t)[0]
                for part_tGE, zero_t in zip(query_TGE.split(64), zero_T.split(64), strict=True)
            ]
            index_1QR = torch.cat(parts).flatten(0, 1)[None]
            code_TGS, _ = reference.code_queries(query_TGE, lists.coder_PES)
            read_TL = torch.stack([reference.lists_read(lists, 0, code_GS) for code_GS in code_TGS])
            tiles_L = lists.first_PL1[0].diff()
            share.append(float((read_TL * tiles_L).sum(-1).float().mean() / head.tiles))
        else:
            index_1QR, _ = head.search(query_1QE, keys_1NE, TOP_K)
            share.append(1.0)
        found.append(float(recall(index_1QR, truth_1QR)))
    return found, share


def make_lists(keys_HNE: Tensor, query_HTGE: Tensor) -> tuple[dict[float, BankIndex], dict[str, float]]:
    """An index for each target, of the same lists; and seconds of each part."""
    heads: dict[float, list[KeyLists]] = {target: [] for target in TARGETS}
    seconds = {"size": 0.0, "lists": 0.0, "reads": 0.0}

    def lap(part: str, began: float) -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds[part] += (now := time.perf_counter()) - began
        return now

    for keys_1NE, query_TGE in zip(keys_HNE.split(1), query_HTGE, strict=True):
        query_1QE, now = query_TGE.flatten(0, 1)[None], time.perf_counter()
        # As `BankIndex.choose` does.
        some_1nE = keys_1NE[:, :: -(-keys_1NE.shape[1] // (1 << 17))].contiguous()
        size = Sketch.choose(some_1nE, query_1QE, top_k=TOP_K, target=(1 + max(TARGETS)) / 2).size
        now = lap("size", now)
        for more in range(size, keys_1NE.shape[-1] + 1, 16):
            whole = KeyLists.build(keys_1NE, Basis.fit(keys_1NE, query_1QE), more, 1)
            now = lap("lists", now)
            try:
                reads = [whole._fewest_reads(query_TGE, keys_1NE, TOP_K, target) for target in TARGETS]
            except ConfigError as error:
                print(f"{more} coordinates are too few: {error}", flush=True)
                continue
            finally:
                now = lap("reads", now)
            for target, least in zip(TARGETS, reads, strict=True):
                heads[target].append(replace(whole, reads=least))
            break
    # Lists are the same for all targets, only how much is read of them differs.
    return {target: BankIndex(tuple(heads[target]), TOP_K, target, "") for target in TARGETS}, seconds


def make_sketch(keys_HNE: Tensor, query_HTGE: Tensor) -> BankIndex:
    heads = [
        Sketch.build(keys_1NE, Basis.fit(keys_1NE, query_TGE.flatten(0, 1)[None]), 48)
        for keys_1NE, query_TGE in zip(keys_HNE.split(1), query_HTGE, strict=True)
    ]
    return BankIndex(tuple(heads), TOP_K, 0.99, "")


def search_times(
    model: LongMem, bank: MemoryBank, query_HTGE: Tensor, repeats: int, *, profile: bool = False
) -> list[float]:
    """p20, p50, p80 in milliseconds of what a step searches, with another token's queries each time."""
    placed = PlacedReader([bank], model.config, torch.device(model.device))
    heads = {layer: model.config.heads_of(layer) for layer in model.config.memory_layers}
    still_H1GE = query_HTGE[:, :1].to(bank.keys_HNE.dtype).contiguous()

    def step() -> list[Tensor]:
        return [
            placed(layer, still_H1GE[its].transpose(1, 2)[None]).index_BKGTR for layer, its in heads.items()
        ]  # (1, K, G, 1, E)

    replay, _ = recorded(step)
    # Written before each search, so that neither keys nor lists are in the cache, as in a step behind a model.
    cold = torch.empty(1 << (27 if DEVICE == "cuda" else 10), dtype=torch.uint8, device=DEVICE)
    times = []
    for run in range(repeats + 3):
        still_H1GE.copy_(query_HTGE[:, run % query_HTGE.shape[1]][:, None])
        cold.zero_()
        if DEVICE == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            replay()
            ended.record()
            torch.cuda.synchronize()
            times.append(began.elapsed_time(ended))
        else:
            start = time.perf_counter()
            replay()
            times.append(1000 * (time.perf_counter() - start))
    if profile and DEVICE == "cuda":
        kernels_of(replay)
    return torch.tensor(times[3:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def kernels_of(replay: Callable[[], None], runs: int = 20) -> None:
    """Prints what a step's searches are made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            replay()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.device_time_total]
    for event in sorted(found, key=lambda event: -event.device_time_total)[:16]:
        print(f"    {event.device_time_total / runs:8.1f} µs {event.count / runs:6.1f} × {event.key[:80]}")


def copy_bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(1 << (30 if DEVICE == "cuda" else 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (quantiles(lambda: target.copy_(source), DEVICE, 20)[1] / 1000)


class Table:
    """Rows that are written as soon as they are known."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.about = about
        columns = (
            "what", "bank", "search", "p20_ms", "p50_ms", "p80_ms", "share_of_backbone", "same_tokens", "logits_error",
            "recorded_differs",
            "recall_least", "recall_mean", "recall_by_head", "read_share", "coordinates", "tokens", "real_tokens",
            "GB_on_card",
        )  # fmt: skip
        self._file = None if path is None else path.open("w", newline="")
        self._writer = None if self._file is None else csv.DictWriter(self._file, [*columns, *about])
        if self._writer is not None:
            self._writer.writeheader()

    def add(self, **row: Any) -> None:
        card = {"GB_on_card": torch.cuda.memory_allocated() / 1e9} if DEVICE == "cuda" else {}
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)
        if self._writer is not None and self._file is not None:
            self._writer.writerow({**row, **card, **self.about})
            self._file.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, nargs="+", help="folders of `longmem tokenize`; the first one asks")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--real", type=int, default=1 << 20, help="tokens that are encoded")
    parser.add_argument("--size", type=int, default=1 << 24, help="tokens of the bank")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="what the rows say; asked of git by default")
    parser.add_argument("--no-compile", action="store_true", help="layers as they are, for comparison")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step's searches")
    parser.add_argument("--search-only", action="store_true", help="no steps of decoding")
    args = parser.parse_args()
    if args.tokens is None and not args.check_only:
        parser.error("give --tokens FOLDER …, or --check-only")
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {what}", flush=True)

    check()
    if DEVICE == "cuda":
        check_index()
    say("checked")
    if args.check_only:
        return
    commit = args.commit or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()  # fmt: skip
    about = {
        "copy_TB_per_s": copy_bandwidth() / 1e12, "compile": not args.no_compile,
        "commit": commit, "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }  # fmt: skip
    table = Table(args.out, about)
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    model = LongMem.from_pretrained(args.model, device=DEVICE, dtype=dtype)
    model.eval().requires_grad_(False)
    say("model loaded")
    keys_HNE, values_HNE, queries, prompt_T = real(model, args.tokens or [], args.real)
    real_tokens = keys_HNE.shape[1]
    say(f"{real_tokens:,} tokens encoded, {len(queries)} documents read on in")
    bank = bank_of(model, tiled(keys_HNE, args.size), tiled(values_HNE, args.size, noise=0.0))
    del keys_HNE, values_HNE
    choosing_HTGE = spread(torch.cat(queries[::2], dim=1), CHOOSING)
    measuring_HTGE = spread(torch.cat(queries[1::2], dim=1), MEASURING)
    tokens = {"tokens": len(bank), "real_tokens": real_tokens}
    say(f"a bank of {len(bank):,}")

    known_HNE = bank.keys_HNE[:, :-LATE]
    indexes, seconds = make_lists(known_HNE, choosing_HTGE)
    say(f"lists made: {', '.join(f'{part} {took:.1f} s' for part, took in seconds.items())}")
    table.add(what="make", search="lists", p50_ms=1000 * sum(seconds.values()), **tokens)
    ways: dict[str, BankIndex | None] = {"exact": None}
    ways |= {f"lists for {target}": index for target, index in indexes.items()}
    ways["int8 of 48"] = make_sketch(known_HNE, choosing_HTGE)
    for name, index in ways.items():
        bank._index = index
        row: dict[str, Any] = {"what": "search", "bank": f"{len(bank):,}", "search": name}
        row |= tokens
        if index is not None:
            found, share = search_share(bank, index, measuring_HTGE)
            row |= {"recall_least": min(found), "recall_mean": sum(found) / len(found)}
            row |= {"recall_by_head": " ".join(f"{one:.4f}" for one in found), "read_share": sum(share) / len(share)}
            row |= {"coordinates": " ".join(str(head.size) for head in index.heads)}
        repeats = 100 if DEVICE == "cuda" else 3
        times = search_times(model, bank, measuring_HTGE, repeats, profile=args.profile)
        table.add(**row, **dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True)))
    del ways["int8 of 48"]
    say("searches timed")
    if args.search_only:
        return
    settings = {"compile": not args.no_compile and DEVICE == "cuda"}
    steps(model, bank, ways, prompt_T, table, tokens, **settings)
    say("done")


def steps(
    model: LongMem,
    bank: MemoryBank,
    ways: dict[str, BankIndex | None],
    prompt_T: Tensor,
    table: Table,
    tokens: dict[str, int],
    **settings: Any,
) -> None:
    """A step of one text, in each way."""
    prompt_N = model.with_prefix(prompt_T)
    plan: list[tuple[str, MemoryBank | None, BankIndex | None, float]] = [
        ("backbone alone", None, None, 0.0),
        ("empty bank", None, None, 1.0),
        *((name, bank, index, 1.0) for name, index in ways.items()),
    ]
    alone, chosen, expected = None, [], []
    for name, read, index, memory in plan:
        bank._index = index
        decoder = begin(model, 1, [], memory=memory, **settings)
        logits_V, _ = decoder.begin(0, prompt_N, read)
        token, same, logits = int(logits_V.argmax()), 0, []
        exact = name == "exact"
        for step in range(32 if DEVICE == "cuda" else 3):
            # All go the way of exact search, so that what they choose can be compared.
            token = token if exact or not chosen else chosen[step]
            if exact:
                chosen.append(token)
            logits_BV, _ = decoder.step([token], [read])
            logits.append(logits_BV[0].float().clone())
            token = int(logits_BV[0].argmax())
        if exact:
            expected = logits
        if expected:
            same = sum(int(mine.argmax()) == int(its.argmax()) for mine, its in zip(logits, expected, strict=True))
        # The same step as it is recorded, and as it is called: each head by itself, then.
        decoder._token_B1.fill_(token)
        decoder._cache.look_at(decoder.capacity)
        called_BV = decoder.run(model.reader([read], 1))[0].clone()
        differs = error(decoder.step([token], [read])[0], called_BV)
        assert differs < 0.05, f"{name}: a recorded step differs by {differs} from the one that was called"
        times = quantiles(
            lambda d=decoder, b=read: d.step([5], [b])[0].argmax(-1).tolist(), DEVICE, 200 if DEVICE == "cuda" else 3
        )
        alone = alone or times[1]
        row: dict[str, Any] = dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True))
        row["recorded_differs"] = differs
        if expected and read is not None:
            wrong = error(torch.stack(logits), torch.stack(expected))
            row |= {"same_tokens": f"{same} of {len(logits)}", "logits_error": wrong}
        kept = {"search": name if read is not None else "", "bank": f"{len(bank):,}"}
        kept = kept if read is not None else {"bank": name}
        table.add(what="step", **kept, share_of_backbone=alone / times[1], **row, **(tokens if read else {}))
        del decoder
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    bank._index = None


if __name__ == "__main__":
    main()
