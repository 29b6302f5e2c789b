"""The frozen backbone: what it runs, what it never does, and the names it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from longmem.backbone import Backbone

IDS_BT = tiny.tokens(2, 40)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("highest", [0, 1, 3, tiny.LAYERS])
def test_only_the_layers_below_the_highest_boundary_run(family: str, highest: int) -> None:
    backbone = tiny.backbone(family)
    ran: list[int] = []
    for index, layer in enumerate(backbone.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    seen = backbone(IDS_BT, boundaries={0, highest})
    assert ran == list(range(highest))
    assert set(seen.hidden_states) == {0, highest}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_where_it_stops_does_not_change_what_it_saw(family: str) -> None:
    backbone = tiny.backbone(family)
    whole = backbone(IDS_BT, boundaries=range(tiny.LAYERS + 1)).hidden_states
    for highest in range(tiny.LAYERS + 1):
        assert torch.equal(backbone(IDS_BT, boundaries=[highest]).hidden_states[highest], whole[highest])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_cache_continues_where_it_stopped(family: str) -> None:
    backbone = tiny.backbone(family)
    whole = backbone(IDS_BT, boundaries=(1, tiny.LAYERS))
    cache = backbone.new_cache()
    parts = [backbone(part_BT, boundaries=(1, tiny.LAYERS), cache=cache) for part_BT in IDS_BT.split([20, 1, 1, 18], 1)]
    assert torch.equal(torch.cat([part.positions_BT for part in parts], 1), whole.positions_BT)
    for boundary in (1, tiny.LAYERS):
        together_BTD = torch.cat([part.hidden_states[boundary] for part in parts], dim=1)
        torch.testing.assert_close(together_BTD, whole.hidden_states[boundary], atol=1e-4, rtol=1e-4)


def test_no_hook_is_left_behind() -> None:
    backbone = tiny.backbone()
    backbone(IDS_BT, boundaries=range(tiny.LAYERS + 1))
    with pytest.raises(IndexError):
        backbone(torch.full((1, 3), tiny.VOCABULARY), boundaries=(0, 2))
    assert not any(layer._forward_pre_hooks for layer in backbone.layers)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_frozen(family: str) -> None:
    backbone = tiny.backbone(family)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not backbone(IDS_BT, boundaries=[2]).hidden_states[2].requires_grad


def test_dropout_never_acts() -> None:
    model = tiny.causal_lm("gpt2")
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    backbone = Backbone(model.train()).train()
    first, second = (backbone(IDS_BT, boundaries=[4]).hidden_states[4] for _ in range(2))
    assert torch.equal(first, second)


def test_the_hash_is_of_the_weights_and_not_of_their_precision() -> None:
    assert tiny.backbone().weights_hash == tiny.backbone(dtype=torch.bfloat16).weights_hash
    assert tiny.backbone().weights_hash != tiny.backbone(seed=1).weights_hash


@given(st.data())
def test_the_hash_changes_with_any_one_weight(data: st.DataObject) -> None:
    model = tiny.causal_lm("llama")
    before = Backbone(model).weights_hash
    name, parameter = data.draw(st.sampled_from(list(model.named_parameters())), label="parameter")
    place = data.draw(st.integers(0, parameter.numel() - 1), label=name)
    with torch.no_grad():
        parameter.view(-1)[place] += 1.0
    assert Backbone(model).weights_hash != before


def test_the_hash_is_the_same_after_a_round_trip_through_disk(tmp_path: Path) -> None:
    model = tiny.causal_lm("llama")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert Backbone(again).weights_hash == Backbone(model).weights_hash


LANGUAGE_MODEL = tiny.causal_lm("llama")
token_ids = st.none() | st.integers(-1, 200)


@given(token_ids, token_ids | st.lists(st.integers(0, 200), min_size=1, max_size=2))
def test_the_prefix_is_a_token_of_the_vocabulary(bos: Any, eos: Any) -> None:
    backbone = Backbone(LANGUAGE_MODEL)
    backbone.model.config = LlamaConfig(vocab_size=tiny.VOCABULARY)
    backbone.model.config.bos_token_id, backbone.model.config.eos_token_id = bos, eos
    assert 0 <= backbone.prefix_token_id < tiny.VOCABULARY
    if isinstance(bos, int) and 0 <= bos < tiny.VOCABULARY:
        assert backbone.prefix_token_id == bos


def test_the_separator_of_documents_is_the_prefix_where_there_is_one(tiny_model_dir: Path) -> None:
    backbone = Backbone.from_pretrained(str(tiny_model_dir.parent / "backbone"), device="cpu")
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.prefix_token_id) == "<|endoftext|>"
