"""The short form of benchmarks/kill9.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill9.py"


@pytest.fixture(scope="module")
def kill9():
    if not SCRIPT.exists():
        pytest.skip("benchmarks are not part of this installation")
    spec = importlib.util.spec_from_file_location("kill9", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill9"] = module  # so that its processes find what they run
    sys.path.insert(0, str(SCRIPT.parent))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules["kill9"]


@pytest.mark.parametrize("store", [1, 2])
def test_kills_lose_and_tear_nothing(kill9, tmp_path: Path, store: int) -> None:
    """A hundred in all."""
    pytest.importorskip("cryptography")
    found = kill9.run(tmp_path / f"memories-{store}", kills=50, writers=2)
    assert found["acknowledged_tokens"] > 0 and found["reads"] > 0 and found["segments_merged"] > 0
    assert found["forked_merged_and_forgotten"] > 0 and found["encrypted_and_destroyed"] > 0
    assert (found["lost_tokens"], found["torn_reads"], found["faults"]) == (0, 0, [])
    assert found["processes_that_failed"] == {}


def test_what_is_torn_would_be_seen(kill9) -> None:
    bank = kill9.MemoryBank(kill9.SPEC)
    for start in (0, 10):
        bank.append(kill9.entry("writer 0", start))
    assert kill9.torn(bank) == []
    bank.values_HNE[1, 15, 3] += 1
    bank.token_ids_N[0] = 99
    assert kill9.torn(bank) == ["token_ids_N of writer 0", "values_HNE of writer 0"]
    assert torch.equal(bank.keys_HNE, -bank.values_HNE) is False
