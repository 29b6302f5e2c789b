"""Training: it learns, leaves the backbone alone, never reads its own segment, and resumes to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from longmem.config import SideNetConfig
from longmem.data import Mixture, TokenizedDocuments
from longmem.errors import CheckpointError, ConfigError
from longmem.evals.perplexity import PerplexityConfig
from longmem.model import LongMem
from longmem.retrieved import Retrieved
from longmem.train import TrainConfig, Trainer, draw_curves, train

REPETITIVE = tiny.documents(400, 400, 400, period=20)
SMALL = TrainConfig(steps=6, rows=2, segment=16, bank_tokens=64, warmup=2, dtype="float32", log_every=1)
EVALUATION = PerplexityConfig("blocks", segment=16, prefill=32, segments=2)


def fresh(**settings: Any) -> LongMem:
    return tiny.model("llama", trained=False, **settings)


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize(
    "form",
    [
        {"update": "alpha"},
        {"update": "difference"},
        {"newest_wins": True, "passage_evidence": True},
        {"fusion": "gate", "chunk_size": 4},
    ],
)
def test_a_few_steps_learn_and_leave_the_backbone_alone(form: dict[str, Any], tmp_path: Path) -> None:
    model = fresh(**form)
    before = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    hashed = tiny.backbone("llama").weights_hash
    config = dataclasses.replace(SMALL, steps=40, rows=3, learning_rate=3e-3, wrong_fraction=0.0)
    train(model, REPETITIVE, config, tmp_path)
    losses = [row["loss"] for row in log_of(tmp_path)]
    assert np.mean(losses[-8:]) < np.mean(losses[1:9]) - 0.1
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and not parameter.requires_grad
    assert model.bank_spec.weights == hashed
    again = LongMem.from_pretrained(tmp_path, backbone=model.backbone)
    assert again.config == model.config
    newest = [parameter for name, parameter in model.sidenet.named_parameters() if ".newest_" in name]
    assert len(newest) == (4 if model.config.newest_wins else 0) and all(parameter.any() for parameter in newest)
    gains = [parameter for name, parameter in model.sidenet.named_parameters() if name.endswith(".evidence_KG")]
    assert len(gains) == (2 if model.config.passage_evidence else 0) and all(parameter.any() for parameter in gains)


def test_mixed_precision_trains_too(tmp_path: Path) -> None:
    model = tiny.model("llama", torch.bfloat16, trained=False)
    train(model, REPETITIVE, dataclasses.replace(SMALL, dtype="bfloat16"), tmp_path)
    assert all(math.isfinite(row["loss"]) for row in log_of(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in model.sidenet.parameters())


def test_starved_steps_read_in_short_windows_and_write_whole_segments(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, wrong_fraction=0.0, learning_rate=0.0, starved_fraction=1.0, starved=4)
    starved = Trainer(fresh(), REPETITIVE, config)
    whole = Trainer(fresh(), REPETITIVE, dataclasses.replace(config, starved_fraction=0.0))
    seen: list[tuple[int, ...]] = []
    hook = starved.sidenet.register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(next(iter(inputs[0].values())).shape[:2]))
    )
    for _ in range(3):
        starved.step()
        whole.step()
    hook.remove()
    assert starved.starved_windows == [4, 8] and set(seen) <= {(2 * 4, 4 + 1), (2 * 2, 8 + 1)}
    assert torch.equal(starved.banks.keys_HBNE, whole.banks.keys_HBNE)
    assert torch.equal(starved.banks.token_ids_BN, whole.banks.token_ids_BN)
    # All windows of a stream read its bank, and what they are about is cut in the same order.
    reader, right_B, _ = starved._reader(windows=4)
    assert reader is not None and reader.source_B.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and right_B.all()
    segments = starved.streams.next()
    assert torch.equal(segments.cut(4).tokens_BS.view(2, 16), segments.tokens_BS)
    train(fresh(), REPETITIVE, dataclasses.replace(config, learning_rate=1e-3, starved_fraction=0.5), tmp_path)
    assert all(math.isfinite(row["loss"]) for row in log_of(tmp_path))


@pytest.mark.parametrize("form", ["alpha", "difference"])
def test_what_a_wrong_bank_changes_is_learned_away(form: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, steps=60, rows=4, wrong_fraction=0.5, learning_rate=3e-3)
    harms = {}
    for weight in (1e-9, 10.0):
        folder = tmp_path / str(weight)
        train(fresh(update=form), REPETITIVE, dataclasses.replace(config, harmless_weight=weight), folder)
        harms[weight] = np.mean([row["harm"] for row in log_of(folder)[-15:]])
    assert 0 < harms[10.0] < 0.5 * harms[1e-9]
    # Where nobody reads a wrong bank there is none.
    trainer = Trainer(
        fresh(update=form), REPETITIVE, dataclasses.replace(config, wrong_fraction=0.0, harmless_weight=1.0)
    )
    assert trainer.step()["harm"] == 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("form", [{"update": "alpha"}, {"update": "difference", "newest_wins": True}])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(form: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, lookup_weight=0.1, save_every=2, eval_every=3, steps=7)
    settings: dict[str, Any] = {"heldout": REPETITIVE, "evaluation": EVALUATION}
    train(fresh(**form), REPETITIVE, config, tmp_path / "whole", **settings)

    def interrupt(figures: dict[str, Any]) -> None:
        if figures["step"] == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(fresh(**form), REPETITIVE, config, tmp_path / "parts", on_figures=interrupt, **settings)
    assert not (tmp_path / "parts" / "sidenet.safetensors").exists()
    # Of the five logged steps the last was not saved: it is lived again. The new model's own weights do not matter.
    again = fresh(**form)
    tiny.randomise(again.sidenet, 0.5)
    train(again, REPETITIVE, config, tmp_path / "parts", resume=True, **settings)

    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    for file in ("sidenet.safetensors", "state/state.safetensors"):
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert json.loads((tmp_path / "whole/state/state.json").read_text()) == json.loads(
        (tmp_path / "parts/state/state.json").read_text()
    )


def test_the_same_seed_is_the_same_run(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(fresh(), REPETITIVE, dataclasses.replace(SMALL, seed=seed, steps=3), tmp_path / name)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") != log_of(tmp_path / "c")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(fresh(), REPETITIVE, dataclasses.replace(SMALL, steps=2, save_every=1), folder)
    return folder


def test_other_settings_do_not_resume(saved: Path) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    config = dataclasses.replace(SMALL, steps=2, save_every=1)
    with pytest.raises(CheckpointError, match=r"had other settings: learning_rate 0\.002 \(now 0\.1\)"):
        train(fresh(), REPETITIVE, dataclasses.replace(config, learning_rate=0.1), saved, resume=True)
    with pytest.raises(CheckpointError, match="SideNet of another shape"):
        train(fresh(update="difference"), REPETITIVE, config, saved, resume=True)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    # How often a run logs and saves is no part of what it computes.
    train(fresh(), REPETITIVE, dataclasses.replace(config, log_every=2, save_every=2), saved, resume=True)


@pytest.mark.parametrize(
    ("file", "raw"), [("state.json", b"{"), ("state.safetensors", b"damaged"), ("state.json", None)]
)
def test_a_damaged_state_is_named(saved: Path, tmp_path: Path, file: str, raw: bytes | None) -> None:
    state = tmp_path / "state"
    state.mkdir()
    for path in (saved / "state").iterdir():
        (state / path.name).write_bytes(path.read_bytes())
    (state / file).unlink() if raw is None else (state / file).write_bytes(raw)
    with pytest.raises(CheckpointError, match=file):
        train(fresh(), REPETITIVE, dataclasses.replace(SMALL, steps=2, save_every=1), tmp_path, resume=True)


def test_a_new_run_in_the_same_folder_begins_a_new_log(tmp_path: Path) -> None:
    for _ in range(2):
        train(fresh(), REPETITIVE, dataclasses.replace(SMALL, steps=3), tmp_path)
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3]


def test_without_memory_no_bank_is_touched() -> None:
    model = fresh()
    trainer = Trainer(model, REPETITIVE, dataclasses.replace(SMALL, memory=False))
    figures = [trainer.step() for _ in range(4)]
    assert not trainer.banks.written_B.any() and not trainer.banks.keys_HBNE.any()
    assert not any(name.startswith("mass_") for row in figures for name in row)
    # Nothing that reads memory has learnt.
    assert all(not layer.memory.bias_KG.any() for layer in model.sidenet.layers if layer.kv_heads)


def test_with_nothing_remembered_yet_both_losses_are_one() -> None:
    """In the first step every bank is empty, so the loss with an empty bank has the gradient of the other."""
    norms = [
        Trainer(fresh(), REPETITIVE, dataclasses.replace(SMALL, empty_weight=weight)).step()["gradient_norm"]
        for weight in (0.0, 0.5, 2.0)
    ]
    assert norms[1:] == pytest.approx([1.5 * norms[0], 3.0 * norms[0]], rel=1e-4)


def test_the_loss_with_an_empty_bank_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read with the banks and what without them, step by step."""
    model = fresh()
    trainer = Trainer(model, REPETITIVE, dataclasses.replace(SMALL, empty_weight=0.5))
    seen: list[bool] = []
    correct = model.correct
    monkeypatch.setattr(model, "correct", lambda out, retrieve: seen.append(retrieve is None) or correct(out, retrieve))
    trainer.step()
    trainer.step()
    assert seen == [True, False] * 2


def test_a_segment_reads_what_came_before_it_and_never_itself() -> None:
    model = fresh()
    # Each stream reads one document of seven segments, whose tokens are all different.
    config = dataclasses.replace(SMALL, steps=20, rows=2, segment=12, bank_tokens=60, wrong_fraction=0)
    documents = tiny.documents(84, 84, 84)
    trainer = Trainer(model, documents, config)
    sizes: list[torch.Tensor] = []

    def look(_module: Any, args: tuple[Any, ...]) -> None:
        found: Retrieved = args[3]
        sizes.append(found.bank_size_B)
        place_BKGTR = found.index_BKGTR % config.bank_tokens
        assert (place_BKGTR[found.valid_BKGTR] < found.bank_size_B.max()).all()

    memory_layer = next(layer for layer in model.sidenet.layers if layer.kv_heads)
    memory_layer.memory.register_forward_pre_hook(look)
    for step in range(10):
        written_B = trainer.banks.written_B.clone()
        figures = trainer.step()
        segment_of_document = step % 7
        assert sizes[step].tolist() == [min(12 * segment_of_document, 60)] * 2
        assert trainer.banks.written_B.tolist() == [12 * (segment_of_document + 1)] * 2
        masses = [value for name, value in figures.items() if name.startswith("mass_")]
        assert len(masses) == 2
        assert all(mass == 0 for mass in masses) if segment_of_document == 0 else all(mass > 0 for mass in masses)
        assert written_B.tolist() != trainer.banks.written_B.tolist()


def test_what_is_written_is_what_the_model_encodes() -> None:
    model = fresh()
    trainer = Trainer(model, REPETITIVE, SMALL)
    trainer.step()
    tokens_BS = Trainer(model, REPETITIVE, SMALL).streams.next().tokens_BS
    assert torch.equal(trainer.banks.token_ids_BN[:, :16], tokens_BS)
    for row, tokens_S in enumerate(tokens_BS):
        # A segment is shorter than a window of `encode`, and both stand behind the prefix.
        keys_HSE, values_HSE = model.encode(tokens_S)
        torch.testing.assert_close(trainer.banks.keys_HBNE[:, row, :16], keys_HSE, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(trainer.banks.values_HBNE[:, row, :16], values_HSE, atol=2e-2, rtol=2e-2)


def test_reading_fills_banks_as_steps_do_and_teaches_nothing() -> None:
    reads, steps = Trainer(fresh(), REPETITIVE, SMALL), Trainer(fresh(), REPETITIVE, SMALL)
    before = {name: value.clone() for name, value in reads.sidenet.state_dict().items()}
    tokens_BS = torch.stack([reads.read().tokens_BS for _ in range(3)])
    for _ in range(3):
        steps.step()
    assert torch.equal(tokens_BS[0], reads.banks.token_ids_BN[:, :16])
    for name in ("token_ids_BN", "written_B", "keys_HBNE", "values_HBNE"):
        torch.testing.assert_close(getattr(reads.banks, name), getattr(steps.banks, name))
    assert all(torch.equal(value, before[name]) for name, value in reads.sidenet.state_dict().items())


def test_wrong_banks_are_as_many_as_asked() -> None:
    for fraction in (0.0, 1.0):
        trainer = Trainer(fresh(), REPETITIVE, dataclasses.replace(SMALL, wrong_fraction=fraction, rows=3))
        trainer.step()
        reader, right_B, _ = trainer._reader()
        assert reader is not None and right_B.tolist() == [not fraction] * 3
        assert (reader.length_B == 16).all()
        assert sorted(reader.source_B.tolist()) == [0, 1, 2]
        assert ((reader.source_B != torch.arange(3)) == bool(fraction)).all()


def test_crowded_rows_are_as_many_as_asked_once_every_ring_is_full() -> None:
    config = dataclasses.replace(
        SMALL, wrong_fraction=1.0, crowded_fraction=0.5, crowd=2, rows=4, segment=16, bank_tokens=32, steps=9
    )
    trainer = Trainer(fresh(), tiny.documents(*[400] * 4), config)
    for step in range(5):
        reader, right_B, _ = trainer._reader()
        assert reader is not None
        full = step * 16 >= 32
        assert (reader.crowded_M is not None) == full
        assert int(right_B.sum()) == (2 if full else 0)  # who is crowded sees its own bank too
        if full:
            assert reader.size_B[right_B].tolist() == [64.0, 64.0]
            assert reader.crowded_M is not None and torch.equal(right_B.nonzero()[:, 0], reader.crowded_M)
        trainer.step()


def test_starved_steps_crowd_all_windows_of_a_stream_if_asked(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SMALL,
        wrong_fraction=1.0,
        crowded_fraction=0.5,
        crowd=2,
        starved_fraction=0.5,
        starved=4,
        rows=4,
        bank_tokens=16,
    )
    for starved_crowd in (1, 4):
        trainer = Trainer(fresh(), tiny.documents(*[400] * 4), dataclasses.replace(config, starved_crowd=starved_crowd))
        trainer.step()
        reader, right_B, _ = trainer._reader(windows=4)
        assert reader is not None
        crowded_B = reader.size_B > 16
        assert torch.equal(crowded_B, right_B)
        # Two streams of four windows each, among the banks of all.
        assert crowded_B.view(4, 4).all(1).sum() == crowded_B.sum() / 4 == (2 if starved_crowd == 4 else 0)
        assert (reader.size_B[crowded_B] == 4 * 16).all()
        reader, _, _ = trainer._reader(windows=1)
        assert reader is not None and reader.size_B.max() == 2 * 16
    train(fresh(), tiny.documents(*[400] * 4), dataclasses.replace(config, starved_crowd=4), tmp_path)
    assert all(math.isfinite(row["loss"]) for row in log_of(tmp_path))


def test_the_lookup_loss_counts_attention_on_the_next_token_alone() -> None:
    trainer = Trainer(fresh(), REPETITIVE, dataclasses.replace(SMALL, lookup_weight=1.0, wrong_fraction=0))
    figures = [trainer.step() for _ in range(5)]
    assert figures[0]["lookup"] == 0  # nothing was retrieved
    # A phrase of 20 tokens repeats: now and then the next token is among the 8 retrieved, with about an eighth of them.
    assert all(0 < row["lookup"] < 4 for row in figures[2:])


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seen: list[dict[str, Any]] = []
    config = dataclasses.replace(SMALL, eval_every=3, save_every=4)
    settings: dict[str, Any] = {"heldout": REPETITIVE, "evaluation": EVALUATION, "on_figures": seen.append}
    result = train(fresh(), REPETITIVE, config, tmp_path, **settings)
    assert result is not None and result.tokens == 3 * 32
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in seen] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["step"] for row in seen if "bank_on" in row] == [3, 6]
    written = json.loads((tmp_path / "config.json").read_text())["training"]
    assert written["train"]["steps"] == 6 and written["tokens"] == 6 * 2 * 16 and written["documents"] == 3
    assert (tmp_path / "state" / "state.safetensors").exists()
    assert not [path for path in tmp_path.rglob(".*")]
    assert draw_curves(tmp_path / "log.jsonl", tmp_path / "again.png")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.sidenet.layers[0].alpha_D.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"The loss is nan at step 1\. Lower --learning-rate"):
        train(model, REPETITIVE, SMALL, tmp_path)
    assert not (tmp_path / "sidenet.safetensors").exists()


def test_documents_too_short_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two segments of 16 tokens"):
        train(fresh(), tiny.documents(20), SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"rows": 0},
        {"segment": 0},
        {"bank_tokens": 0},
        {"log_every": 0},
        {"wrong_fraction": 1.2},
        {"crowded_fraction": 1.2},
        {"starved_fraction": -0.1},
        {"starved_crowd": 3},
        {"starved": 5, "starved_fraction": 0.5},
        {"empty_weight": -0.1},
        {"harmless_weight": -1.0},
        {"answer_weight": -1.0},
        {"dtype": "float16"},
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TrainConfig(**settings)


@given(st.integers(1, 300), st.integers(0, 100))
def test_the_learning_rate_rises_and_then_falls(steps: int, warmup: int) -> None:
    config = TrainConfig(steps=steps, warmup=warmup)
    rates = [config.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert math.isclose(config.rate(max(steps, warmup + 1)), config.final_rate)


def test_matrices_decay_and_gates_are_quick() -> None:
    trainer = Trainer(fresh(), REPETITIVE, SMALL)
    matrices, vectors, gates = trainer.optimizer.param_groups
    assert {parameter.ndim for parameter in matrices["params"]} == {2} and matrices["weight_decay"] > 0
    assert vectors["weight_decay"] == gates["weight_decay"] == 0
    assert gates["factor"] == SMALL.gate_rate
    counted = [id(p) for group in (matrices, vectors, gates) for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in trainer.sidenet.parameters())


def test_a_bank_shorter_than_a_segment_keeps_its_end() -> None:
    trainer = Trainer(fresh(), REPETITIVE, dataclasses.replace(SMALL, bank_tokens=10))
    trainer.step()
    segments = Trainer(fresh(), REPETITIVE, SMALL).streams.next()
    kept_BN = trainer.banks.token_ids_BN
    assert [sorted(row) for row in kept_BN.tolist()] == [sorted(row) for row in segments.tokens_BS[:, -10:].tolist()]


def test_a_sidenet_that_reads_nothing_is_trained_all_the_same(tmp_path: Path) -> None:
    model = LongMem(tiny.backbone("llama"), SideNetConfig(((0, 2), (2, 4)), ()))
    train(model, REPETITIVE, dataclasses.replace(SMALL, memory=False, steps=2), tmp_path)
    assert all(math.isfinite(row["loss"]) for row in log_of(tmp_path))


# ---- mixtures and answers ------------------------------------------------------------------------------------


def marked(every: int, *lengths: int, seed: int = 1) -> TokenizedDocuments:
    """Documents with every so many tokens an answer."""
    documents = tiny.documents(*lengths, seed=seed)
    documents.answers = (np.arange(len(documents.tokens)) % every == 0).astype(np.uint8)
    return documents


def gradients(trainer: Trainer, steps: int = 3) -> list[float]:
    return [trainer.step()["gradient_norm"] for _ in range(steps)]


def test_documents_without_answers_train_as_ever() -> None:
    weighted = dataclasses.replace(SMALL, answer_weight=5.0)
    assert gradients(Trainer(fresh(), REPETITIVE, SMALL)) == gradients(Trainer(fresh(), REPETITIVE, weighted))
    alone = Mixture((REPETITIVE,), (1.0,))
    assert gradients(Trainer(fresh(), REPETITIVE, SMALL)) == gradients(Trainer(fresh(), alone, SMALL))


def test_answers_weigh_what_they_are_said_to_where_a_row_reads_its_own_bank() -> None:
    config = dataclasses.replace(SMALL, answer_weight=4.0)
    trainer = Trainer(fresh(), marked(5, 100, 100), config)
    segments = trainer.streams.next()
    assert segments.answers_BS is not None
    factor_BS = trainer._factors(segments, torch.tensor([True, False]))
    assert factor_BS is not None
    for row, weight in ((0, 4.0), (1, 0.0)):
        marks_S = segments.answers_BS[row]
        assert (factor_BS[row][marks_S] == weight).all() and (factor_BS[row][~marks_S] == 1).all()


def test_weights_of_answers_are_weights_of_their_losses() -> None:
    """All tokens answers: everything is the same but for the factor, and without it for the empty bank's loss."""
    plain, all_answers = tiny.documents(100, 100, seed=1), marked(1, 100, 100)
    config = dataclasses.replace(SMALL, empty_weight=0.5, wrong_fraction=0.0)
    (without,) = gradients(Trainer(fresh(), plain, dataclasses.replace(config, empty_weight=0.0)), 1)
    for weight in (0.0, 1.0, 3.0):
        trainer = Trainer(fresh(), all_answers, dataclasses.replace(config, answer_weight=weight))
        assert gradients(trainer, 1) == pytest.approx([weight * without], rel=1e-4)


def test_the_loss_of_answers_is_logged() -> None:
    trainer = Trainer(fresh(), marked(5, 100, 100), dataclasses.replace(SMALL, wrong_fraction=0.0, answer_weight=3.0))
    figures = [trainer.step() for _ in range(3)]
    assert all(0 < row["answer_loss"] < 20 for row in figures)
    twin = Trainer(fresh(), marked(5, 100, 100), dataclasses.replace(SMALL, memory=False))
    assert "answer_loss" not in twin.step() and "answer_loss" not in Trainer(fresh(), REPETITIVE, SMALL).step()


def test_a_mixture_resumes_to_the_bit(tmp_path: Path) -> None:
    mixture = Mixture((REPETITIVE, marked(4, 100, 60)), (0.7, 0.3))
    config = dataclasses.replace(SMALL, steps=9, save_every=4, answer_weight=2.0)
    train(fresh(), mixture, config, tmp_path / "whole")
    assert json.loads((tmp_path / "whole/config.json").read_text())["training"]["shares"] == [0.7, 0.3]

    def interrupt(figures: dict[str, Any]) -> None:
        if figures["step"] == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(fresh(), mixture, config, tmp_path / "parts", on_figures=interrupt)
    with pytest.raises(CheckpointError, match=r"shares of \[0\.7, 0\.3\], now \[0\.5, 0\.5\]"):
        train(fresh(), Mixture(mixture.sources, (0.5, 0.5)), config, tmp_path / "parts", resume=True)
    train(fresh(), mixture, config, tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "state/state.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
