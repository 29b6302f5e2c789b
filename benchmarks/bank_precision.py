"""What remembered keys and values in few bits cost: the gain from memory that is left, on held-out texts.

    python benchmarks/bank_precision.py TEXTS [--model smollm2-135m] [--prefill 8192] [--segments 2] [--out FILE.json]

Blocks that start empty, as in `longmem eval perplexity --protocol blocks`; every document's bank is rounded as a bank
of the model rounds it, and read back in bfloat16. Beside it, for comparison: keys turned and coded as values are, also
centred on the document's own mean, and plain rounding with one scale a row. TEXTS is what `longmem eval perplexity`
takes. The interval of what is kept is that of 10,000 draws of as many documents (95 %).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longmem import LongMem
from longmem.bank import BankEntry, packed, unpacked
from longmem.cli.common import load_documents
from longmem.codec import pack_rows, unpack_rows
from longmem.config import BankSpec
from longmem.ops import linear_nll
from longmem.streams import StreamBanks


def plain(rows_HNE: Tensor, bits: int) -> Tensor:
    """Symmetric rounding with one float16 scale a row, neither turned nor centred."""
    top = 2 ** (bits - 1) - 1
    scale_HN1 = (rows_HNE.float().abs().amax(-1, keepdim=True) / top).half().float().clamp(min=1e-8)
    return ((rows_HNE.float() / scale_HN1).round() * scale_HN1).bfloat16()


def kept(spec: BankSpec) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values as a bank of this spec reads them back."""

    def read(keys_HNE: Tensor, values_HNE: Tensor) -> tuple[Tensor, Tensor]:
        tokens = keys_HNE.shape[1]
        places = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, 2, dtype=torch.int64)
        entry = unpacked(packed(BankEntry("", "", 0, *places, keys_HNE, values_HNE), spec), spec)
        return entry.keys_HNE, entry.values_HNE

    return read


def interval(empty_D: np.ndarray, full_D: np.ndarray, way_D: np.ndarray) -> list[float]:
    """Of the share of the gain that is kept, over documents drawn anew."""
    draws_XD = np.random.default_rng(0).integers(len(empty_D), size=(10_000, len(empty_D)))
    saved_X, whole_X = ((empty_D - loss_D)[draws_XD].sum(1) for loss_D in (way_D, full_D))
    return [float(q) for q in np.quantile(saved_X / whole_X, [0.025, 0.975])]


def each(way: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda keys_HNE, values_HNE: (way(keys_HNE), way(values_HNE))


Way = tuple[float, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]


def ways_for(model: LongMem) -> dict[str, Way]:
    """Bytes a number, and what is read back."""
    return {
        "bfloat16": (2.0, kept(model.bank_spec)),
        "8 bits": (1.0, kept(model.bank_spec_in("int8"))),
        "4 bits": (0.5, kept(model.bank_spec_in("int4"))),
        "4 bits, keys turned": (0.5, kept(dataclasses.replace(model.bank_spec_in("int4"), grid=None))),
        "4 bits, keys turned, their own centre": (0.5, each(lambda rows_HNE: unpack_rows(pack_rows(rows_HNE, 4)))),
        "4 bits, plain": (0.5, each(lambda rows_HNE: plain(rows_HNE, 4))),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--documents", type=int, default=8, help="how many of those that are long enough")
    parser.add_argument("--first", type=int, default=0, help="leave out so many of them")
    parser.add_argument("--named", default="", help="only documents whose name holds this")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="what the model computes in"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = LongMem.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    documents = load_documents(args.texts, model.backbone)
    segment, needed = 1024, args.prefill + args.segments * 1024
    chosen = [i for i, name in enumerate(documents.names) if args.named in name and documents.lengths[i] >= needed]
    ways = ways_for(model)
    losses: dict[str, list[float]] = {name: [] for name in ("empty", *ways)}
    names = []
    for index in chosen[args.first :][: args.documents]:
        names.append("/".join(Path(documents.names[index]).parts[-2:]))
        tokens_1N = torch.from_numpy(documents[index][:needed].astype(np.int64))[None].to(model.device)
        keys_HNE, values_HNE = (rows_HNE.to(model.device) for rows_HNE in model.encode(tokens_1N[0]))
        rounded = {name: way(keys_HNE, values_HNE) for name, (_, way) in ways.items()}
        sums = dict.fromkeys(losses, 0.0)
        for first in range(args.prefill, needed, segment):
            prefix_11 = tokens_1N.new_full((1, 1), model.backbone.prefix_token_id)
            input_1T = torch.cat((prefix_11, tokens_1N[:, first : first + segment - 1]), dim=1)
            seen = model.backbone(input_1T, boundaries={*model.sidenet.boundaries, model.backbone.num_layers})
            target_X = tokens_1N[0, first : first + segment]
            for name in sums:
                reader = None
                if name != "empty":
                    shape = (1, args.prefill + args.segments * segment, model.config, model.backbone.head_dim)
                    banks = StreamBanks(*shape, dtype=torch.bfloat16, device=model.device)
                    keys, values = (rows_HNE[:, None, :first] for rows_HNE in rounded[name])
                    banks.append(keys, values, tokens_1N[:, :first])
                    reader = banks.reader()
                hidden_XD = model.backbone.final_norm(model.correct(seen, reader)[0]).flatten(0, 1)
                sums[name] += float(linear_nll(hidden_XD, model.backbone.output_weight_VD, target_X).mean())
        for name, total in sums.items():
            losses[name].append(total / args.segments)
        print(f"{names[-1]}: " + ", ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items()), flush=True)
    heads, head_dim = len(model.config.memory_heads), model.backbone.head_dim
    mean = {name: float(np.mean(values)) for name, values in losses.items()}
    print("| | bytes a token and head | of all heads | gain | gain kept |\n|---|---|---|---|---|")
    rows = []
    for name, (number_bytes, _) in ways.items():
        per_head = int(2 * head_dim * number_bytes) + (0 if name == "bfloat16" else 4)
        saved = mean["empty"] - mean[name]
        share = saved / (mean["empty"] - mean["bfloat16"])
        gain = 1 - np.exp(-saved)
        low, high = interval(*(np.array(losses[which]) for which in ("empty", "bfloat16", name)))
        rows.append({"way": name, "bytes_per_head": per_head, "gain": gain, "kept": share, "kept_95": [low, high]})
        said = f"{100 * share:.1f} % ({100 * low:.1f} – {100 * high:.1f})"
        print(f"| {name} | {per_head} | {heads * per_head} | {100 * gain:.2f} % | {said} |")
    if args.out is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        settings = {"model": args.model, "prefill": args.prefill, "segments": args.segments, "commit": commit}
        where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
        found = {**settings, "device": where, "dtype": args.dtype, "torch": torch.__version__, "ways": rows}
        args.out.write_text(json.dumps({**found, "documents": names, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
