"""A SideNet on disk: a folder with `config.json` and `sidenet.safetensors`.

Weights are stored whole (`float32`, `bfloat16`) or, much smaller, as the rounded difference to the backbone layers
they were copied from (`int8`, `int4`; see `longmem.quantize`). No pickle.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longmem.backbone import Backbone
from longmem.config import SideNetConfig, read_json
from longmem.errors import CheckpointError
from longmem.quantize import dequantize, quantize
from longmem.sidenet import SideNet

FORMAT = "longmem-sidenet-1"
Precision = Literal["float32", "bfloat16", "int8", "int4"]
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sidenet.safetensors"


def new_sidenet(config: SideNetConfig, backbone: Backbone) -> SideNet:
    """An untrained SideNet for a backbone: with an empty bank, the two together are the backbone, bit for bit.

    Raises:
        CheckpointError: the configuration names layers or heads the backbone does not have.
    """
    top = config.spans[-1][1]
    stray = [head for head in config.memory_heads if head.kv_head >= backbone.num_key_value_heads]
    if top > backbone.num_layers or stray:
        raise CheckpointError(
            f"The SideNet's spans reach layer {top} and its memory heads are "
            f"{list(map(tuple, config.memory_heads))}, but backbone "
            f"{backbone.name!r} has {backbone.num_layers} layers with {backbone.num_key_value_heads} key-value "
            "heads each. "
            "Use the backbone it was trained for, or choose heads with `longmem probe`."
        )
    return SideNet(
        config,
        backbone.family,
        backbone.layers,
        head_dim=backbone.head_dim,
        num_heads=backbone.num_heads,
        num_kv_heads=backbone.num_key_value_heads,
    )


def architecture(backbone: Backbone) -> dict[str, Any]:
    """What a backbone must share with the one a SideNet was trained for."""
    return {
        "model_type": backbone.config.model_type,
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "num_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "head_dim": backbone.head_dim,
        "vocab_size": int(backbone.config.vocab_size),
    }


def save_sidenet(
    folder: Path,
    sidenet: SideNet,
    backbone: Backbone,
    *,
    precision: Precision = "bfloat16",
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a SideNet; each file appears whole or not at all.

    Args:
        folder: created if need be.
        precision: how weights are stored.
        training: anything worth keeping about how it was trained; goes into `config.json`.
    """
    if precision not in get_args(Precision):
        raise CheckpointError(f"Unknown precision {precision!r}; choose one of {', '.join(get_args(Precision))}.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    untrained = new_sidenet(sidenet.config, backbone).state_dict() if precision.startswith("int") else {}
    for name, tensor in sidenet.state_dict().items():
        tensor = tensor.detach().cpu()
        if precision.startswith("int") and tensor.ndim == 2 and min(tensor.shape) >= 64:
            change_OI = tensor.float() - untrained[name].cpu().float()
            for part, packed in quantize(change_OI, int(precision[3:])).items():
                tensors[f"{name}.{part}"] = packed.contiguous()
        else:
            whole = torch.bfloat16 if precision == "bfloat16" and tensor.ndim == 2 else torch.float32
            tensors[name] = tensor.to(whole).contiguous()
    config = {
        "format": FORMAT,
        "backbone": backbone.name,
        "backbone_weights": backbone.weights_hash,
        "architecture": architecture(backbone),
        "precision": precision,
        "sidenet": sidenet.config.to_dict(),
        "training": dict(training or {}),
    }
    text = json.dumps(config, indent=1) + "\n"
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    config = read_json(folder / CONFIG_FILE)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has format {config.get('format')!r}, this version of longmem reads {FORMAT!r}."
        )
    if not isinstance(config.get("backbone"), str) or not isinstance(config.get("sidenet"), dict):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} lacks its fields `backbone` or `sidenet`. Restore it from a copy, or train again."
        )
    return config


def load_sidenet(folder: Path, backbone: Backbone) -> SideNet:
    """The SideNet of a checkpoint folder, in float32 on the backbone's device.

    Raises:
        CheckpointError: files are missing or damaged, or were made for another architecture.

    Warns if the backbone has the right architecture but other weights than the SideNet was trained on.
    """
    config = read_config(folder)
    if config.get("architecture") != architecture(backbone):
        raise CheckpointError(
            f"The SideNet in {folder} was trained for {config.get('backbone')!r} with {config.get('architecture')}; "
            f"this backbone, {backbone.name!r}, is {architecture(backbone)}. Use its own backbone, or train one "
            "with `longmem train`."
        )
    if config.get("backbone_weights") != backbone.weights_hash:
        warnings.warn(
            f"The SideNet in {folder} was trained on other weights of {config.get('backbone')!r}. It fits, but may "
            "read memory less well.",
            stacklevel=2,
        )
    sidenet = new_sidenet(SideNetConfig.from_dict(config["sidenet"]), backbone).float()
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy it beside {CONFIG_FILE}, or train again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Restore it from a copy, or train again.") from error
    state: dict[str, Tensor] = {}
    for name, untrained in sidenet.state_dict().items():
        try:
            if f"{name}.packed" in stored:
                change_OI = dequantize(stored[f"{name}.packed"], stored[f"{name}.scale"], untrained.shape[1])
                state[name] = untrained.cpu() + change_OI
            else:
                state[name] = stored[name].float()
        except KeyError as error:
            raise CheckpointError(
                f"{path} lacks {error}. It is incomplete: restore it from a copy, or train again."
            ) from error
    try:
        sidenet.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {folder / CONFIG_FILE}: {error}") from error
    return sidenet.eval()
