"""Training a SideNet (paper, section 2.4): forward → loss → step → write.

Streams of consecutive segments, one bank a stream. Each step reads what earlier steps wrote, and only then is its own
text written, so a segment never retrieves itself. The backbone gets no gradient.

B streams, S tokens of a segment, T = S + 1 with the prefix; in starved steps B counts windows and S their tokens.
K, G, R as in `longmem.attention`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longmem.attention import MemoryRead
from longmem.backbone import BackboneOutput
from longmem.bank import DTYPES
from longmem.config import SideNetConfig, read_json
from longmem.data import Mixture, Segments, Streams, TokenizedDocuments, to_device
from longmem.drawing import new_figure
from longmem.errors import CheckpointError, ConfigError, MissingExtraError
from longmem.evals.perplexity import PerplexityConfig, PerplexityResult, perplexity
from longmem.model import LongMem
from longmem.ops import linear_cross_entropy, linear_divergence, linear_nll
from longmem.streams import StreamBanks, StreamReader


@dataclass(frozen=True)
class TrainConfig:
    """How a SideNet is trained.

    Attributes:
        steps: optimiser steps; the learning rate is a function of the step alone.
        rows: streams side by side, B.
        segment: tokens of a segment, S.
        bank_tokens: tokens that each stream's bank keeps while training (it is unlimited afterwards).
        learning_rate: peak, after a linear warm-up; then a cosine down to `final_rate` of it.
        gate_rate: factor on the learning rate of α, scales, biases and gates, which have far to go.
        weight_decay: of matrices only.
        empty_weight: of a second loss, that of the same segments with an empty bank, so that one costs nothing. The
            backbone runs once for both.
        wrong_fraction: share of streams that read another stream's bank in a step, so that a wrong one costs little.
        crowded_fraction: share of streams that read their bank among others' in a step, as one `crowd` times as large.
        crowd: streams whose banks are one to those that are crowded.
        starved_fraction: share of steps in which segments are read in short windows, none of which sees the others, so
            that questions with little before them are learned too.
        starved: tokens of the shortest such windows; each starved step takes this, twice, or four times as many, as
            long as they divide `segment`.
        starved_crowd: as `crowd`, in starved steps; 1 crowds nobody then.
        harmless_weight: of the divergence of what is said with a wrong bank from what is said with an empty one, in
            rows that read a wrong one: it should change nothing. A distribution a token teaches more than the token.
        lookup_weight: of the memory regulariser: attention among retrieved tokens should fall on those that are the
            next token.
        answer_weight: of marked answers (see `longmem.data.Document`), beside 1 for any other token, in rows that read
            their own bank. Elsewhere nothing could tell the answers, so there they are left out of the loss.
        memory: False trains the memory-free twin: the same network, data, steps and seed without any bank.
        max_segments: segments read of one document before the stream moves on.
        dtype: precision of the forward pass; master weights are float32.
        compile: run `torch.compile`d layers; pays on a GPU, after about a minute.
    """

    steps: int = 2000
    rows: int = 16
    segment: int = 1024
    bank_tokens: int = 16384
    learning_rate: float = 2e-3
    gate_rate: float = 10.0
    final_rate: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    seed: int = 0
    empty_weight: float = 0.5
    wrong_fraction: float = 0.1
    crowded_fraction: float = 0.0
    crowd: int = 4
    starved_fraction: float = 0.0
    starved: int = 64
    starved_crowd: int = 1
    harmless_weight: float = 0.0
    lookup_weight: float = 0.0
    answer_weight: float = 1.0
    memory: bool = True
    max_segments: int = 64
    dtype: str = "bfloat16"
    compile: bool = False
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "segment", "bank_tokens", "max_segments", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.wrong_fraction <= 1:
            raise ConfigError(f"wrong_fraction is a share of the batch, from 0 to 1; got {self.wrong_fraction}.")
        if not 0 <= self.crowded_fraction <= 1:
            raise ConfigError(f"crowded_fraction is a share of the batch, from 0 to 1; got {self.crowded_fraction}.")
        if self.crowded_fraction and (self.crowd < 1 or self.rows % self.crowd):
            raise ConfigError(f"crowd must divide the {self.rows} rows; got {self.crowd}.")
        if not 0 <= self.starved_fraction <= 1:
            raise ConfigError(f"starved_fraction is a share of the steps, from 0 to 1; got {self.starved_fraction}.")
        if self.starved_fraction and (self.starved < 1 or self.segment % self.starved):
            raise ConfigError(f"starved must divide the {self.segment} tokens of a segment; got {self.starved}.")
        if self.starved_crowd < 1 or self.rows % self.starved_crowd:
            raise ConfigError(f"starved_crowd must divide the {self.rows} rows; got {self.starved_crowd}.")
        if self.empty_weight < 0:
            raise ConfigError(f"empty_weight must not be negative; got {self.empty_weight}.")
        if self.harmless_weight < 0:
            raise ConfigError(f"harmless_weight must not be negative; got {self.harmless_weight}.")
        if self.answer_weight < 0:
            raise ConfigError(f"answer_weight must be at least 0; got {self.answer_weight}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step (0-based)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """Everything a run consists of; `step()` shows the whole of it.

    Args:
        model: its SideNet is trained in float32, its backbone is left alone.
        documents: tokenised training text, of one kind or a mixture.
        config: settings.
    """

    def __init__(self, model: LongMem, documents: TokenizedDocuments | Mixture, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.device = model.device
        self.sidenet = model.sidenet.float().requires_grad_(True)
        if config.compile:
            model.backbone.compile_layers()
            self.sidenet.compile_layers()
        self.streams = Streams(
            documents, config.rows, config.segment, max_segments=config.max_segments, seed=config.seed
        )
        self.banks = StreamBanks(
            config.rows,
            config.bank_tokens,
            model.config,
            model.backbone.head_dim,
            dtype=torch.bfloat16,
            device=self.device,
        )
        self.optimizer = torch.optim.AdamW(
            self._groups(), betas=(config.beta1, config.beta2), fused=self.device.type == "cuda"
        )
        self.rng = np.random.default_rng(config.seed + 1)
        self.done = 0
        self.tokens = 0

    @property
    def starved_windows(self) -> list[int]:
        """Tokens that windows of starved steps may have."""
        sizes = [self.config.starved * factor for factor in (1, 2, 4)]
        return [size for size in sizes if self.config.segment % size == 0 and size < self.config.segment] or sizes[:1]

    def _groups(self) -> list[dict[str, Any]]:
        config = self.config
        matrices, vectors, gates = [], [], []
        for name, parameter in self.sidenet.named_parameters():
            if ".decoder." in name or name.endswith("memory_output_DF"):
                (matrices if parameter.ndim == 2 else vectors).append(parameter)
            else:
                gates.append(parameter)
        return [
            {"params": matrices, "lr": config.learning_rate, "weight_decay": config.weight_decay, "factor": 1.0},
            {"params": vectors, "lr": config.learning_rate, "weight_decay": 0.0, "factor": 1.0},
            {"params": gates, "lr": config.learning_rate, "weight_decay": 0.0, "factor": config.gate_rate},
        ]

    def step(self) -> dict[str, float]:
        """One optimiser step; returns what there is to log."""
        whole = segments = self.streams.next().to(self.device)
        self.banks.reset(segments.starts_B)
        # Drawn only where it matters, so that other runs draw what they always did.
        starves = bool(self.config.starved_fraction) and self.rng.random() < self.config.starved_fraction
        if starves:
            segments = whole.cut(self.starved_windows[int(self.rng.integers(len(self.starved_windows)))])
        tokens_BS = segments.tokens_BS
        seen = self._see(tokens_BS, self._boundaries)

        reader, right_B, wrong_M = self._reader(windows=len(tokens_BS) // self.config.rows)
        empty_BTD = None if reader is None else self._read_nothing(seen, segments)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            hidden_BTD, reads = self.model.correct(seen, reader)
            factor_BS = self._factors(segments, right_B if reader is not None else torch.zeros_like(right_B))
            loss = self._language_loss(hidden_BTD[:, :-1], tokens_BS, factor_BS)
            answers = self._answer_loss(hidden_BTD[:, :-1], segments, right_B) if reader is not None else {}
            lookup = self._lookup_loss(reads, reader, right_B, tokens_BS) if reader is not None else loss.new_zeros(())
            harm = self._harm(hidden_BTD, empty_BTD, wrong_M)
        (loss + self.config.lookup_weight * lookup + self.config.harmless_weight * harm).backward()

        norm = nn.utils.clip_grad_norm_(self.sidenet.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["factor"] * self.config.rate(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.memory:
            # What is remembered was read as a whole, as it would be in use.
            memory_layers = set(self.model.config.memory_layers)
            self._write(self._see(whole.tokens_BS, memory_layers) if starves else seen, whole.tokens_BS)
        self.done += 1
        self.tokens += tokens_BS.numel()
        return self._figures(loss, lookup, harm, answers, norm, reads)

    @torch.no_grad()
    def read(self) -> Segments:
        """What a step would read and remember, without learning from it; returns it. For who wants to watch."""
        segments = self.streams.next().to(self.device)
        self.banks.reset(segments.starts_B)
        seen = self._see(segments.tokens_BS, self._boundaries)
        reader, _, _ = self._reader()
        self.model.correct(seen, reader)
        if self.config.memory:
            self._write(seen, segments.tokens_BS)
        self.done += 1
        return segments

    def _read_nothing(self, seen: BackboneOutput, segments: Segments) -> Tensor | None:
        """Learn from the same segments with an empty bank; their hidden states, if they are needed."""
        config = self.config
        # The difference form has nothing to learn from an empty bank: there it is the backbone.
        learns = bool(config.empty_weight) and self.sidenet.config.update == "alpha"
        if not learns and not config.harmless_weight:
            return None
        with (
            torch.set_grad_enabled(learns),
            torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"),
        ):
            hidden_BTD, _ = self.model.correct(seen, None)
            if learns:
                nobody_B = torch.zeros(len(segments.tokens_BS), dtype=torch.bool, device=self.device)
                factor_BS = self._factors(segments, nobody_B)
                loss = config.empty_weight * self._language_loss(hidden_BTD[:, :-1], segments.tokens_BS, factor_BS)
        if learns:
            loss.backward()
        return hidden_BTD.detach()

    def _harm(self, hidden_BTD: Tensor, empty_BTD: Tensor | None, wrong_M: Tensor) -> Tensor:
        """Mean divergence, in nats a token, of rows that read a wrong bank from what they say with an empty one."""
        if not self.config.harmless_weight or empty_BTD is None or not len(wrong_M):
            return hidden_BTD.new_zeros((), dtype=torch.float32)
        norm = self.model.backbone.final_norm
        heard_XD, told_XD = (
            norm(part_BTD.index_select(0, wrong_M)[:, :-1]).flatten(0, 1) for part_BTD in (hidden_BTD, empty_BTD)
        )
        return linear_divergence(heard_XD, told_XD, self.model.backbone.output_weight_VD, 1 / len(heard_XD))

    @property
    def _boundaries(self) -> set[int]:
        """Layers of the backbone whose inputs are read and remembered."""
        return {*self.sidenet.boundaries, *self.model.config.memory_layers, self.model.backbone.num_layers}

    def _see(self, tokens_BS: Tensor, boundaries: set[int]) -> BackboneOutput:
        prefix_B1 = tokens_BS.new_full((tokens_BS.shape[0], 1), self.model.backbone.prefix_token_id)
        return self.model.backbone(torch.cat((prefix_B1, tokens_BS), dim=1), boundaries=boundaries)

    def _reader(self, windows: int = 1) -> tuple[StreamReader | None, Tensor, Tensor]:
        """The banks as this step sees them, given how many windows a stream has; which rows see their own (bool), and
        which do not (their numbers)."""
        config, rows = self.config, self.config.rows
        draw_B = self.rng.random(rows)
        source_B, shift = np.arange(rows), int(self.rng.integers(1, max(2, rows)))
        wrong_B = draw_B < config.wrong_fraction
        crowded = np.zeros(0, dtype=np.int64)
        crowd = config.crowd if windows == 1 else config.starved_crowd
        crowds = bool(config.crowded_fraction) and (windows == 1 or crowd > 1)
        # What was never written must not be read: until every ring is full, nobody is crowded.
        if crowds and self.done * config.segment >= config.bank_tokens:
            crowded = np.sort(self.rng.permutation(rows)[: round(config.crowded_fraction * rows)])
            wrong_B[crowded] = False
            crowded = (crowded[:, None] * windows + np.arange(windows)).flatten()
        source_B = np.where(wrong_B, (source_B + shift) % rows, source_B).repeat(windows)
        wrong_B = wrong_B.repeat(windows)
        right_B = to_device(torch.from_numpy(~wrong_B), self.device)
        wrong_M = to_device(torch.from_numpy(np.flatnonzero(wrong_B)), self.device)
        if not config.memory:
            return None, right_B, wrong_M
        source_B = to_device(torch.from_numpy(source_B), self.device)
        reader = self.banks.reader(source_B, crowded.tolist(), crowd if len(crowded) else 1)
        return reader, right_B, wrong_M

    def _factors(self, segments: Segments, told_B: Tensor) -> Tensor | None:
        """Weight of each token, (B, S) float32, given which rows read what tells their answers; None is 1 for all."""
        if segments.answers_BS is None:
            return None
        weight_B1 = (told_B.float() * self.config.answer_weight)[:, None]
        return torch.where(segments.answers_BS, weight_B1, 1.0)

    def _language_loss(self, hidden_BSD: Tensor, tokens_BS: Tensor, factor_BS: Tensor | None) -> Tensor:
        normed_XD = self.model.backbone.final_norm(hidden_BSD).flatten(0, 1)
        target_X = tokens_BS.flatten()
        # By the number of tokens, not by the sum of weights: what else is in a batch does not change a token's weight.
        weight_X = torch.full_like(target_X, 1 / target_X.numel(), dtype=torch.float32)
        if factor_BS is not None:
            weight_X = weight_X * factor_BS.flatten()
        return linear_cross_entropy(normed_XD, self.model.backbone.output_weight_VD, target_X, weight_X)

    @torch.no_grad()
    def _answer_loss(self, hidden_BSD: Tensor, segments: Segments, right_B: Tensor) -> dict[str, float]:
        """Mean loss of answers in rows that read their own bank, in nats a token, in steps that are logged."""
        if segments.answers_BS is None or not self._logs(self.done + 1):
            return {}
        counted_BS = segments.answers_BS & right_B[:, None]
        if not counted_BS.any():
            return {}
        normed_XD = self.model.backbone.final_norm(hidden_BSD[counted_BS])
        target_X = segments.tokens_BS[counted_BS]
        return {"answer_loss": float(linear_nll(normed_XD, self.model.backbone.output_weight_VD, target_X).mean())}

    def _lookup_loss(self, reads: list[MemoryRead], reader: StreamReader, right_B: Tensor, tokens_BS: Tensor) -> Tensor:
        """−log of the attention, among retrieved tokens, that falls on those which are the next token.

        Counted where the next token was retrieved at all, from the row's own bank: memory must be used where it
        helps, and only there.
        """
        if not self.config.lookup_weight:
            return tokens_BS.new_zeros((), dtype=torch.float32)
        total, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for read in reads:
            ids_BKGSR = reader.token_ids(read.index_BKGTR[..., :-1, :])
            hit_BKGSR = (ids_BKGSR == tokens_BS[:, None, None, :, None]) & read.valid_BKGTR[..., :-1, :]
            found_BKGS = hit_BKGSR.any(-1) & right_B[:, None, None, None]
            log_weight_BKGSR = read.log_weight_BKGTR[..., :-1, :].masked_fill(~hit_BKGSR, -torch.inf)
            log_hit_BKGS = torch.where(found_BKGS[..., None], log_weight_BKGSR, 0.0).logsumexp(-1)
            total = total - (log_hit_BKGS * found_BKGS).sum()
            count = count + found_BKGS.sum()
        return total / count.clamp(min=1)

    @torch.no_grad()
    def _write(self, seen: BackboneOutput, tokens_BS: Tensor) -> None:
        keys_HBTE, values_HBTE = self.model.keys_values(seen)
        self.banks.append(keys_HBTE[:, :, 1:], values_HBTE[:, :, 1:], tokens_BS)

    def _logs(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps

    def _figures(
        self,
        loss: Tensor,
        lookup: Tensor,
        harm: Tensor,
        answers: dict[str, float],
        norm: Tensor,
        reads: list[MemoryRead],
    ) -> dict[str, float]:
        if not self._logs(self.done):
            return {}
        figures = {
            "step": self.done,
            "tokens": self.tokens,
            "loss": float(loss.detach()),
            "lookup": float(lookup.detach()),
            "harm": float(harm.detach()),
            **answers,
            "gradient_norm": float(norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        for read in reads:
            figures[f"mass_{read.layer}"] = float(read.mass_BKGT.detach().mean())
        return figures

    # ---- resuming ------------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """All that is needed to go on as if nothing had happened: weights, optimiser, banks, data, random state."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"sidenet.{name}": p.detach().contiguous() for name, p in self.sidenet.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value.contiguous() for name, value in state.items()})
        tensors["banks.keys"], tensors["banks.values"] = self.banks.keys_HBNE, self.banks.values_HBNE
        tensors["banks.token_ids"], tensors["banks.written"] = self.banks.token_ids_BN, self.banks.written_B
        temporary = folder / ".state.safetensors"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary)
        temporary.replace(folder / "state.safetensors")
        numbers = {
            "done": self.done,
            "tokens": self.tokens,
            "streams": self.streams.state,
            "shares": list(self.streams.mixture.shares),
            "rng": self.rng.bit_generator.state,
            "config": dataclasses.asdict(self.config),
            "sidenet": self.sidenet.config.to_dict(),
        }
        (folder / ".state.json").write_text(json.dumps(numbers))
        (folder / ".state.json").replace(folder / "state.json")

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`.

        Raises:
            CheckpointError: the files are damaged, or were saved by a run with other settings.
        """
        numbers = read_json(folder / "state.json")
        if SideNetConfig.from_dict(numbers.get("sidenet", {})) != self.sidenet.config:
            raise CheckpointError(
                f"The run saved in {folder} trains a SideNet of another shape: {numbers['sidenet']}; now "
                f"{self.sidenet.config.to_dict()}. Resume with the same shape, or begin a new run."
            )
        # A setting that the saved run did not know is one it was not trained with.
        old, new = numbers["config"], dataclasses.asdict(self.config)
        changed = {
            name: (old.get(name), new.get(name))
            for name in old | new
            if old.get(name) != new.get(name) and name not in ("compile", "log_every", "eval_every", "save_every")
        }
        if changed:
            raise CheckpointError(
                f"The run saved in {folder} had other settings: "
                f"{', '.join(f'{n} {a} (now {b})' for n, (a, b) in changed.items())}. "
                "Resume with the same ones, or begin a new run with --warm-from."
            )
        shares = list(self.streams.mixture.shares)
        if numbers.get("shares") != shares:
            raise CheckpointError(
                f"The run saved in {folder} read its kinds of documents in shares of {numbers.get('shares')}, now "
                f"{shares}. Resume with the same mixture, or begin a new run with --warm-from."
            )
        try:
            tensors = load_file(folder / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / 'state.safetensors'} cannot be read ({error}). Begin again, or use --warm-from."
            ) from error
        self.sidenet.load_state_dict(
            {name.removeprefix("sidenet."): t for name, t in tensors.items() if name.startswith("sidenet.")}
        )
        optimizer = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, field = name.split(".")
                optimizer["state"].setdefault(int(index), {})[field] = tensor
        self.optimizer.load_state_dict(optimizer)
        for name, mine in (
            ("keys", self.banks.keys_HBNE),
            ("values", self.banks.values_HBNE),
            ("token_ids", self.banks.token_ids_BN),
            ("written", self.banks.written_B),
        ):
            mine.copy_(tensors[f"banks.{name}"])
        self.done, self.tokens = numbers["done"], numbers["tokens"]
        self.streams.state = numbers["streams"]
        self.rng.bit_generator.state = numbers["rng"]


def train(
    model: LongMem,
    documents: TokenizedDocuments | Mixture,
    config: TrainConfig,
    out: Path,
    *,
    heldout: TokenizedDocuments | None = None,
    evaluation: PerplexityConfig | None = None,
    resume: bool = False,
    on_figures: Callable[[dict[str, Any]], None] | None = None,
) -> PerplexityResult | None:
    """Train the SideNet of `model` and write it to `out`; returns the last held-out evaluation.

    `out` gets `config.json` and `sidenet.safetensors` (bfloat16), `log.jsonl`, `curves.png` (with matplotlib
    installed) and, with `save_every`, `state/` to resume from.

    Raises:
        ConfigError, CheckpointError, SourceError: before anything is trained.
    """
    trainer = Trainer(model, documents, config)
    if resume:
        trainer.load_state(out / "state")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    if resume:
        # Lines of steps after the saved one belong to a future that will now be lived again.
        kept = (
            [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= trainer.done]
            if log.exists()
            else []
        )
        log.write_text("".join(line + "\n" for line in kept))
    elif log.exists():
        log.unlink()
    result = None
    clock, clock_tokens = time.perf_counter(), trainer.tokens

    def write(figures: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        if on_figures is not None:
            on_figures(figures)

    while trainer.done < config.steps:
        figures = trainer.step()
        last = trainer.done == config.steps
        if figures:
            if not math.isfinite(figures["loss"]):
                raise ConfigError(
                    f"The loss is {figures['loss']} at step {trainer.done}. Lower --learning-rate (now "
                    f"{config.learning_rate})."
                )
            now = time.perf_counter()
            figures["tokens_per_second"] = (trainer.tokens - clock_tokens) / (now - clock)
            clock, clock_tokens = now, trainer.tokens
            write(figures)
        if heldout is not None and (last or (config.eval_every and trainer.done % config.eval_every == 0)):
            result = evaluate(model, heldout, evaluation or PerplexityConfig("blocks", prefill=8192, segments=4))
            write(
                {
                    "step": trainer.done,
                    **{k: v for k, v in result.perplexity.items() if v},
                    "gain_percent": result.gain_percent,
                }
            )
            clock = time.perf_counter()
        if config.save_every and (last or trainer.done % config.save_every == 0):
            trainer.save_state(out / "state")
            clock = time.perf_counter()
    training = {"train": dataclasses.asdict(config), "tokens": trainer.tokens, "documents": len(documents)}
    if isinstance(documents, Mixture):
        training["shares"] = list(documents.shares)
    model.save(out, training=training)
    draw_curves(log, out / "curves.png")
    return result


def evaluate(model: LongMem, heldout: TokenizedDocuments, config: PerplexityConfig) -> PerplexityResult:
    """Held-out perplexity in the middle of training, under the same precision as training."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.backbone.dtype == torch.bfloat16):
        return perplexity(model, heldout, config)


def draw_curves(log: Path, path: Path) -> bool:
    """Draw losses and held-out perplexities of a log; False if matplotlib is not installed (extra `plot`)."""
    try:
        figure = new_figure(11, 4)
    except MissingExtraError:
        return False
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows if "loss" in row]
    left.plot(steps, [row["loss"] for row in rows if "loss" in row], linewidth=0.8)
    left.set(xlabel="step", ylabel="nats a token", title="training loss")
    for name, label in (
        ("bank_on", "on"),
        ("bank_off", "empty"),
        ("bank_wrong", "wrong"),
        ("backbone_local", "backbone"),
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name)]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(xlabel="step", ylabel="perplexity", title="held-out, bank on / empty / wrong")
    if right.lines:
        right.legend()
    figure.savefig(path, dpi=120)
    return True


__all__ = ["TrainConfig", "Trainer", "draw_curves", "evaluate", "train"]
