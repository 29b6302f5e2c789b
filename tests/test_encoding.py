"""Encoding a window by the shortest way gives what the whole backbone gives."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

from longmem import backbone as backbone_module
from longmem import encoding
from longmem.backbone import Backbone
from longmem.encoding import Passes, causal_attention, exact_in_bfloat16, layer_keys_values, pass_layer
from longmem.ops import cpu

LAYERS = (1, 2)


def windows(rows: int = 2, tokens: int = 150) -> torch.Tensor:
    """Longer than the tokens that attend at a time, and no multiple of them."""
    return torch.stack([tiny.tokens(tokens, seed=row) for row in range(rows)])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("first", [0, 70, 149])
@torch.no_grad()
def test_keys_and_values_are_those_of_the_backbone(family: str, first: int) -> None:
    backbone = Backbone(tiny.causal_lm(family))
    ids_BT = windows()
    seen = backbone(ids_BT, boundaries=LAYERS)
    found = backbone.encode(ids_BT, LAYERS, first=first)
    assert set(found) == set(LAYERS)
    for layer in LAYERS:
        for mine, whole in zip(found[layer], backbone.keys_values(layer, seen.hidden_states[layer]), strict=True):
            torch.testing.assert_close(mine, whole[:, :, first:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_attention_of_other_devices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny.causal_lm(family))
    expected = backbone.encode(windows(), LAYERS)
    monkeypatch.setattr(encoding.cpu, "causal_attention", causal_attention)
    for layer, found in backbone.encode(windows(), LAYERS).items():
        for mine, other in zip(found, expected[layer], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 30])
def test_one_attention_is_the_other(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(0)
    query_BHTE, key_BKTE, value_BKTE = (torch.randn(2, heads, 20, 8, dtype=dtype) for heads in (6, 2, 2))
    rough = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        causal_attention(query_BHTE, key_BKTE, value_BKTE, 0.3, window),
        cpu.causal_attention(query_BHTE, key_BKTE, value_BKTE, 0.3, window),
        atol=rough,
        rtol=rough,
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_one_compiled_pass_serves_all_layers(family: str) -> None:
    backbone = Backbone(tiny.causal_lm(family))
    ids_BT, top = windows(tokens=40), backbone.num_layers - 1
    expected = backbone.encode(ids_BT, [1, top], first=3)
    torch._dynamo.reset()
    of_layer, of_top = CompileCounter(), CompileCounter()
    backbone._passes = Passes(
        torch.compile(pass_layer, backend=of_layer), torch.compile(layer_keys_values, backend=of_top)
    )
    found = backbone.encode(ids_BT, [1, top], first=3)
    assert of_layer.frame_count == of_top.frame_count == 1
    for layer, pair in expected.items():
        for mine, other in zip(found[layer], pair, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_above_the_last_one_wanted_are_not_run() -> None:
    backbone = Backbone(tiny.causal_lm("llama"))
    expected = backbone.encode(windows(), [1])
    for layer in list(backbone.layers)[2:]:
        tiny.randomise(layer, 1.0)
    for before, after in zip(expected[1], backbone.encode(windows(), [1])[1], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_weights_that_bfloat16_holds_are_multiplied_in_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "has_bfloat16_products", lambda: True)
    model = tiny.causal_lm(family)
    in_float32 = Backbone(model).encode(windows(), LAYERS)  # the weights are any numbers
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    backbone = Backbone(model)
    in_bfloat16 = backbone.encode(windows(), LAYERS)
    monkeypatch.setattr(backbone_module, "has_bfloat16_products", lambda: False)
    exactly = Backbone(model).encode(windows(), LAYERS)
    for layer in LAYERS:
        for rough, fine, rounded in zip(in_bfloat16[layer], in_float32[layer], exactly[layer], strict=True):
            assert fine.dtype == rounded.dtype == torch.float32
            assert not torch.equal(rough.float(), rounded)
            assert (rough.float() - rounded).norm() < 0.02 * rounded.norm()
    assert backbone.dtype == torch.float32


def test_what_bfloat16_holds() -> None:
    assert exact_in_bfloat16([torch.tensor([1.0, -0.5, 2.0**-100]), torch.zeros(2, 0)])
    assert not exact_in_bfloat16([torch.zeros(3), torch.tensor([1.0, 1.001])])
