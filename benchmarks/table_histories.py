"""A table of what runs of `ablate_histories.sh` remember: perplexity, facts told in chats, and things hidden in a bank.

    python benchmarks/table_histories.py OUT/evals

Reads NAME-facts.json, NAME-recall.json, NAME-blocks.json and NAME-sliding.json; what is not there is a dash. Rates are
those of the right answer with the bank on, behind the slash with the evidence in the window.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EVALUATIONS = ("facts", "recall", "blocks", "sliding")
HEADS = (
    "blocks: empty, on, gain",
    "sliding: empty, on, gain",
    "told once",
    "corrected (stale)",
    "never told: any value, on / empty",
    "pass key",
    "pairs",
)


def rate(group: dict[str, Any], condition: str, *labels: str) -> str:
    """Share of the cases that were answered with any of the labels, in percent."""
    rates = group["scores"][condition]["rates"]
    return f"{100 * sum(rates[label] for label in labels):.0f}"


def right(group: dict[str, Any]) -> str:
    return f"{rate(group, 'bank_on', 'answer')} / {rate(group, 'window', 'answer')} %"


def perplexity(result: dict[str, Any]) -> str:
    return f"{result['bank_off']:.2f}, {result['bank_on']:.2f}, {result['gain_percent']:.1f} %"


def row(results: dict[str, dict[str, Any]]) -> list[str]:
    """Cells of one run, given by evaluation."""
    cells = [perplexity(results[name]) if name in results else "–" for name in ("blocks", "sliding")]
    if "facts" in results:
        groups = results["facts"]["groups"]
        stale = rate(groups["corrected"], "bank_on", "stale")
        values = [rate(groups["silent"], condition, "borrowed", "stray") for condition in ("bank_on", "bank_off")]
        cells += [right(groups["once"]), f"{right(groups['corrected'])} ({stale} %)", f"{' / '.join(values)} %"]
    else:
        cells += ["–"] * 3
    groups = results.get("recall", {}).get("groups", {})
    # One size of the bank.
    cells += [right(next(iter(groups[task].values()))) if task in groups else "–" for task in ("passkey", "pairs")]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        name, _, evaluation = path.stem.rpartition("-")
        if evaluation in EVALUATIONS:
            runs.setdefault(name, {})[evaluation] = json.loads(path.read_text())
    print("| | " + " | ".join(HEADS) + " |\n|" + "---|" * (len(HEADS) + 1))
    for name, results in runs.items():
        print(f"| {name} | " + " | ".join(row(results)) + " |")


if __name__ == "__main__":
    main()
