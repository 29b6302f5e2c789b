"""How fast a SideNet trains: tokens a second with and without memory, and where the time goes.

    python benchmarks/train_speed.py [--out FILE.json]

The backbone has SmolLM2-135M's shape and random weights, the text is random too: neither changes what has to be
computed. On a CPU a tiny model stands in, to see that the script runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longmem.backbone import Backbone
from longmem.config import SideNetConfig
from longmem.data import TokenizedDocuments
from longmem.model import LongMem
from longmem.train import TrainConfig, Trainer

LOOK_UP = ((17, 1), (18, 2), (20, 2))
ALL = (*LOOK_UP, (23, 0), (23, 1), (23, 2))
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100000},
    tie_word_embeddings=True,
)  # fmt: skip


def build(device: str, heads: tuple, dtype: torch.dtype) -> LongMem:
    torch.manual_seed(0)
    config = SMOLLM2
    if device == "cpu":
        config = LlamaConfig(**{**SMOLLM2.to_dict(), "hidden_size": 72, "intermediate_size": 64, "vocab_size": 300})
    model: Any = LlamaForCausalLM(config)
    backbone = Backbone(model.to(device, dtype), name="random")
    return LongMem(backbone, SideNetConfig.around(heads, backbone.num_layers))


def measure(device: str, heads: tuple, config: TrainConfig, steps: int, profile: bool) -> dict:
    model = build(device, heads, torch.bfloat16)
    rng = np.random.default_rng(0)
    lengths = [config.segment * 200] * config.rows
    words = rng.integers(model.backbone.config.vocab_size, size=sum(lengths), dtype=np.uint16)
    documents = TokenizedDocuments(words, [str(i) for i in range(config.rows)], lengths)
    trainer = Trainer(model, documents, config)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    # Until the banks are full.
    for _ in range(min(200, -(-config.bank_tokens // config.segment) + 4) if config.memory else 6):
        trainer.step()
    wait()
    warm = time.perf_counter() - began
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        trainer.step()
        wait()
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    wait()
    tokens = config.rows * config.segment
    row = {
        "memory": config.memory,
        "heads": len(heads),
        "rows": config.rows,
        "segment": config.segment,
        "bank_tokens": config.bank_tokens,
        "empty_weight": config.empty_weight,
        "compile": config.compile,
        "warm_up_seconds": round(warm, 2),
        "step_ms_p50": round(1000 * float(np.median(times)), 2),
        "tokens_per_second": round(steps * tokens / (time.perf_counter() - began)),
    }
    if device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print(json.dumps(row), flush=True)
    if profile and device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                trainer.step()
            wait()
        for event in sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:28]:
            print(f"{event.device_time_total / 3000:8.2f} ms {event.count // 3:5d} {event.key[:110]}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="which rows of the table")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = TrainConfig(rows=16, segment=1024, bank_tokens=16384, empty_weight=0.0, compile=device == "cuda")
    if device == "cpu":
        base = dataclasses.replace(base, rows=2, segment=64, bank_tokens=256)
    long = dataclasses.replace(base, segment=2 * base.segment)
    full = dataclasses.replace(long, bank_tokens=2 * base.bank_tokens)
    plan = [
        (LOOK_UP, long),
        (LOOK_UP, dataclasses.replace(long, memory=False)),
        (ALL, full),
        (ALL, dataclasses.replace(full, empty_weight=0.5)),
        (LOOK_UP, base),
        (LOOK_UP, dataclasses.replace(base, memory=False)),
        (LOOK_UP, dataclasses.replace(base, compile=False)),
        (LOOK_UP, dataclasses.replace(base, compile=False, memory=False)),
    ]
    rows = []
    for number, (heads, config) in enumerate(plan):
        if args.only is None or number in args.only:
            rows.append(measure(device, heads, config, 20 if device == "cuda" else 2, args.profile))
    if args.out is not None:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        about = {"device": name, "torch": torch.__version__}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
