"""Draw what benchmarks/search_peers.py measured: the cost of a step against the size of the bank.

python benchmarks/plot_search.py [search_peers.csv] [--out docs/search_peers.svg]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from longmem.drawing import new_figure

HERE = Path(__file__).parent
REGIMES = {"decode": "one token (9 queries)", "segment": "1,024 tokens (9,216 queries)"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw cost against bank size.")
    parser.add_argument("csv", type=Path, nargs="?", default=HERE / "results" / "search_peers.csv")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "search_peers.svg")
    arguments = parser.parse_args()
    with arguments.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["way"] for row in rows))
    figure = new_figure(11, 5)
    panels = figure.subplots(1, len(REGIMES))
    for axes, (regime, title) in zip(panels, REGIMES.items(), strict=True):
        for number, name in enumerate(names):
            mine = sorted(
                (row for row in rows if (row["way"], row["regime"]) == (name, regime)), key=lambda r: int(r["N"])
            )
            sizes = [int(row["N"]) for row in mine]
            low, middle, high = ([float(row[key]) for row in mine] for key in ("p20_ms", "p50_ms", "p95_ms"))
            ours, colour = name.startswith("longmem"), f"C{number}"
            axes.plot(sizes, middle, "o-", color=colour, linewidth=2.5 if ours else 1.2, label=_label(name, rows))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(
            title=title, xlabel="remembered tokens", ylabel="milliseconds of one core, three heads (p50; p20 – p95)"
        )
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, threads: {rows[0]['threads']}", fontsize=9)
    figure.savefig(arguments.out)


def _label(name: str, rows: list[dict[str, str]]) -> str:
    """A way, and the least recall of its heads at the largest size where that is known."""
    known = max((row for row in rows if row["way"] == name and row["recall"]), key=lambda row: int(row["N"]))
    return f"{name} (finds {min(map(float, known['recall'].split('/'))):.3f} at {int(known['N']):,})"


if __name__ == "__main__":
    main()
