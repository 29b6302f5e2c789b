from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem import focus as module
from longmem.bank import BankEntry, MemoryBank
from longmem.config import BankSpec, MemoryHead
from longmem.errors import ConfigError
from longmem.focus import FOCUS, STRETCH, Focus, WordIndex, still_there, with_surroundings
from longmem.group import BankGroup
from longmem.ops import PASSAGE
from longmem.store import MemoryStore

LEAST = 2048  # tokens of the smallest focus
SPEC = BankSpec("tiny", "weights", (MemoryHead(1, 0), MemoryHead(2, 1)), 4, "float32")
COMMON = 50  # token ids below are everywhere


def told(token_ids_N: torch.Tensor, source: str = "a", seed: int = 0) -> BankEntry:
    tokens = len(token_ids_N)
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, tokens, 4, generator=generator)
    starts_N = torch.arange(tokens)
    return BankEntry(source, "x" * tokens, 0, token_ids_N, torch.stack((starts_N, starts_N + 1), 1), keys, values)


def bank_of(*token_ids: torch.Tensor) -> MemoryBank:
    bank = MemoryBank(SPEC)
    for number, ids_N in enumerate(token_ids):
        bank.append(told(ids_N, f"source {number}", number))
    return bank


def noise(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(COMMON, (tokens,), generator=torch.Generator().manual_seed(seed))


def needle(tokens: int, place: int, token_id: int = 777) -> torch.Tensor:
    ids_N = noise(tokens)
    ids_N[place] = token_id
    return ids_N


def plain_scores(token_ids_N: torch.Tensor, asked: list[int]) -> list[float]:
    """The formula, word by word."""
    stretches = [token_ids_N[i : i + STRETCH].tolist() for i in range(0, len(token_ids_N) - STRETCH + 1, STRETCH)]
    scores = [0.0] * len(stretches)
    for token in set(asked):
        among = sum(token in stretch for stretch in stretches)
        rare = torch.tensor((len(stretches) - among + 0.5) / (among + 0.5)).log1p().item() ** 2
        often = 1 + torch.tensor(float(asked.count(token))).log().item()
        for number, stretch in enumerate(stretches):
            count = stretch.count(token)
            scores[number] += rare * often * count * 1.9 / (count + 0.9)
    return scores


# ---- words -------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    parts=st.lists(st.integers(0, 3 * STRETCH), min_size=1, max_size=5),
    asked=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_scores_are_the_formula_however_a_bank_grew(parts: list[int], asked: list[int], seed: int) -> None:
    ids_N = torch.randint(12, (sum(parts),), generator=torch.Generator().manual_seed(seed))
    words, bank = WordIndex(), MemoryBank(SPEC)
    for number, part_n in enumerate(ids_N.split(parts)):
        bank.append(told(part_n, f"source {number}"))
        words.update(bank)
    expected = torch.tensor(plain_scores(ids_N, asked))
    assert len(words) == len(ids_N) // STRETCH == len(expected)
    torch.testing.assert_close(words.scores(torch.tensor(asked)), expected)


def test_many_small_additions_end_as_few_runs() -> None:
    ids_N, words, bank = noise(40 * STRETCH), WordIndex(), MemoryBank(SPEC)
    for number, part_n in enumerate(ids_N.split(STRETCH)):
        bank.append(told(part_n, f"source {number}"))
        words.update(bank)
        assert len(words._runs) <= module._MOST_RUNS
    at_once = WordIndex()
    at_once.update(bank)
    torch.testing.assert_close(words.scores(ids_N[:9]), at_once.scores(ids_N[:9]))


def test_words_of_what_is_forgotten_are_gone() -> None:
    words, bank = WordIndex(), bank_of(needle(4 * STRETCH, 700), noise(10, seed=1))
    words.update(bank)
    assert len(words) == 4 and float(words.scores(torch.tensor([777])).max()) > 0
    # As much is remembered since as was forgotten.
    bank.forget("source 0")
    bank.append(told(noise(4 * STRETCH, seed=1), "other"))
    words.update(bank)
    assert len(words) == 4 and float(words.scores(torch.tensor([777])).max()) == 0
    bank.forget("other")
    words.update(bank)
    assert len(words) == 0 and len(words.scores(torch.tensor([777]))) == 0


def test_surroundings_raise_their_own() -> None:
    score_S = torch.zeros(400)
    score_S[100:160] = 1.0  # a document that is spoken of
    score_S[300] = 1.0  # a stray word
    raised_S = with_surroundings(score_S)
    assert float(raised_S[100:160].min()) > float(raised_S[300]) > float(raised_S[200])
    for few in (1, 2, 3):
        assert with_surroundings(torch.ones(few)).tolist() == pytest.approx([1 + module._AROUND] * few)


# ---- what is read ------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    tokens=st.integers(1, 5 * LEAST),
    focus=st.integers(LEAST, 2 * LEAST),
    hidden=st.integers(0, 600),
    seed=st.integers(0, 9),
)
def test_a_part_is_no_larger_than_asked_and_has_whole_stretches(
    tokens: int, focus: int, hidden: int, seed: int
) -> None:
    bank, hidden = bank_of(noise(tokens, seed)), min(hidden, tokens)
    read = Focus(focus).on(bank, noise(90, seed + 1).tolist(), hidden)
    assert isinstance(read, MemoryBank)
    visible = tokens - hidden
    if visible <= focus:
        assert len(read) == visible and (hidden or read is bank)
        return
    assert focus - STRETCH < len(read) <= focus
    row_P = read.in_whole(torch.arange(len(read)))
    assert row_P.tolist() == sorted(set(row_P.tolist())) and int(row_P[-1]) == visible - 1
    whole = visible // STRETCH * STRETCH
    _, count_S = (row_P[row_P < whole] // STRETCH).unique(return_counts=True)
    assert set(count_S.tolist()) == {STRETCH} and STRETCH % PASSAGE == 0
    # What was remembered last is there.
    assert set(range(visible - focus // 16, visible)) <= set(row_P.tolist())
    for name in ("keys_HNE", "values_HNE"):
        assert torch.equal(getattr(read, name), getattr(bank, name)[:, row_P])
    for name in ("token_ids_N", "source_index_N", "offsets_N2", "place_N"):
        assert torch.equal(getattr(read, name), getattr(bank, name)[row_P])


@pytest.mark.parametrize("place", [0, 5_000, 17_000])
def test_a_word_that_is_asked_for_is_read(place: int) -> None:
    bank = bank_of(needle(20_000, place))
    window = [*noise(500, seed=3).tolist(), 777, 5]
    read = Focus(LEAST).on(bank, window)
    assert isinstance(read, MemoryBank) and place in read.in_whole(torch.arange(len(read))).tolist()
    # Long ago in the window it is still what the text is about.
    read = Focus(LEAST).on(bank, [777, 777, *noise(500, seed=3).tolist()])
    assert isinstance(read, MemoryBank) and place in read.in_whole(torch.arange(len(read))).tolist()


def test_a_part_quotes_the_whole() -> None:
    bank = bank_of(noise(4000), needle(4000, 100), noise(4000, seed=2))
    bank.name = "notes"
    read = Focus(LEAST).on(bank, [777])
    assert isinstance(read, MemoryBank) and read.name == "notes" and read.sources == bank.sources
    row_P = read.in_whole(torch.arange(len(read)))
    at = row_P.tolist().index(4100)
    assert read.span(at, at) == bank.span(4100, 4100)
    assert read.gap(at - 1, at) == 1 and read.index is None


def test_forgotten_text_is_read_no_more_and_new_text_is() -> None:
    bank, focus = bank_of(noise(6000), needle(2000, 100)), Focus(LEAST)
    focus.on(bank, [777])
    bank.forget("source 1")
    bank.append(told(needle(3000, 50, 888), "new"))
    bank.append(told(noise(4000, seed=5), "newer"))
    read = focus.on(bank, [777, 888])
    assert isinstance(read, MemoryBank)
    assert 777 not in read.token_ids_N.tolist() and 888 in read.token_ids_N.tolist()


def test_each_bank_of_a_group_is_read_for_itself() -> None:
    small, large, left_out = bank_of(noise(500)), bank_of(needle(9000, 40)), bank_of(noise(9000, seed=4))
    group = BankGroup([small, large, left_out], [1.0, 2.0, 0.0])
    focus = Focus(LEAST)
    assert focus.chooses(group) and not focus.chooses(small) and not focus.chooses(None)
    read = focus.on(group, [777], hidden=100)
    assert isinstance(read, BankGroup) and read.weights == group.weights
    first, second, third = read.banks
    assert len(first) == 400 and len(second) <= LEAST and 777 in second.token_ids_N.tolist() and third is left_out


def test_a_window_without_words_reads_as_much() -> None:
    for bank in (bank_of(noise(5000)), bank_of(noise(4000), noise(2000))):
        for window in ([], [999]):
            assert LEAST - STRETCH < len(Focus(LEAST).on(bank, window)) <= LEAST
    empty = MemoryBank(SPEC)
    assert not Focus(LEAST).chooses(empty) and Focus(LEAST).on(empty, [1]) is empty


def test_a_question_chooses_little_and_what_is_newest_fills_the_rest() -> None:
    ids_N = noise(40 * LEAST, seed=7)
    ids_N[::300] = 777  # in nearly every stretch
    bank = bank_of(ids_N)
    for tokens, newest in ((4, 0.8), (module._LONG, 0.0)):
        window = [777, *noise(tokens - 1, seed=8).tolist()]
        read = Focus(4 * LEAST).on(bank, window)
        assert isinstance(read, MemoryBank) and 4 * LEAST - STRETCH < len(read) <= 4 * LEAST
        row_P = read.in_whole(torch.arange(len(read)))
        among_newest = (row_P >= len(bank) - 4 * LEAST).float().mean()
        assert (among_newest > newest) if newest else (among_newest < 0.5)


def test_what_is_read_is_there_until_something_goes() -> None:
    def thin(bank: MemoryBank) -> None:
        bank.thin(torch.arange(len(bank)) != 5)

    for lose in (lambda bank: bank.forget("source 0"), thin):
        large, small = bank_of(noise(5000), noise(500)), bank_of(noise(500), noise(90))
        group, focus = BankGroup([large, small]), Focus(LEAST)
        parts = [focus.on(bank, [1], hidden) for bank in (large, small) for hidden in (0, 9)]
        both = focus.on(group, [1])
        for bank in (large, small):
            bank.append(told(noise(50), "new"))
        assert all(still_there(part, bank) for part, bank in zip(parts, (large, large, small, small), strict=True))
        assert still_there(both, group)
        lose(small)
        assert still_there(parts[0], large) and not still_there(parts[3], small)
        assert parts[2] is small and still_there(small, small) and still_there(both, group)  # it is read as it is
        lose(large)
        assert not any(still_there(part, large) for part in parts[:2]) and not still_there(both, group)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_bank_on_disk_is_read_as_one_in_memory(sealed: bool, tmp_path: Path) -> None:
    def same(stored: MemoryBank, bank: MemoryBank) -> None:
        read, expected = (focus.on(one, [777], hidden=100) for one in (stored, bank))
        assert isinstance(read, MemoryBank) and isinstance(expected, MemoryBank) and len(read) == len(expected)
        assert torch.equal(read.keys_HNE, expected.keys_HNE) and torch.equal(read.values_HNE, expected.values_HNE)
        row_P = read.in_whole(torch.arange(len(read)))
        assert torch.equal(row_P, expected.in_whole(torch.arange(len(read)))) and read.name == stored.name
        for at in (0, len(read) - 1):
            assert read.span(at, at) == stored.span(int(row_P[at]), int(row_P[at]))

    focus = Focus(LEAST)
    with MemoryStore.open(tmp_path / "memories") as store:
        if sealed:
            pytest.importorskip("cryptography")
            store.encrypt("notes")
        stored, bank = store.bank("notes", SPEC), MemoryBank(SPEC)
        for number, ids_N in enumerate((noise(3000), needle(3000, 100), noise(3000, seed=2))):
            for one in (stored, bank):
                one.append(told(ids_N, f"source {number}", number))
            if number:
                same(stored, bank)
        same(store.bank("notes", version=2), bank_of(noise(3000), needle(3000, 100)))
        other, read = store.bank("notes"), focus.on(stored, [777])
        keep_N = torch.rand(9000, generator=torch.Generator().manual_seed(1)) < 0.7
        for one in (stored, bank):
            one.thin(keep_N)
        same(stored, bank)
        for one in (other, bank):
            one.forget("source 0")
        assert not still_there(read, stored) and still_there(focus.on(stored, [777]), stored)
        same(other, bank)
        read = focus.on(stored, [777])
        stored.refresh()
        assert not still_there(read, stored)
        same(stored, bank)


def test_nothing_is_chosen_where_all_is_wanted() -> None:
    bank = bank_of(noise(5000))
    everything = Focus(0)
    assert not everything.chooses(bank) and everything.on(bank, [1]) is bank
    assert not Focus().chooses(bank) and FOCUS > 5000


def test_words_are_not_kept_of_banks_that_are_gone() -> None:
    focus, bank = Focus(LEAST), bank_of(noise(5000))
    focus.on(bank, [1])
    assert len(focus._words) == 1
    del bank
    assert len(focus._words) == 0


def test_a_focus_too_small_to_hold_anything_is_refused() -> None:
    for tokens in (-1, 1, LEAST - 1):
        with pytest.raises(ConfigError, match=rf"focus must be 0 .* at least {LEAST} tokens; got {tokens}"):
            Focus(tokens)
