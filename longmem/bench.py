"""What memory costs on this machine: writing, and generating with banks of growing size.

H memory heads, N remembered tokens, T tokens, E head size.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.bank import BankEntry, MemoryBank
from longmem.drawing import new_figure
from longmem.errors import ConfigError
from longmem.model import LongMem
from longmem.retrieved import Retrieve, Retrieved

_BLOCK = 1 << 14  # tokens whose keys and values are drawn; larger banks repeat them, their channels moved on
_RANDOM = ("empty", "random")  # what such banks are called
_WARM = 2  # tokens generated before any is timed


@dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
        sizes: tokens in each bank; 0 is the SideNet with nothing to read.
        write: tokens written, and read by the backbone alone to compare.
        prompt: tokens in the local window before any is generated.
        tokens: most tokens generated with a bank.
        seconds: a bank is given up after so many, once there are five tokens.
        seed: of random tokens, keys and values.
    """

    sizes: tuple[int, ...] = (0, 4096, 65536, 262144)
    write: int = 2304
    prompt: int = 256
    tokens: int = 24
    seconds: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("sizes", bool(self.sizes) and min(self.sizes) >= 0, "one or more numbers of tokens, 0 or more"),
            ("write", self.write >= 1, "at least 1"),
            ("prompt", self.prompt >= 2, "at least 2 tokens"),
            ("tokens", self.tokens >= 5, "at least 5"),
            ("seconds", self.seconds > 0, "above 0"),
        ):
            if not valid:
                raise ConfigError(f"{name} of a bench must be {expected}; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Cost:
    """What a generated token costs with a bank.

    Attributes:
        bank: what the bank is.
        size: N, its tokens; None is the backbone alone, without a SideNet.
        tokens: how many were timed.
        ms_p50, ms_p95: milliseconds a token.
        search_ms_p50, search_ms_p95: of these, looking things up in the bank.
    """

    bank: str
    size: int | None
    tokens: int
    ms_p50: float
    ms_p95: float
    search_ms_p50: float
    search_ms_p95: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 / self.ms_p50


@dataclass(frozen=True)
class BenchResult:
    """Figures of one machine.

    Attributes:
        machine: what it is, in words.
        model: the backbone's name.
        write_tokens_per_second: of remembering text.
        prefill_tokens_per_second: of the backbone reading the same tokens, in windows of the same size.
        costs: a token with each bank, the backbone alone first.
    """

    machine: dict[str, str]
    model: str
    write_tokens_per_second: float
    prefill_tokens_per_second: float
    costs: tuple[Cost, ...]
    config: BenchConfig

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        for cost, row in zip(self.costs, fields["costs"], strict=True):
            row["tokens_per_second"] = cost.tokens_per_second
        return fields

    def save(self, path: str | Path) -> None:
        """Write all figures to a JSON file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draw milliseconds a token against the bank's size into an image file.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        figure = new_figure(6, 4)
        axes = figure.subplots()
        grown = sorted((cost for cost in self.costs if cost.bank in _RANDOM), key=lambda cost: cost.size or 0)
        sizes = [cost.size or 0 for cost in grown]
        axes.plot(sizes, [cost.ms_p50 for cost in grown], "o-", label="a token")
        axes.plot(sizes, [cost.search_ms_p50 for cost in grown], "o-", label="of it, search")
        for cost in self.costs:
            if cost.size is None:
                axes.axhline(cost.ms_p50, color="grey", linestyle=":", label=cost.bank)
            elif cost.bank not in _RANDOM:
                axes.plot([cost.size], [cost.ms_p50], "*", markersize=12, label=cost.bank)
        axes.set_xscale("symlog", linthresh=1024)
        axes.set(xlabel="tokens in the bank", ylabel="milliseconds (median)", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{self.model}\n{self.machine['processor']}", fontsize=9)
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def bench(
    model: LongMem,
    config: BenchConfig | None = None,
    *,
    banks: Sequence[tuple[str, MemoryBank]] = (),
    on_step: Callable[[int], None] | None = None,
) -> BenchResult:
    """Measure a model on this machine. Random tokens and banks: they are for time, not for meaning.

    Args:
        banks: more banks to generate with, by name, each searched as it is set to.
        on_step: called with 1 for each of `steps(config, banks)` steps that is done.
    """
    config = config or BenchConfig()
    advance = on_step or (lambda _: None)
    window = config.prompt + _WARM + config.tokens
    if window > model.backbone.max_positions:
        raise ConfigError(
            f"A bench of {config.prompt} tokens of prompt and {config.tokens} generated needs a window of {window}; "
            f"backbone {model.backbone.name!r} has {model.backbone.max_positions}. Give fewer."
        )
    generator = torch.Generator().manual_seed(config.seed)
    ids_N = torch.randint(model.backbone.config.vocab_size, (config.write,), generator=generator)
    write = config.write / _seconds_of(model, lambda: model.encode(ids_N))
    advance(1)
    prefill = config.write / _seconds_of(model, lambda: _prefill(model, ids_N))
    advance(1)
    costs = [cost_of(model, "backbone alone", None, config, memory=0.0)]
    advance(1)
    for size in config.sizes:
        bank = random_bank(model, size, config.seed)
        costs.append(cost_of(model, _RANDOM[size > 0], bank, config))
        advance(1)
    for name, bank in banks:
        costs.append(cost_of(model, name, bank, config))
        advance(1)
    return BenchResult(machine(model.device), model.backbone.name, write, prefill, tuple(costs), config)


def steps(config: BenchConfig, banks: Sequence[Any] = ()) -> int:
    """Steps that `bench` counts."""
    return 3 + len(config.sizes) + len(banks)


@torch.no_grad()
def cost_of(model: LongMem, name: str, bank: MemoryBank | None, config: BenchConfig, *, memory: float = 1.0) -> Cost:
    """What a token costs that is generated with a bank, behind a random prompt that is read without one."""
    generator = torch.Generator().manual_seed(config.seed)
    read_1T = torch.randint(model.backbone.config.vocab_size, (1, config.prompt), generator=generator)
    read_1T, cache = read_1T.to(model.device), model.new_cache()
    retrieve = None
    times, search_times = [], []
    started = time.perf_counter()
    for step in range(1 + _WARM + config.tokens):
        search = _Clocked(retrieve, model.device) if retrieve is not None else None
        before = _now(model.device)
        hidden_BTD, _ = model.read(read_1T, search, memory=memory, cache=cache)
        read_1T = model.backbone.logits(hidden_BTD[:, -1:]).argmax(-1)
        elapsed = _now(model.device) - before
        if step == 0:
            retrieve = None if memory == 0.0 else model.reader(bank, rows=1)
        elif step > _WARM:
            times.append(1000 * elapsed)
            search_times.append(0.0 if search is None else 1000 * search.seconds)
        if len(times) >= 5 and time.perf_counter() - started > config.seconds:
            break
    size = None if bank is None else len(bank)
    return Cost(name, size, len(times), *_percentiles(times), *_percentiles(search_times))


def random_bank(model: LongMem, size: int, seed: int = 0) -> MemoryBank:
    """A bank of `size` random tokens, on the model's device."""
    # One block is drawn, since drawing takes longer than all the rest; no two keys are alike up to E blocks.
    bank, generator = model.new_bank(), torch.Generator().manual_seed(seed)
    shape = (len(model.config.memory_heads), min(size, _BLOCK), model.backbone.head_dim)
    keys_HnE, values_HnE = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    ids_n = torch.randint(model.backbone.config.vocab_size, (shape[1],), generator=generator)
    while len(bank) < size:
        first = len(bank)
        part, moved = slice(0, min(size - first, shape[1])), first // _BLOCK
        keys_HNE = keys_HnE[:, part].roll(moved, -1)
        starts_N = torch.arange(first, first + part.stop)
        offsets_N2 = torch.stack([starts_N, starts_N + 1], dim=1)
        values_HNE = values_HnE[:, part]
        bank.append(BankEntry("random", "x" * part.stop, first, ids_n[part], offsets_N2, keys_HNE, values_HNE))
    return bank


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    described = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


class _Clocked:
    """A retrieve callable that adds up the seconds it takes."""

    def __init__(self, retrieve: Retrieve, device: torch.device) -> None:
        self._retrieve, self._device = retrieve, device
        self.seconds = 0.0

    def __call__(self, layer: int, query_BKGTE: Tensor) -> Retrieved:
        before = _now(self._device)
        found = self._retrieve(layer, query_BKGTE)
        self.seconds += _now(self._device) - before
        return found


def _prefill(model: LongMem, ids_N: Tensor) -> None:
    """The backbone by itself reads tokens once, in windows as large as those of writing."""
    encode = model.config.encode
    for ids_T in ids_N.split(min(encode.stride + encode.overlap, model.backbone.max_positions)):
        model.backbone(ids_T[None].to(model.device), boundaries={model.backbone.num_layers})


def _seconds_of(model: LongMem, run: Callable[[], Any]) -> float:
    before = _now(model.device)
    run()
    return _now(model.device) - before


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _percentiles(times: list[float]) -> tuple[float, float]:
    p50, p95 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    )
    return p50, p95


__all__ = ["BenchConfig", "BenchResult", "Cost", "bench", "steps"]
