"""Long-context language modelling: the same weights with the bank on, empty, and filled with the wrong text.

Two protocols (paper, section 3.2):

* blocks: each segment starts with an empty local window, the bank holds the document's earlier tokens;
* sliding: each token sees 1,024 to 1,536 tokens of local context, the bank holds what is before them. The honest one.

B documents side by side, T tokens of a window, X scored tokens, H memory heads, N tokens of a document, E head size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longmem.backbone import BackboneOutput
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.focus import FOCUS, Focus
from longmem.focus import check as check_focus
from longmem.model import LongMem
from longmem.ops import linear_nll
from longmem.retrieved import Retrieve
from longmem.streams import StreamBanks

USUAL_CONDITIONS = ("backbone_local", "backbone_window", "bank_off", "bank_on", "bank_wrong")
BANKED = ("bank_on", "bank_wrong", "bank_crowded", "bank_focused")
# The others take long: whole windows through the SideNet, and a search as many times as large as there are documents.
CONDITIONS = (*USUAL_CONDITIONS, "sidenet_window", "bank_crowded", "bank_focused")


@dataclass(frozen=True)
class PerplexityConfig:
    """What is scored.

    Attributes:
        protocol: see the module's docstring.
        segment: tokens of a block; also the unit of `segments`.
        prefill: tokens that the bank holds when scoring starts.
        segments: how many times `segment` tokens are scored.
        context: local tokens before each scored stride (sliding).
        stride: tokens scored at a time (sliding).
        conditions: any of `backbone_local` (the frozen model, same local window), `backbone_window` (its whole
            trained window), `bank_off`, `bank_on`, `bank_wrong` (another document's memory); only if asked for:
            `sidenet_window` (no bank, but the SideNet behind the backbone's whole trained window), `bank_crowded`
            (the document's own memory among those of all documents beside it) and `bank_focused` (the same, of which
            what the last tokens before the scored ones have to do with is read: `longmem.focus`).
        focus: tokens that are read of a bank at most (`bank_focused`).
        rows: documents side by side; 0 chooses.
        seed: of the bootstrap.
    """

    protocol: Literal["blocks", "sliding"] = "sliding"
    segment: int = 1024
    prefill: int = 16384
    segments: int = 16
    context: int = 1024
    stride: int = 512
    conditions: tuple[str, ...] = USUAL_CONDITIONS
    focus: int = FOCUS
    rows: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in ("blocks", "sliding"):
            raise ConfigError(f"Unknown protocol {self.protocol!r}; choose blocks or sliding.")
        if self.prefill < 0 or self.segments < 1 or self.segment < 2:
            raise ConfigError(
                f"prefill must be >= 0, segments >= 1 and segment >= 2; got {self.prefill}, {self.segments}, "
                f"{self.segment}."
            )
        if self.protocol == "sliding" and (self.segments * self.segment) % self.stride:
            raise ConfigError(f"stride {self.stride} does not divide the {self.segments * self.segment} scored tokens.")
        check_focus(self.focus)
        unknown = set(self.conditions) - set(CONDITIONS)
        if unknown:
            raise ConfigError(f"Unknown conditions {sorted(unknown)}; choose among {', '.join(CONDITIONS)}.")

    @property
    def scored(self) -> int:
        """Tokens scored in each document."""
        return self.segments * self.segment

    @property
    def first_scored(self) -> int:
        return self.prefill + (self.context if self.protocol == "sliding" else 0)

    @property
    def needed(self) -> int:
        """Tokens a document must have."""
        return self.first_scored + self.scored


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexities over all documents, and the losses of each.

    Attributes:
        perplexity: condition → exp(mean loss), None where a condition could not be measured.
        gain_percent: 100 · (1 − bank_on / bank_off).
        gain_interval: its 95 % bootstrap interval over documents.
        recovered: what the bank takes from the loss, as a share of what the whole window takes from it: (bank_off −
            bank_on) / (bank_off − sidenet_window), in nats; None unless all three are measured.
        intervals: condition → 95 % interval of the perplexity.
        tokens: scored tokens of all documents.
        documents: their names.
        losses: condition → mean loss of each document, in nats.
        by_position: condition → perplexity of each segment (blocks) or 1,024 tokens (sliding), over documents.
    """

    perplexity: dict[str, float | None]
    gain_percent: float | None
    gain_interval: tuple[float, float] | None
    recovered: float | None
    intervals: dict[str, tuple[float, float] | None]
    tokens: int
    documents: list[str]
    losses: dict[str, list[float]]
    by_position: dict[str, list[float]]
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        rest = dataclasses.asdict(self)
        return {**rest.pop("perplexity"), **rest, "documents": len(self.documents), "document_names": self.documents}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def perplexity(
    model: LongMem,
    documents: TokenizedDocuments,
    config: PerplexityConfig = PerplexityConfig(),
    *,
    on_tokens: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Measure perplexity with the bank on, off and wrong.

    Documents shorter than needed are left out.

    Args:
        on_tokens: progress, called with the number of document tokens just dealt with.

    Raises:
        SourceError: no document is long enough.
    """
    long_enough = [i for i in range(len(documents)) if documents.lengths[i] >= config.needed]
    if not long_enough:
        raise SourceError(
            f"No document has the {config.needed} tokens that this evaluation needs; the longest has "
            f"{int(documents.lengths.max())}. "
            "Give longer documents, or lower --prefill or --segments."
        )
    rows = config.rows or (16 if model.device.type == "cuda" else 2)
    # Batches of nearly equal size, two at least: the wrong bank is a neighbour's in the batch.
    batches = max(1, min(-(-len(long_enough) // rows), len(long_enough) // 2))
    per_document: dict[str, list[np.ndarray]] = {name: [] for name in config.conditions}
    for batch in np.array_split(np.array(long_enough), batches):
        tokens_BN = torch.stack([torch.from_numpy(documents[i][: config.needed].astype(np.int64)) for i in batch])
        for name, loss_BX in _score(model, tokens_BN, config).items():
            per_document[name].extend(loss_BX.cpu().numpy())
        if on_tokens is not None:
            on_tokens(int(tokens_BN.numel()))
    losses = {name: np.stack(rows_X) for name, rows_X in per_document.items() if rows_X}
    return _summary(losses, [documents.names[i] for i in long_enough], config)


def _score(model: LongMem, tokens_BN: Tensor, config: PerplexityConfig) -> dict[str, Tensor]:
    """Losses (B, scored) of a batch of documents under each condition."""
    tokens_BN = tokens_BN.to(model.device)
    rows = tokens_BN.shape[0]
    reads_bank = set(BANKED) & set(config.conditions) and model.config.memory_heads
    banks = None
    focus = Focus(config.focus)
    if reads_bank:
        encoded = [model.encode(row_N[: config.needed]) for row_N in tokens_BN]
        keys_HBNE = torch.stack([keys for keys, _ in encoded], dim=1).to(model.device)
        values_HBNE = torch.stack([values for _, values in encoded], dim=1).to(model.device)
        capacity = -(-config.needed // model.config.chunk_size) * model.config.chunk_size
        banks = StreamBanks(
            rows, capacity, model.config, model.backbone.head_dim, dtype=keys_HBNE.dtype, device=model.device
        )
    losses: dict[str, list[Tensor]] = {name: [] for name in config.conditions}
    step = config.segment if config.protocol == "blocks" else config.stride
    local = 0 if config.protocol == "blocks" else config.context
    remembered = 0
    for first in range(config.first_scored, config.needed, step):
        last = first + step
        window = first - local
        if banks is not None:
            banks.append(
                keys_HBNE[:, :, remembered:window],
                values_HBNE[:, :, remembered:window],
                tokens_BN[:, remembered:window],
            )
            remembered = window
        for name, loss_BX in _score_step(model, tokens_BN, window, first, last, banks, focus, config).items():
            losses[name].append(loss_BX)
    return {name: torch.cat(parts, dim=1) for name, parts in losses.items() if parts}


def _score_step(
    model: LongMem,
    tokens_BN: Tensor,
    window: int,
    first: int,
    last: int,
    banks: StreamBanks | None,
    focus: Focus,
    config: PerplexityConfig,
) -> dict[str, Tensor]:
    """Losses of tokens [first, last), the local window beginning at `window`."""
    backbone = model.backbone
    rows = tokens_BN.shape[0]
    prefix_B1 = tokens_BN.new_full((rows, 1), backbone.prefix_token_id)
    target_BX = tokens_BN[:, first:last]

    def nll(hidden_BTD: Tensor) -> Tensor:
        scored_XD = backbone.final_norm(hidden_BTD[:, -(last - first) :]).flatten(0, 1)
        return linear_nll(scored_XD, backbone.output_weight_VD, target_BX.flatten()).unflatten(0, (rows, -1))

    input_BT = torch.cat((prefix_B1, tokens_BN[:, window : last - 1]), dim=1)
    top = backbone.num_layers
    seen = backbone(input_BT, boundaries={*model.sidenet.boundaries, top})
    readers: dict[str, Retrieve | None] = {"bank_off": None}
    if banks is not None:
        readers["bank_on"] = banks.reader()
        if rows > 1:
            readers["bank_wrong"] = banks.reader(torch.arange(rows, device=tokens_BN.device).roll(1))
            filled = window // model.config.chunk_size * model.config.chunk_size
            readers["bank_crowded"] = banks.reader(None, range(rows), rows, filled)
    losses = {name: nll(model.correct(seen, readers[name])[0]) for name in config.conditions if name in readers}
    if "bank_focused" in config.conditions and banks is not None:
        asking_BT = tokens_BN[:, max(0, first - config.context) : first]
        losses["bank_focused"] = nll(_focused(model, seen, banks, focus, window, asking_BT))
    if "backbone_local" in config.conditions:
        losses["backbone_local"] = nll(seen.hidden_states[top])
    whole = [name for name in ("backbone_window", "sidenet_window") if name in config.conditions]
    if whole:
        past = max(0, last - backbone.max_positions)
        parts: dict[str, list[Tensor]] = {name: [] for name in whole}
        # A whole trained window is long: a few documents at a time.
        for some_BN in tokens_BN.split(4):
            long_BT = torch.cat((prefix_B1[: len(some_BN)], some_BN[:, past : last - 1]), dim=1)
            long = backbone(long_BT, boundaries={*model.sidenet.boundaries, top})
            for name in whole:
                hidden_BTD = long.hidden_states[top] if name == "backbone_window" else model.correct(long, None)[0]
                parts[name].append(hidden_BTD[:, -(last - first) :])
        losses |= {name: nll(torch.cat(some)) for name, some in parts.items()}
    return losses


def _focused(
    model: LongMem, seen: BackboneOutput, streams: StreamBanks, focus: Focus, filled: int, asking_BT: Tensor
) -> Tensor:
    """Hidden states (B, T, D) where each row reads what its text is about of all that all rows remember."""
    bank = streams.together(filled // model.config.chunk_size * model.config.chunk_size, model.bank_spec)
    rows = []
    # Row by row: what is chosen is another bank for each.
    for row, asking_T in enumerate(asking_BT):
        hidden_states = {boundary: hidden_BTD[row : row + 1] for boundary, hidden_BTD in seen.hidden_states.items()}
        alone = BackboneOutput(hidden_states, seen.positions_BT[row : row + 1])
        read = focus.on(bank, asking_T.tolist())
        rows.append(model.correct(alone, model.reader(read, rows=1))[0])
    return torch.cat(rows)


def _summary(losses: dict[str, np.ndarray], names: list[str], config: PerplexityConfig) -> PerplexityResult:
    means = {name: loss_DX.mean(1) for name, loss_DX in losses.items()}
    some = next(iter(losses.values()))
    draws = np.random.default_rng(config.seed).integers(len(names), size=(2000, len(names)))

    def interval(statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
        if len(names) < 2:
            return None
        low, high = np.percentile(statistic(draws), [2.5, 97.5])
        return float(low), float(high)

    gain = gain_interval = None
    if "bank_on" in means and "bank_off" in means:
        saved_D = means["bank_off"] - means["bank_on"]
        gain = float(100 * (1 - np.exp(-saved_D.mean())))
        gain_interval = interval(lambda d: 100 * (1 - np.exp(-saved_D[d].mean(1))))
    recovered = None
    if {"bank_on", "bank_off", "sidenet_window"} <= set(means):
        whole = float((means["bank_off"] - means["sidenet_window"]).mean())
        recovered = float((means["bank_off"] - means["bank_on"]).mean()) / whole if whole else None
    return PerplexityResult(
        perplexity={c: float(np.exp(means[c].mean())) if c in means else None for c in config.conditions},
        gain_percent=gain,
        gain_interval=gain_interval,
        recovered=recovered,
        intervals={c: interval(lambda d, m=m: np.exp(m[d].mean(1))) for c, m in means.items()},
        tokens=int(some.size),
        documents=names,
        losses={c: [float(x) for x in m] for c, m in means.items()},
        by_position={
            c: [float(np.exp(part.mean())) for part in np.array_split(loss_DX, config.segments, axis=1)]
            for c, loss_DX in losses.items()
        },
        config=dataclasses.asdict(config),
    )
