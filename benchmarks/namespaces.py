"""Does anything of one bank reach the logits of a text that does not read it? Random cases, compared bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/namespaces.py --cases 10000     # results/namespaces.json

A tiny random model; a batch of rows that read nothing, one bank, or several with weights, from a store of users, teams
and domains. In each case the logits of one row are compared with those of the same row when

- the other rows read other banks, or nothing;
- banks of weight 0 are in its group, or are not;
- its banks come from a store where no other bank exists.

B rows, T tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longmem.backbone import Backbone
from longmem.bank import BankEntry, MemoryBank
from longmem.config import EncodeConfig, SideNetConfig
from longmem.group import BankGroup, Readable
from longmem.model import LongMem
from longmem.store import MemoryStore

RESULTS = Path(__file__).parent / "results" / "namespaces.json"
VOCABULARY = 97
NAMES = ("user/1", "user/2", "user/1/session", "team/a", "team/b", "domain/physics", "domain/law", "empty")
PART = 250  # cases that a process does at a time
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)


def tiny_model() -> LongMem:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    heads = [(1, 0), (1, 1), (2, 1)]
    sidenet = SideNetConfig.around(heads, 4, below=1, top_k=8, encode=EncodeConfig(24, 8))
    model = LongMem(Backbone(LlamaForCausalLM(config).eval(), name="tiny"), sidenet).eval()
    with torch.no_grad():
        for parameter in model.sidenet.parameters():
            # As training would move them; the heads read memory.
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def fill(bank: MemoryBank, model: LongMem, tokens: int, seed: int) -> None:
    ids_N = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
    starts_N = torch.arange(tokens)
    offsets_N2 = torch.stack([starts_N, starts_N + 1], dim=1)
    bank.append(BankEntry("text", "x" * tokens, 0, ids_N, offsets_N2, *model.encode(ids_N)))


def stores(model: LongMem, folder: Path) -> tuple[dict[str, MemoryBank], dict[str, MemoryBank]]:
    """The banks of one store, and each again from a store that holds no other."""
    together: dict[str, MemoryBank] = {}
    alone: dict[str, MemoryBank] = {}
    with MemoryStore.open(folder / "all") as store:
        for number, name in enumerate(NAMES):
            bank = store.bank(name, model.bank_spec)
            if name != "empty":
                fill(bank, model, 5 + 9 * number, number)
        together |= {name: store.bank(name) for name in NAMES}
    for number, name in enumerate(NAMES):
        with MemoryStore.open(folder / name.replace("/", "-")) as store:
            bank = store.bank(name, model.bank_spec)
            if name != "empty":
                fill(bank, model, 5 + 9 * number, number)
            alone[name] = store.bank(name)
    return together, alone


Row = tuple[tuple[str, float], ...]


def random_row(chance: random.Random) -> Row:
    names = chance.sample(NAMES, chance.randint(0, 4))
    return tuple((name, chance.choice(WEIGHTS)) for name in names)


def read(row: Row, banks: dict[str, MemoryBank]) -> Readable | None:
    if not row:
        return None
    if len(row) == 1 and row[0][1] == 1.0:
        return banks[row[0][0]]
    return BankGroup([banks[name] for name, _ in row], [weight for _, weight in row])


def case(model: LongMem, banks: dict[str, MemoryBank], alone: dict[str, MemoryBank], seed: int) -> dict[str, bool]:
    """Which comparisons of a random case hold."""
    chance = random.Random(seed)
    count = chance.randint(1, 4)
    rows = [random_row(chance) for _ in range(count)]
    watched = chance.randrange(count)
    ids_BT = torch.randint(VOCABULARY, (count, chance.randint(1, 6)), generator=torch.Generator().manual_seed(seed))

    def logits(changed: Callable[[int, Row], Readable | None]) -> torch.Tensor:
        given = [changed(number, row) for number, row in enumerate(rows)]
        return model.forward(ids_BT, given).logits_BTV[watched]

    plain = logits(lambda number, row: read(row, banks))
    others = [random_row(chance) for _ in rows]
    present = tuple(pair for pair in rows[watched] if pair[1] > 0)
    mine = rows[watched]
    return {
        "other_rows": torch.equal(plain, logits(lambda n, row: read(row if n == watched else others[n], banks))),
        "no_other_rows": torch.equal(plain, logits(lambda n, row: read(row, banks) if n == watched else None)),
        "weight_0_is_absent": torch.equal(plain, logits(lambda n, row: read(present if n == watched else row, banks))),
        "store_of_its_own": torch.equal(plain, logits(lambda n, row: read(row, alone if n == watched else banks))),
        # A comparison that cannot fail says nothing: without its banks the row is another.
        "reads_at_all": not present
        or all(name == "empty" for name, _ in present)
        or not torch.equal(plain, logits(lambda n, row: None if n == watched else read(row, banks))),
        "seen": bool(mine),
    }


def run(cases: int, first: int = 0) -> dict[str, Any]:
    """What holds in so many cases, how often. `first` is the number of the first, which seeds it."""
    torch.set_num_threads(1)
    model = tiny_model()
    held: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        banks, alone = stores(model, Path(name))
        for seed in range(first, first + cases):
            for what, holds in case(model, banks, alone, seed).items():
                held[what] = held.get(what, 0) + holds
    return {"cases": cases, "reading": held.pop("seen"), "holds": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    starts = range(0, arguments.cases, PART)
    found: dict[str, Any] = {"cases": 0, "reading": 0, "holds": {}}
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        sizes = [min(PART, arguments.cases - start) for start in starts]
        for part in pool.map(run, sizes, starts):
            found["cases"] += part["cases"]
            found["reading"] += part["reading"]
            for what, count in part["holds"].items():
                found["holds"][what] = found["holds"].get(what, 0) + count
            print(f"{found['cases']:,} cases", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = platform.processor() or platform.machine()
    result = {"commit": commit, "device": device, "torch": torch.__version__, **found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
