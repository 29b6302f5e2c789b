"""Do the plain implementation and the fast paths of a CPU agree on the perplexity?

    python benchmarks/agreement.py TEXT [--model smollm2-135m] [--remember 8192] [--score 256]

A text's first tokens are remembered, and those that follow read in one window: at once or token by token behind a
cache, as in decoding, plain or compiled, by exact search or by an index. The first row is the reference: all tokens
at once, searched by `longmem.ops.reference` (attention to what many queries found is its own anyway). Banks are written
by transformers in float32, but for two rows that say otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path

import torch
from search_cpu import processor
from torch import Tensor

from longmem import LongMem
from longmem.bank import BankEntry, MemoryBank
from longmem.index import BankReader
from longmem.ops import reference
from longmem.retrieved import Retrieve

RESULTS = Path(__file__).parent / "results" / "agreement.json"


class PlainReader(BankReader):
    """Searches by the reference alone."""

    def _search(self, bank: MemoryBank, heads: slice, query_KQE: Tensor) -> tuple[Tensor, Tensor]:
        return reference.topk_scan(query_KQE, bank.keys_HNE[heads], self.config.top_k)


def bank_of(model: LongMem, ids_N: Tensor, keys_values: tuple[Tensor, Tensor]) -> MemoryBank:
    bank, starts_N = model.new_bank(), torch.arange(len(ids_N))
    offsets_N2 = torch.stack([starts_N, starts_N + 1], dim=1)
    bank.append(BankEntry("text", "x" * len(ids_N), 0, ids_N, offsets_N2, *keys_values))
    return bank


def by_transformers(model: LongMem, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """What `encode` means: windows through transformers' layers, in the model's own precision."""
    parts = []
    for first, kept, end in model.config.encode.windows(0, len(ids_N)):
        seen = model.backbone(model.with_prefix(ids_N[first:end])[None], boundaries=model.config.memory_layers)
        parts.append([rows_HBTE[:, 0, kept - first + 1 :] for rows_HBTE in model.keys_values(seen)])
    keys_HNE, values_HNE = (torch.cat(rows, dim=1) for rows in zip(*parts, strict=True))
    return keys_HNE, values_HNE


def at_once(model: LongMem, ids_T: Tensor, retrieve: Retrieve | None) -> float:
    hidden_1TD, _ = model.read(ids_T[None, :-1], retrieve)
    return perplexity(model.backbone.logits(hidden_1TD)[0], ids_T)


def one_by_one(model: LongMem, ids_T: Tensor, retrieve: Retrieve | None) -> float:
    cache, logits = model.new_cache(), []
    for token_1 in ids_T[:-1].split(1):
        hidden_11D, _ = model.read(token_1[None], retrieve, cache=cache)
        logits.append(model.backbone.logits(hidden_11D)[0])
    return perplexity(torch.cat(logits), ids_T)


def perplexity(logits_TV: Tensor, ids_T: Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:]).item())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Do the reference and the fast paths agree on the perplexity?")
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--remember", type=int, default=8192)
    parser.add_argument("--score", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LongMem.from_pretrained(args.model, device="cpu", dtype="float32")
    encoded = model.tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids_N = torch.tensor(encoded[: args.remember + args.score])
    past_N, ids_T = ids_N[: args.remember], model.with_prefix(ids_N[args.remember :])
    bank = bank_of(model, past_N, by_transformers(model, past_N))
    reader = model.reader(bank, rows=1)
    rows: dict[str, float] = {}

    def row(name: str, value: float) -> None:
        rows[name] = value
        print(f"{name:<44}{value:.5f}", flush=True)

    row("reference", at_once(model, ids_T, PlainReader([bank], model.config)))
    row("at once", at_once(model, ids_T, reader))
    row("no bank, at once", at_once(model, ids_T, None))
    row("token by token", one_by_one(model, ids_T, reader))
    bank.use_index(model.make_index(bank, recall=0.99))
    row("token by token, index asked for .99", one_by_one(model, ids_T, reader))
    bank.use_index(None)
    half = LongMem.from_pretrained(args.model, device="cpu", dtype="bfloat16")
    for name, written in (
        ("bank written by `encode`, at once", model.encode(past_N)),
        ("bank written in bfloat16, at once", by_transformers(half, past_N)),
    ):
        row(name, at_once(model, ids_T, model.reader(bank_of(model, past_N, written), rows=1)))
    model.compile_decoding()
    row("token by token, compiled", one_by_one(model, ids_T, reader))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"commit": commit, "device": processor(), "torch": torch.__version__, "model": args.model}
    found |= {"text": args.text.name, "remember": args.remember, "score": args.score, "perplexity": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
