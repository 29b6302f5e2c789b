from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from longmem.decoding import KeyValueBuffer, RowDecoder, RowLinear, for_single_rows, layer_step
from longmem.errors import CompilerError, ConfigError
from longmem.model import LongMem


def rows(model: LongMem) -> LongMem:
    """The model with single tokens decoded by steps that are not compiled, which shows whether they are right."""
    model.decode_by(RowDecoder(model.backbone.family, compile=False))
    return model


@torch.no_grad()
def token_by_token(model: LongMem, ids_T: Tensor, bank, memory: float, first: int = 3) -> Tensor:
    """Logits (T − first + 1, V), read as `first` tokens, single ones, two at once amid them, and single ones again."""
    cache = model.new_cache()
    middle = (first + len(ids_T)) // 2
    ends = [first, *range(first + 1, middle), *range(middle + 1, len(ids_T) + 1)]
    logits, begin = [], 0
    for end in ends:
        output = model(ids_T[None, begin:end], bank, cache=cache, memory=memory)
        logits.append(output.logits_BTV[0, -1:] if begin == 0 else output.logits_BTV[0])
        begin = end
    return torch.cat(logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("update", ["alpha", "difference"])
@torch.no_grad()
def test_steps_of_one_token_equal_reading_all_at_once(family, update):
    model = tiny.model(family, update=update)
    ids_T, bank = tiny.tokens(26), tiny.bank(model, 30)
    rows(model)
    for remembered, memory in ((None, 1.0), (bank, 1.0), (bank, 0.5), (bank, 0.0)):
        all_at_once = model(ids_T[None], remembered, memory=memory).logits_BTV[0, 2:]
        stepped = token_by_token(model, ids_T, remembered, memory)
        assert (stepped - all_at_once).abs().max() < 1e-4
        assert torch.equal(stepped.argmax(-1), all_at_once.argmax(-1))


@torch.no_grad()
def test_what_memory_read_is_the_same():
    model = tiny.model()
    bank, ids_T = tiny.bank(model, 30), tiny.tokens(12)
    reads = []
    for decode in (False, True):
        if decode:
            rows(model)
        cache = model.new_cache()
        model(ids_T[None, :-1], bank, cache=cache)
        reads.append(model(ids_T[None, -1:], bank, cache=cache).reads)
    for eager, stepped in zip(*reads, strict=True):
        torch.testing.assert_close(stepped.mass_BKGT, eager.mass_BKGT)
        torch.testing.assert_close(stepped.weight_BKGTR, eager.weight_BKGTR)
        assert torch.equal(stepped.index_BKGTR, eager.index_BKGTR)


@torch.no_grad()
def test_the_steps_are_taken(monkeypatch):
    model, taken = tiny.model(), []
    monkeypatch.setattr("longmem.decoding.layer_step", lambda *args: taken.append(1) or layer_step(*args))
    rows(model)
    token_by_token(model, tiny.tokens(8), None, 1.0)
    assert len(taken) == (tiny.LAYERS + len(model.sidenet.layers)) * 3
    taken.clear()
    model(tiny.tokens(2, 1), cache=model.new_cache())
    cache = model.new_cache()
    for _ in range(2):
        model(tiny.tokens(1, 1), cache=cache)
    model(tiny.tokens(1, 2), cache=cache)
    assert not taken


@torch.no_grad()
def test_nothing_but_speed_of_the_model_changes():
    model = tiny.model()
    names, size, hashed = list(model.state_dict()), len(list(model.parameters())), model.backbone.weights_hash
    rows(model)
    del model.backbone.__dict__["weights_hash"]
    assert list(model.state_dict()) == names and len(list(model.parameters())) == size
    assert model.backbone.weights_hash == hashed


# ---- products ----


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_weights_are_kept_in_bfloat16_only_if_that_is_exact(bias):
    linear = nn.Linear(24, 40, bias=bias)
    x_1D = torch.randn(1, 1, 24)
    fine = for_single_rows(linear)
    assert fine.weight_OD.dtype == torch.float32 and fine.weight_OD.data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(fine(x_1D), linear(x_1D))
    linear.weight.copy_(linear.weight.bfloat16())
    coarse = for_single_rows(linear)
    assert coarse.weight_OD.dtype == torch.bfloat16
    torch.testing.assert_close(coarse(x_1D), linear(x_1D))


def test_a_twin_shares_everything_but_linear_layers():
    layer = tiny.backbone().layers[0]
    twin = for_single_rows(layer)
    assert twin is not layer and isinstance(twin.mlp.down_proj, RowLinear)
    assert isinstance(layer.mlp.down_proj, nn.Linear)
    assert twin.input_layernorm.weight is layer.input_layernorm.weight


# ---- buffers ----


def test_a_buffer_holds_what_was_put_in():
    buffer = KeyValueBuffer()
    assert buffer.get_seq_length() == 0
    pieces = [torch.randn(2, 3, length, 4) for length in (5, 1, 1, 250, 1, 400, 1)]
    for n, piece in enumerate(pieces, start=1):
        keys, values = buffer.update(piece, -piece)
        assert torch.equal(keys, torch.cat(pieces[:n], dim=2)) and torch.equal(values, -keys)
        assert buffer.get_seq_length() == keys.shape[2]


def test_a_buffer_goes_on_from_what_transformers_made_of_it():
    buffer, (first, second) = KeyValueBuffer(), torch.randn(2, 2, 1, 5, 4)
    buffer.update(first, first)
    buffer.reorder_cache(torch.tensor([1, 0]))
    buffer.crop(-2)
    keys, values = buffer.update(second, second)
    assert torch.equal(keys, torch.cat([first.flip(0)[:, :, :3], second], dim=2)) and torch.equal(keys, values)
    buffer.reset()
    assert torch.equal(buffer.update(second, second)[0], second)


def test_a_buffer_seldom_moves():
    buffer, places = KeyValueBuffer(), set()
    for _ in range(1000):
        keys, _ = buffer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        places.add(keys.data_ptr())
    assert len(places) <= 3


# ---- compiled ----


CAN_COMPILE = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_paths()["include"], "Python.h").exists()


@pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and Python's headers")
@torch.no_grad()
def test_compiled_steps_equal_eager_ones_and_compile_once():
    from torch._dynamo.utils import counters

    model = tiny.model()
    for parameter in model.backbone.parameters():
        parameter.copy_(parameter.bfloat16())
    ids_T, bank = tiny.tokens(40), tiny.bank(model, 30)
    cases = [(None, 1.0), (bank, 1.0), (bank, 0.0)]
    eager = [token_by_token(model, ids_T, bank, memory) for bank, memory in cases]
    before = counters["stats"]["unique_graphs"]
    model.compile_decoding()
    for (bank, memory), expected in zip(cases, eager, strict=True):
        stepped = token_by_token(model, ids_T, bank, memory)
        assert (stepped - expected).abs().max() < 1e-4
        assert torch.equal(stepped.argmax(-1), expected.argmax(-1))
    # a layer of the backbone, one of the SideNet (in float32), the head
    assert counters["stats"]["unique_graphs"] - before == 3


def test_without_a_compiler_the_error_says_what_to_install():
    import torch._inductor.config as inductor

    model = tiny.model("qwen2")
    settings = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with inductor.patch(settings), pytest.raises(CompilerError, match=r"apt-get install g\+\+"):
        model.compile_decoding()
    # The model goes on without.
    assert token_by_token(model, tiny.tokens(8), None, 1.0).isfinite().all()


def test_only_float32_is_compiled():
    with pytest.raises(ConfigError, match="float32"):
        tiny.model(dtype=torch.bfloat16).compile_decoding()


def test_on_a_gpu_compiling_is_left_to_the_first_step(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model(dtype=torch.bfloat16)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert not model.fuses_steps
    model.compile_decoding()
    assert model.fuses_steps
