"""A SideNet on disk: it comes back, it is small, and what is wrong with a file is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from longmem.backbone import Backbone
from longmem.checkpoint import Precision, architecture, load_sidenet, new_sidenet, read_config, save_sidenet
from longmem.config import MemoryHead, SideNetConfig
from longmem.errors import CheckpointError
from longmem.sidenet import SideNet

# Matrices of 64 and more rows and columns are rounded; this backbone's are, its vectors are not.
BACKBONE = Backbone(tiny.causal_lm("llama", hidden=128), name="tiny")
CONFIG = SideNetConfig.around([(1, 0), (2, 1)], tiny.LAYERS)


def trained() -> SideNet:
    sidenet = new_sidenet(CONFIG, BACKBONE)
    tiny.randomise(sidenet, 0.01)
    return sidenet.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_sidenet(tmp_path / "sidenet", trained(), BACKBONE, precision="float32")
    return tmp_path / "sidenet"


@pytest.mark.parametrize("precision", get_args(Precision))
def test_it_comes_back(precision: Precision, tmp_path: Path) -> None:
    sidenet = trained()
    save_sidenet(tmp_path / "new" / "folder", sidenet, BACKBONE, precision=precision, training={"steps": 7})
    config = read_config(tmp_path / "new" / "folder")
    assert config["precision"] == precision and config["training"] == {"steps": 7}
    again = load_sidenet(tmp_path / "new" / "folder", BACKBONE)
    assert again.config == CONFIG and not again.training
    untrained = new_sidenet(CONFIG, BACKBONE).state_dict()
    state = again.state_dict()
    assert set(state) == set(sidenet.state_dict())
    for name, tensor in sidenet.state_dict().items():
        assert state[name].dtype == torch.float32
        if precision == "float32" or tensor.ndim < 2:
            assert torch.equal(state[name], tensor)
        elif precision == "bfloat16":
            assert torch.equal(state[name], (tensor.bfloat16() if tensor.ndim == 2 else tensor).float())
        elif min(tensor.shape) >= 64:
            # Half a step of the change, not of the weight.
            largest = (tensor - untrained[name]).abs().max()
            assert (state[name] - tensor).abs().max() <= 0.51 * largest / (127 if precision == "int8" else 7)


def test_each_precision_is_smaller_than_the_last(tmp_path: Path) -> None:
    sizes = []
    for precision in get_args(Precision):
        save_sidenet(tmp_path / precision, trained(), BACKBONE, precision=precision)
        sizes.append((tmp_path / precision / "sidenet.safetensors").stat().st_size)
    whole, half, eight, four = sizes
    assert half < 0.6 * whole and eight < 0.4 * whole and four < 0.25 * whole


def test_an_untrained_sidenet_is_exact_in_any_precision_that_stores_changes(tmp_path: Path) -> None:
    sidenet = new_sidenet(CONFIG, BACKBONE)
    save_sidenet(tmp_path, sidenet, BACKBONE, precision="int4")
    again = load_sidenet(tmp_path, BACKBONE).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in sidenet.state_dict().items())


def test_saving_again_replaces_and_leaves_nothing_behind(folder: Path) -> None:
    save_sidenet(folder, new_sidenet(CONFIG, BACKBONE), BACKBONE, precision="float32")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sidenet.safetensors"]
    state = load_sidenet(folder, BACKBONE).state_dict()
    assert all(torch.equal(state[name], t) for name, t in new_sidenet(CONFIG, BACKBONE).state_dict().items())


def test_an_unknown_precision_changes_nothing_on_disk(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'int3'; choose one of float32, bfloat16, int8, int4"):
        save_sidenet(tmp_path / "sidenet", trained(), BACKBONE, precision="int3")  # type: ignore[arg-type]
    assert not (tmp_path / "sidenet").exists()


def test_a_save_that_fails_leaves_what_was_there(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError):
        save_sidenet(folder, trained(), BACKBONE, training={"when": object()})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("file", ["config.json", "sidenet.safetensors"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file} is missing"):
        load_sidenet(folder, BACKBONE)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 5000, -1])
def test_truncated_weights_are_named(folder: Path, kept: int) -> None:
    path = folder / "sidenet.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"sidenet\.safetensors is damaged"):
        load_sidenet(folder, BACKBONE)


def test_weights_that_lack_a_tensor_are_named(folder: Path) -> None:
    tensors = load_file(folder / "sidenet.safetensors")
    gone = sorted(tensors)[3]
    del tensors[gone]
    save_file(tensors, folder / "sidenet.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks '{gone}'"):
        load_sidenet(folder, BACKBONE)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    tensors = load_file(folder / "sidenet.safetensors")
    tensors["layers.0.alpha_D"] = torch.zeros(5)
    save_file(tensors, folder / "sidenet.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_sidenet(folder, BACKBONE)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_sidenet(folder, BACKBONE)


@pytest.mark.parametrize("change", [{"format": "longmem-sidenet-9"}, {"sidenet": None}, {"sidenet": {"spans": []}}])
def test_a_config_of_another_kind_is_refused(folder: Path, change: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError):
        load_sidenet(folder, BACKBONE)
    del config["sidenet"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_sidenet(folder, BACKBONE)


def test_a_backbone_of_another_architecture_is_refused(folder: Path) -> None:
    for other in (tiny.backbone("llama"), tiny.backbone("qwen3")):
        with pytest.raises(CheckpointError, match="was trained for 'tiny'") as refused:
            load_sidenet(folder, other)
        assert str(architecture(other)) in str(refused.value)


def test_other_weights_of_the_same_architecture_are_warned_of(folder: Path) -> None:
    other = Backbone(tiny.causal_lm("llama", hidden=128, seed=1))
    with pytest.warns(UserWarning, match="trained on other weights of 'tiny'"):
        load_sidenet(folder, other)


def test_a_folder_can_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_sidenet(tmp_path / "elsewhere", BACKBONE).config == CONFIG


@pytest.mark.parametrize(
    "config",
    [
        SideNetConfig(((1, 5),), (MemoryHead(1, 0),)),
        SideNetConfig(((1, 4),), (MemoryHead(1, 2),)),
    ],
)
def test_layers_and_heads_that_a_backbone_lacks_are_named(config: SideNetConfig) -> None:
    with pytest.raises(CheckpointError, match="has 4 layers with 2 key-value heads each"):
        new_sidenet(config, BACKBONE)


def test_nothing_on_disk_is_pickled(folder: Path) -> None:
    length = int.from_bytes((folder / "sidenet.safetensors").read_bytes()[:8], "little")
    header = json.loads((folder / "sidenet.safetensors").read_bytes()[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
