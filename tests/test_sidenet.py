"""What a SideNet promises whatever it has learnt: no memory, no difference; and no row sees another's bank."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem.attention import local_attention
from longmem.bank import MemoryBank
from longmem.checkpoint import new_sidenet
from longmem.config import SideNetConfig
from longmem.index import BankReader
from longmem.model import LongMem
from longmem.ops import causal_logsumexp
from longmem.retrieved import Retrieved
from longmem.sidenet import SideNetLayer

DTYPES = (torch.float32, torch.bfloat16)
FORMS: dict[str, dict[str, Any]] = {
    "alpha": {"update": "alpha"},
    "difference": {"update": "difference", "below": 0},
    "gate": {"update": "alpha", "fusion": "gate", "chunk_size": 4},
    "difference-gate": {"update": "difference", "fusion": "gate"},
    "chunks": {"update": "difference", "chunk_size": 4},
    "first": {"update": "alpha", "init": "first"},
}
IDS_BT = tiny.tokens(2, 40, seed=9)

every_form = pytest.mark.parametrize("form", FORMS)
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def backbone_logits(model: LongMem) -> torch.Tensor:
    return model.backbone.model(IDS_BT).logits


@every_dtype
@every_form
@every_family
@torch.no_grad()
def test_untrained_and_without_memory_it_is_the_backbone(family: str, form: str, dtype: torch.dtype) -> None:
    model = tiny.model(family, dtype, trained=False, **FORMS[form])
    for banks in (None, model.new_bank(), [None, model.new_bank()]):
        assert torch.equal(model(IDS_BT, banks).logits_BTV, backbone_logits(model))


@every_dtype
@every_form
@every_family
@torch.no_grad()
def test_trained_with_the_dial_at_zero_it_is_the_backbone(family: str, form: str, dtype: torch.dtype) -> None:
    model = tiny.model(family, dtype, **FORMS[form])
    assert torch.equal(model(IDS_BT, tiny.bank(model, 60), memory=0.0).logits_BTV, backbone_logits(model))


@every_dtype
@every_family
@torch.no_grad()
def test_the_difference_form_keeps_the_backbone_exactly_after_training(family: str, dtype: torch.dtype) -> None:
    model = tiny.model(family, dtype, update="difference")
    assert torch.equal(model(IDS_BT, None).logits_BTV, backbone_logits(model))
    # Not because there is no bank to ask, but because it holds nothing.
    hidden_BTD, _ = model.read(IDS_BT, BankReader([None, None], model.config))
    assert torch.equal(model.backbone.logits(hidden_BTD), backbone_logits(model))


@every_dtype
@every_form
@every_family
@torch.no_grad()
def test_memory_adds_exactly_nothing_where_nothing_is_retrieved(family: str, form: str, dtype: torch.dtype) -> None:
    model = tiny.model(family, dtype, **FORMS[form])
    without = model(IDS_BT, None)
    assert torch.equal(model(IDS_BT, model.new_bank()).logits_BTV, without.logits_BTV)
    hidden_BTD, reads = model.read(IDS_BT, BankReader([None, model.new_bank()], model.config))
    assert torch.equal(model.backbone.logits(hidden_BTD), without.logits_BTV)
    assert [read.layer for read in reads] == list(model.config.memory_layers)
    assert all((read.mass_BKGT == 0).all() and (read.weight_BKGTR == 0).all() for read in reads)

    def finds_nothing(layer: int, query_BKGTE: torch.Tensor) -> Retrieved:
        """Keys and values are there (and large), but none is valid."""
        shape = (*query_BKGTE.shape[:-1], 8)
        rows_BKGTRE = torch.full((*shape, query_BKGTE.shape[-1]), 100.0, dtype=query_BKGTE.dtype)
        valid_BKGTR = torch.zeros(shape, dtype=torch.bool)
        return tiny.retrieved(rows_BKGTRE, rows_BKGTRE, valid_BKGTR, valid_BKGTR.long(), torch.full((2,), 7.0))

    hidden_BTD, _ = model.read(IDS_BT, finds_nothing)
    assert torch.equal(model.backbone.logits(hidden_BTD), without.logits_BTV)


@every_form
@every_family
@torch.no_grad()
def test_a_bank_changes_the_logits_and_the_reads_say_so(family: str, form: str) -> None:
    model = tiny.model(family, **FORMS[form])
    read = model(IDS_BT, [tiny.bank(model, 60), None])
    assert not torch.equal(read.logits_BTV[0], model(IDS_BT).logits_BTV[0])
    for layer in read.reads:
        assert (layer.mass_BKGT[0] > 0).all() and (layer.mass_BKGT[0] < 1).all()
        torch.testing.assert_close(layer.weight_BKGTR.sum(-1), layer.mass_BKGT)
        assert (layer.index_BKGTR < 60).all()


# In each family and form, the first row's logits with and without its bank, in a batch of which nobody else has one.
MODELS = {
    (family, form, dtype): tiny.model(family, dtype, **FORMS[form])
    for family, form, dtype in [
        ("llama", "alpha", torch.float32),
        ("llama", "difference", torch.bfloat16),
        ("gemma3", "alpha", torch.bfloat16),
        ("gemma3", "chunks", torch.float32),
        ("gpt2", "gate", torch.float32),
        ("gpt_neox", "difference-gate", torch.float32),
    ]
}
banks_of_others = st.lists(st.none() | st.tuples(st.integers(0, 90), st.integers(0, 5)), min_size=2, max_size=2)


@settings(max_examples=8)
@pytest.mark.parametrize("key", MODELS, ids=str)
@pytest.mark.parametrize("own", [None, 0, 3, 60])
@given(others=banks_of_others)
@torch.no_grad()
def test_a_row_does_not_depend_on_what_the_banks_of_others_hold(key: Any, own: int | None, others: list[Any]) -> None:
    model = MODELS[key]
    ids_BT = tiny.tokens(3, 12)
    mine = None if own is None else tiny.bank(model, own)
    alone = model(ids_BT, [mine, None, None]).logits_BTV
    theirs = [None if other is None else tiny.bank(model, *other) for other in others]
    assert torch.equal(model(ids_BT, [mine, *theirs]).logits_BTV[0], alone[0])


@every_form
@every_family
@torch.no_grad()
def test_token_by_token_with_a_cache_equals_all_at_once(family: str, form: str) -> None:
    model = tiny.model(family, **FORMS[form])
    banks = [tiny.bank(model, 60), None]
    whole_BTV = model(IDS_BT, banks).logits_BTV
    cache = model.new_cache()
    parts = [model(part_BT, banks, cache=cache).logits_BTV for part_BT in IDS_BT.split([9, *[1] * 20, 11], dim=1)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, atol=3e-4, rtol=1e-3)


@every_form
@torch.no_grad()
def test_a_bank_may_come_under_a_cache(form: str) -> None:
    """The first 20 tokens see no memory, the later ones do; at once, that is a search that answers only the later."""
    model = tiny.model("llama", **FORMS[form])
    bank = tiny.bank(model, 60)

    def later(layer: int, query_BKGTE: torch.Tensor) -> Retrieved:
        found = BankReader([bank, bank], model.config)(layer, query_BKGTE)
        found.score_BKGTR[:, :, :, :20] = -torch.inf
        return found

    hidden_BTD, _ = model.read(IDS_BT, later)
    cache = model.new_cache()
    parts = [
        model(IDS_BT[:, :20], None, cache=cache).logits_BTV,
        model(IDS_BT[:, 20:], bank, cache=cache).logits_BTV,
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.backbone.logits(hidden_BTD), atol=3e-4, rtol=1e-3)


def by_hand(model: LongMem, bank: MemoryBank, memory: float) -> torch.Tensor:
    """The formula of the module's docstring, every layer in full."""
    family, seen = model.backbone.family, model.backbone(IDS_BT, boundaries=range(tiny.LAYERS + 1))

    def decode(layer: SideNetLayer, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder layer's output, and Δ_mem."""
        rotary = model.backbone.position_embeddings(layer.lo, x_BTD, seen.positions_BT)
        query_BHTE, key_BKTE, value_BKTE = family.qkv(layer.decoder, x_BTD)
        turned_BHTE, turned_BKTE = family.rotate(query_BHTE, rotary), family.rotate(key_BKTE, rotary)
        scaling, window = family.scaling(layer.decoder), family.window(layer.decoder)
        local_BHTE = local_attention(turned_BHTE, turned_BKTE, value_BKTE, scaling, window)
        projected_BTD = family.project(layer.decoder, local_BHTE.transpose(1, 2).flatten(2))
        branch_BTD = family.after_projection(layer.decoder, projected_BTD)
        output_BTD = family.finish(layer.decoder, x_BTD, branch_BTD)
        if not layer.kv_heads:
            return output_BTD, torch.zeros_like(x_BTD)
        group = query_BHTE.shape[1] // key_BKTE.shape[1]
        query_BKGTE, turned_BKGTE, local_BKGTE = (
            part.unflatten(1, (-1, group))[:, layer.kv_heads] for part in (query_BHTE, turned_BHTE, local_BHTE)
        )
        logsumexp_BKGT = causal_logsumexp(turned_BKGTE, turned_BKTE[:, layer.kv_heads], scaling, window)
        found = BankReader([bank] * 2, model.config)(layer.lo, query_BKGTE)
        change_BKGTE, _ = layer.memory(query_BKGTE, local_BKGTE, logsumexp_BKGT, found)
        heads = change_BKGTE.flatten(1, 2).transpose(1, 2).flatten(2)
        joint_BTD = family.after_projection(layer.decoder, projected_BTD + heads @ layer.memory_output_DF.T)
        return output_BTD, joint_BTD - branch_BTD

    difference_BTD = torch.zeros_like(seen.hidden_states[0])
    for layer in model.sidenet.layers:
        hidden_BTD = seen.hidden_states[layer.lo]
        x_BTD = hidden_BTD + difference_BTD
        output_BTD, memory_BTD = decode(layer, x_BTD)
        if model.config.update == "alpha":
            step_BTD = layer.alpha_D * (output_BTD - x_BTD)
        else:
            step_BTD = output_BTD - decode(layer, hidden_BTD)[0]
        difference_BTD = difference_BTD + step_BTD + memory * memory_BTD
    return model.backbone.logits(seen.hidden_states[tiny.LAYERS] + memory * difference_BTD)


@pytest.mark.parametrize("memory", [0.5, 1.0])
@every_form
@every_family
@torch.no_grad()
def test_it_is_its_formula(family: str, form: str, memory: float) -> None:
    model = tiny.model(family, **FORMS[form])
    bank = tiny.bank(model, 60)
    expected_BTV = by_hand(model, bank, memory)
    torch.testing.assert_close(model(IDS_BT, bank, memory=memory).logits_BTV, expected_BTV, atol=3e-4, rtol=1e-3)


@every_form
@torch.no_grad()
def test_the_dial_goes_from_the_backbone_to_the_trained_strength(form: str) -> None:
    model = tiny.model("llama", **FORMS[form])
    bank = tiny.bank(model, 60)
    full_BTD, _ = model.read(IDS_BT, model.reader(bank, 2))
    none_BTD, _ = model.read(IDS_BT, model.reader(bank, 2), memory=0.0)
    distances = []
    for memory in (0.0, 1e-6, 0.25, 0.5, 0.75, 1.0):
        hidden_BTD, _ = model.read(IDS_BT, model.reader(bank, 2), memory=memory)
        distances.append(float((hidden_BTD - none_BTD).norm()))
    assert distances == sorted(distances)
    assert distances[0] == 0.0 and distances[1] < 1e-3 * distances[-1]
    assert distances[-1] == float((full_BTD - none_BTD).norm()) > 0


def trainable(model: LongMem) -> dict[str, torch.Tensor]:
    model.sidenet.requires_grad_(True)
    bank = tiny.bank(model, 60)
    model(IDS_BT, [bank, None]).logits_BTV.square().mean().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    return {name: parameter.grad for name, parameter in model.sidenet.named_parameters()}


@pytest.mark.parametrize("form", ["alpha", "gate"])
@every_family
def test_gradients_reach_every_weight_of_the_sidenet_and_none_of_the_backbone(family: str, form: str) -> None:
    gradients = trainable(tiny.model(family, **FORMS[form]))
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    still = [name for name, gradient in gradients.items() if not gradient.any()]
    assert still == []


@every_family
def test_gradients_reach_all_that_reads_memory_in_the_difference_form(family: str) -> None:
    gradients = trainable(tiny.model(family, update="difference"))
    memory = [name for name in gradients if ".memory" in name]
    assert {name.rsplit(".", 1)[-1] for name in memory} == {
        "scale_KG",
        "bias_KG",
        "size_bias_KG",
        "null_key_KGE",
        "null_bias_KG",
        "memory_output_DF",
    }
    assert all(gradients[name] is not None and gradients[name].any() for name in memory)


def test_an_untrained_alpha_sidenet_can_start_to_learn() -> None:
    """α is 0 at the start; were everything behind it 0 too, nothing would ever move."""
    gradients = trainable(tiny.model("llama", trained=False))
    moving = {name.split(".", 2)[2] for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert {"alpha_D", "memory_output_DF", "memory.scale_KG", "memory.bias_KG"} <= moving
    assert "decoder.self_attn.q_proj.weight" in moving  # the query projection, through memory


def test_layers_are_copies_of_those_they_stand_for() -> None:
    backbone = tiny.backbone("llama")
    for init, sources in (("last", [1, 3]), ("first", [0, 2])):
        sidenet = new_sidenet(SideNetConfig(((0, 2), (2, 4)), (), init=init), backbone)
        for layer, source in zip(sidenet.layers, sources, strict=True):
            copied, original = layer.decoder.state_dict(), backbone.layers[source].state_dict()
            assert all(torch.equal(copied[name], original[name]) for name in original)
            assert all(parameter.requires_grad for parameter in layer.parameters())
            shared = {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in backbone.parameters()}
            assert not shared


@torch.no_grad()
def test_a_memory_layer_takes_the_first_layer_of_its_span() -> None:
    backbone = tiny.backbone("llama")
    config = SideNetConfig.around([(1, 0)], tiny.LAYERS, above=1, init="last")
    sidenet = new_sidenet(config, backbone)
    assert sidenet.boundaries == (1,)
    weight = sidenet.layers[0].decoder.self_attn.q_proj.weight
    assert torch.equal(weight, backbone.layers[1].self_attn.q_proj.weight)


@torch.no_grad()
def test_a_sidenet_without_memory_heads_is_allowed() -> None:
    model = LongMem(tiny.backbone("llama"), SideNetConfig(((0, 2), (2, 4)), ())).eval()
    assert torch.equal(model(IDS_BT).logits_BTV, backbone_logits(model))
