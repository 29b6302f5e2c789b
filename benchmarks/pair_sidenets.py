"""Two SideNets of one backbone behind the same banks: what one gains over the other on texts that go on.

    python benchmarks/pair_sidenets.py TOKENS A B [--remembered 59488] [--documents N] --out FILE.json

TOKENS is a folder of `longmem tokenize`. Of every document that is long enough so many tokens are remembered, and of
the 1,024 that follow the last 512 are scored, with nothing remembered, with the document's own bank and with that of
the next document. Differences are paired, so a CPU tells in minutes what the full evaluation takes a GPU for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longmem.bank import BankEntry, MemoryBank
from longmem.data import TokenizedDocuments
from longmem.model import LongMem

WINDOW, SCORED = 1024, 512
CONDITIONS = ("empty", "on", "wrong")


def bank_of(model: LongMem, ids_N: Tensor, name: str) -> MemoryBank:
    bank, starts_N = model.new_bank(), torch.arange(len(ids_N))
    offsets_N2 = torch.stack((starts_N, starts_N + 1), dim=1)
    bank.append(BankEntry(name, "x" * len(ids_N), 0, ids_N, offsets_N2, *model.encode(ids_N)))
    return bank


@torch.no_grad()
def losses(model: LongMem, window_T: Tensor, banks: tuple[MemoryBank | None, ...]) -> list[float]:
    """Mean loss of the scored tokens behind each bank, nats."""
    input_1T = model.with_prefix(window_T[:-1])[None].to(model.device)
    target_S = window_T[-SCORED:].to(model.device)
    found = []
    for bank in banks:
        logits_SV = model(input_1T, bank).logits_BTV[0, -SCORED:].float()
        found.append(float(torch.nn.functional.cross_entropy(logits_SV, target_S)))
    return found


def interval(difference_D: np.ndarray) -> tuple[float, float, float]:
    """Mean, and 95 % of the means of as many documents drawn anew."""
    draws = np.random.default_rng(0).integers(len(difference_D), size=(10000, len(difference_D)))
    low, high = np.percentile(difference_D[draws].mean(1), [2.5, 97.5])
    return float(difference_D.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("sidenets", nargs=2, metavar=("A", "B"))
    parser.add_argument("--remembered", type=int, default=59488)
    parser.add_argument("--documents", type=int, default=0, help="at most so many; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    texts = TokenizedDocuments.load(args.tokens)
    long_enough = [i for i in range(len(texts)) if len(texts[i]) >= args.remembered + WINDOW]
    chosen = long_enough[: args.documents or None]
    models = [LongMem.from_pretrained(name, device=args.device, dtype="bfloat16") for name in args.sidenets]
    ids = [torch.from_numpy(texts[i][: args.remembered + WINDOW].astype(np.int64)) for i in chosen]
    rows, following = [], bank_of(models[0], ids[0][: args.remembered], "0")
    first = following
    for number, ids_N in enumerate(ids):
        own = following
        following = first if number + 1 == len(ids) else bank_of(models[0], ids[number + 1][: args.remembered], "next")
        each = [losses(model, ids_N[args.remembered :], (None, own, following)) for model in models]
        rows.append({"document": texts.names[chosen[number]], "A": each[0], "B": each[1]})
        print(f"{number + 1} of {len(ids)}: {rows[-1]}", flush=True)
    loss_2DC = np.array([[row[name] for row in rows] for name in "AB"])
    result = {
        "sidenets": args.sidenets,
        "remembered": args.remembered,
        "conditions": CONDITIONS,
        "gain_percent": [100 * (1 - float(np.exp((loss[:, 1] - loss[:, 0]).mean()))) for loss in loss_2DC],
        "wrong_percent": [100 * (float(np.exp((loss[:, 2] - loss[:, 0]).mean())) - 1) for loss in loss_2DC],
        "B_less_A_nats": {name: interval(loss_2DC[1, :, c] - loss_2DC[0, :, c]) for c, name in enumerate(CONDITIONS)},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "documents": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: part for name, part in result.items() if name != "documents"}))


if __name__ == "__main__":
    main()
