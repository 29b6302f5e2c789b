"""What thinning a bank costs: perplexity of held-out texts when the bank is cut to 1/2, 1/4, 1/8 and 1/16 of its size.

    python benchmarks/retention.py TEXTS [--model smollm2-135m] [--prefill 16384] [--segments 2] [--out FILE.json]
                                         [--plot FILE.svg]

Every text's first tokens are remembered; each policy of `longmem.retention` thins the bank; blocks of the tokens behind
them, whose local window starts empty, are read with what is left. What reads have attended to is measured while the
remembered text itself is read for the first time, block by block, as in use: each block reads what was remembered
before it. Differences to the whole bank have 95 % bootstrap intervals over texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longmem import LongMem
from longmem.backbone import BackboneOutput
from longmem.bank import BankEntry, MemoryBank
from longmem.cli.common import load_documents
from longmem.config import RetentionPolicy
from longmem.drawing import new_figure
from longmem.ops import linear_nll
from longmem.retention import POLICIES, Cap, plan

SEGMENT = 1024
PARTS = (2, 4, 8, 16)
# What is compared: policy and unit.
WAYS: tuple[tuple[RetentionPolicy, int], ...] = tuple((policy, 64) for policy in POLICIES)


def named(policy: str, unit: int) -> str:
    return f"{policy}, units of {unit}"


def entry_of(model: LongMem, token_ids_N: Tensor) -> BankEntry:
    """Text and offsets mean nothing here."""
    starts_N = torch.arange(len(token_ids_N))
    offsets_N2 = torch.stack((starts_N, starts_N + 1), dim=1)
    return BankEntry("text", "x" * len(token_ids_N), 0, token_ids_N, offsets_N2, *model.encode(token_ids_N))


def seen_block(model: LongMem, token_ids_N: Tensor, first: int) -> BackboneOutput:
    """A block of the backbone, its window starting empty."""
    input_1T = model.with_prefix(token_ids_N[first : first + SEGMENT - 1])[None].to(model.device)
    return model.backbone(input_1T, boundaries={*model.sidenet.boundaries, model.backbone.num_layers})


def loss(model: LongMem, seen: BackboneOutput, target_X: Tensor, bank: MemoryBank | None) -> float:
    hidden_XD = model.backbone.final_norm(model.correct(seen, model.reader(bank, rows=1))[0]).flatten(0, 1)
    return float(linear_nll(hidden_XD, model.backbone.output_weight_VD, target_X.to(model.device)).mean())


def attended(model: LongMem, bank: MemoryBank, token_ids_N: Tensor) -> Tensor:
    """Attention that each row got while the text was read for the first time, (N,)."""
    mass_N = torch.zeros(len(bank), dtype=torch.float64)
    for first in range(SEGMENT, len(bank), SEGMENT):
        seen = seen_block(model, token_ids_N, first)
        for read in model.correct(seen, model.reader(bank.between(0, first), rows=1))[1]:
            weights = (read.weight_BKGTR * read.valid_BKGTR).flatten().double().cpu()
            mass_N.index_add_(0, read.index_BKGTR.flatten().cpu(), weights)
    return mass_N


def left_of(bank: MemoryBank, entry: BankEntry, keep_N: Tensor) -> MemoryBank:
    left = MemoryBank(bank.spec, bank.device)
    left.append(entry.thinned(keep_N))
    return left


@torch.no_grad()
def measure(model: LongMem, token_ids_N: Tensor, prefill: int, segments: int) -> dict[str, float]:
    """Mean loss of each way and size over the blocks of one text."""
    entry = entry_of(model, token_ids_N[:prefill])
    bank = MemoryBank(model.bank_spec, model.device)
    bank.append(entry)
    scores = {
        "surprise": model.surprise(token_ids_N[:prefill]).double(),
        "attention": attended(model, bank, token_ids_N),
    }
    banks: dict[str, MemoryBank | None] = {"empty": None, "all": bank}
    for policy, unit in WAYS:
        for part in PARTS:
            cap = Cap(tokens=prefill // part, policy=policy, unit=unit)
            keep_N = plan(bank, cap, scores.get(policy)).keep_N
            banks[f"{named(policy, unit)}, 1/{part}"] = left_of(bank, entry, keep_N)
    sums = dict.fromkeys(banks, 0.0)
    for first in range(prefill, prefill + segments * SEGMENT, SEGMENT):
        seen = seen_block(model, token_ids_N, first)
        for name, left in banks.items():
            sums[name] += loss(model, seen, token_ids_N[first : first + SEGMENT], left) / segments
    return sums


def summary(losses: dict[str, list[float]], seed: int) -> list[dict]:
    """Perplexity of every way, and what it costs beside the whole bank, in percent, with intervals over texts."""
    whole_D, empty_D = np.array(losses["all"]), np.array(losses["empty"])
    draws = np.random.default_rng(seed).integers(len(whole_D), size=(4000, len(whole_D)))
    rows = []
    for name, of_text in losses.items():
        more_D = np.array(of_text) - whole_D
        low, high = np.percentile(100 * np.expm1(more_D[draws].mean(1)), [2.5, 97.5])
        rows.append(
            {
                "way": name,
                "perplexity": float(np.exp(np.mean(of_text))),
                "cost_percent": float(100 * np.expm1(more_D.mean())),
                "cost_interval": [float(low), float(high)],
                "gain_kept": float((empty_D.mean() - np.mean(of_text)) / (empty_D.mean() - whole_D.mean())),
            }
        )
    return rows


def plot(rows: Sequence[dict], path: Path) -> None:
    """Cost against size, a line a way."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    at = {row["way"]: row for row in rows}
    for policy, unit in WAYS:
        some = [at[f"{named(policy, unit)}, 1/{part}"] for part in PARTS]
        axes.plot(PARTS, [row["cost_percent"] for row in some], marker="o", ms=3, label=named(policy, unit))
    axes.axhline(at["empty"]["cost_percent"], color="grey", lw=0.8)
    axes.text(2, at["empty"]["cost_percent"], "empty bank", va="bottom", color="grey", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(PARTS, [f"1/{part}" for part in PARTS])
    axes.set_xlabel("of the bank is kept")
    axes.set_ylabel("perplexity more than with all of it, %")
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prefill", type=int, default=16384)
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--documents", type=int, default=6, help="how many of those that are long enough")
    parser.add_argument("--first", type=int, default=0, help="leave out so many of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    model = LongMem.from_pretrained(args.model, dtype="bfloat16")
    documents = load_documents(args.texts, model.backbone)
    needed = args.prefill + args.segments * SEGMENT
    chosen = [i for i in range(len(documents)) if documents.lengths[i] >= needed][args.first :][: args.documents]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    settings = {name: getattr(args, name) for name in ("model", "prefill", "segments", "seed")}
    about = {**settings, "commit": commit, "device": str(model.device), "torch": torch.__version__}
    losses: dict[str, list[float]] = {}
    for number, index in enumerate(chosen):
        began = time.monotonic()
        ids_N = torch.from_numpy(documents[index][:needed].astype(np.int64))
        for name, value in measure(model, ids_N, args.prefill, args.segments).items():
            losses.setdefault(name, []).append(value)
        print(f"{documents.names[index]}: {time.monotonic() - began:.0f} s", flush=True)
        rows = summary(losses, args.seed)
        names = [Path(documents.names[i]).name for i in chosen[: number + 1]]
        if args.out is not None:
            found = {**about, "ways": rows, "documents": names, "losses": losses}
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| | perplexity | costs | of the gain kept |\n|---|---|---|---|")
    for row in rows:
        low, high = row["cost_interval"]
        cost = f"{row['cost_percent']:.2f} % ({low:.2f} – {high:.2f})"
        print(f"| {row['way']} | {row['perplexity']:.2f} | {cost} | {100 * row['gain_kept']:.0f} % |")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
