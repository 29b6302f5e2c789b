"""Each family, taken apart, against the model that transformers runs."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from longmem.attention import local_attention
from longmem.backbone import Backbone
from longmem.errors import UnsupportedBackboneError
from longmem.families import FAMILIES

DTYPES = (torch.float32, torch.bfloat16)
# Longer than the sliding window.
IDS_BT = tiny.tokens(2, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_logits_are_the_models_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    backbone = tiny.backbone(family, dtype)
    expected = backbone.model(IDS_BT, output_hidden_states=True)
    seen = backbone(IDS_BT, boundaries=range(tiny.LAYERS + 1))
    top_BTD = seen.hidden_states[tiny.LAYERS]
    assert torch.equal(backbone.logits(top_BTD), expected.logits)
    assert torch.equal(backbone.final_norm(top_BTD), expected.hidden_states[-1])
    for boundary in range(tiny.LAYERS):
        assert torch.equal(seen.hidden_states[boundary], expected.hidden_states[boundary])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_keys_and_values_are_those_of_the_models_cache(family: str, dtype: torch.dtype) -> None:
    backbone = tiny.backbone(family, dtype)
    cache = DynamicCache(config=backbone.config)
    backbone.model(IDS_BT, past_key_values=cache, use_cache=True)
    seen = backbone(IDS_BT, boundaries=range(tiny.LAYERS))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    for layer, cached in enumerate(cache.layers):
        hidden_BTD = seen.hidden_states[layer]
        key_BKTE, value_BKTE = backbone.keys_values(layer, hidden_BTD)
        rotary = backbone.position_embeddings(layer, hidden_BTD, seen.positions_BT)
        kept = cached.keys.shape[2]  # the cache of a sliding layer forgets what its window cannot see
        torch.testing.assert_close(backbone.family.rotate(key_BKTE, rotary)[:, :, -kept:], cached.keys, **tolerance)
        torch.testing.assert_close(value_BKTE[:, :, -kept:], cached.values, **tolerance)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_pieces_of_a_layer_put_together_are_the_layer(family: str) -> None:
    backbone = tiny.backbone(family)
    pieces = backbone.family
    seen = backbone(IDS_BT, boundaries=range(tiny.LAYERS + 1))
    for index, layer in enumerate(backbone.layers):
        x_BTD = seen.hidden_states[index]
        query_BHTE, key_BKTE, value_BKTE = pieces.qkv(layer, x_BTD)
        assert query_BHTE.shape[1:] == (backbone.num_heads, 40, backbone.head_dim)
        assert key_BKTE.shape == value_BKTE.shape == (2, backbone.num_key_value_heads, 40, backbone.head_dim)
        rotary = backbone.position_embeddings(index, x_BTD, seen.positions_BT)
        heads_BHTE = local_attention(
            pieces.rotate(query_BHTE, rotary),
            pieces.rotate(key_BKTE, rotary),
            value_BKTE,
            pieces.scaling(layer),
            pieces.window(layer),
        )
        heads_BTF = heads_BHTE.transpose(1, 2).flatten(2)
        branch_BTD = pieces.after_projection(layer, pieces.project(layer, heads_BTF))
        torch.testing.assert_close(
            pieces.finish(layer, x_BTD, branch_BTD), seen.hidden_states[index + 1], atol=2e-5, rtol=1e-4
        )
        # The weight is that of the projection, without its bias.
        projected_BTD = heads_BTF @ pieces.output_weight(layer).T + pieces.project(layer, torch.zeros_like(heads_BTF))
        torch.testing.assert_close(projected_BTD, pieces.project(layer, heads_BTF), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_family_without_norms_on_its_branch_leaves_it_alone(family: str) -> None:
    backbone = tiny.backbone(family)
    branch_BTD = torch.randn(1, 3, backbone.hidden_size)
    same = torch.equal(backbone.family.after_projection(backbone.layers[0], branch_BTD), branch_BTD)
    assert same == (not backbone.family.norms_branch)


def test_sliding_windows_are_found() -> None:
    windows = {
        family: [made.family.window(layer) for layer in made.layers]
        for family in tiny.FAMILIES
        for made in [tiny.backbone(family)]
    }
    assert windows.pop("mistral") == [tiny.WINDOW] * tiny.LAYERS
    assert windows.pop("gemma3") == [tiny.WINDOW, None] * (tiny.LAYERS // 2)
    assert all(window is None for family in windows.values() for window in family)


def test_a_gpt_neox_without_parallel_residual_is_put_together_too() -> None:
    model = tiny.causal_lm("gpt_neox")
    for layer in model.gpt_neox.layers:
        layer.use_parallel_residual = False
    backbone = Backbone(model)
    with torch.no_grad():
        seen = backbone(IDS_BT, boundaries=(0, 1))
        layer, x_BTD = backbone.layers[0], seen.hidden_states[0]
        rotary = backbone.position_embeddings(0, x_BTD, seen.positions_BT)
        pieces = backbone.family
        query_BHTE, key_BKTE, value_BKTE = pieces.qkv(layer, x_BTD)
        heads_BHTE = local_attention(
            pieces.rotate(query_BHTE, rotary), pieces.rotate(key_BKTE, rotary), value_BKTE, pieces.scaling(layer)
        )
        output_BTD = pieces.finish(layer, x_BTD, pieces.project(layer, heads_BHTE.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(output_BTD, seen.hidden_states[1], atol=2e-5, rtol=1e-4)


def test_an_unknown_family_is_refused_with_the_names_of_the_known() -> None:
    config = OPTConfig(
        vocab_size=11,
        hidden_size=8,
        ffn_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=8,
        max_position_embeddings=8,
    )
    with pytest.raises(UnsupportedBackboneError) as refused:
        Backbone(OPTForCausalLM(config))
    assert "'opt'" in str(refused.value)
    for family in FAMILIES:
        for model_type in family.model_types:
            assert model_type in str(refused.value)
