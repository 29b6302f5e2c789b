"""Tokens a second on a CPU, one at a time: transformers' `generate`, longmem, and longmem with compiled decoding.

    OMP_NUM_THREADS=1 python benchmarks/decode_cpu.py
    OMP_NUM_THREADS=1 python benchmarks/decode_cpu.py --vectors real.safetensors --store DIR     # with indexes

Every way continues the same random prompt greedily. Before anything is timed, the logits of compiled decoding are
compared with eager ones, and the tokens chosen. Ways take turns, so that what else the machine does meets all alike,
and what a bank with an index is compared with, an empty bank and the backbone alone, takes turns with it once more;
the processor's own time is given too, which leaves out waiting for a busy core. Banks hold random keys and values: they
are for time, not for meaning. An index needs keys of text: with --vectors banks hold texts (--texts; Python's
documentation by default), repeated with slight noise where there are too few, and what follows in the last of them is
the prompt. The file, and banks and indexes in the store, are made where they are missing, and kept: a million tokens
take half an hour, their index two minutes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import subprocess
import time
from operator import eq
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from longmem.bank import BankEntry, MemoryBank
from longmem.errors import BankIndexError
from longmem.model import LongMem
from longmem.probe import default_documents
from longmem.store import MemoryStore

RESULTS = Path(__file__).parent / "results" / "decode_cpu.csv"
TOLERANCE = 1e-3
PER_TEXT, READ_ON = 60_000, 1_024


class Clock(BaseStreamer):
    """Seconds between tokens, by the wall and by the processor, without the first, which reads the prompt."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def put(self, value: Tensor) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        """Called by `generate`."""

    @property
    def steps_S2(self) -> Tensor:
        return torch.tensor(self.times, dtype=torch.float64).diff(dim=0)[1:]


def make_vectors(model_name: str, tokens: int, texts: Path | None) -> dict[str, Tensor]:
    """Token ids (N,) of texts, keys and values (H, n, E) of all but the last `READ_ON` of them."""
    writer = LongMem.from_pretrained(model_name, device="cpu", dtype="float32")
    if texts is None:
        documents = default_documents(writer.tokenizer)
        whole_N = torch.cat([torch.from_numpy(documents[i].astype("int64")) for i in range(len(documents))])
        all_ids, most = iter([whole_N]), tokens
    else:
        read = (path.read_text(encoding="utf-8") for path in sorted(texts.rglob("*.txt")))
        all_ids = (torch.tensor(writer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in read)
        most = PER_TEXT
    ids, encoded, following_T = [], [], torch.zeros(0, dtype=torch.int64)
    for ids_N in all_ids:
        length = min(most, len(ids_N) - READ_ON)
        ids.append(ids_N[:length])
        encoded.append(writer.encode(ids_N[:length]))
        following_T = ids_N[length : length + READ_ON]
        if sum(map(len, ids)) >= tokens:
            break
    keys_HNE, values_HNE = (torch.cat(parts, dim=1) for parts in zip(*encoded, strict=True))
    return {"ids": torch.cat([*ids, following_T]), "keys": keys_HNE, "values": values_HNE}


def text_bank(model: LongMem, size: int, vectors: dict[str, Tensor], store: MemoryStore, recall: float) -> MemoryBank:
    """A bank of text, with an index; what is repeated up to `size` tokens has noise of 2 % of a channel's spread."""
    bank, generator = store.bank(f"text-{size}", model.bank_spec), torch.Generator().manual_seed(0)
    spreads = [0.02 * vectors[name][:, ::16].float().std(1, keepdim=True) for name in ("keys", "values")]
    while len(bank) < size:
        count = min(size - len(bank), vectors["keys"].shape[1])
        keys_HnE, values_HnE = (
            (rows_HnE + torch.randn(rows_HnE.shape, generator=generator).mul_(spread_H1E)).bfloat16()
            if len(bank)
            else rows_HnE
            for rows_HnE, spread_H1E in zip(
                (vectors[name][:, :count] for name in ("keys", "values")), spreads, strict=True
            )
        )
        offsets_n2 = torch.stack([torch.arange(count), torch.arange(1, count + 1)], dim=1)
        ids_n, source = vectors["ids"][:count], f"text/{len(bank)}"
        bank.append(BankEntry(source, "x" * count, 0, ids_n, offsets_n2, keys_HnE, values_HnE))
    try:
        bank.load_index()
    except BankIndexError:
        started = time.perf_counter()
        bank.save_index(model.make_index(bank, recall=recall))
        print(f"index made in {time.perf_counter() - started:.0f} s", flush=True)
    return bank


def random_bank(model: LongMem, size: int) -> MemoryBank:
    """A bank of `size` random tokens."""
    bank, generator = model.new_bank(), torch.Generator().manual_seed(0)
    keys_HNE, values_HNE = (
        torch.empty(len(model.config.memory_heads), size, model.backbone.head_dim, dtype=torch.bfloat16)
        for _ in range(2)
    )
    for rows_HNE in (keys_HNE, values_HNE):
        for rows_NE in rows_HNE:
            rows_NE.copy_(torch.randn(rows_NE.shape, generator=generator))
    ids_N = torch.randint(model.backbone.config.vocab_size, (size,), generator=generator)
    offsets_N2 = torch.stack([torch.arange(size), torch.arange(1, size + 1)], dim=1)
    if size:
        bank.append(BankEntry("random", "x" * size, 0, ids_N, offsets_N2, keys_HNE, values_HNE))
    return bank


def greedy(
    model: LongMem, ids_T: Tensor, bank: MemoryBank | None, memory: float, tokens: int
) -> tuple[list[int], Tensor, Tensor]:
    """Token ids chosen, their logits (tokens, V), and the steps' seconds (tokens − 1, 2)."""
    cache, clock = model.new_cache(), Clock()
    chosen: list[int] = []
    logits, read_T = [], ids_T
    clock.put(ids_T)
    for step in range(tokens):
        # The prompt is read without the bank: it is not timed, and takes minutes with a large one.
        read_bank = bank if step else None
        logits_V = model(read_T[None], read_bank, cache=cache, memory=memory, last_only=True).logits_BTV[0, 0]
        read_T = logits_V.argmax().view(1)
        chosen.append(int(read_T))
        logits.append(logits_V)
        clock.put(read_T)
    return chosen, torch.stack(logits), clock.steps_S2


def transformers_greedy(model: LongMem, ids_T: Tensor, tokens: int) -> tuple[list[int], Tensor]:
    """Token ids that `generate` chose, and the steps' seconds (tokens − 1, 2)."""
    clock, ids_1T = Clock(), ids_T[None]
    output = model.backbone.model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    return output[0, len(ids_T) :].tolist(), clock.steps_S2


def row(way: str, bank: str, steps_S2: Tensor) -> dict[str, Any]:
    wall_S, processor_S = (1000 * steps_S2).unbind(1)
    p20, p50, p80 = wall_S.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    made: dict[str, Any] = {"way": way, "bank": bank, "steps": len(steps_S2)}
    made |= {"ms_p20": round(p20, 2), "ms_p50": round(p50, 2), "ms_p80": round(p80, 2)}
    made |= {f"tokens_per_s_p{100 - p}": round(1000 / ms, 2) for p, ms in ((20, p20), (50, p50), (80, p80))}
    return made | {"processor_ms_p50": round(float(processor_S.median()), 2)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=25, help="generated a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--banks", type=int, nargs="*", default=[0, 1 << 16, 1 << 20], help="tokens in each bank")
    parser.add_argument("--vectors", type=Path, help="keys of text, a file; also measure banks that have an index")
    parser.add_argument("--texts", type=Path, help="folder of .txt files to make them of")
    parser.add_argument("--encode", type=int, default=98_304, help="tokens to encode where that file is missing")
    parser.add_argument("--store", type=Path, help="keeps banks of that text, and their indexes")
    parser.add_argument("--recall", type=float, default=0.99, help="asked of an index")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a CSV that rows are added to")
    arguments = parser.parse_args()
    if (arguments.vectors is None) != (arguments.store is None):
        parser.error("--vectors and --store go together")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    eager = LongMem.from_pretrained(arguments.model, device="cpu", dtype="float32")
    compiled = LongMem.from_pretrained(arguments.model, device="cpu", dtype="float32")
    started = time.perf_counter()
    compiled.compile_decoding()
    compiling = time.perf_counter() - started
    print(f"compiled in {compiling:.1f} s", flush=True)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    common = {"prompt": arguments.prompt, "compile_s": round(compiling, 1), "threads": torch.get_num_threads()}
    common |= {"commit": commit, "device": processor(), "versions": versions}

    ids_T = torch.randint(
        eager.backbone.config.vocab_size, (arguments.prompt,), generator=torch.Generator().manual_seed(0)
    )
    vectors, store = None, None
    if arguments.vectors is not None:
        if not arguments.vectors.exists():
            save_file(make_vectors(arguments.model, arguments.encode, arguments.texts), arguments.vectors)
        vectors, store = load_file(arguments.vectors), MemoryStore.open(arguments.store)
        ids_T = vectors["ids"][vectors["keys"].shape[1] :][: arguments.prompt]
    empty = compiled.new_bank()
    for size in [None, *arguments.banks]:
        bank, name, memory, by_index = None, "none: backbone alone (memory=0)", 0.0, ""
        if size is not None and vectors is not None and store is not None and size:
            bank, name, memory = text_bank(eager, size, vectors, store, arguments.recall), f"{size} tokens of text", 1.0
        elif size is not None:
            bank, name, memory = random_bank(eager, size), f"{size} tokens", 1.0
        index = None if bank is None else bank.index
        if bank is not None and index is not None:
            bank.use_index(None)
            print(name, *index.kinds, flush=True)
            told = f"recall {min(index.recall):.3f} – {max(index.recall):.3f}"
            by_index = f"longmem compiled, index for {index.target} ({told})"
        tokens = arguments.tokens if (size or 0) < 1 << 19 else 10
        steps: dict[str, list[Tensor]] = {}
        worst = 0.0
        for turn in range(arguments.rounds):
            load = os.getloadavg()[0]
            expected, logits_SV, eager_S2 = greedy(eager, ids_T, bank, memory, tokens)
            chosen, compiled_logits_SV, compiled_S2 = greedy(compiled, ids_T, bank, memory, tokens)
            worst = max(worst, float((compiled_logits_SV - logits_SV).abs().max()))
            if chosen != expected or worst > TOLERANCE:
                raise SystemExit(f"{name}: compiled decoding differs from eager decoding, by {worst:.1e}")
            if turn:  # the first round is for checking, and warms everything up
                steps.setdefault("longmem eager", []).append(eager_S2)
                steps.setdefault("longmem compiled", []).append(compiled_S2)
            if bank is not None and index is not None:
                bank.use_index(index)
                chosen, _, indexed_S2 = greedy(compiled, ids_T, bank, memory, arguments.tokens)
                bank.use_index(None)
                print(f"{sum(map(eq, chosen, expected))} of {tokens} tokens as with exact search", flush=True)
                if turn:
                    steps.setdefault(by_index, []).append(indexed_S2)
                for beside, its_bank, its_memory in (("memory=0", None, 0.0), ("empty bank", empty, 1.0)):
                    _, _, beside_S2 = greedy(compiled, ids_T, its_bank, its_memory, arguments.tokens)
                    if turn:
                        steps.setdefault(f"longmem compiled, {beside}, in turn", []).append(beside_S2)
            if size is None:
                chosen, seconds_S2 = transformers_greedy(eager, ids_T, tokens)
                if chosen != expected:
                    raise SystemExit("transformers' generate chose other tokens")
                if turn:
                    steps.setdefault("transformers generate", []).append(seconds_S2)
        for way, parts in steps.items():
            made = row(way, name, torch.cat(parts))
            made |= {"largest_logit_difference": f"{worst:.1e}", "load": round(load, 1)}
            print(made, flush=True)
            write(arguments.out, made | common)
        for beside in ("memory=0", "empty bank") if by_index else ():
            its_S2, indexed_S2 = (torch.cat(steps[way]) for way in (f"longmem compiled, {beside}, in turn", by_index))
            wall, processor_time = (its_S2.median(0).values / indexed_S2.median(0).values).tolist()
            print(f"{name}: {wall:.1%} of the speed with {beside}, by processor time {processor_time:.1%}")


def write(path: Path, made: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(made), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(made)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
