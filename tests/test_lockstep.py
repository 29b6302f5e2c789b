"""What is asked in lockstep is answered as if each were alone."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
from conftest import TINY_TEXT

from longmem.contenders import lockstep as module
from longmem.contenders.contender import ContenderConfig, Prompt
from longmem.contenders.lockstep import Lockstep
from longmem.contenders.memgpt import MemGpt
from longmem.contenders.reader import Reader
from longmem.contenders.together import Speaker
from longmem.data import Document
from longmem.model import LongMem


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(tiny_model_dir, device="cpu")


def test_memgpt_in_lockstep_is_memgpt_alone(model: LongMem, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ContenderConfig(window=500, chunk=32, chunks=2)
    told = [[Document("bees", TINY_TEXT * n)] for n in (1, 6, 3)] + [[]]
    prompt = Prompt("Where are the bees? On", "bees", room=4)
    alone = []
    for documents in told:
        contender = MemGpt(model, config)
        contender.prepare(documents)
        alone.append((contender.core, contender.cost.told_tokens, contender.pose(prompt)))
    together: list[int] = []
    scored = module.log_likelihoods
    noted = lambda model, memory, asked: together.append(len(asked)) or scored(model, memory, asked)  # noqa: E731
    monkeypatch.setattr(module, "log_likelihoods", noted)
    lockstep = Lockstep(Speaker(model, 0.0, 4))
    twins = [copy.copy(MemGpt(model, config)) for _ in told]
    for twin in twins:
        twin.reader = lockstep.reader()
    lockstep.run([partial(twin.prepare, documents) for twin, documents in zip(twins, told, strict=True)])
    told_tokens = [twin.cost.told_tokens for twin in twins]
    posed = lockstep.run([partial(twin.pose, prompt) for twin in twins])
    assert list(zip((twin.core for twin in twins), told_tokens, posed, strict=True)) == alone
    # Two options of each of those that had something to read.
    assert together[0] == 6


def test_answers_come_in_order_and_errors_go_on(model: LongMem) -> None:
    lockstep = Lockstep(Speaker(model, 0.0, 2))
    turns: list[str] = []

    def script(name: str, questions: int) -> str:
        reader = lockstep.reader()
        for number in range(questions):
            turns.append(f"{name}{number}")
            reader.read([5, 6, 7 + number])
            alone = Reader(model, 0.0)
            alone.read([5, 6, 7 + number])
            assert reader.say(3)[0] == alone.say(3)[0]
            (losses,) = reader.options([[8, 9]])
            assert losses == pytest.approx(alone.log_likelihoods([8, 9])[0], abs=1e-3)
        return name

    assert lockstep.run([partial(script, "a", 2), partial(script, "b", 0), partial(script, "c", 1)]) == ["a", "b", "c"]
    assert turns == ["a0", "c0", "a1"]
    assert lockstep.run([]) == []

    def fails() -> None:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        lockstep.run([partial(script, "a", 1), fails])
