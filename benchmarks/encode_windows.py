"""What the windows that texts are written in are worth: the gain from memory with each, on held-out texts.

    python benchmarks/encode_windows.py TEXTS [--windows 768+256 1792+256 …] [--out FILE.json]

Blocks that start empty, as in `longmem eval perplexity --protocol blocks`; every document is written in windows of
NEW tokens behind CONTEXT tokens, and read with the same weights. TEXTS is what `longmem eval perplexity` takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longmem import LongMem
from longmem.cli.common import load_documents
from longmem.config import EncodeConfig
from longmem.ops import linear_nll
from longmem.streams import StreamBanks

SEGMENT = 1024


def encode(model: LongMem, ids_N: Tensor, windows: EncodeConfig) -> tuple[Tensor, Tensor]:
    """Keys and values as a model with these windows writes them."""
    before = model.sidenet.config
    model.sidenet.config = dataclasses.replace(before, encode=windows)
    try:
        return model.encode(ids_N)
    finally:
        model.sidenet.config = before


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--windows", nargs="+", default=["768+256", "1792+256"], help="NEW+CONTEXT; the first is today's"
    )
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--documents", type=int, default=8, help="how many of those that are long enough")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = LongMem.from_pretrained(args.model, dtype="bfloat16")
    documents = load_documents(args.texts, model.backbone)
    ways = {name: EncodeConfig(*map(int, name.split("+"))) for name in args.windows}
    needed = args.prefill + args.segments * SEGMENT
    chosen = [i for i in range(len(documents)) if documents.lengths[i] >= needed]
    losses: dict[str, list[float]] = {name: [] for name in ("empty", *ways)}
    names = []
    for index in chosen[: args.documents]:
        names.append(documents.names[index])
        tokens_1N = torch.from_numpy(documents[index][:needed].astype(np.int64))[None].to(model.device)
        written = {name: encode(model, tokens_1N[0, : needed - SEGMENT], windows) for name, windows in ways.items()}
        sums = dict.fromkeys(losses, 0.0)
        for first in range(args.prefill, needed, SEGMENT):
            prefix_11 = tokens_1N.new_full((1, 1), model.backbone.prefix_token_id)
            input_1T = torch.cat((prefix_11, tokens_1N[:, first : first + SEGMENT - 1]), dim=1)
            seen = model.backbone(input_1T, boundaries={*model.sidenet.boundaries, model.backbone.num_layers})
            target_X = tokens_1N[0, first : first + SEGMENT]
            for name in sums:
                reader = None
                if name != "empty":
                    keys_HBNE, values_HBNE = (rows_HNE[:, None, :first].to(model.device) for rows_HNE in written[name])
                    banks = StreamBanks(
                        1, first, model.config, model.backbone.head_dim, dtype=keys_HBNE.dtype, device=model.device
                    )
                    banks.append(keys_HBNE, values_HBNE, tokens_1N[:, :first])
                    reader = banks.reader()
                hidden_XD = model.backbone.final_norm(model.correct(seen, reader)[0]).flatten(0, 1)
                sums[name] += float(linear_nll(hidden_XD, model.backbone.output_weight_VD, target_X).mean())
        for name, total in sums.items():
            losses[name].append(total / args.segments)
        print(f"{names[-1]}: " + ", ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items()), flush=True)
    _report(losses, list(ways), names, args, str(model.device))


def _report(
    losses: dict[str, list[float]], ways: list[str], names: list[str], args: argparse.Namespace, device: str
) -> None:
    draws = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
    today_D = np.array(losses[ways[0]])
    print(f"| windows | gain | perplexity against {ways[0]} (95 % interval over texts) |\n|---|---|---|")
    rows = []
    for name in ways:
        on_D = np.array(losses[name])
        gain = 100 * (1 - np.exp((on_D - losses["empty"]).mean()))
        against = 100 * (np.exp((on_D - today_D).mean()) - 1)
        low, high = np.percentile(100 * (np.exp((on_D - today_D)[draws].mean(1)) - 1), [2.5, 97.5])
        rows.append({"windows": name, "gain_percent": gain, "against_percent": against, "interval": [low, high]})
        print(f"| {name} | {gain:.2f} % | {against:+.2f} % ({low:+.2f} – {high:+.2f}) |")
    if args.out is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        settings = {"model": args.model, "prefill": args.prefill, "segments": args.segments, "commit": commit}
        found = {**settings, "device": device, "torch": torch.__version__, "ways": rows}
        args.out.write_text(json.dumps({**found, "documents": names, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
