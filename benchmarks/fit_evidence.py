"""Teach a trained SideNet when passage evidence counts, without training it: a regression for each query head.

    python benchmarks/fit_evidence.py SIDENET TEXTS HISTORIES --out FOLDER [--precision int4]

SIDENET is a checkpoint or a shipped one; TEXTS and HISTORIES are folders of `longmem tokenize` and `longmem histories`,
read in equal shares as in training. Evidence (`longmem.evidence`) helps where something told is asked for and hurts
prose, whose words lead anywhere. So each head's gain, a linear function of its query, is fitted by ridge regression: 1
where the next token is part of a marked answer, 0 everywhere else; moved so that it is 0 on average there, and
multiplied by 1.3. All else stays as it is.

B streams, T tokens, H query heads, E head size, N tokens in all.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.attention import MemoryAttention
from longmem.checkpoint import read_config
from longmem.data import Mixture, TokenizedDocuments
from longmem.model import SHIPPED, LongMem
from longmem.train import TrainConfig, Trainer

# Segments of every stream that only fill its bank.
UNCOUNTED = 10
# Of the squared errors' weight, answers get this share: they are one token in a hundred.
ANSWERS = 0.35
# Times the mean variance of a query's coordinates: what holds the regression back.
RIDGE = 0.02
FACTOR = 1.3


@torch.no_grad()
def queries_of(model: LongMem, texts: Mixture, steps: int) -> tuple[dict[int, Tensor], Tensor]:
    """Queries (N, H, E) of each memory layer, behind banks, and whether the next token is part of an answer (N,)."""
    # Banks are mostly the row's own; a quarter are another's and a quarter crowded, as in training.
    config = TrainConfig(
        rows=4, segment=512, bank_tokens=8192, max_segments=32, wrong_fraction=0.25, crowded_fraction=0.25, crowd=4
    )
    dtype = model.backbone.dtype
    trainer = Trainer(model, texts, config)
    model.sidenet.to(dtype)
    asked: dict[int, list[Tensor]] = {layer: [] for layer in model.config.memory_layers}
    counts, hooks = False, []

    def note(module: MemoryAttention, inputs: tuple[Any, ...]) -> None:
        if counts:
            query_BTKGE = inputs[0][:, :, :, :-1].permute(0, 3, 1, 2, 4)
            asked[module.layer].append(query_BTKGE.flatten(2, 3).flatten(0, 1).bfloat16())

    for module in model.sidenet.modules():
        if isinstance(module, MemoryAttention):
            hooks.append(module.register_forward_pre_hook(note))
    answers = []
    for step in range(steps):
        counts = step >= UNCOUNTED
        segments = trainer.read()
        if counts:
            assert segments.answers_BS is not None, "no text marks answers: give histories"
            answers.append(segments.answers_BS.flatten())
        print(f"\r{step + 1} of {steps} segments", end="", flush=True)
    print()
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in asked.items()}, torch.cat(answers)


def gain_of(query_NE: Tensor, answer_N: Tensor) -> tuple[Tensor, Tensor]:
    """A vector (E,) and a number that say 1 of answers' queries and 0 of all others, roughly."""
    known_NE = torch.cat((query_NE, torch.ones(len(query_NE), 1)), dim=1)
    share_N = torch.where(answer_N, ANSWERS / answer_N.sum(), (1 - ANSWERS) / (~answer_N).sum()) * len(answer_N)
    squares_EE = known_NE.T @ (known_NE * share_N[:, None])
    squares_EE += RIDGE * squares_EE.diagonal()[:-1].mean() * torch.eye(len(squares_EE))
    fitted_E = torch.linalg.solve(squares_EE, known_NE.T @ (share_N * answer_N.float()))
    elsewhere = (known_NE @ fitted_E)[~answer_N].mean()
    return FACTOR * fitted_E[:-1], FACTOR * (fitted_E[-1] - elsewhere)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sidenet")
    parser.add_argument("texts", type=Path)
    parser.add_argument("histories", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=70, help="segments of each of four streams")
    parser.add_argument("--precision", choices=["bfloat16", "int8", "int4"], default="int4")
    args = parser.parse_args()
    texts = Mixture((TokenizedDocuments.load(args.texts), TokenizedDocuments.load(args.histories)), (0.5, 0.5))
    asking = LongMem.from_pretrained(args.sidenet, device="cpu", dtype="bfloat16")
    queries, answer_N = queries_of(asking, texts, args.steps)
    print(f"{int(answer_N.sum()):,} of {len(answer_N):,} tokens are of answers")

    plain = LongMem.from_pretrained(args.sidenet, device="cpu", dtype="float32")
    model = LongMem(plain.backbone, dataclasses.replace(plain.config, passage_evidence=True))
    model.sidenet.load_state_dict(plain.sidenet.state_dict(), strict=False)
    for module in model.sidenet.modules():
        if isinstance(module, MemoryAttention):
            query_NHE, (kv_heads, group) = queries[module.layer].float(), module.evidence_KG.shape
            for head in range(kv_heads * group):
                k, g = divmod(head, group)
                vector_E, number = gain_of(query_NHE[:, head] * module.scaling, answer_N)
                module.evidence_query_KGE[k, g], module.evidence_KG[k, g] = vector_E, number
    folder = SHIPPED / args.sidenet if (SHIPPED / args.sidenet).is_dir() else Path(args.sidenet)
    how = {"tokens": len(answer_N), "answers": int(answer_N.sum()), "weight": ANSWERS, "ridge": RIDGE, "factor": FACTOR}
    training = read_config(folder).get("training", {}) | {"evidence": how}
    model.save(args.out, precision=args.precision, training=training)


if __name__ == "__main__":
    main()
