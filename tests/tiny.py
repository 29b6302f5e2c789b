"""Tiny random models of every family, banks for them, and toy documents: what the tests run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longmem.backbone import Backbone
from longmem.bank import BankEntry, MemoryBank
from longmem.config import EncodeConfig, SideNetConfig
from longmem.data import TokenizedDocuments
from longmem.model import LongMem
from longmem.retrieved import Retrieved, RetrievedRows

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "gpt2")
VOCABULARY, LAYERS, WINDOW = 97, 4, 16


def causal_lm(family: str, *, hidden: int = 32, seed: int = 0) -> Any:
    """A random model of four layers; mistral's layers, and every other one of gemma3's, see 16 tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden + 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    grouped = {**sizes, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**grouped))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**grouped, sliding_window=WINDOW))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**grouped))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=16))
    elif family == "gemma3":
        layer_types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **grouped, head_dim=16, sliding_window=WINDOW, layer_types=layer_types, query_pre_attn_scalar=8
            )
        )
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**sizes))
    else:
        raise ValueError(family)
    # Fresh biases are 0 and fresh norms 1, which would hide one that is left out.
    randomise(model, 0.1, seed)
    return model.eval()


def randomise(module: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Add noise to every parameter, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += (scale * torch.randn(parameter.shape, generator=random)).to(parameter.dtype)


def backbone(family: str = "llama", dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Backbone:
    return Backbone(causal_lm(family, seed=seed).to(dtype), name=f"tiny-{family}")


def model(
    family: str = "llama", dtype: torch.dtype = torch.float32, *, trained: bool = True, seed: int = 0, **settings: Any
) -> LongMem:
    """A model with three memory heads in two layers; `trained` moves all of its SideNet's weights at random."""
    frozen = backbone(family, dtype, seed=seed)
    fields: dict[str, Any] = {"below": 1, "top_k": 8, "encode": EncodeConfig(24, 8), **settings}
    heads = [(1, 0), (1, 1), (2, 1)]
    made = LongMem(frozen, SideNetConfig.around(heads, LAYERS, **fields)).eval()
    if trained:
        randomise(made.sidenet, 0.1, seed + 1)
    made.sidenet.to(dtype)
    return made


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def bank(model: LongMem, size: int, seed: int = 0) -> MemoryBank:
    """A bank of `size` random tokens, encoded by the model."""
    made = model.new_bank()
    ids_N = tokens(size, seed=seed)
    if size:
        starts_N = torch.arange(size)
        offsets_N2 = torch.stack([starts_N, starts_N + 1], dim=1)
        made.append(BankEntry("source", "x" * size, 0, ids_N, offsets_N2, *model.encode(ids_N)))
    return made


def retrieved(
    keys_BKGTRE: torch.Tensor,
    values_BKGTRE: torch.Tensor,
    valid_BKGTR: torch.Tensor,
    index_BKGTR: torch.Tensor,
    bank_size_B: torch.Tensor,
) -> Retrieved:
    """What a search would return that had found these rows: a pool of its own for each head."""
    batch, kv_heads, *_ = keys_BKGTRE.shape
    pools = [rows_BKGTRE.flatten(0, 1).flatten(1, 3) for rows_BKGTRE in (keys_BKGTRE, values_BKGTRE)]
    slot_BKGTR = torch.arange(pools[0].shape[1]).view(valid_BKGTR.shape[2:]).expand(valid_BKGTR.shape)
    pool_BK = torch.arange(batch * kv_heads).view(batch, kv_heads)
    score_BKGTR = torch.zeros(valid_BKGTR.shape).masked_fill(~valid_BKGTR, -torch.inf)
    return RetrievedRows(*pools, pool_BK, slot_BKGTR, score_BKGTR, index_BKGTR, bank_size_B, index_BKGTR)


def documents(*lengths: int, period: int = 0, seed: int = 0) -> TokenizedDocuments:
    """Random documents; with `period`, each repeats a random phrase of its own of that many tokens."""
    random = np.random.default_rng(seed)
    arrays = [
        np.resize(random.integers(VOCABULARY, size=period or length), length).astype(np.uint16) for length in lengths
    ]
    return TokenizedDocuments(np.concatenate(arrays), [f"document {i}" for i in range(len(lengths))], lengths)
