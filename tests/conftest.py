from __future__ import annotations

import os
from pathlib import Path

# Triton kernels run in its interpreter, on any machine; it must be told before anything imports it.
os.environ["TRITON_INTERPRET"] = "1"

# Tests download nothing from the hub; set before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longmem.backbone import Backbone
from longmem.config import EncodeConfig, SideNetConfig
from longmem.errors import BackboneNotFoundError
from longmem.evals import answers
from longmem.model import LongMem
from longmem.pretrained import setup

# The first example pays for lazy initialisation, and test machines are shared: time is no sign of a fault here.
hypothesis.settings.register_profile("longmem", deadline=None)
hypothesis.settings.load_profile("longmem")
# Tiny models gain nothing from threads, and threads that wait for each other on a shared machine cost a lot.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded SmolLM2-135M-Instruct, from the cache that all runs share."""
    try:
        return setup("smollm2-135m")
    except BackboneNotFoundError as error:
        pytest.skip(f"the embedded model cannot be set up here: {error}")


TINY_TEXT = (
    "Ada keeps bees on the roof. Her brother paints boats in Brest. The harbour is quiet in winter.\n\n"
    "The bees sleep until March. Ada reads about honey, wax and the moon. Her brother writes letters.\n\n"
)
TINY_TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)


def build_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of four layers with its tokenizer in `folder/backbone`, and a SideNet checkpoint beside it."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TINY_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|endoftext|>", eos_token="<|end|>")
    tokenizer.chat_template = TINY_TEMPLATE
    torch.manual_seed(seed)
    backbone = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    config = SideNetConfig.around([(1, 0), (2, 1)], 4, below=1, top_k=8, encode=EncodeConfig(24, 8))
    model = LongMem(Backbone.from_pretrained(str(folder / "backbone"), device="cpu"), config)
    model.save(folder / "sidenet")
    return folder / "sidenet"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that `LongMem.from_pretrained` loads at once: untrained, its backbone random (`../backbone`)."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights, whose banks are not for `tiny_model_dir`."""
    return build_tiny_model(tmp_path_factory.mktemp("other-tiny"), seed=1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[answers.Ask]:
    """What evaluations ask; nothing is answered."""
    found: list[answers.Ask] = []

    def ask_all(model: LongMem, asks: list[answers.Ask]) -> list[answers.Outcome]:
        found.extend(asks)
        return [answers.Outcome(None, -1.0)] * len(asks)

    monkeypatch.setattr(answers, "ask_all", ask_all)
    return found
