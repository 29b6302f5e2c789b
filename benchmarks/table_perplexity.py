"""A table of perplexity results, for some of their documents, each beside a memory-free twin if there is one.

    python benchmarks/table_perplexity.py RESULT.json… [--documents books] [--twin PREFIX]

Reads files of `longmem eval perplexity --json`. With `--twin PREFIX` the twin of DIR/NAME-PROTOCOL-PREFILL.json is
DIR/PREFIX-PROTOCOL-PREFILL.json. Intervals are 95 %, of 2,000 bootstrap draws of documents, paired between conditions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

LABELS = {
    "backbone_local": "backbone, same window",
    "backbone_window": "backbone, whole window",
    "bank_off": "bank empty",
    "bank_on": "bank on",
    "bank_wrong": "bank wrong",
    "sidenet_window": "bank empty, whole window",
    "bank_crowded": "bank among others",
    "bank_focused": "bank among others, a part read",
}


def chosen_losses(path: Path, word: str) -> dict[str, np.ndarray]:
    """Condition → mean loss of each document whose name holds `word`."""
    result = json.loads(path.read_text())
    keep = [i for i, name in enumerate(result["document_names"]) if word in name]
    return {name: np.array(losses)[keep] for name, losses in result["losses"].items()}


def change(from_D: np.ndarray, to_D: np.ndarray) -> str:
    """How much the perplexity changes, in percent, with its interval."""
    draws = np.random.default_rng(0).integers(len(from_D), size=(2000, len(from_D)))
    low, high = np.percentile(100 * np.expm1((to_D - from_D)[draws].mean(1)), [2.5, 97.5])
    return f"{100 * np.expm1((to_D - from_D).mean()):+.2f} % ({low:+.2f} … {high:+.2f})"


def kept(off_D: np.ndarray, on_D: np.ndarray, crowded_D: np.ndarray) -> str:
    """How much of the gain from a document's own bank is left among others', in percent of nats, with its interval."""
    draws = np.random.default_rng(0).integers(len(off_D), size=(2000, len(off_D)))
    shares = (off_D - crowded_D)[draws].mean(1) / (off_D - on_D)[draws].mean(1)
    low, high = np.percentile(100 * shares, [2.5, 97.5])
    return f"{100 * (off_D - crowded_D).mean() / (off_D - on_D).mean():.0f} % ({low:.0f} – {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--documents", default="", help="only those whose name holds this")
    parser.add_argument("--twin", help="first part of the file names of the memory-free twin")
    args = parser.parse_args()
    heads = [
        *LABELS.values(),
        "memory: on against empty",
        "wrong against empty",
        "empty against twin",
        "on against twin",
        "gain left among others",
        "the same, a part read",
    ]
    print("| | documents | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 2))
    for path in args.results:
        losses = chosen_losses(path, args.documents)
        some = next(iter(losses.values()))
        cells = [f"{np.exp(losses[name].mean()):.2f}" if name in losses else "–" for name in LABELS]
        twin_path = path.with_name("-".join([args.twin or "", *path.stem.split("-")[-2:]]) + ".json")
        twin = chosen_losses(twin_path, args.documents)["bank_off"] if args.twin and twin_path.exists() else None
        off, on, wrong = (losses.get(f"bank_{name}") for name in ("off", "on", "wrong"))
        for before, after in ((off, on), (off, wrong), (twin, off), (twin, on)):
            cells.append("–" if before is None or after is None else change(before, after))
        for crowded in (losses.get("bank_crowded"), losses.get("bank_focused")):
            cells.append("–" if off is None or on is None or crowded is None else kept(off, on, crowded))
        print(f"| {path.stem} | {len(some)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
