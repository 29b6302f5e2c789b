"""Launches that memory adds to a recorded step, counted without a GPU.

    python benchmarks/decode_launches.py [--rows 1 32] [--banks one each index]

Every operation that makes or changes memory is a launch there; views are not. What a step compiles (a layer's own
work, `window_step`) is left out, and a kernel of `longmem.ops` counts as what it launches for few queries. A small
random model with the memory heads of SmolLM2-135M takes a step with empty banks and with banks of 4,096 tokens
(`index`: 8,192, and some that the index does not know), with Triton's interpreter in place of a GPU. Prints how many
launches there are by the function that asks for them. Casts between precisions are missing: it computes in float32.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from decode_gpu import bank_of, begin, grown, index_of, lists_of, model_for
from torch.utils._python_dispatch import TorchDispatchMode
from train_speed import ALL

import longmem.attention
import longmem.index
import longmem.lists
import longmem.retrieved
import longmem.sketch
from longmem.bank import MemoryBank
from longmem.index import PlacedReader

PACKAGE = str(Path(longmem.__file__).parent)
# Launches of each kernel's Python function; where a bank has room for more than 32,768 tokens a search takes one more.
KERNELS = {
    "topk_scan": 4,
    "topk_coded": 4,
    "topk_listed": 10,
    "code_queries": 1,
    "attend_rows": 1,
    "joint_rows": 1,
    "raise_rows": 2,
}
# What takes or names memory, and launches nothing.
NOTHING = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
)


class Launches(TorchDispatchMode):
    """Counts launches by where they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.within = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not self.within and not is_view and name not in NOTHING:
            self.count[f"{_place()}: {name}"] += 1
        return func(*args, **(kwargs or {}))

    def as_one(self, function: Callable[..., Any], launches: int) -> Callable[..., Any]:
        """A function that counts as so many launches, whatever it does here."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.within and launches:
                self.count[f"{_place()}: {function.__name__} (kernel)"] += launches
            self.within += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.within -= 1

        return counted


def _place() -> str:
    """Where in the package the innermost call stands."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def kernels_as_launches(launches: Launches) -> Iterator[None]:
    """Functions of `longmem.ops` as the modules that call them know them."""
    patches = [
        mock.patch.object(module, name, launches.as_one(getattr(module, name), count))
        for name, count in KERNELS.items()
        for module in (longmem.index, longmem.retrieved, longmem.attention, longmem.sketch, longmem.lists)
        if hasattr(module, name)
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@torch.no_grad()
def launches_of(rows: int, banks: str) -> Counter[str]:
    """A step's launches."""
    model = model_for("cpu", ALL, torch.float32)
    held: list[MemoryBank | None] = [None] * rows
    if banks == "each":
        held = [bank_of(model, 4096, seed=row) for row in range(rows)]
    elif banks == "one":
        held = [bank_of(model, 4096)] * rows
    elif banks in ("index", "lists"):
        bank = bank_of(model, 8192)
        bank._index = index_of(bank, 48) if banks == "index" else lists_of(bank, 48)
        grown(bank, 9000)
        held = [bank] * rows
    decoder = begin(model, rows, [None] * rows)
    reader = PlacedReader(held, model.config, model.device) if any(held) else None
    launches = Launches()
    for windows in (decoder._cache.backbone, decoder._cache.sidenet):
        windows.run = launches.as_one(windows.run, 0)
    # What a CPU needs in place of addresses is no launch on a GPU.
    pools = mock.patch.object(PlacedReader, "_pools", launches.as_one(PlacedReader._pools, 0))
    at_once = mock.patch.object(longmem.retrieved, "joins_at_once", lambda device: True)
    with kernels_as_launches(launches), pools, at_once:
        decoder.run(reader)  # makes what is made once
        launches.count.clear()
        with launches:
            decoder.run(reader)
    return launches.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--banks", nargs="*", choices=["one", "each", "index", "lists"], default=["one", "each"])
    args = parser.parse_args()
    for rows in args.rows:
        empty = launches_of(rows, "none")
        print(f"{rows} rows, empty bank: {empty.total()} beside compiled layers", flush=True)
        for place, count in sorted(empty.items()):
            print(f"  {count:4} {place}")
        for banks in args.banks:
            full = launches_of(rows, banks)
            print(f"{rows} rows, {banks} bank: {full.total()}, of which memory adds", full.total() - empty.total())
            for place, count in sorted((full - empty).items()):
                print(f"  {count:4} {place}", flush=True)


if __name__ == "__main__":
    main()
