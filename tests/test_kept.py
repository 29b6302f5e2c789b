"""What is kept fits, and what was asked for last stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longmem.contenders.kept import Kept


@given(st.lists(st.text("abc", max_size=4)), st.integers(0, 12))
def test_no_more_is_kept_than_fits_and_the_oldest_goes_first(texts: list[str], most: int) -> None:
    kept: Kept[int] = Kept(most, lambda text, made: len(text))
    fresh: list[str] = []  # oldest first
    for number, text in enumerate(texts):
        made = kept.get(text)
        assert (made is not None) == (text in fresh)
        if made is not None:
            assert texts[made] == text
        else:
            kept.put(text, number)
        if text in fresh:
            fresh.remove(text)
        if len(text) <= most:
            fresh.append(text)
        while sum(map(len, fresh)) > most:
            fresh.pop(0)
        assert len(kept) == len(fresh)
