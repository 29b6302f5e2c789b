"""SmolLM2-135M remembers the documentation of Python, and what it was told.

    make demo          or          python examples/demo.py [--store DIR]

One process writes banks to disk: the Python language reference that ships inside CPython, but for its last part, and
20 facts told in a conversation. A second process, which has read nothing, opens them and shows what they are worth:
always with the same weights, once with the bank, once without, once with a bank of something else.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

MODEL = "smollm2-135m"
SEGMENT, UNREAD = 1024, 3  # the last three segments of the documentation are not remembered
WRONG_MODULES = ("typing", "argparse", "turtle", "datetime", "doctest")

# (what is told, question, begun answer, answer)
FACTS = [
    ("I have a dog called Biscuit.", "What is my dog called?", "Your dog is called", "Biscuit"),
    ("My sister lives in Lisbon.", "Where does my sister live?", "Your sister lives in", "Lisbon"),
    ("I work as a carpenter.", "What do I work as?", "You work as a", "carpenter"),
    ("My favourite colour is turquoise.", "What is my favourite colour?", "Your favourite colour is", "turquoise"),
    ("I was born in Reykjavik.", "Where was I born?", "You were born in", "Reykjavik"),
    ("My cat is named Pepper.", "What is my cat named?", "Your cat is named", "Pepper"),
    ("I play the cello.", "Which instrument do I play?", "You play the", "cello"),
    ("My teacher was Mrs. Okafor.", "Who was my teacher?", "Your teacher was Mrs.", "Okafor"),
    ("I drive an old Volvo.", "Which car do I drive?", "You drive an old", "Volvo"),
    ("My brother's name is Matthias.", "What is my brother's name?", "Your brother's name is", "Matthias"),
    ("I am allergic to peanuts.", "What am I allergic to?", "You are allergic to", "peanuts"),
    ("We will meet on Thursday.", "When will we meet?", "You will meet on", "Thursday"),
    ("My daughter studies chemistry.", "What does my daughter study?", "Your daughter studies", "chemistry"),
    ("I keep my keys in the blue drawer.", "Where do I keep my keys?", "You keep your keys in the", "blue"),
    ("My grandmother was from Hungary.", "Where was my grandmother from?", "Your grandmother was from", "Hungary"),
    ("I like to eat dumplings.", "What do I like to eat?", "You like to eat", "dumplings"),
    ("My boat is called Albatross.", "What is my boat called?", "Your boat is called", "Albatross"),
    ("I support the team from Leeds.", "Which team do I support?", "You support the team from", "Leeds"),
    ("My project is named Firefly.", "What is my project named?", "Your project is named", "Firefly"),
    ("I go to the gym on Mondays.", "When do I go to the gym?", "You go to the gym on", "Mondays"),
]

console = Console()


def documentation() -> str:
    """The Python language reference, from `pydoc_data.topics`."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def something_else() -> str:
    """As good as any text that is not the documentation: source code of the standard library."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in WRONG_MODULES)


def fastest_dtype() -> Any:
    """bfloat16 where this machine multiplies it faster, float32 elsewhere."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        torch.matmul(a, b)
        start = time.perf_counter()
        for _ in range(5):
            torch.matmul(a, b)
        return time.perf_counter() - start

    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def load(dtype: Any = None) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from longmem import LongMem

    disable_progress_bar()
    return LongMem.from_pretrained(MODEL, device="cpu", dtype=dtype or fastest_dtype())


def split(model: Any) -> tuple[str, Any]:
    """The documentation to remember, and the token ids (1, N) of the rest."""
    import torch

    text = documentation()
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first_unread = len(encoded["input_ids"]) - SEGMENT * UNREAD
    rest_1N = torch.tensor([encoded["input_ids"][first_unread:]])
    return text[: encoded["offset_mapping"][first_unread][0]], rest_1N


def remember(store_dir: Path) -> None:
    """First process: write everything to disk."""
    from longmem import MemoryStore

    model = load()
    text, _ = split(model)
    store = MemoryStore.open(store_dir)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, source, content in (
            ("python", "python-reference", text),
            ("something-else", "standard-library", something_else()[: len(text) // 12]),
            ("facts", "yesterday", "".join(f"User: {told}\nAssistant: I will remember that.\n" for told, *_ in FACTS)),
        ):
            bank = store.bank(name, spec=model.bank_spec)
            total = len(model.tokenizer(content, add_special_tokens=False)["input_ids"])
            task = progress.add_task(f"remembering {source}", total=total)
            model.write_text(bank, content, source=source, on_tokens=lambda n, task=task: progress.advance(task, n))
    size = sum(info.bytes for info in store.banks()) / 1e6
    console.print(f"Three banks on disk, {size:.0f} MB. This process has done its work.\n")


def show(store_dir: Path) -> None:
    """Second process: open the banks and use them."""
    from longmem import MemoryStore

    model = load()
    store = MemoryStore.open(store_dir)
    python, other, facts = (store.bank(name, spec=model.bank_spec) for name in ("python", "something-else", "facts"))
    console.print(f"A new process opened the banks: {len(python):,} tokens of Python's documentation.\n")
    show_perplexity(model, python, other)
    model = load("float32")  # token by token, float32 is the faster one on a CPU
    show_passage(model, python)
    show_facts(model, facts)


def show_perplexity(model: Any, python: Any, other: Any) -> None:
    import torch

    _, rest_1N = split(model)
    banks = {"off": None, "on": python, f"wrong ({len(other):,} tokens of source code)": other}
    losses: dict[str, list[float]] = {name: [] for name in banks}
    with torch.inference_mode(), console.status("reading the unread rest"):
        for segment_1S in rest_1N.split(SEGMENT, dim=1):
            input_1T = model.with_prefix(segment_1S[0, :-1])[None]
            for name, bank in banks.items():
                logits_SV = model(input_1T, bank).logits_BTV[0].float()
                losses[name].append(float(torch.nn.functional.cross_entropy(logits_SV, segment_1S[0])))
    table = Table(
        title=f"Perplexity of the unread rest ({rest_1N.numel():,} tokens, segments of {SEGMENT})", title_justify="left"
    )
    table.add_column("bank")
    table.add_column("perplexity", justify="right")
    table.add_column("against off", justify="right")
    values = {name: math.exp(sum(loss) / len(loss)) for name, loss in losses.items()}
    for name, value in values.items():
        table.add_row(name, f"{value:.2f}", f"{100 * (value / values['off'] - 1):+.1f} %")
    console.print(table)


def show_passage(model: Any, python: Any) -> None:
    text, begun = documentation(), "Classes without an"
    end = text.find(begun) + len(begun) if begun in text else len(text) // 3
    prompt = text[end - 260 : end]
    weights: dict[Any, float] = {}
    continued = {}
    with console.status("continuing a passage"):
        for name, bank in (("bank on", python), ("bank off", None)):
            words = ""
            for piece in model.generate(
                prompt, bank=bank, max_new_tokens=28, attribute=bank is not None, remember=False
            ):
                words += piece.text
                for span in piece.sources:
                    key = (span.source, span.start, span.end, span.text)
                    weights[key] = weights.get(key, 0.0) + span.weight
            continued[name] = words
    console.print("\n[bold]A passage of the documentation, continued[/bold]")
    console.print(f"…{prompt}", style="dim", markup=False, highlight=False)
    for name, words in continued.items():
        console.print(f"  {name}: {' '.join(words.split())}", markup=False, highlight=False)
    real = " ".join(text[end : end + 130].split())
    console.print(f"  the real text: {real}", markup=False, highlight=False)
    console.print("\nWhat it drew on most:")
    for key in sorted(weights, key=weights.__getitem__, reverse=True)[:4]:
        source, start, stop, words = key
        console.print(f"  {source}:{start}–{stop}  “{' '.join(words.split())[:90]}”", markup=False, highlight=False)


def show_facts(model: Any, facts: Any) -> None:
    import torch

    told = "".join(f"User: {fact}\nAssistant: I will remember that.\n" for fact, *_ in FACTS)
    right = {"told yesterday, bank on": 0, "bank off": 0, "all 20 in the window, bank off": 0}
    with torch.inference_mode(), console.status("asking about the facts"):
        for _, question, begun, answer in FACTS:
            ask = f"User: {question}\nAssistant: {begun}"
            for name, bank, context in zip(right, (facts, None, None), ("", "", told), strict=True):
                right[name] += answers(model, context + ask, bank, answer)
    table = Table(title=f"{len(FACTS)} facts from yesterday's conversation, answer begun", title_justify="left")
    table.add_column("")
    table.add_column("continued correctly", justify="right")
    for name, count in right.items():
        table.add_row(name, f"{count} of {len(FACTS)}")
    console.print()
    console.print(table)


def answers(model: Any, prompt: str, bank: Any, answer: str) -> bool:
    """Whether greedy decoding continues with the answer. Stops at the first letter that differs."""
    said = ""
    for piece in model.generate(prompt, bank=bank, max_new_tokens=12, remember=False):
        said = (said + piece.text).lstrip().lower()
        if said.startswith(answer.lower()):
            return True
        if not answer.lower().startswith(said):
            return False
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="keep the banks in this folder (a temporary one by default)")
    parser.add_argument("--part", choices=("remember", "show"), help="run only one of the two processes")
    arguments = parser.parse_args()
    if arguments.part:
        {"remember": remember, "show": show}[arguments.part](arguments.store)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="longmem-demo-") as temporary:
        store = arguments.store or Path(temporary)
        for part in ("remember", "show"):
            subprocess.run([sys.executable, __file__, "--store", str(store), "--part", part], check=True)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
