from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longmem.backbone import Backbone
from longmem.config import MemoryHead, SideNetConfig
from longmem.data import Document, TokenizedDocuments
from longmem.errors import CheckpointError, ConfigError, MissingExtraError
from longmem.probe import ProbeConfig, ProbeResult, cause, lookup, probe
from longmem.probe.cause import Fact, attend, generate_facts
from longmem.probe.lookup import chance_of_hit, in_top, repeated_pairs
from longmem.probe.result import _number as number
from longmem.probe.text import python_documents

VOCABULARY = 300
SMALL = ProbeConfig(texts=2, remembered=96, window=32, top_k=4, sessions=2, facts=2, filler=24, max_heads=3)
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def models_of_all_families() -> dict[str, Any]:
    ends: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    common = ends | shape | {"num_key_value_heads": 2}
    local = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    gemma = Gemma3TextConfig(**common, **local, head_dim=8, query_pre_attn_scalar=8)
    neox = ends | shape
    gpt2 = GPT2Config(**ends, n_embd=32, n_layer=3, n_head=4, n_positions=256)
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**common)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**common, sliding_window=16)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**common)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8)),
        "gemma3": lambda: Gemma3ForCausalLM(gemma),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**neox)),
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
    }


FAMILIES = models_of_all_families()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the questions and each printable character; other words are all one."""
    words = re.findall(r"\w+", " ".join(f"{t[1]} {t[2]} {' '.join(t[3][:3])}" for t in cause._TEMPLATES))
    vocabulary = list(dict.fromkeys(["?", *(chr(code) for code in range(32, 127)), *words]))[:VOCABULARY]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module")
def documents() -> TokenizedDocuments:
    tokens = np.random.default_rng(0).integers(1, 40, 2000).astype(np.uint16)
    return TokenizedDocuments(tokens, ["one", "two"], [900, 1100])


def backbone_of(family: str, tokenizer: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(FAMILIES[family](), tokenizer, family)


def questions_of(backbone: Backbone, documents: TokenizedDocuments, config: ProbeConfig = SMALL) -> cause.Questions:
    rng = np.random.default_rng(0)
    return cause.Questions(backbone, cause.make_sessions(backbone, documents, config, rng))


# ---- look-up -----------------------------------------------------------------------------------------------


def test_a_position_counts_if_its_pair_stands_in_memory_and_is_rare() -> None:
    memory = np.array([5, 6, 7, 5, 6, 8, 9, 9, 9, 9])
    new = np.array([5, 6, 8, 9, 9, 5, 8])
    # (5,6) twice; (6,8) and (8,9) once; (9,9) three times; (9,5), (5,8) never. The place is that of the second token.
    assert repeated_pairs(memory, new, 8, 60) == {0: [1, 4], 1: [5], 2: [6], 3: [7, 8, 9]}
    assert repeated_pairs(memory, new, 2, 60) == {0: [1, 4], 1: [5], 2: [6]}
    assert repeated_pairs(memory, new, 8, 1) == {2: [6]}


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.lists(st.integers(0, 4), min_size=2, max_size=20))
def test_places_hold_the_next_token_after_the_current_one(memory: list[int], new: list[int]) -> None:
    places = repeated_pairs(np.array(memory), np.array(new), 60, 60)
    for t in range(len(new) - 1):
        expected = [p for p in range(1, len(memory)) if (memory[p - 1], memory[p]) == (new[t], new[t + 1])]
        assert places.get(t, []) == expected


def test_a_hit_is_a_wanted_key_among_the_top() -> None:
    # One head, keys 0 … 4 whose scores for the query (1, 0) are their numbers, and for (−1, 0) the reverse.
    key_KNE = torch.tensor([[[float(n), 1.0] for n in range(5)]])
    query_KPE = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    wanted_PN = torch.tensor([[False, False, False, True, False], [False, False, False, True, False]])
    assert in_top(query_KPE, key_KNE, wanted_PN, 1).tolist() == [[False, False]]
    assert in_top(query_KPE, key_KNE, wanted_PN, 2).tolist() == [[True, False]]
    assert in_top(query_KPE, key_KNE, wanted_PN, 4).tolist() == [[True, True]]


@given(st.integers(1, 30), st.integers(0, 8), st.integers(1, 40))
def test_chance_is_that_of_drawing_without_replacement(remembered: int, targets: int, top_k: int) -> None:
    targets, top_k = min(targets, remembered), min(top_k, remembered)
    from math import comb

    expected = 1 - comb(remembered - targets, top_k) / comb(remembered, top_k)
    assert chance_of_hit(remembered, targets, top_k) == pytest.approx(expected, abs=1e-9)


def test_look_up_finds_a_planted_head(tokenizer: Any, documents: TokenizedDocuments) -> None:
    """A first layer whose embedding, rigged to tell the token before, makes one head an induction head."""
    backbone = backbone_of("gpt2", tokenizer)
    size = 16
    tokens = np.tile(np.arange(1, size + 1), 30)
    base = backbone.base
    with torch.no_grad():
        base.wpe.weight.zero_()
        base.wte.weight.zero_()
        # The text counts 1 … 16 over and over, so a token tells the one before it: dimension t is "is t", and the key
        # of head 2 reads "is t" as "follows t − 1" where its query reads "is t" as it is.
        base.wte.weight[1 : size + 1, :size] = 8 * torch.eye(size)
        weight, bias = base.h[0].attn.c_attn.weight, base.h[0].attn.c_attn.bias
        weight.zero_()
        bias.zero_()
        # Sixteen sign patterns: each agrees with itself alone.
        directions = torch.tensor([[1.0 if n >> bit & 1 else -1.0 for bit in range(4)] * 2 for n in range(size)])
        weight[:size, 16:24] = directions
        weight[:size, 32 + 16 : 32 + 24] = directions.roll(1, 0)
    text = TokenizedDocuments(tokens.astype(np.uint16), ["count"], [len(tokens)])
    config = ProbeConfig(texts=1, remembered=96, window=32, top_k=1)
    rates, positions, chance = lookup.look_up_rates(
        backbone, text, config, np.random.default_rng(0), lambda stage, done, total: None
    )
    assert positions == 32
    assert rates[0][2] == 1.0 > 0.1 > chance


# ---- cause -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_taken_apart_are_the_backbone(family: str, tokenizer: Any) -> None:
    backbone = backbone_of(family, tokenizer)
    ids = torch.randint(0, VOCABULARY, (2, 40))
    seen = backbone(ids, boundaries=range(backbone.num_layers + 1))
    distance = torch.arange(40)[:, None] - torch.arange(40)[None, :]
    for layer in range(backbone.num_layers):
        window = backbone.family.window(backbone.layers[layer])
        mask = (distance >= 0) & (distance < (window or 40))
        given = seen.hidden_states[layer]
        whole, (key, value) = attend(backbone, layer, given, seen.positions_BT, mask[None, None])
        torch.testing.assert_close(whole, seen.hidden_states[layer + 1], rtol=1e-4, atol=1e-5)
        # The last ten tokens alone, over the cached keys of the others.
        past = key[:, :, :30], value[:, :, :30]
        rest, _ = attend(backbone, layer, given[:, 30:], seen.positions_BT[:, 30:], mask[None, None, 30:], past)
        torch.testing.assert_close(rest, whole[:, 30:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_runs_on_every_family(family: str, tokenizer: Any, documents: TokenizedDocuments) -> None:
    backbone = backbone_of(family, tokenizer)
    config = ProbeConfig(**{**vars(SMALL), "facts": 1, "min_hit_rate": 0.1, "min_effect": -1.0, "min_gain": -1.0})
    stages: dict[str, tuple[int, int]] = {}
    result = probe(backbone, documents, config=config, on_progress=lambda stage, *steps: stages.update({stage: steps}))
    assert (len(result.look_up), len(result.look_up[0])) == (3, 4)
    assert (len(result.knock_out), len(result.knock_out[0])) == (3, backbone.num_key_value_heads)
    assert len(result.memory_heads) == 3 and result.memory_heads == tuple(sorted(result.memory_heads))
    assert all(done == total for done, total in stages.values()) and set(stages) == {"look-up", "knock-out", "addition"}
    assert all(torch.isfinite(torch.tensor(result.knock_out)).flatten())
    SideNetConfig.around(list(result.memory_heads), backbone.num_layers, below=1)
    assert result.evidence.positions > 0 and 0 < result.evidence.chance < 1


def test_questions_are_answered_as_the_backbone_answers(tokenizer: Any, documents: TokenizedDocuments) -> None:
    """Without filler, all heads looking is plain causal attention over session and question."""
    backbone = backbone_of("llama", tokenizer)
    config = ProbeConfig(sessions=1, facts=2, filler=0)
    sessions = cause.make_sessions(backbone, documents, config, np.random.default_rng(0))
    questions = cause.Questions(backbone, sessions)
    log_probs = []
    for ids, answer in sessions[0].questions:
        whole = torch.tensor([sessions[0].context + ids])
        logits = backbone.logits(backbone(whole, boundaries={3}).hidden_states[3])[0].log_softmax(-1)
        log_probs.append(sum(float(logits[-answer + i - 1, ids[len(ids) - answer + i]]) for i in range(answer)))
    score, _ = questions.answer(torch.ones(3, 2, dtype=torch.bool))
    assert score == pytest.approx(sum(log_probs) / 2, abs=1e-4)


def test_nobody_looking_is_a_session_never_told(tokenizer: Any, documents: TokenizedDocuments) -> None:
    backbone = backbone_of("llama", tokenizer)
    sessions = cause.make_sessions(backbone, documents, SMALL, np.random.default_rng(0))
    nobody = torch.zeros(3, 2, dtype=torch.bool)
    before, _ = cause.Questions(backbone, sessions).answer(nobody)
    others = []
    for session in sessions:
        context = list(session.context)
        context[session.told] = [7] * (session.told.stop - session.told.start)
        others.append(cause.Session(context, session.told, session.questions))
    after, _ = cause.Questions(backbone, others).answer(nobody)
    looking, _ = cause.Questions(backbone, others).answer(~nobody)
    assert before == after != looking


def test_knocking_out_a_head_without_output_costs_nothing(tokenizer: Any, documents: TokenizedDocuments) -> None:
    backbone = backbone_of("llama", tokenizer)
    with torch.no_grad():  # query heads 2 and 3 share key-value head 1
        backbone.layers[1].self_attn.o_proj.weight[:, 16:] = 0
    effects = questions_of(backbone, documents).knock_out(lambda done, total: None)
    assert effects[1][1] == 0.0
    assert all(effects[layer][head] != 0.0 for layer, head in [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)])


def test_an_effect_is_the_loss_against_all_heads_looking(tokenizer: Any, documents: TokenizedDocuments) -> None:
    questions = questions_of(backbone_of("qwen3", tokenizer), documents)
    everybody = torch.ones(3, 2, dtype=torch.bool)
    effects = questions.knock_out(lambda done, total: None)
    without = everybody.clone()
    without[1, 0] = False
    assert effects[1][0] == pytest.approx(questions.answer(everybody)[0] - questions.answer(without)[0], abs=1e-9)


def test_a_window_that_ends_before_the_session_shows_nothing(tokenizer: Any, documents: TokenizedDocuments) -> None:
    """Mistral's sixteen-token window cannot reach over the filler: no head has any effect."""
    effects = questions_of(backbone_of("mistral", tokenizer), documents).knock_out(lambda done, total: None)
    assert all(effect == 0.0 for row in effects for effect in row)


def test_greedy_addition_prefers_look_up_then_gain(tokenizer: Any, documents: TokenizedDocuments) -> None:
    backbone = backbone_of("llama", tokenizer)
    questions = questions_of(backbone, documents)
    look_up = ((0.0, 0.6), (0.9, 0.0), (0.0, 0.0))
    knock_out = ((1.0, 1.0), (1.0, 1.0), (-1.0, 1.0))
    config = ProbeConfig(**{**vars(SMALL), "min_gain": -10.0, "max_heads": 4})
    path = cause.add_greedily(questions, look_up, knock_out, config, lambda stage, done, total: None)
    assert [step.head for step in path[:2]] == [(1, 0), (0, 1)]
    assert [step.reason for step in path] == ["look-up", "look-up", "copy-out", "copy-out"]
    assert MemoryHead(2, 0) not in [step.head for step in path]  # no effect, no candidate
    looks = torch.zeros(3, 2, dtype=torch.bool)
    now, _ = questions.answer(looks)
    for step in path:
        looks[step.head] = True
        then, _ = questions.answer(looks)
        assert (step.log_probability, step.gain) == pytest.approx((then, then - now), abs=1e-6)
        now = then
    assert path[2].gain >= path[3].gain or path[2].head != path[3].head
    strict = cause.add_greedily(
        questions, look_up, knock_out, ProbeConfig(**{**vars(SMALL), "min_gain": 99.0}), lambda stage, done, total: None
    )
    assert [step.chosen for step in strict] == [True, True, False]


# ---- facts -------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 1000))
def test_facts_are_of_different_kinds_with_different_answers(count: int, seed: int) -> None:
    facts = generate_facts(count, np.random.default_rng(seed))
    assert facts == generate_facts(count, np.random.default_rng(seed))
    assert len({fact.question for fact in facts}) == len({fact.answer for fact in facts}) == count
    for fact in facts:
        assert fact.answer in fact.statement and fact.answer not in fact.question + fact.begun


def test_facts_are_told_in_the_chat_template_if_there_is_one(tokenizer: Any) -> None:
    fact = Fact("I have a dog called Rex.", "What is my dog called?", "Your dog is called", "Rex")
    session, (question,) = cause.tell(tokenizer, [fact])
    assert session.startswith("User: I have a dog called Rex.\nAssistant: ")
    assert question.endswith("User: What is my dog called?\nAssistant: Your dog is called")
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT_TEMPLATE)
    session, (question,) = cause.tell(chatty, [fact])
    assert session == "[user] I have a dog called Rex. [assistant] I will remember that. "
    assert question == "[user] What is my dog called? [assistant] Your dog is called"


def test_contexts_are_equally_long_and_fit_the_window(tokenizer: Any, documents: TokenizedDocuments) -> None:
    backbone = backbone_of("gpt2", tokenizer)
    config = ProbeConfig(**{**vars(SMALL), "filler": 10_000})
    sessions = cause.make_sessions(backbone, documents, config, np.random.default_rng(0))
    assert len({len(session.context) for session in sessions}) == 1
    longest = max(len(ids) for session in sessions for ids, _ in session.questions)
    assert len(sessions[0].context) + longest == backbone.max_positions
    for session in sessions:
        assert session.context[0] == backbone.prefix_token_id
        for ids, answer in session.questions:
            assert 0 < answer < len(ids)


# ---- errors ------------------------------------------------------------------------------------------------


def test_user_mistakes_are_named(tokenizer: Any, documents: TokenizedDocuments) -> None:
    backbone = backbone_of("gpt2", tokenizer)
    with pytest.raises(ConfigError, match=r"document of 2033 tokens; the longest of 2 has 1100"):
        probe(backbone, documents, config=ProbeConfig(**{**vars(SMALL), "remembered": 2000}))
    with pytest.raises(ConfigError, match="does not hold a session of 12 facts"):
        probe(backbone, documents, config=ProbeConfig(**{**vars(SMALL), "facts": 12}))
    with pytest.raises(ConfigError, match="12 kinds of facts; got facts=13"):
        probe(backbone, documents, config=ProbeConfig(**{**vars(SMALL), "facts": 13}))
    with pytest.raises(ConfigError, match="tokenizer"):
        probe(backbone_of("gpt2", None), documents, config=SMALL)
    with pytest.raises(ConfigError, match="nothing new repeats"):
        unique = TokenizedDocuments(np.arange(1, 200, dtype=np.uint16), ["unique"], [199])
        probe(backbone, unique, config=SMALL)
    with pytest.raises(ConfigError, match="texts >= 1; got 0"):
        ProbeConfig(texts=0)
    with pytest.raises(ConfigError, match=r"min_hit_rate .* got 1\.5"):
        ProbeConfig(min_hit_rate=1.5)


# ---- result ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tokenizer: Any, documents: TokenizedDocuments) -> ProbeResult:
    return probe(backbone_of("llama", tokenizer), documents, config=SMALL)


def test_a_result_survives_its_file(result: ProbeResult, tmp_path: Path) -> None:
    result.save(tmp_path / "probe.json")
    assert ProbeResult.load(tmp_path / "probe.json") == result
    (tmp_path / "other.json").write_text('{"memory_heads": []}')
    with pytest.raises(CheckpointError, match="not the result of a probe"):
        ProbeResult.load(tmp_path / "other.json")


def test_a_seed_gives_one_result(result: ProbeResult, tokenizer: Any, documents: TokenizedDocuments) -> None:
    again = probe(backbone_of("llama", tokenizer), documents, config=SMALL)
    assert (again.look_up, again.knock_out, again.path) == (result.look_up, result.knock_out, result.path)


def test_the_heat_map_shows_every_layer(result: ProbeResult) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.heat_map())
    text = console.export_text()
    assert "look-up" in text and "knock-out" in text
    assert result.look_up_kv[0] == (max(result.look_up[0][:2]), max(result.look_up[0][2:]))


@pytest.mark.parametrize(("value", "text"), [(0.934, ".93"), (1, "1.00"), (-0.05, "-.05"), (0.001, "·"), (-2, "-2.00")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_plot(result: ProbeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        result.plot(tmp_path / "probe.png")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_default_documents_ship_with_python() -> None:
    documents: list[Document] = list(python_documents())
    assert [document.name for document in documents] == ["python topics", "python docstrings"]
    assert all(len(document.text) > 100_000 for document in documents)
