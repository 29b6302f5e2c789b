"""What encryption costs when a bank is opened.

    OMP_NUM_THREADS=1 python benchmarks/encryption.py                   # results/encryption.json

A bank of random keys and values in the shape of SmolLM2-135M's (three memory heads of 64 in bfloat16) is written once
plain and once encrypted, consolidated, and opened again and again, the two in turns, each with and without comparing
checksums; files are in the page cache. All keys and values are read once in every opening, since a mapped file is read
only where it is touched.

H memory heads, N tokens, E head size.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from longmem.bank import BankEntry
from longmem.config import BankSpec, MemoryHead
from longmem.store import MemoryStore

RESULTS = Path(__file__).parent / "results" / "encryption.json"
SPEC = BankSpec("random", "0" * 64, (MemoryHead(16, 0), MemoryHead(18, 1), MemoryHead(20, 2)), 64)


def entry(source: str, tokens: int, seed: int) -> BankEntry:
    """A text of four characters a token."""
    random = torch.Generator().manual_seed(seed)
    starts_N = 4 * torch.arange(tokens)
    shape = (len(SPEC.memory_heads), tokens, SPEC.head_dim)
    return BankEntry(
        source=source,
        text="".join(f"{token % 1000:03} " for token in range(tokens)),
        char_start=0,
        token_ids_N=torch.randint(49_152, (tokens,), generator=random),
        offsets_N2=torch.stack((starts_N, starts_N + 4), 1),
        keys_HNE=torch.randn(shape, generator=random).bfloat16(),
        values_HNE=torch.randn(shape, generator=random).bfloat16(),
    )


def opening(folder: Path, name: str, *, verify: bool) -> float:
    """Seconds to open the store and the bank, and to read all keys and values."""
    start = time.perf_counter()
    with MemoryStore.open(folder, create=False) as store:
        bank = store.bank(name, verify=verify)
        float(bank.keys_HNE.float().sum() + bank.values_HNE.float().sum())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Opening an encrypted bank.")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--sources", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "memories"
        with MemoryStore.open(folder) as store:
            store.encrypt("encrypted")
            for name in ("plain", "encrypted"):
                bank = store.bank(name, SPEC)
                for number in range(args.sources):
                    bank.append(entry(f"{number}.txt", args.tokens // args.sources, number))
                store.consolidate(name)
            sizes = {info.name: info.bytes for info in store.banks()}
        ways = [(name, verify) for verify in (True, False) for name in ("plain", "encrypted")]
        seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
        for number in range(args.rounds + 1):
            for name, verify in ways:
                took = opening(folder, name, verify=verify)
                if number:  # the first is to warm up
                    seconds[name, verify].append(took)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ("torch", "safetensors", "cryptography")
    result = {
        "commit": commit,
        "device": platform.processor() or platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "tokens": args.tokens,
        "sources": args.sources,
        "rounds": args.rounds,
        "bytes": sizes,
        "opening": [
            {
                "bank": name,
                "checksums": verify,
                "seconds_median": round(statistics.median(took), 4),
                "seconds_min": round(min(took), 4),
                "seconds_max": round(max(took), 4),
            }
            for (name, verify), took in seconds.items()
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
