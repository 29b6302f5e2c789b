"""LongMem: a frozen backbone, its SideNet, and the banks they read.

    write:  text → tokens → backbone (stops after the last memory layer) → keys, values of the memory heads → bank
    read:   tokens → backbone → hidden states → SideNet ⇄ bank → logits

`forward` reads, `write` writes; neither does the other.

B batch, T tokens, D hidden size, H memory heads, N tokens of a source, E head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmem import checkpoint
from longmem.attention import MemoryRead, pick_heads
from longmem.backbone import Backbone, BackboneOutput
from longmem.bank import DTYPES, BankEntry, MemoryBank, centre_text
from longmem.checkpoint import load_sidenet, new_sidenet, read_config, save_sidenet
from longmem.config import BankSpec, EncodeConfig, Precision, SideNetConfig
from longmem.data import read_text
from longmem.decoding import RowDecoder, compiling
from longmem.errors import BankMismatchError, CompilerError, ConfigError, SideNetNotFoundError, SourceError
from longmem.grid import Grid
from longmem.group import BankGroup, Readable, members
from longmem.index import BankReader, GroupReader
from longmem.ops import NativeOps, linear_nll
from longmem.retrieved import Retrieve, Retrieved
from longmem.sidenet import SideNet, SideNetCache
from longmem.store import StoredBank

if TYPE_CHECKING:
    from longmem.approximate import BankIndex
    from longmem.generation import Piece
    from longmem.recall import Hit
    from longmem.retention import Cap, Plan

SHIPPED = Path(__file__).parent / "sidenets"
# A text that says how rows are rounded: its mean key and value centre those of banks in few bits, and the spread of its
# keys and queries decides which bits go where. Banks made with another one cannot be merged: do not change it.
CENTRE = Path(__file__).parent / "centre.txt"
_ASKING = 512  # tokens of it that are read at a time, for what its queries are like
# Tokens that a GPU encodes at a time: enough to be busy, and few enough for the memory of a small one.
BATCH_TOKENS = 1 << 15


class ModelCache:
    """Keys and values of the local window, of backbone and SideNet, for token-by-token generation.

    Args:
        ends_B: tokens of each row of what is read first that are more than padding; None is all.
    """

    def __init__(self, backbone: Backbone, ends_B: Tensor | None = None) -> None:
        self.backbone = backbone.new_cache()
        self.sidenet = SideNetCache(ends_B)

    @property
    def length(self) -> int:
        return self.backbone.get_seq_length()


class Cache(Protocol):
    """Local windows that `LongMem.read` extends: `ModelCache`, or those of a batch (`longmem.steps.BatchCache`)."""

    @property
    def backbone(self) -> Any: ...

    @property
    def sidenet(self) -> Any: ...


@dataclass(frozen=True)
class LongMemOutput:
    """Logits, and what the memory layers read to get them.

    Attributes:
        logits_BTV: next-token logits.
        reads: one entry a memory layer (empty without a bank).
    """

    logits_BTV: Tensor
    reads: list[MemoryRead] = field(default_factory=list)


class LongMem(nn.Module):
    """A language model with long-term memory (paper, section 2).

    Args:
        backbone: frozen.
        sidenet: trained, or fresh from a `SideNetConfig`.

    Attributes:
        fuses_steps: recorded steps are compiled (`compile_decoding`).
    """

    def __init__(self, backbone: Backbone, sidenet: SideNet | SideNetConfig) -> None:
        super().__init__()
        self.fuses_steps = False
        self._native: NativeOps | None = None
        self.backbone = backbone
        self.sidenet = new_sidenet(sidenet, backbone) if isinstance(sidenet, SideNetConfig) else sidenet

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        backbone: str | Backbone | None = None,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        compile: bool = False,
    ) -> LongMem:
        """A SideNet that ships with the package (`smollm2-135m`), or a checkpoint folder, with its frozen backbone.

        Args:
            name: a shipped SideNet, or a folder that `longmem train` or `save` wrote.
            backbone: another backbone of the same architecture; by default the one the SideNet was trained for.
            device: "auto" takes a GPU if there is one.
            dtype: "auto" is bfloat16 on a GPU and float32 elsewhere.
            compile: generate faster (see `compile_decoding`).

        Raises:
            SideNetNotFoundError: nothing of that name.
            CheckpointError: damaged, or made for another architecture.
            ConfigError, CompilerError: decoding cannot be compiled here.
        """
        folder = cls._find(name)
        config = read_config(folder)
        if not isinstance(backbone, Backbone):
            from longmem.pretrained import resolve_device

            where = resolve_device(device)
            auto = torch.bfloat16 if where.type == "cuda" else torch.float32
            backbone = Backbone.from_pretrained(
                backbone or config["backbone"], dtype=auto if dtype == "auto" else DTYPES[dtype], device=str(where)
            )
        sidenet = load_sidenet(folder, backbone).to(backbone.dtype)
        model = cls(backbone, sidenet).eval().requires_grad_(False)
        if compile:
            model.compile_decoding()
        return model

    @staticmethod
    def _find(name: str | Path) -> Path:
        shipped = [SHIPPED / str(name)] if "/" not in str(name) else []
        for folder in (*shipped, Path(name)):
            if (folder / "config.json").is_file() and (folder / "sidenet.safetensors").is_file():
                return folder
        if Path(name).is_dir() and (Path(name) / "config.json").is_file():
            # A folder that is meant, but damaged: say what is wrong with it rather than that it is unknown.
            read_config(Path(name))
            return Path(name)
        names = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []
        raise SideNetNotFoundError(
            f"There is no trained SideNet for {str(name)!r}. These ship with longmem: {', '.join(names) or 'none'}; "
            "otherwise "
            f"give a checkpoint folder. To train one: `longmem train DOCUMENTS --backbone {name} --out DIR`."
        )

    def save(
        self,
        folder: str | Path,
        *,
        precision: checkpoint.Precision = "bfloat16",
        training: dict[str, Any] | None = None,
    ) -> None:
        """Write the SideNet to a folder (not the backbone)."""
        save_sidenet(Path(folder), self.sidenet, self.backbone, precision=precision, training=training)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def config(self) -> SideNetConfig:
        return self.sidenet.config

    @property
    def bank_spec(self) -> BankSpec:
        """What banks for this model hold."""
        return BankSpec(
            backbone=self.backbone.name,
            weights=self.backbone.weights_hash,
            memory_heads=self.config.memory_heads,
            head_dim=self.backbone.head_dim,
            encode=self.config.encode,
        )

    def bank_spec_in(self, precision: Precision) -> BankSpec:
        """What banks for this model hold that keep keys and values in full, in int8 or in int4 (see `longmem.codec`).

        Raises:
            ConfigError: heads that cannot be rounded, or a backbone without a tokenizer.
        """
        spec = dataclasses.replace(self.bank_spec, precision=precision)
        if precision == "full":
            return spec
        # Any text would do; a bank's own must not, since a trace of it would stay when it is forgotten.
        entry = self.encode_text(CENTRE.read_text(encoding="utf-8"), source="centre")
        centre_2HE = torch.stack([rows_HNE.float().mean(1) for rows_HNE in (entry.keys_HNE, entry.values_HNE)])
        spec = dataclasses.replace(spec, centre=centre_text(centre_2HE))
        if precision == "int8":
            return spec
        bank = MemoryBank(self.bank_spec, self.device)
        bank.append(entry)
        length = min(_ASKING, self.backbone.max_positions - 1)
        asked = [self.asked(entry.token_ids_N[n : n + length], bank) for n in range(0, len(entry), length)]
        grid = Grid.fit(entry.keys_HNE.cpu(), torch.cat(asked, dim=1).cpu(), centre_2HE[0].cpu())
        return dataclasses.replace(spec, grid=grid.to_text())

    @torch.no_grad()
    def asked(self, token_ids_T: Tensor, bank: MemoryBank) -> Tensor:
        """Queries (H, T · G, E) of every memory head while the model reads a window of text beside a bank, float32."""
        reader = BankReader([bank], self.config)
        asked: dict[int, Tensor] = {}

        def retrieve(layer: int, query_BKGTE: Tensor) -> Retrieved:
            # Without those of the prefix, which is no text.
            asked[layer] = query_BKGTE[0, :, :, 1:].float().transpose(1, 2).flatten(1, 2)
            return reader(layer, query_BKGTE)

        self.read(self.with_prefix(token_ids_T)[None].to(self.device), retrieve)
        return torch.cat([asked[layer] for layer in self.config.memory_layers])

    def new_bank(self) -> MemoryBank:
        """An empty bank in memory, on the model's device."""
        return MemoryBank(self.bank_spec, self.device)

    def new_cache(self, ends_B: Tensor | None = None) -> ModelCache:
        """An empty cache for `forward`.

        Args:
            ends_B: int64, tokens of each row of what is read first that are more than padding; None is all.
        """
        return ModelCache(self.backbone, ends_B)

    @torch.no_grad()
    def compile_decoding(self) -> None:
        """Generate faster from now on.

        On a CPU single tokens of a batch of one run through compiled steps. The arithmetic stays float32; logits differ
        in the order of sums. It takes some seconds, fewer where the compiler's cache on disk has the steps already, and
        memory for a copy of those weights that bfloat16 holds exactly (see `longmem.decoding`). The steps keep the
        weights as they are now, so compile after training.

        On a GPU steps are recorded in any case; what a layer does to a token is fused, too, when the first is taken,
        which takes about a minute.

        Raises:
            ConfigError: the model is neither in float32 on a CPU nor on a CUDA GPU.
            CompilerError: no working C++ compiler.
        """
        if self.device.type == "cuda":
            self.fuses_steps = True
            return
        if self.device.type != "cpu" or self.backbone.dtype != torch.float32:
            raise ConfigError(
                f"Compiled decoding is for float32 on a CPU, or for a CUDA GPU; this model is "
                f"{str(self.backbone.dtype)[6:]} on {self.device.type}. Load it with device='cpu' and dtype='float32', "
                "or do not compile."
            )
        self.decode_by(RowDecoder(self.backbone.family))
        try:
            # The first token is what compiles; better here, where it is asked for, than amid a text.
            with compiling():
                self._native = NativeOps.load()
                cache = self.new_cache()
                for tokens in (2, 1):
                    self(torch.zeros(1, tokens, dtype=torch.int64), cache=cache, last_only=True)
        except CompilerError:
            self._native = None
            self.decode_by(None)
            raise

    def decode_by(self, decoder: RowDecoder | None) -> None:
        """Give single tokens behind a cache to a decoder from now on; None goes back to eager decoding."""
        self.backbone.decode_by(decoder)
        self.sidenet.decode_by(decoder)

    # ---- read ----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids_BT: Tensor,
        banks: Sequence[Readable | None] | Readable | None = None,
        *,
        memory: float = 1.0,
        cache: ModelCache | None = None,
        last_only: bool = False,
    ) -> LongMemOutput:
        """Next-token logits, with what the banks remember.

        Args:
            input_ids_BT: token ids of the local window, or those that continue `cache`.
            banks: one a row (None is an empty one, a `BankGroup` several); a single bank serves every row.
            memory: 0 is the backbone bit for bit, 1 the trained strength.
            cache: extended in place.
            last_only: logits of the last position alone, (B, 1, V).

        Raises:
            BankMismatchError: a bank was written by another backbone or other memory heads.
            ConfigError: `memory` is outside 0 … 1, or the number of banks is not B.
        """
        retrieve = self.reader(banks, rows=input_ids_BT.shape[0])
        if not 0.0 <= memory <= 1.0:
            raise ConfigError(
                f"memory is a dial from 0 (the backbone alone) to 1 (the trained strength); got {memory}."
            )
        hidden_BTD, reads = self.read(input_ids_BT, retrieve, memory=memory, cache=cache)
        return LongMemOutput(self.backbone.logits(hidden_BTD[:, -1:] if last_only else hidden_BTD), reads)

    def read(
        self, input_ids_BT: Tensor, retrieve: Retrieve | None, *, memory: float = 1.0, cache: Cache | None = None
    ) -> tuple[Tensor, list[MemoryRead]]:
        """Hidden states (B, T, D) before the final norm, corrected by the SideNet; and what was read."""
        top = self.backbone.num_layers
        boundaries = {top} if memory == 0.0 else {*self.sidenet.boundaries, top}
        seen = self.backbone(input_ids_BT, boundaries=boundaries, cache=cache.backbone if cache else None)
        if memory == 0.0:
            return seen.hidden_states[top], []
        return self.correct(seen, retrieve, memory=memory, cache=cache)

    def correct(
        self, seen: BackboneOutput, retrieve: Retrieve | None, *, memory: float = 1.0, cache: Cache | None = None
    ) -> tuple[Tensor, list[MemoryRead]]:
        """Add the SideNet's difference to the backbone's last hidden states."""
        top_BTD = seen.hidden_states[self.backbone.num_layers]
        found = self.sidenet(
            seen.hidden_states,
            self.backbone.rotary_of(top_BTD, seen.positions_BT),
            retrieve,
            cache=cache.sidenet if cache else None,
            memory=memory,
        )
        return top_BTD + found.difference_BTD, found.reads

    def reader(self, banks: Sequence[Readable | None] | Readable | None, rows: int) -> Retrieve | None:
        """A retrieve callable over one bank a row, or one group; None if nothing is remembered in any."""
        if banks is None or isinstance(banks, Readable):
            banks = [banks] * rows
        if len(banks) != rows:
            raise ConfigError(
                f"{len(banks)} banks were given for a batch of {rows} rows; give one a row (None for an empty one)."
            )
        for bank in banks:
            if bank is not None:
                self.check(bank)
        if not any(bank is not None and len(bank) for bank in banks):
            return None
        read = [() if bank is None else members(bank) for bank in banks]
        if all(not row or (len(row) == 1 and row[0][1] == 1.0) for row in read):
            return BankReader([row[0][0] if row else None for row in read], self.config, self._native)
        return GroupReader(read, self.config, self._native)

    def check(self, bank: Readable) -> None:
        """Raise `BankMismatchError` if the bank, or a group's, is not for this model."""
        if isinstance(bank, BankGroup):
            bank = bank.first  # the others are of the same spec
        given, wanted = bank.spec, self.bank_spec
        for name in ("weights", "memory_heads", "head_dim"):
            if getattr(given, name) != getattr(wanted, name):
                raise BankMismatchError(
                    f"This bank was written by {given.backbone!r} and the model is {wanted.backbone!r}: their "
                    f"{name} differ "
                    f"(bank {_short(getattr(given, name))}, model {_short(getattr(wanted, name))}). Remembered keys "
                    "mean something only to the "
                    "weights that made them: use the bank's own model, or write the texts into a new bank."
                )

    # ---- write ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        token_ids_N: Tensor,
        start: int = 0,
        *,
        windows: EncodeConfig | None = None,
        batch_size: int | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (H, N − start, E) of a source's tokens from `start` on, in the bank's dtype.

        A pure function of the source's own tokens: see `EncodeConfig` for the windows.

        Args:
            token_ids_N: the whole source so far.
            start: tokens before it are context only.
            windows: how it is cut: as the bank that it is for says (`BankSpec.encode`); the model's own by default.
            batch_size: windows a batch; on a GPU as many as `BATCH_TOKENS` are, 1 elsewhere. All windows of a batch
                take as long as its longest.
            on_tokens: called with the number of tokens just encoded.
        """
        device, encode = self.device, windows or self.config.encode
        if batch_size is None:
            batch_size = max(1, BATCH_TOKENS // (encode.stride + encode.overlap)) if device.type == "cuda" else 1
        cut = encode.windows(start, token_ids_N.numel())
        batches = -(-len(cut) // batch_size)
        shape = (len(self.config.memory_heads), max(0, token_ids_N.numel() - start), self.backbone.head_dim)
        keys_HNE, values_HNE = (torch.empty(shape, dtype=DTYPES[self.bank_spec.dtype], device=device) for _ in range(2))
        # To the device at once: each copy waits for all that it has to do. Behind them zeros, which no token sees.
        pad = max((end - first for first, _, end in cut), default=0)
        padded_P = F.pad(token_ids_N.to(device, torch.int64), (0, pad))
        for batch in range(batches):
            # All batches of about one size: a small one takes a GPU nearly as long as a large one.
            group = cut[batch * len(cut) // batches : (batch + 1) * len(cut) // batches]
            size = max(end - first for first, _, end in group)
            prefix_B1 = torch.full((len(group), 1), self.backbone.prefix_token_id, device=device)
            rows = [padded_P[first : first + size] for first, _, _ in group]
            input_ids_BT = torch.cat((prefix_B1, torch.stack(rows)), dim=1)
            # +1: the prefix is never remembered
            context = min(kept - first for first, kept, _ in group) + 1
            found = self._by_head(self.backbone.encode(input_ids_BT, self.config.memory_layers, first=context))
            for row, (first, kept, end) in enumerate(group):
                new = slice(kept - first + 1 - context, end - first + 1 - context)
                for all_HNE, found_HBTE in zip((keys_HNE, values_HNE), found, strict=True):
                    all_HNE[:, kept - start : end - start] = found_HBTE[:, row, new]
                if on_tokens is not None:
                    on_tokens(end - kept)
        return keys_HNE, values_HNE

    @torch.no_grad()
    def surprise(
        self,
        token_ids_N: Tensor,
        start: int = 0,
        *,
        windows: EncodeConfig | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Tensor:
        """How badly the backbone predicted a source's tokens from `start` on, each in the window it is encoded in:
        −log p in nats, float32 on the CPU.

        Args:
            token_ids_N: the whole source so far.
            windows: as `encode` takes them.
        """
        tokens_N, top = token_ids_N.to("cpu", torch.int64), self.backbone.num_layers
        found = [torch.empty(0)]
        for first, kept, end in (windows or self.config.encode).windows(start, tokens_N.numel()):
            input_1T = self.with_prefix(tokens_N[first : end - 1])[None].to(self.device)
            hidden_1TD = self.backbone(input_1T, boundaries={top}).hidden_states[top]
            # The prefix comes first: position i predicts token first + i.
            scored_XD = self.backbone.final_norm(hidden_1TD[0, kept - first :])
            target_X = tokens_N[kept:end].to(self.device)
            found.append(linear_nll(scored_XD, self.backbone.output_weight_VD, target_X).cpu())
            if on_tokens is not None:
                on_tokens(end - kept)
        return torch.cat(found)

    def keys_values(self, seen: BackboneOutput) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory heads, (H, B, T, E) each, in the bank's dtype."""
        layers, hidden_states = self.config.memory_layers, seen.hidden_states
        return self._by_head({layer: self.backbone.keys_values(layer, hidden_states[layer]) for layer in layers})

    def _by_head(self, keys_values: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The memory heads' (H, B, T, E) of all heads' keys and values (B, K, T, E) by layer."""
        keys, values = [], []
        for layer in self.config.memory_layers:
            kv_heads = [head.kv_head for head in self.config.memory_heads if head.layer == layer]
            key_BKTE, value_BKTE = keys_values[layer]
            keys.append(pick_heads(key_BKTE, kv_heads).transpose(0, 1))
            values.append(pick_heads(value_BKTE, kv_heads).transpose(0, 1))
        dtype = DTYPES["bfloat16"]
        return torch.cat(keys).to(dtype), torch.cat(values).to(dtype)

    def write(
        self,
        bank: MemoryBank,
        path: str | Path,
        *,
        source: str | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> int:
        """Remember a text file; returns the number of tokens. Durable once it returns if the bank is a stored one.

        Args:
            bank: where to.
            path: a UTF-8 file.
            source: its name in the bank, the path by default.
            on_tokens: progress, called with the number of tokens just encoded.

        Raises:
            SourceError: missing, empty or binary file, or one remembered before.
        """
        return self.write_text(bank, read_text(Path(path)), source=source or str(path), on_tokens=on_tokens)

    def write_text(
        self,
        bank: MemoryBank,
        text: str,
        *,
        source: str,
        append: bool = False,
        on_tokens: Callable[[int], None] | None = None,
    ) -> int:
        """Remember a text under a source name; returns the number of tokens.

        Args:
            append: continue a source that is remembered already, as a conversation does. Otherwise that is an error.

        Raises:
            SourceError: the text is empty, or the source is remembered and `append` is False.
            BankMismatchError: the bank belongs to another model.
        """
        self.check(bank)
        if not text.strip() and not append:
            raise SourceError(f"The text of source {source!r} is empty; there is nothing to remember.")
        past = bank.length_of(source)
        if past and not append:
            raise SourceError(
                f"Source {source!r} is remembered already ({past} characters). Forget it first, continue it with "
                "append, or choose another name."
            )
        before_N = bank.tokens_of(source) if past else None
        windows = bank.spec.encode
        entry = self.encode_text(
            text, source=source, before_N=before_N, char_start=past, windows=windows, on_tokens=on_tokens
        )
        if len(entry):
            bank.append(entry)
            self.keep_to_cap(bank)
        return len(entry)

    def retain(self, bank: StoredBank, cap: Cap, *, preview: bool = False, **settings: Any) -> Plan:
        """Bring a bank down to a cap, or say what would go (see `longmem.keeping.retain`)."""
        from longmem.keeping import retain

        return retain(bank, cap, model=self, preview=preview, **settings)

    def keep_to_cap(self, bank: MemoryBank) -> Plan | None:
        """After a write: bring a stored bank down to the cap that was set on it (`longmem.keeping.keep_to_cap`)."""
        from longmem.keeping import keep_to_cap

        return keep_to_cap(bank, self) if isinstance(bank, StoredBank) else None

    def encode_text(
        self,
        text: str,
        *,
        source: str,
        before_N: Tensor | None = None,
        char_start: int = 0,
        windows: EncodeConfig | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> BankEntry:
        """A text as `write_text` writes it, for a bank to `append`.

        Args:
            before_N: token ids of the source so far, if the text continues it.
            char_start: characters of the source so far.
            windows: as `encode` takes them.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        new_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        before_N = new_N[:0] if before_N is None else before_N
        ids_N = torch.cat((before_N, new_N))
        keys_HNE, values_HNE = self.encode(ids_N, len(before_N), windows=windows, on_tokens=on_tokens)
        # Of millions of pairs a tensor is made ten times faster this way.
        flat = np.fromiter(chain.from_iterable(encoded["offset_mapping"]), np.int64, 2 * len(new_N))
        offsets_N2 = torch.from_numpy(flat).view(-1, 2) + char_start
        return BankEntry(source, text, char_start, new_N, offsets_N2, keys_HNE, values_HNE)

    # ---- use -----------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Tensor, *, bank: Readable | None = None, source: str | None = None, **settings: Any
    ) -> Iterator[Piece]:
        """Continue a text with what the bank remembers, token by token (see `longmem.generation.generate`).

        Args:
            settings: fields of `GenerationConfig`, such as `max_new_tokens`, `temperature`, `attribute`.
        """
        from longmem.generation import GenerationConfig, generate

        return generate(self, prompt, bank=bank, source=source, config=GenerationConfig(**settings))

    def generate_batch(
        self,
        prompts: Sequence[str | Tensor],
        *,
        banks: Sequence[Readable | None] | Readable | None = None,
        sources: Sequence[str | None] | None = None,
        rows: int = 32,
        compile: bool = False,
        **settings: Any,
    ) -> Iterator[tuple[int, Piece]]:
        """Continue many texts side by side, each with its own bank (see `longmem.batch.generate_batch`)."""
        from longmem.batch import generate_batch
        from longmem.generation import GenerationConfig

        config = GenerationConfig(**settings)
        return generate_batch(self, prompts, banks=banks, sources=sources, config=config, rows=rows, compile=compile)

    def recall(self, query: str, *, bank: Readable, top_k: int = 8, words: float | None = None) -> list[Hit]:
        """The remembered passages that a query is about, best first (see `longmem.recall.recall`)."""
        from longmem.recall import recall

        return recall(self, bank, query, top_k, words)

    def make_index(self, bank: MemoryBank, *, recall: float = 0.99, text: str | None = None) -> BankIndex:
        """A small copy of a bank's keys to search large banks by (see `longmem.indexing.make_index`)."""
        from longmem.indexing import make_index

        return make_index(self, bank, recall=recall, text=text)

    @property
    def tokenizer(self) -> Any:
        if self.backbone.tokenizer is None:
            raise ConfigError(
                f"Backbone {self.backbone.name!r} was built without a tokenizer, so it can only take token ids. "
                "Give it one."
            )
        return self.backbone.tokenizer

    def with_prefix(self, token_ids_N: Tensor) -> Tensor:
        """Token ids behind the prefix token that begins every local window."""
        return torch.cat((token_ids_N.new_full((1,), self.backbone.prefix_token_id), token_ids_N))


def _short(value: Any) -> str:
    return value[:12] + "…" if isinstance(value, str) and len(value) > 12 else str(value)


__all__ = ["LongMem", "LongMemOutput", "ModelCache"]
