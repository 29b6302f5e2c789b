"""What a probe found: figures, choice, evidence, and how to look at them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from longmem.config import MemoryHead, read_json
from longmem.drawing import new_figure
from longmem.errors import CheckpointError
from longmem.probe.config import ProbeConfig


@dataclass(frozen=True)
class Addition:
    """A step of the greedy addition.

    Attributes:
        head: the head that is let look from here on.
        reason: "look-up" for those that came first, "copy-out" for those chosen by gain.
        log_probability: of the answers, now that it looks.
        gain: how much of that is this head's, in nats.
        chosen: False only for a last step, whose gain was too small.
    """

    head: MemoryHead
    reason: Literal["look-up", "copy-out"]
    log_probability: float
    gain: float
    chosen: bool


@dataclass(frozen=True)
class Evidence:
    """What the figures of a probe rest on.

    Attributes:
        positions: how many were counted in the look-up test.
        chance: hit rate of `top_k` keys drawn at random.
        facts: questions of the causal test.
        context: tokens before each question: prefix, session and filler.
        log_probability_all, log_probability_none: of the answers (mean over facts of their tokens' sum, in nats), when
            all heads may look at the session and when none may.
        right_all: share of answers that greedy decoding gives when all heads look.
    """

    positions: int
    chance: float
    facts: int
    context: int
    log_probability_all: float
    log_probability_none: float
    right_all: float


@dataclass(frozen=True)
class ProbeResult:
    """The memory heads of a backbone, and why.

    Attributes:
        backbone: its name.
        memory_heads: the choice in ascending order, as `SideNetConfig` takes it. Empty if no head can look anything up
            or helps to answer.
        look_up: hit rate of each layer's query heads, L × H.
        knock_out: nats lost without each layer's key-value heads, L × K.
        path: the greedy addition.
        evidence: what these rest on.
        config: the settings.
        seconds: wall time of each stage.
    """

    backbone: str
    memory_heads: tuple[MemoryHead, ...]
    look_up: tuple[tuple[float, ...], ...]
    knock_out: tuple[tuple[float, ...], ...]
    path: tuple[Addition, ...]
    evidence: Evidence
    config: ProbeConfig
    seconds: dict[str, float]

    @property
    def look_up_kv(self) -> tuple[tuple[float, ...], ...]:
        """Hit rate of each key-value head, L × K: that of its best query head."""
        return best_of_group(self.look_up, len(self.knock_out[0]))

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        return json.dumps(fields | {"look_up_kv": self.look_up_kv}, indent=1)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, or not a probe's result.
        """
        fields = read_json(Path(path))
        fields.pop("look_up_kv", None)
        try:
            fields["memory_heads"] = tuple(MemoryHead(*head) for head in fields["memory_heads"])
            for name in ("look_up", "knock_out"):
                fields[name] = tuple(tuple(row) for row in fields[name])
            fields["path"] = tuple(Addition(**step | {"head": MemoryHead(*step["head"])}) for step in fields["path"])
            fields["evidence"] = Evidence(**fields["evidence"])
            fields["config"] = ProbeConfig(**fields["config"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not the result of a probe: {error}. Expected a file written by `longmem probe`."
            ) from error

    def heat_map(self) -> RenderableType:
        """Layers × heads for a terminal: look-up hit rates beside knock-out effects. Chosen heads are underlined."""
        group = len(self.look_up[0]) // len(self.knock_out[0])
        return Columns(
            [
                _heat_table("look-up, hit rate", self.look_up, 1.0, group, self.memory_heads),
                _heat_table("knock-out, nats", self.knock_out, self._largest_effect, 1, self.memory_heads),
            ],
            padding=(0, 4),
        )

    def plot(self, path: str | Path) -> None:
        """Draw the heat map into an image file.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        layers, heads = len(self.look_up), len(self.look_up[0])
        kv_heads = len(self.knock_out[0])
        figure = new_figure(3 + 0.45 * (heads + kv_heads), 1.5 + 0.22 * layers)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(heads, kv_heads))
        panels = (
            (left, self.look_up, 1.0, heads // kv_heads, "look-up: hit rate", "query head"),
            (right, self.knock_out, self._largest_effect, 1, "knock-out: nats", "KV head"),
        )
        for axes, values, top, group, title, label in panels:
            axes.imshow(values, aspect="auto", cmap="Oranges", vmin=0.0, vmax=top)
            axes.set(title=title, xlabel=label, xticks=range(len(values[0])), yticks=range(layers))
            for layer, row in enumerate(values):
                for head, value in enumerate(row):
                    weight = "bold" if (layer, head // group) in self.memory_heads else "normal"
                    axes.text(head, layer, _number(value), ha="center", va="center", fontsize=6, fontweight=weight)
        left.set_ylabel("layer")
        figure.suptitle(f"{self.backbone}: " + " ".join(f"({layer},{head})" for layer, head in self.memory_heads))
        figure.savefig(path, dpi=150)

    @property
    def _largest_effect(self) -> float:
        return max(max(max(row) for row in self.knock_out), 1e-6)


def best_of_group(rates: tuple[tuple[float, ...], ...], kv_heads: int) -> tuple[tuple[float, ...], ...]:
    """L × H hit rates of query heads → L × K of key-value heads."""
    group = len(rates[0]) // kv_heads
    return tuple(tuple(max(row[k * group : (k + 1) * group]) for k in range(kv_heads)) for row in rates)


def _number(value: float) -> str:
    """Two decimals without the zero before the point: .93, 1.00, -.05; a dot for nothing."""
    text = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"
    return "·" if text in (".00", "-.00") else text


def _heat_table(
    title: str, values: tuple[tuple[float, ...], ...], top: float, group: int, chosen: Sequence[MemoryHead]
) -> Table:
    table = Table(title=title, box=None, padding=0, header_style="dim")
    table.add_column("layer ", justify="right", style="dim", no_wrap=True)
    for head in range(len(values[0])):
        table.add_column(f"{head} ", justify="right", min_width=5, no_wrap=True)
    for layer, row in enumerate(values):
        cells = []
        for head, value in enumerate(row):
            heat = min(max(value / top, 0.0), 1.0)
            background = f"rgb({255 - int(25 * heat)},{255 - int(155 * heat)},{255 - int(255 * heat)})"
            underline = " bold underline" if (layer, head // group) in chosen else ""
            cell = Text(f"{_number(value):>4}", style=f"rgb(40,40,40) on {background}{underline}")
            cells.append(cell.append(" ", style=f"on {background} not underline"))
        table.add_row(f"{layer} ", *cells)
    return table
