"""What a bank of many sources costs: agents remember a source a conversation, and each has a few tokens.

    python benchmarks/sources.py [--sources 100 10000 50000] [--out FILE.json]

Milliseconds a token of `LongMem.generate` with the SideNet that ships, random keys and values, 20 tokens a source, in
memory, with and without attribution. Floor: the same rows as one source.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch

from longmem import LongMem, MemoryBank
from longmem.bank import BankEntry

TOKENS, NEW, REPEATS = 20, 24, 5


def bank_of(model: LongMem, sources: int, tokens: int) -> MemoryBank:
    """So many sources of so many tokens each."""
    bank, random = model.new_bank(), torch.Generator().manual_seed(0)
    shape = (len(bank.spec.memory_heads), tokens, bank.spec.head_dim)
    for number in range(sources):
        keys_HNE, values_HNE = torch.randn(2, *shape, generator=random).to(model.backbone.dtype)
        ids_N, start_N = torch.randint(1000, 40000, (tokens,), generator=random), torch.arange(tokens)
        offsets_N2 = torch.stack((start_N, start_N + 1), dim=1)
        bank.append(BankEntry(f"chat/{number}", "x" * tokens, 0, ids_N, offsets_N2, keys_HNE, values_HNE))
    return bank


def milliseconds(model: LongMem, bank: MemoryBank, attribute: bool) -> float:
    """A token, the median of some texts behind one that is not counted."""
    took = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        settings = {"max_new_tokens": NEW, "stop_token_ids": (), "remember": False, "attribute": attribute}
        tokens = len(list(model.generate("What is my dog called?", bank=bank, **settings)))
        took.append(1000 * (time.perf_counter() - start) / tokens)
    return sorted(took[1:])[REPEATS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[100, 10000, 50000])
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
    if args.out is not None:
        about = {"commit": commit, "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
