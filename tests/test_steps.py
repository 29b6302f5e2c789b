"""Steps of texts side by side: every row is what it would be alone, whatever the others do."""

from __future__ import annotations

from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import longmem.retrieved
from longmem.errors import BankMismatchError, ConfigError
from longmem.index import BankReader, PlacedReader
from longmem.model import LongMem
from longmem.retrieved import Retrieved
from longmem.steps import BatchDecoder, _Recorded
from longmem.windows import Branch, SideBranch

LENGTHS, MORE, CAPACITY = (5, 1, 19), 9, 32


def alone(model: LongMem, text_N: torch.Tensor, more_N: torch.Tensor, bank, memory: float) -> list[torch.Tensor]:
    """Logits after the text and after each further token."""
    cache = model.new_cache()
    logits = [model(text_N[None], bank, memory=memory, cache=cache).logits_BTV[0, -1]]
    logits += [model(one_1[None], bank, memory=memory, cache=cache).logits_BTV[0, -1] for one_1 in more_N.split(1)]
    return logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("update", ["alpha", "difference"])
@torch.no_grad()
def test_each_row_is_what_it_would_be_alone(family, update):
    model = tiny.model(family, update=update)
    banks = [tiny.bank(model, 30), None, tiny.bank(model, 3, seed=1)]
    texts = [tiny.tokens(length, seed=length) for length in LENGTHS]
    more_BN = tiny.tokens(len(texts), MORE)
    for memory in (1.0, 0.5, 0.0):
        decoder = BatchDecoder(model, len(texts), CAPACITY, memory=memory)
        rows = [[decoder.begin(row, text, bank)[0]] for row, (text, bank) in enumerate(zip(texts, banks, strict=True))]
        for now_B in more_BN.T:
            logits_BV, _ = decoder.step(now_B.tolist(), banks)
            for row, logits_V in zip(rows, logits_BV, strict=True):
                row.append(logits_V)
        for row, text, more_N, bank in zip(rows, texts, more_BN, banks, strict=True):
            expected = alone(model, text, more_N, bank, memory)
            assert (torch.stack(row) - torch.stack(expected)).abs().max() < 1e-4


@torch.no_grad()
def test_a_rows_logits_are_the_same_bits_whatever_the_others_hold():
    model = tiny.model()
    own, text_N = tiny.bank(model, 30), tiny.tokens(7)
    seen = []
    for others in (None, tiny.bank(model, 50, seed=3)):
        decoder = BatchDecoder(model, 3, CAPACITY)
        decoder.begin(0, tiny.tokens(3, seed=5), others)
        decoder.begin(1, text_N, own)
        decoder.begin(2, tiny.tokens(12, seed=6), own)
        seen.append([decoder.step([4, 9, 5], [others, own, own])[0][1] for _ in range(4)])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


class Recording(Branch):
    """Notes what a step asks of it."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def reached(self, boundary: int) -> None:
        self.notes.append(f"reached {boundary}")

    def wait(self, boundary: int) -> None:
        self.notes.append(f"wait {boundary}")

    def __enter__(self) -> None:
        self.notes.append("enter")

    def __exit__(self, *error: object) -> None:
        self.notes.append("exit")


@torch.no_grad()
def test_the_sidenet_waits_for_the_hidden_states_that_it_reads_and_for_no_others():
    model = tiny.model()
    bank = tiny.bank(model, 9)
    decoder, branch = BatchDecoder(model, 1, CAPACITY), Recording()
    decoder.begin(0, tiny.tokens(4), bank)
    decoder._cache.backbone.branch = decoder._cache.sidenet.branch = branch

    def noting(layer: int, query_BKGTE: torch.Tensor) -> Retrieved:
        branch.notes.append(f"read {layer}")
        return BankReader([bank], model.config)(layer, query_BKGTE)

    decoder.run(noting)
    top, spans = model.backbone.num_layers, model.config.spans
    reached = [f"reached {boundary}" for boundary in range(top + 1)]
    aside = [
        note
        for lo, _ in spans
        for note in (f"wait {lo}", *([f"read {lo}"] if lo in model.config.memory_layers else []))
    ]
    assert branch.notes == [*reached, "enter", *aside, "exit"]


def test_a_side_branch_waits_and_is_waited_for(monkeypatch):
    """A GPU's streams, which are stood in for: what runs where, and what waits for what."""
    notes: list[tuple] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "side"

        def record_event(self) -> str:
            return f"event {len(notes)}"

        def wait_event(self, event: str) -> None:
            notes.append((self.name, event))

        def wait_stream(self, other: Stream) -> None:
            notes.append((self.name, other.name))

    now = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    branch = SideBranch(torch.device("cuda"))
    for _ in range(2):
        notes.clear()
        for boundary in range(3):
            branch.reached(boundary)
            notes.append((now[0].name, boundary))
        with pytest.raises(ZeroDivisionError), branch:
            assert now[0].name == "side"
            branch.wait(1)
            raise ZeroDivisionError
        assert now[0].name == "main" and notes[3:] == [("side", "event 1"), ("main", "side")]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("update", ["alpha", "difference"])
@torch.no_grad()
def test_steps_with_joint_attention_in_one_kernel(family, update):
    """As a GPU takes them: all banks in one search, then one kernel a memory layer."""
    pytest.importorskip("triton")
    model = tiny.model(family, update=update, newest_wins=True, passage_evidence=True)
    own, other = tiny.bank(model, 30), tiny.bank(model, 3, seed=1)
    for banks in ([own], [own, own], [own, None, other]):
        decoder = BatchDecoder(model, len(banks), CAPACITY)
        for row, bank in enumerate(banks):
            decoder.begin(row, tiny.tokens(5 + row), bank)
        results = []
        for at_once in (False, True):
            with mock.patch.object(longmem.retrieved, "joins_at_once", lambda device, at_once=at_once: at_once):
                logits_BV, reads = decoder.run(PlacedReader(banks, model.config, model.device))
            results.append((logits_BV, *(read.weight_BKGTR for read in reads)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_row_may_wait_and_may_begin_anew():
    model, bank = tiny.model(), None
    text_N, more = tiny.tokens(6), [3, 8, 2]
    expected = alone(model, text_N, torch.tensor(more), bank, 1.0)
    decoder = BatchDecoder(model, 2, CAPACITY)
    decoder.begin(0, tiny.tokens(9, seed=2))
    for _ in range(5):
        decoder.step([7, None], [bank, bank])  # row 1 was never begun
    decoder.begin(1, text_N)
    found = [decoder.step([None, more[0]], [bank, bank])[0][1]]
    found.append(decoder.step([1, more[1]], [bank, bank])[0][1])
    decoder.step([1, None], [bank, bank])
    decoder.begin(0, text_N)
    found.append(decoder.step([more[0], more[2]], [bank, bank])[0][1])
    assert (torch.stack(found) - torch.stack(expected[1:])).abs().max() < 1e-4


@torch.no_grad()
def test_a_bank_may_grow_between_steps():
    model = tiny.model()
    bank, larger = tiny.bank(model, 12), tiny.bank(model, 40)
    decoder = BatchDecoder(model, 1, CAPACITY)
    decoder.begin(0, tiny.tokens(5), bank)
    _, reads = decoder.step([3], [bank])
    assert all(bool((read.index_BKGTR < 12).all()) for read in reads)
    _, reads = decoder.step([3], [larger])
    assert any(bool((read.index_BKGTR >= 12).any()) for read in reads)


@torch.no_grad()
def test_a_replayed_step_weighs_anew_what_it_read():
    """A read keeps the weights it has computed, and a replayed step writes to the same tensors."""
    model = tiny.model()
    bank = tiny.bank(model, 9)
    decoder = BatchDecoder(model, 1, CAPACITY)
    decoder.begin(0, tiny.tokens(4), bank)
    recorded = object.__new__(_Recorded)
    recorded._reader = None
    recorded._logits_BV, recorded._reads = decoder.run(model.reader([bank], 1))
    recorded._graph = mock.Mock(replay=lambda: bank.keys_HNE.mul_(-3.0))
    for _ in range(2):
        for read in recorded.replay([bank])[1]:
            assert torch.equal(read.log_weight_BKGTR, read.weigh())


@hypothesis_settings(max_examples=20)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 6))
def test_texts_of_any_lengths(lengths, steps):
    model = MODEL
    decoder = BatchDecoder(model, len(lengths), 12 + 7)
    texts = [tiny.tokens(length, seed=i) for i, length in enumerate(lengths)]
    for row, text in enumerate(texts):
        logits_V, _ = decoder.begin(row, text)
        assert torch.allclose(logits_V, model(text[None]).logits_BTV[0, -1], atol=1e-4)
    for step in range(steps):
        logits_BV, _ = decoder.step([step] * len(texts), [None] * len(texts))
        for row, text in enumerate(texts):
            all_N = torch.cat((text, torch.arange(step + 1)))
            assert torch.allclose(logits_BV[row], model(all_N[None]).logits_BTV[0, -1], atol=1e-4)


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_texts_are_filled_side_by_side(memory):
    model = MODEL
    banks = [tiny.bank(model, 12), None, tiny.bank(model, 5)] if memory else [None] * 3
    texts = {row: tiny.tokens(length, seed=row) for row, length in enumerate((7, 1, 12))}
    decoder = BatchDecoder(model, 3, 16, memory=memory)
    decoder.fill({row: texts[row] for row in (2, 0)}, banks)
    decoder.step([4, None, 4], banks)
    # A row that held something is filled anew.
    decoder.fill(texts, banks)
    for step in range(3):
        logits_BV, _ = decoder.step([step] * 3, banks)
        for row, text_N in texts.items():
            whole_1N = torch.cat((text_N, torch.arange(step + 1)))[None]
            expected_V = model(whole_1N, banks[row], memory=memory).logits_BTV[0, -1]
            assert torch.allclose(logits_BV[row], expected_V, atol=1e-4)
    with pytest.raises(ConfigError, match="0 tokens does not fit"):
        decoder.fill({0: tiny.tokens(0)}, banks)
    decoder.release()
    with pytest.raises(ConfigError, match="No text was begun"):
        decoder.step([1, 1, 1], banks)
    assert not decoder._cache.backbone._kept and not decoder._cache.sidenet._kept


def test_what_cannot_be_is_named():
    model = tiny.model()
    with pytest.raises(ConfigError, match="at least one row"):
        BatchDecoder(model, 0, 8)
    with pytest.raises(ConfigError, match="300 tokens does not fit"):
        BatchDecoder(model, 1, 300)
    decoder = BatchDecoder(model, 2, 8)
    with pytest.raises(ConfigError, match="No text was begun"):
        decoder.step([1, 1], [None, None])
    with pytest.raises(ConfigError, match="9 tokens does not fit"):
        decoder.begin(0, tiny.tokens(9))
    with pytest.raises(ConfigError, match="0 tokens"):
        decoder.begin(0, tiny.tokens(0))
    decoder.begin(0, tiny.tokens(7))
    with pytest.raises(ConfigError, match="Row 1 was never begun"):
        decoder.step([1, 1], [None, None])
    with pytest.raises(ConfigError, match="1 tokens and 2 banks"):
        decoder.step([1], [None, None])
    decoder.step([1, None], [None, None])
    with pytest.raises(ConfigError, match="Row 0 is full"):
        decoder.step([1, None], [None, None])
    for banks in ([None, None], [tiny.bank(model, 4), None]):
        with pytest.raises(BankMismatchError):
            decoder.step([None, None], [tiny.bank(tiny.model(seed=3), 4), None])
        decoder.step([None, None], banks)


MODEL = tiny.model()
