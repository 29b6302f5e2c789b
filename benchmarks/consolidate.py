"""Opening and searching a bank that was written in many commits: as it is, consolidated, and written in one commit.

    OMP_NUM_THREADS=1 python benchmarks/consolidate.py                  # results/consolidate.json

Random keys and values in the shapes of SmolLM2-135M's memory heads, random token ids, random words as text. "sources"
is how many sources take turns in the commits: one, or a hundred. Every way has a store of its own. Ways take turns,
files are in the page cache, medians of `--rounds`. "space" is everything in the store's folder over keys and values.

H memory heads, N tokens of a commit, E head size; X pools of keys, Q queries each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longmem.bank import BankEntry
from longmem.config import BankSpec, MemoryHead
from longmem.ops import topk_scan
from longmem.store import MemoryStore

RESULTS = Path(__file__).parent / "results" / "consolidate.json"
SPEC = BankSpec("random", "0" * 64, tuple(MemoryHead(layer, 0) for layer in range(6)), 64)
WORDS = ("the", "bees", "of", "Ada", "sleep", "on", "a", "roof", "in", "Brest", "until", "March")


def entry(source: str, char_start: int, tokens: int, random: torch.Generator) -> BankEntry:
    words = [WORDS[n] + " " for n in torch.randint(len(WORDS), (tokens,), generator=random).tolist()]
    ends_N = char_start + torch.tensor([len(word) for word in words]).cumsum(0)
    starts_N = torch.cat([ends_N.new_tensor([char_start]), ends_N[:-1]])
    keys_HNE, values_HNE = (torch.randn(6, tokens, 64, generator=random).bfloat16() for _ in range(2))
    ids_N = torch.randint(49152, (tokens,), generator=random)
    offsets_N2 = torch.stack([starts_N, ends_N], 1)
    return BankEntry(source, "".join(words), char_start, ids_N, offsets_N2, keys_HNE, values_HNE)


def write(folder: Path, commits: int, tokens: int, sources: int) -> float:
    """Seconds for `tokens` tokens in `commits` appends to bank `notes` of a store."""
    random = torch.Generator().manual_seed(0)
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        begun = time.perf_counter()
        for commit in range(commits):
            source = f"source {commit % sources}"
            bank.append(entry(source, bank.length_of(source), tokens // commits, random))
        return time.perf_counter() - begun


def timed(act: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of opening (checksums compared, and not) and of a search, for each store in the folder."""
    ways = ("one", "consolidated", "many")
    seconds: dict[str, dict[str, list[float]]] = {way: {"open": [], "unverified": [], "search": []} for way in ways}
    query_XQE = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(rounds):
        for way in ways:
            with MemoryStore.open(folder / way) as store:
                seconds[way]["open"].append(timed(partial(store.bank, "notes")))
                seconds[way]["unverified"].append(timed(partial(store.bank, "notes", verify=False)))
                keys_HNE = store.bank("notes", verify=False).keys_HNE
                topk_scan(query_XQE, keys_HNE, 32)
                seconds[way]["search"].append(timed(partial(topk_scan, query_XQE, keys_HNE, 32)))
    return {
        way: {f"{what}_ms": round(1000 * statistics.median(times), 2) for what, times in kinds.items()}
        for way, kinds in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--commits", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    raw = arguments.tokens * SPEC.bytes_per_token
    rows = []
    for sources in (1, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            wrote = write(folder / "many", arguments.commits, arguments.tokens, sources)
            write(folder / "consolidated", arguments.commits, arguments.tokens, sources)
            write(folder / "one", 1, arguments.tokens, 1)
            with MemoryStore.open(folder / "consolidated") as store:
                took = timed(partial(store.consolidate, "notes"))
                assert store.verify().ok
            found = measure(folder, arguments.rounds)
            disk = sum(path.stat().st_size for path in (folder / "consolidated").rglob("*") if path.is_file())
            times = {what: found["consolidated"][what] / found["one"][what] for what in found["one"]}
            rows.append(
                {
                    "tokens": arguments.tokens,
                    "commits": arguments.commits,
                    "sources": sources,
                    "write_seconds": round(wrote, 2),
                    "consolidate_seconds": round(took, 2),
                    **found,
                    "consolidated_to_one": {what[:-3]: round(ratio, 2) for what, ratio in times.items()},
                    "store_bytes": disk,
                    "raw_bytes": raw,
                    "space": round(disk / raw, 3),
                }
            )
            print(json.dumps(rows[-1], indent=1))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    result = {"commit": commit, **machine, "threads": torch.get_num_threads(), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
