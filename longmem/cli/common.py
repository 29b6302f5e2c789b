"""Options that several commands share, and how they load and print things."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longmem.config import EncodeConfig
from longmem.config import Precision as Kept
from longmem.errors import BankMismatchError, ConfigError, SourceError

if TYPE_CHECKING:
    import torch

    from longmem.backbone import Backbone
    from longmem.bank import MemoryBank
    from longmem.config import BankSpec
    from longmem.data import TokenizedDocuments
    from longmem.evals.perplexity import PerplexityConfig
    from longmem.group import Readable
    from longmem.model import LongMem

DEFAULT_MODEL = "smollm2-135m"
DType = Literal["auto", "float32", "bfloat16"]

Store = Annotated[Path, typer.Option(envvar="LONGMEM_STORE", help="Folder that holds the banks.", show_default=False)]
MaybeStore = Annotated[
    Path | None, typer.Option(envvar="LONGMEM_STORE", help="Folder that holds the banks.", show_default=False)
]
Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="LONGMEM_KEYS",
        help="Folder of the keys of encrypted banks; STORE.keys, beside the store, by default.",
        show_default=False,
    ),
]
Bank = Annotated[str, typer.Option(help="Name of the bank: notes, user/1234.", show_default=False)]
MaybeBank = Annotated[
    str | None, typer.Option(help="Name of the bank; without one nothing is remembered.", show_default=False)
]
_SEVERAL = "Name of a bank, with a weight after a colon if wanted (domain/physics:0.5); several times to read several."
Banks = Annotated[list[str], typer.Option("--bank", help=_SEVERAL, show_default=False)]
MaybeBanks = Annotated[
    list[str] | None, typer.Option("--bank", help=f"{_SEVERAL} The first is written to.", show_default=False)
]
Version = Annotated[
    str | None,
    typer.Option(
        "--version", help="Number or tag of a version (`longmem log`); the newest by default.", show_default=False
    ),
]
Model = Annotated[str, typer.Option(help="A SideNet that ships with longmem, or a checkpoint folder.")]
BackboneName = Annotated[str, typer.Option("--backbone", help="An embedded model, a folder, or a Hugging Face hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[DType, typer.Option("--dtype", help="auto is bfloat16 on a GPU, float32 elsewhere.")]
Focus = Annotated[
    int,
    typer.Option(help="Tokens of a bank that are read at most: of a larger one what the text is about; 0 reads all."),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Faster, after some seconds of compiling (on a GPU a minute); needs a C++ compiler.",
    ),
]
BankPrecision = Annotated[
    Kept | None,
    typer.Option(
        "--precision",
        help="How a new bank keeps keys and values: full, int8 (about half the bytes), or int4 (about a quarter).",
        show_default="full",
    ),
]
BankWindows = Annotated[
    str | None,
    typer.Option(
        "--windows",
        help="How a new bank's texts are cut to be read: new tokens + context. 1984+63 reads long ones faster on a "
        "GPU; small additions to a text take longer.",
        show_default="768+256",
    ),
]
Search = Annotated[
    Literal["exact", "index"],
    typer.Option(help="index is faster in large banks, and finds nearly all (see `longmem index`)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Documents = Annotated[
    list[Path],
    typer.Argument(
        help="Text files, .jsonl files, folders of them, or folders written by `longmem tokenize`.",
        show_default=False,
    ),
]

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


# ---- models ------------------------------------------------------------------------------------------------


def load_model(name: str, device: str, dtype: DType = "auto", *, compile: bool = False) -> LongMem:
    _quiet_transformers()
    from longmem.model import LongMem

    return LongMem.from_pretrained(name, device=device, dtype=dtype, compile=compile)


def load_backbone(name: str, device: str, dtype: DType) -> Backbone:
    _quiet_transformers()
    from longmem.backbone import Backbone
    from longmem.bank import DTYPES

    where = device_of(device)
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    return Backbone.from_pretrained(name, dtype=DTYPES[dtype], device=str(where))


def device_of(name: str) -> torch.device:
    from longmem.pretrained import resolve_device

    return resolve_device(name)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Texts longer than the backbone's window are the whole point.
    logging.set_verbosity_error()


# ---- banks ---------------------------------------------------------------------------------------------------


def contents(bank: MemoryBank) -> str:
    """How much a bank holds, in words."""
    sources = len(bank.sources)
    return f"{len(bank):,} tokens of {sources} source{'' if sources == 1 else 's'}"


def spec_of(model: LongMem, precision: Kept | None, windows: str | None = None) -> BankSpec:
    """What a bank for this model holds, in the precision and the windows that were asked for."""
    spec = model.bank_spec if precision is None else model.bank_spec_in(precision)
    return spec if windows is None else dataclasses.replace(spec, encode=EncodeConfig.from_text(windows))


def check_windows(bank: MemoryBank, name: str, windows: str | None) -> None:
    """Raise `BankMismatchError` if the bank was made with other windows than were asked for."""
    if windows is not None and EncodeConfig.from_text(windows) != bank.spec.encode:
        raise BankMismatchError(
            f"Bank {name!r} is written in windows of {bank.spec.encode}; --windows {windows} was asked for. A bank's "
            "windows are chosen when it is made: leave the option out, or use another --bank."
        )


def check_precision(bank: MemoryBank, name: str, precision: Kept | None) -> None:
    """Raise `BankMismatchError` if the bank was made with another precision than was asked for."""
    if precision not in (None, bank.spec.precision):
        raise BankMismatchError(
            f"Bank {name!r} keeps keys and values in {bank.spec.precision}; --precision {precision} was asked for. A "
            "bank's precision is chosen when it is made: leave the option out, or use another --bank."
        )


def weighted(banks: Sequence[str]) -> list[tuple[str, float]]:
    """Names and weights of banks, as options give them."""
    found = []
    for text in banks:
        name, colon, weight = text.partition(":")
        try:
            found.append((name, float(weight) if colon else 1.0))
        except ValueError as error:
            raise typer.BadParameter(
                f"{text!r} has no number for a weight: give NAME or NAME:WEIGHT, as in domain/physics:0.5.",
                param_hint="--bank",
            ) from error
    return found


def check_bank(store: Path | None, bank: str | Sequence[str] | None, search: str) -> None:
    """Raise `BadParameter` where options of banks do not go together."""
    if bank and store is None:
        raise typer.BadParameter("--bank needs --store, or LONGMEM_STORE in the environment.", param_hint="--store")
    if not bank and search == "index":
        raise typer.BadParameter("without --bank there is nothing to search.", param_hint="--search")


def together(banks: Sequence[MemoryBank], weights: Sequence[float]) -> Readable:
    """A bank, or several to be read together."""
    from longmem.group import BankGroup

    return banks[0] if len(banks) == 1 and weights[0] == 1.0 else BankGroup(banks, weights)


@contextmanager
def open_banks(
    store: Path | None,
    banks: Sequence[str] | None,
    device: str,
    search: Literal["exact", "index"],
    version: int | str | None = None,
    *,
    keys: Path | None = None,
) -> Iterator[Readable | None]:
    """Existing banks to be read together, the first of them in a version; None if none was asked for."""
    if store is None or not banks:
        yield None
        return
    from longmem.store import MemoryStore

    names = weighted(banks)
    with MemoryStore.open(store, create=False, keys=keys) as opened:
        where = device_of(device)
        versions = [version] + [None] * (len(names) - 1)
        found = [
            opened.bank(name, device=where, search=search, version=of)
            for (name, _), of in zip(names, versions, strict=True)
        ]
        yield together(found, [weight for _, weight in names])


def version_of(version: str | None) -> int | str | None:
    """A version as it was given: a number, or a tag."""
    return int(version) if version is not None and version.isascii() and version.isdigit() else version


@contextmanager
def open_bank(
    store: Path | None, bank: str | None, device: str, search: Literal["exact", "index"], *, keys: Path | None = None
) -> Iterator[MemoryBank | None]:
    """An existing bank, or None if none was asked for."""
    if store is None or bank is None:
        yield None
        return
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        yield opened.bank(bank, device=device_of(device), search=search)


# ---- documents ---------------------------------------------------------------------------------------------


def load_documents(paths: Sequence[Path], backbone: Backbone) -> TokenizedDocuments:
    """Documents of all paths, tokenised unless they are already.

    Raises:
        SourceError: a path holds no text.
        ConfigError: token ids on disk are not this backbone's.
    """
    from longmem.data import TokenizedDocuments, read_documents

    parts = [TokenizedDocuments.load(path) for path in paths if TokenizedDocuments.is_saved(path)]
    for path, part in zip(filter(TokenizedDocuments.is_saved, paths), parts, strict=True):
        largest = int(part.tokens.max(initial=0))
        if largest >= backbone.config.vocab_size:
            raise ConfigError(
                f"{path} holds token id {largest}, but backbone {backbone.name!r} knows {backbone.config.vocab_size} "
                "tokens only. Tokenise the text again: `longmem tokenize DOCUMENTS --backbone NAME --out DIR`."
            )
    texts = [path for path in paths if not TokenizedDocuments.is_saved(path)]
    if texts:
        with counting("tokenizing", None, "documents") as advance:
            found = TokenizedDocuments.from_documents(
                read_documents(texts), backbone.tokenizer, on_document=lambda name: advance(1)
            )
        parts.append(found)
    return TokenizedDocuments.concatenate(parts)


def check_long_enough(documents: TokenizedDocuments, config: PerplexityConfig) -> int:
    """How many documents an evaluation can use.

    Raises:
        SourceError: none.
    """
    usable = int((documents.lengths >= config.needed).sum())
    if not usable:
        raise SourceError(
            f"No document has the {config.needed:,} tokens that this evaluation needs (remembered and scored); the "
            f"longest has {int(documents.lengths.max()):,}. Give longer documents, remember less first (prefill), or "
            "score fewer segments."
        )
    return usable


# ---- printing ----------------------------------------------------------------------------------------------


@contextmanager
def counting(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    quiet = not err.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.advance(task, steps)


def size(count: float) -> str:
    """A number of bytes in words: 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def snippet(text: str, longest: int = 160) -> str:
    """A text in one line, cut if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
