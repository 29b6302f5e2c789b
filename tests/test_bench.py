"""What a bench measures, and that its figures add up. (Times themselves are the machine's.)"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from longmem.bench import BenchConfig, BenchResult, bench, cost_of, machine, random_bank, steps
from longmem.errors import ConfigError, MissingExtraError
from longmem.model import LongMem

CONFIG = BenchConfig(sizes=(0, 50, 20_000), write=60, prompt=6, tokens=6)


@pytest.fixture(scope="module")
def model() -> LongMem:
    return tiny.model()


@pytest.fixture(scope="module")
def result(model: LongMem) -> BenchResult:
    done: list[int] = []
    banks = [("mine", tiny.bank(model, 30))]
    made = bench(model, CONFIG, banks=banks, on_step=done.append)
    assert sum(done) == steps(CONFIG, banks) == 7
    return made


def test_every_bank_is_measured(result: BenchResult) -> None:
    described = [(cost.bank, cost.size) for cost in result.costs]
    assert described == [("backbone alone", None), ("empty", 0), ("random", 50), ("random", 20_000), ("mine", 30)]
    assert all(cost.tokens == 6 and 0 < cost.ms_p50 <= cost.ms_p95 for cost in result.costs)
    for cost in result.costs:
        assert (cost.search_ms_p50 > 0) == bool(cost.size)
        assert cost.search_ms_p50 < cost.ms_p50
        assert cost.tokens_per_second == pytest.approx(1000 / cost.ms_p50)
    assert result.write_tokens_per_second > 0 and result.prefill_tokens_per_second > 0


def test_figures_are_written_and_drawn(result: BenchResult, tmp_path: Path) -> None:
    result.save(tmp_path / "new" / "figures.json")
    figures = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert figures["costs"][2]["size"] == 50 and figures["costs"][2]["tokens_per_second"] > 0
    assert figures["config"]["write"] == 60 and figures["machine"] == machine(torch.device("cpu"))
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "drawn" / "cost.png")
    assert (tmp_path / "drawn" / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"longmem\[plot\]"):
        result.plot(tmp_path / "cost.png")


def test_random_banks_have_no_two_keys_alike(model: LongMem) -> None:
    bank = random_bank(model, 40_000)
    assert len(bank) == 40_000 and len(bank.keys_HNE[0].float().unique(dim=0)) == 40_000
    assert len(random_bank(model, 0)) == 0


def test_a_slow_bank_is_given_up(model: LongMem) -> None:
    config = BenchConfig(prompt=6, tokens=20, seconds=1e-9)
    assert cost_of(model, "slow", random_bank(model, 40), config).tokens == 5


@pytest.mark.parametrize(
    "settings", [{"sizes": ()}, {"sizes": (-1,)}, {"write": 0}, {"prompt": 1}, {"tokens": 4}, {"seconds": 0.0}]
)
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} of a bench must be"):
        BenchConfig(**settings)


def test_a_window_that_is_too_small(model: LongMem) -> None:
    with pytest.raises(ConfigError, match="needs a window of 282"):
        bench(model)
