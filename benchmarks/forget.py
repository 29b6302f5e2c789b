"""One of 50 documents is forgotten, and then one span inside a document: what is left of them?

    OMP_NUM_THREADS=1 python benchmarks/forget.py                       # results/forget.json

Fifty pages of Python's documentation are written to a bank, in pieces that take turns; a fork and a tag are made, the
bank is consolidated. One document is forgotten, then a span of another. Beside it a store is written that never saw
either. Reported are: the largest difference of logits between the two, on texts that ask for what was forgotten; and
which bytes of it are found in any file of the folder, before and after (`longmem.store.traces`). What the store that
never saw it holds as well (a common phrase, an equal first token) is no trace.

H memory heads, N tokens, T tokens of a text.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from longmem.bank import BankEntry, MemoryBank
from longmem.model import LongMem
from longmem.store import MemoryStore, Stretch
from longmem.store.traces import needles, traces

RESULTS = Path(__file__).parent / "results" / "forget.json"


def documents(count: int, characters: int) -> list[tuple[str, str]]:
    """Pages of Python's documentation, the longest ones, each cut to so many characters."""
    from pydoc_data.topics import topics

    texts = {text[:characters]: name for name, text in sorted(topics.items())}
    longest = sorted(texts, key=len, reverse=True)[:count]
    if len(longest) < count:
        raise SystemExit(f"There are {len(longest)} pages; ask for fewer.")
    return [(f"{texts[text]}.txt", text) for text in longest]


def write(bank: MemoryBank, model: LongMem, texts: list[tuple[str, list[str]]]) -> None:
    """Documents in pieces that take turns."""
    for turn in range(max(len(pieces) for _, pieces in texts)):
        for name, pieces in texts:
            if turn < len(pieces) and pieces[turn]:
                model.write_text(bank, pieces[turn], source=name, append=True)


def entry_of(bank: MemoryBank, source: str, start: int, end: int) -> BankEntry:
    """The tokens of a source that lie in a stretch, as they are in a bank."""
    which = bank.sources.index(source)
    rows_N = (bank.source_index_N == which) & (bank.offsets_N2[:, 0] >= start) & (bank.offsets_N2[:, 1] <= end)
    text = bank.text_of(source, start, end)
    rows = bank.token_ids_N[rows_N], bank.offsets_N2[rows_N], bank.keys_HNE[:, rows_N], bank.values_HNE[:, rows_N]
    return BankEntry(source, text, start, *rows)


def difference(model: LongMem, one: MemoryBank, other: MemoryBank, queries: list[str]) -> float:
    """Largest absolute difference of logits."""
    largest = 0.0
    for query in queries:
        ids_1T = torch.tensor([model.tokenizer(query, add_special_tokens=False).input_ids], device=model.device)
        pair = [model.forward(ids_1T, bank).logits_BTV for bank in (one, other)]
        largest = max(largest, float((pair[0] - pair[1]).abs().max()))
    return largest


def run(model: LongMem, texts: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    pieces = [(name, [text[: len(text) // 2], text[len(text) // 2 :]]) for name, text in texts]
    document, partly = texts[len(texts) // 3][0], texts[len(texts) // 2][0]
    (first, second) = dict(pieces)[partly]
    # From inside the first piece into the second.
    start, end = len(first) * 3 // 4, len(first) + len(second) // 4
    queries = [dict(texts)[document][:400], dict(texts)[partly][start : start + 400], texts[0][1][:400]]
    with MemoryStore.open(folder / "store") as store, MemoryStore.open(folder / "never") as other:
        bank = store.bank("user/1234", model.bank_spec, device=model.device)
        write(bank, model, pieces)
        store.fork("user/1234", "user/1234/fork")
        store.tag("user/1234", "before")
        store.consolidate("user/1234")
        sought = {
            "document": needles(entry_of(bank, document, 0, len(dict(texts)[document]))),
            "span": needles(entry_of(bank, partly, start, end)),
        }
        found = {what: len(traces(folder / "store", sought[what])) for what in sought}
        seconds = {}
        never = other.bank("user/1234", model.bank_spec, device=model.device)
        left = [first[:start], second[end - len(first) :]]
        write(never, model, [(name, left if name == partly else parts) for name, parts in pieces if name != document])
        before = difference(model, bank, never, queries)
        for what, stretch in (("document", Stretch(document)), ("span", Stretch(partly, start, end))):
            begun = time.perf_counter()
            receipt = store.forget("user/1234", [stretch], model)
            seconds[what] = round(time.perf_counter() - begun, 2)
            assert store.is_genuine(receipt)
        banks = {
            "bank": store.bank("user/1234", device=model.device),
            "fork": store.bank("user/1234/fork", device=model.device),
            "tag": store.bank("user/1234", version="before", device=model.device),
            "memory": bank,
        }
        bank.refresh()
        after = {name: difference(model, one, never, queries) for name, one in banks.items()}
        rows = {}
        for what, kinds in sought.items():
            coincidences = set(traces(folder / "never", kinds))
            remaining = traces(folder / "store", set(kinds) - coincidences)
            rows[what] = {
                "needles": dict(Counter(kinds.values())),
                "found_before": found[what],
                "also_in_a_store_that_never_saw_it": len(coincidences),
                "found_after": len(remaining),
                "where": sorted(set(remaining.values())),
                "seconds": seconds[what],
            }
        return {
            "documents": len(texts),
            "tokens": len(bank),
            "largest_difference_of_logits": {"before": before, "after": after},
            **rows,
            "store_verifies": store.verify().ok,
            "store_bytes": sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--characters", type=int, default=2500, help="of each document")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = LongMem.from_pretrained(arguments.model, device=arguments.device)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        found = run(model, documents(arguments.documents, arguments.characters), Path(name))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = platform.processor() or platform.machine()
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    result = {"commit": commit, "device": device, "torch": torch.__version__, "model": arguments.model, **found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
