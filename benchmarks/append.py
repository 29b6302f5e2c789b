"""What an append costs, and opening a store of many appends: what the manifest's second copy adds.

    OMP_NUM_THREADS=1 python benchmarks/append.py                       # adds to results/append.json

Appends of ten tokens with tiny keys and values, so that nothing but the store takes time, one by one in two folders: on
a disk, where they wait for it to sync, and in memory, where they do not. Then stores are opened whose manifest says
that a bank holds many pieces (there are no segments: opening reads none). Each commit adds its own figures; run it for
an earlier one with PYTHONPATH and --commit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from longmem.bank import BankEntry
from longmem.config import BankSpec, MemoryHead
from longmem.store import MemoryStore

RESULTS = Path(__file__).parent / "results" / "append.json"
SPEC = BankSpec("random", "0" * 64, (MemoryHead(0, 0),), 8)
NEVER = "2026-01-31T12:00:00.000000+00:00"


def entry(number: int) -> BankEntry:
    place_N = torch.arange(10)
    keys_HNE = torch.full((1, 10, 8), number).bfloat16()
    return BankEntry(
        f"source {number}", "ten tokens", 0, place_N, torch.stack((place_N, place_N + 1), 1), keys_HNE, keys_HNE
    )


def appends(folder: Path, count: int) -> list[float]:
    """Seconds of each."""
    with MemoryStore.open(folder) as store:
        bank, seconds = store.bank("notes", SPEC), []
        for number in range(count):
            piece, begun = entry(number), time.perf_counter()
            bank.append(piece)
            seconds.append(time.perf_counter() - begun)
    return seconds


def openings(folder: Path, pieces: int, rounds: int) -> tuple[list[float], dict[str, int]]:
    """Seconds of opening a store that says so, after the first; bytes of its databases."""
    with MemoryStore.open(folder) as store:
        store.bank("notes", SPEC)
    for path in folder.glob("twin.sqlite*"):  # it is made again from what is written here
        path.unlink()
    numbers = range(1, pieces + 1)
    database = sqlite3.connect(folder / "manifest.sqlite")
    database.executemany(
        "INSERT INTO segment VALUES (?, ?, ?, 1000)", ((n, f"{n:032x}.safetensors", f"{n:064x}") for n in numbers)
    )
    database.executemany(
        "INSERT INTO piece VALUES (?, ?, 0, 50, 10, ?, 0, 0, ?)", ((n, f"source {n}", n, NEVER) for n in numbers)
    )
    database.executemany("INSERT INTO held VALUES (1, ?, ?, ?)", ((n, n, n) for n in numbers))
    database.executemany("INSERT INTO version VALUES (1, ?, 'append', NULL, 0, ?)", ((n, NEVER) for n in numbers))
    database.commit()
    database.close()
    seconds = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        store = MemoryStore.open(folder)
        seconds.append(time.perf_counter() - begun)
        store.close()
    return seconds[1:], {path.name: path.stat().st_size for path in sorted(folder.glob("*.sqlite"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--appends", type=int, default=300)
    parser.add_argument("--pieces", type=int, nargs="*", default=[1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--commit", help="whose code this runs, if not the one that is checked out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    figures: dict[str, object] = {
        "device": platform.processor() or platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
        | {"sqlite": sqlite3.sqlite_version},
        "appends": arguments.appends,
    }
    for place in ("disk", "memory"):
        with tempfile.TemporaryDirectory(dir=getattr(arguments, place)) as folder:
            seconds = appends(Path(folder) / "store", arguments.appends)
        figures[f"append_{place}_ms_median"] = round(statistics.median(seconds) * 1e3, 2)
    for pieces in arguments.pieces:
        with tempfile.TemporaryDirectory(dir=arguments.memory) as folder:
            seconds, sizes = openings(Path(folder) / "store", pieces, arguments.rounds)
        figures[f"open_{pieces}_pieces"] = {"seconds_median": round(statistics.median(seconds), 4), "bytes": sizes}
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    known[arguments.commit or head] = figures
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
