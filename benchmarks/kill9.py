"""`kill -9` at random instants: what was acknowledged is there, and nobody ever reads half of anything.

    OMP_NUM_THREADS=1 python benchmarks/kill9.py --kills 1000           # results/kill9.json

Several processes append to one bank of one store, each to a source of its own; one consolidates; one forks, merges and
forgets; one encrypts a bank and destroys its key; one reads, opening the bank anew and checking every token. Again and
again one of them is killed at a random instant and started again. In the end the store is verified, and every token
compared. Keys and values follow from source and place, so that any process can tell what they must be.

A killed process loses nothing that the kernel has taken over, so this says nothing about power loss: there the store
relies on fsync and on SQLite's own guarantees (WAL with synchronous = FULL).

H memory heads, N tokens, E head size.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import secrets
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from longmem.bank import BankEntry, MemoryBank
from longmem.config import BankSpec, MemoryHead
from longmem.errors import StoreKeyError
from longmem.store import MemoryStore, Stretch

RESULTS = Path(__file__).parent / "results" / "kill9.json"
SPEC = BankSpec("random", "0" * 64, (MemoryHead(0, 0), MemoryHead(1, 0)), 8)
PIECE = 10  # tokens of an append, and characters


def entry(source: str, char_start: int) -> BankEntry:
    """Ten tokens whose text, ids, keys and values follow from source and place alone."""
    place_N = torch.arange(char_start, char_start + PIECE)
    salt = sum(source.encode())
    keys_HNE = ((place_N * 7 + salt) % 251).bfloat16().expand(2, 8, -1).transpose(1, 2).contiguous()
    offsets_N2 = torch.stack([place_N, place_N + 1], dim=1)
    return BankEntry(source, f"{char_start:09} ", char_start, place_N + salt, offsets_N2, keys_HNE, -keys_HNE)


def torn(bank: MemoryBank) -> list[str]:
    """What of a bank is not what was appended, in words."""
    wrong = []
    for index, source in enumerate(bank.sources):
        length = bank.length_of(source)
        expected = [entry(source, start) for start in range(0, length, PIECE)]
        rows_N = bank.source_index_N == index
        if bank.text_of(source) != "".join(part.text for part in expected):
            wrong.append(f"text of {source}")
        for name, dim in (("token_ids_N", 0), ("offsets_N2", 0), ("keys_HNE", 1), ("values_HNE", 1)):
            ours, theirs = getattr(bank, name), torch.cat([getattr(part, name) for part in expected], dim)
            if not torch.equal(ours[:, rows_N] if dim else ours[rows_N], theirs):
                wrong.append(f"{name} of {source}")
    return wrong


def append(folder: str, source: str, pipe: Connection) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        while True:
            start = bank.length_of(source)
            bank.append(entry(source, start))
            _tell(pipe, start + PIECE)


def consolidate(folder: str, source: str, pipe: Connection) -> None:
    with MemoryStore.open(folder) as store:
        while True:
            made = store.consolidate("notes")
            _tell(pipe, max(made.segments_before - made.segments, 0))
            time.sleep(0.02)


def branch(folder: str, source: str, pipe: Connection) -> None:
    """Fork the bank inside and outside of its namespace, write, merge, forget; delete what is left, of a kill too."""
    with MemoryStore.open(folder) as store:
        while True:
            for info in store.banks():
                if info.name in ("notes/draft", "copy"):
                    store.delete(info.name)
            store.fork("notes", "notes/draft")
            store.fork("notes", "copy")
            draft = store.bank("notes/draft")
            draft.append(entry(source, draft.length_of(source)))
            wrong = torn(draft) + torn(store.bank("copy"))
            store.merge("notes", "notes/draft")
            store.forget("notes", [Stretch(source)])
            _tell(pipe, -len(wrong) if wrong else 1)


def seal(folder: str, source: str, pipe: Connection) -> None:
    """Encrypt a bank, destroy its key, delete it. What a kill leaves of it is whole, or its key was being destroyed."""
    with MemoryStore.open(folder) as store:
        while True:
            wrong = damaged(store)
            for name in sealed(store):
                store.delete(name)
            name = f"sealed-{secrets.token_hex(4)}"
            bank = store.bank(name, SPEC)
            bank.append(entry(source, 0))
            bank.append(entry(source, PIECE))
            store.encrypt(name)
            wrong += [f"{file} can be read" for file in Path(folder, "segments").iterdir() if holds(file, source)]
            bank.append(entry(source, 2 * PIECE))
            wrong += torn(store.bank(name))
            store.destroy_key(name)
            try:
                store.bank(name)
                wrong.append(f"{name} can be opened without its key")
            except StoreKeyError:
                pass
            _tell(pipe, -len(wrong) if wrong else 1)


def sealed(store: MemoryStore) -> list[str]:
    """Banks that are, or were to be, encrypted."""
    return [info.name for info in store.banks() if info.name.startswith("sealed-")]


def damaged(store: MemoryStore) -> list[str]:
    """Those that are damaged, or whose key is lost without having been destroyed."""
    wrong = []
    for name in sealed(store):
        try:
            wrong += torn(store.bank(name))
        except StoreKeyError:
            if not store.manifest.query("SELECT 1 FROM encryption WHERE namespace = ? AND destroyed > ''", name):
                wrong.append(f"the key of {name} is lost")
    return wrong


def holds(file: Path, source: str) -> bool:
    """Whether a file says the name of a source; one that is gone meanwhile does not."""
    try:
        return source.encode() in file.read_bytes()
    except FileNotFoundError:
        return False


def read(folder: str, source: str, pipe: Connection) -> None:
    while True:
        with MemoryStore.open(folder) as store:
            bank = store.bank("notes")
            wrong = torn(bank)
            bank.refresh()
            wrong += torn(bank)
        _tell(pipe, -len(wrong) if wrong else 1)


def _tell(pipe: Connection, number: int) -> None:
    # One write below PIPE_BUF, which the kernel takes whole or not at all: a kill tears no acknowledgement.
    os.write(pipe.fileno(), struct.pack("<q", number))


@dataclass
class Worker:
    """A process that is killed and started again, and what it has said."""

    act: Any
    source: str
    process: Any = None
    pipe: Any = None
    said: list[int] = field(default_factory=list)
    failed: int = 0

    def start(self, processes: Any, folder: Path) -> None:
        self.pipe, theirs = processes.Pipe(duplex=False)
        self.process = processes.Process(target=self.act, args=(str(folder), self.source, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def listen(self) -> None:
        while self.pipe.poll():
            data = os.read(self.pipe.fileno(), 8)
            if not data:
                return
            self.said += struct.unpack("<q", data)

    def kill(self) -> None:
        # One that has ended by itself ended with an error.
        self.failed += not self.process.is_alive()
        self.process.kill()
        self.process.join()
        self.listen()
        self.pipe.close()


def run(folder: Path, kills: int, writers: int = 3, seed: int = 0, longest: float = 0.05) -> dict[str, Any]:
    """Kill that often, then count what is lost or torn. `longest` is in seconds: the pause between two kills."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["longmem.store"])
    chance, begun = random.Random(seed), time.perf_counter()
    with MemoryStore.open(folder) as store:
        store.bank("notes", SPEC)
    workers = [Worker(append, f"writer {n}") for n in range(writers)]
    workers += [Worker(consolidate, "consolidate"), Worker(branch, "branch"), Worker(read, "read")]
    workers.append(Worker(seal, "the sealed source"))
    for worker in workers:
        worker.start(processes, folder)
    for _ in range(kills):
        # Half of the time as soon as the victim works, so that openings die as well as appends.
        victim = chance.choice(workers)
        if chance.random() < 0.5:
            victim.pipe.poll(10)
        time.sleep(chance.random() * longest)
        victim.kill()
        victim.start(processes, folder)
        for worker in workers:
            worker.listen()
    for worker in workers:
        worker.pipe.poll(10)
        worker.kill()
    lost, extra = 0, 0
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes")
        wrong = torn(bank) + damaged(store)
        for name in sealed(store):
            store.delete(name)
        report = store.verify()
        for worker in workers[:writers]:
            acknowledged = max(worker.said, default=0)
            lost += max(0, acknowledged - bank.length_of(worker.source))
            # A writer that is started again goes on where the store ends: what it lost before, it acknowledges twice.
            lost += sum(max(0, past + PIECE - said) for past, said in pairwise(worker.said))
            extra += max(0, bank.length_of(worker.source) - acknowledged)
    by_name = {worker.source: worker for worker in workers}
    return {
        "kills": kills,
        "writers": writers,
        "seconds": round(time.perf_counter() - begun, 1),
        "acknowledged_tokens": sum(max(worker.said, default=0) for worker in workers[:writers]),
        "lost_tokens": lost,
        "committed_but_unacknowledged_tokens": extra,
        "segments_merged": sum(by_name["consolidate"].said),
        "segments": report.segments,
        "reads": sum(said > 0 for said in by_name["read"].said),
        "forked_merged_and_forgotten": sum(said > 0 for said in by_name["branch"].said),
        "encrypted_and_destroyed": sum(said > 0 for said in by_name["the sealed source"].said),
        "torn_reads": sum(said < 0 for worker in workers[writers:] for said in worker.said) + len(wrong),
        "processes_that_failed": {worker.source: worker.failed for worker in workers if worker.failed},
        "faults": [fault.meaning for fault in report.faults],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--kills-per-store", type=int, default=50, help="then a new store, since readers read it whole")
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    packages = ("torch", "safetensors", "cryptography")
    total: dict[str, Any] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "device": platform.processor() or platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "stores": 0,
    }
    for seed in range(-(-arguments.kills // arguments.kills_per_store)):
        kills = min(arguments.kills_per_store, arguments.kills - seed * arguments.kills_per_store)
        with tempfile.TemporaryDirectory() as folder:
            found = run(Path(folder), kills, arguments.writers, seed)
        total["stores"] += 1
        for name, value in found.items():
            if name == "writers":
                total[name] = value
            elif name == "processes_that_failed":
                total[name] = total.get(name, 0) + sum(value.values())
            else:
                total[name] = value + total[name] if name in total else value
        print(json.dumps(found), flush=True)
    total["seconds"] = round(total["seconds"], 1)
    print(json.dumps(total, indent=1))
    arguments.out.write_text(json.dumps(total, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
