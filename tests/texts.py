"""Tiny models that talk: a byte-level tokenizer, banks of a few sentences."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from longmem.backbone import Backbone
from longmem.config import EncodeConfig, SideNetConfig
from longmem.generation import GenerationConfig
from longmem.model import LongMem

FACTS = "Ada keeps bees on the roof. Her brother Émile paints boats in Brest 🎨. The roof is green.\n" * 3
VOCABULARY = 300
FAMILIES = ("llama", "mistral", "neox", "gpt2")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that any token sequence decodes, often to incomplete characters."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        [FACTS],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", bos_token="<|endoftext|>")


@cache
def tiny(family: str = "llama") -> LongMem:
    """A random model whose SideNet has left its initial state, so that memory changes what it says."""
    torch.manual_seed(0)
    llama = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    plain = dict(vocab_size=VOCABULARY, initializer_range=0.2)
    if family == "llama":
        backbone = LlamaForCausalLM(LlamaConfig(**llama))
    elif family == "mistral":
        backbone = MistralForCausalLM(MistralConfig(**llama, sliding_window=16))
    elif family == "neox":
        backbone = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=128,
                **plain,
            )
        )
    else:
        backbone = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, **plain))
    config = SideNetConfig.around([(1, 0), (1, 1), (2, 1)], 4, below=1, top_k=8, encode=EncodeConfig(24, 8))
    model = LongMem(Backbone(backbone, tokenizer(), name=family), config).eval()
    for layer in model.sidenet.layers:
        layer.alpha_D.data.fill_(0.3)
    return model


def full_bank(model: LongMem):
    bank = model.new_bank()
    model.write_text(bank, FACTS, source="facts")
    return bank


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


ENDLESS = GenerationConfig(max_new_tokens=60, window=24, stop_token_ids=())
token_ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


def notes(model: LongMem):
    bank = model.new_bank()
    for number, text in enumerate(FACTS.split(". ")[:3]):
        model.write_text(bank, text, source=f"note {number}")
    return bank
