"""What a bank of many sources costs: agents remember a source a conversation, and each has a few tokens.

    python benchmarks/sources.py [--sources 100 10000 50000] [--stored 6000] [--out FILE.json]

Milliseconds a token of `LongMem.generate` with the SideNet that ships, random keys and values, 20 tokens a source, in
memory, with and without attribution. Floor: the same rows as one source. Then on disk: an append, opening the bank,
forgetting 500 sources at once, and until another process that has it open has followed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from longmem import LongMem, MemoryBank, MemoryStore
from longmem.bank import BankEntry
from longmem.store import StoredBank

TOKENS, NEW, REPEATS, GONE = 20, 24, 5, 500


def entries(model: LongMem, sources: int, tokens: int) -> Iterator[BankEntry]:
    """So many sources of so many tokens each."""
    random, spec = torch.Generator().manual_seed(0), model.bank_spec
    for number in range(sources):
        shape = (2, len(spec.memory_heads), tokens, spec.head_dim)
        keys_HNE, values_HNE = torch.randn(shape, generator=random).to(model.backbone.dtype)
        ids_N, start_N = torch.randint(1000, 40000, (tokens,), generator=random), torch.arange(tokens)
        offsets_N2 = torch.stack((start_N, start_N + 1), dim=1)
        yield BankEntry(f"chat/{number}", "x" * tokens, 0, ids_N, offsets_N2, keys_HNE, values_HNE)


def bank_of(model: LongMem, sources: int, tokens: int) -> MemoryBank:
    bank = model.new_bank()
    for entry in entries(model, sources, tokens):
        bank.append(entry)
    return bank


def on_disk(model: LongMem, sources: int) -> dict[str, float]:
    """Seconds of what is done to a stored bank; appends are milliseconds, the median."""
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(folder) as store:
        bank, appends = store.bank("me", spec=model.bank_spec), []
        for entry in entries(model, sources, TOKENS):
            appends.append(seconds(lambda entry=entry: bank.append(entry)))
        with MemoryStore.open(folder) as other:
            opened: list[StoredBank] = []
            opening = seconds(lambda: opened.append(other.bank("me")))
            forgetting = seconds(lambda: bank.forget_all(bank.sources[:GONE]))
            following = seconds(opened[0].refresh)
    append = 1000 * sorted(appends)[sources // 2]
    return {"append_ms": append, "open_s": opening, f"forget_{GONE}_s": forgetting, "follow_s": following}


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def milliseconds(model: LongMem, bank: MemoryBank, attribute: bool) -> float:
    """A token, the median of some texts behind one that is not counted."""
    took = []
    settings = {"max_new_tokens": NEW, "stop_token_ids": (), "remember": False, "attribute": attribute}
    for _ in range(1 + REPEATS):
        took.append(seconds(lambda: list(model.generate("What is my dog called?", bank=bank, **settings))))
    return 1000 * sorted(took[1:])[REPEATS // 2] / NEW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[100, 10000, 50000])
    parser.add_argument("--stored", type=int, default=6000, help="sources of the bank on disk")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = LongMem.from_pretrained("smollm2-135m", device="cpu", dtype="bfloat16")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = []
    for sources in args.sources:
        for count, tokens in ((sources, TOKENS), (1, sources * TOKENS)):
            bank = bank_of(model, count, tokens)
            plain, attributed = (milliseconds(model, bank, attribute) for attribute in (False, True))
            rows.append({"sources": count, "tokens": len(bank), "ms": plain, "ms_attributed": attributed})
            print(
                f"{count:>9,} sources, {len(bank):>9,} tokens: {plain:6.1f} ms, attributed {attributed:6.1f}",
                flush=True,
            )
    stored = {"sources": args.stored, **on_disk(model, args.stored)}
    print(stored)
    if args.out is not None:
        about = {"commit": commit, "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({**about, "rows": rows, "stored": stored}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
