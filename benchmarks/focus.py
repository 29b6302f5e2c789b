"""What it costs to choose what is read of a large bank (`longmem.focus`): once a prompt, turn or half window.

    python benchmarks/focus.py [--sizes 262144 1048576 4194304] [--out results/focus-DEVICE.csv]

Banks of random keys and Zipf-distributed token ids, one key-value head of size 64 for each of six memory heads. First
time: the words of the whole bank are indexed. Then 1,024 more tokens came. Then the bank is as it was. Floor: the
tokens that are chosen are copied once.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
from pathlib import Path

import torch
from decode_gpu import quantiles
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.config import BankSpec, MemoryHead
from longmem.focus import FOCUS, Focus

SPEC = BankSpec("random", "0" * 64, tuple(MemoryHead(layer, 0) for layer in range(6)), 64)
VOCABULARY = 49152
REPEATS = 9


def words(tokens: int, device: str, seed: int) -> Tensor:
    """Token ids of which the k-th is 1 / k as frequent as the first."""
    generator = torch.Generator(device).manual_seed(seed)
    uniform_N = torch.rand(tokens, generator=generator, device=device)
    return (VOCABULARY**uniform_N).long() - 1


def bank_of(token_ids_N: Tensor) -> MemoryBank:
    shape = len(SPEC.memory_heads), len(token_ids_N), SPEC.head_dim
    keys_HNE, values_HNE = (torch.zeros(shape, dtype=torch.bfloat16, device=token_ids_N.device) for _ in range(2))
    return MemoryBank.of_rows(SPEC, keys_HNE, values_HNE, token_ids_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 18, 1 << 20, 1 << 22])
    parser.add_argument("--window", type=int, default=1536, help="tokens of the window")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    rows = []
    window = words(args.window, device, 1).tolist()
    for size in args.sizes:
        token_ids_N = words(size + 1024, device, 2)
        bank, grown = bank_of(token_ids_N[:size]), bank_of(token_ids_N)
        grown.layout = bank.layout  # the same rows, and some more
        Focus().on(bank, window)  # what a device gets ready at first
        row_P = torch.arange(FOCUS, device=device)
        figures = {
            "copy alone": quantiles(lambda bank=bank, row_P=row_P: bank.part(row_P), device, REPEATS),
            "first": quantiles(lambda bank=bank: Focus().on(bank, window), device, REPEATS),
        }
        focus = Focus()
        focus.on(bank, window)
        index = focus._words.pop(bank)
        # Once: the second time there is nothing to add.
        figures["1,024 more are indexed"] = quantiles(lambda index=index, grown=grown: index.update(grown), device, 1)
        focus.on(grown, window)
        figures["as it was"] = quantiles(lambda focus=focus, grown=grown: focus.on(grown, window), device, REPEATS)
        for what, (p20, p50, p80) in figures.items():
            rows.append({"tokens": size, "what": what, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, **about})
            print(f"{size:>12,} {what:24} {p50:9.2f} ms ({p20:.2f} – {p80:.2f})", flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
