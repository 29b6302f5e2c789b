"""What a token drew on is text that is remembered, with the attention that it was paid."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import ENDLESS, full_bank, tiny

from longmem.attribution import Attribution, attribute, joined
from longmem.generation import GenerationConfig, generate
from longmem.local_window import LocalWindow


def test_attribution_names_remembered_text():
    model = tiny()
    bank = full_bank(model)
    model.write_text(bank, "Boats are painted green in Brest.", source="more")
    config = GenerationConfig(max_new_tokens=12, attribute=True, stop_token_ids=())
    for piece in generate(model, "Ada keeps", bank=bank, config=config):
        assert 0 < len(piece.sources) <= 3
        assert 0 < sum(a.weight for a in piece.sources) <= 1
        assert [a.weight for a in piece.sources] == sorted((a.weight for a in piece.sources), reverse=True)
        for one in piece.sources:
            assert one.text == bank.text_of(one.source, one.start, one.end) != ""
        places = [(a.source, a.start, a.end) for a in piece.sources]
        assert all(a[0] != b[0] or a[2] <= b[1] or b[2] <= a[1] for a in places for b in places if a != b)


def test_attribution_weights_add_up_to_the_mass_on_memory():
    model = tiny()
    bank = full_bank(model)
    window = LocalWindow(model, bank, ENDLESS)
    window.extend([9, 8, 7])
    _, reads = window.logits()
    mass = torch.cat([read.mass_BKGT[0, :, :, -1].flatten() for read in reads]).mean()
    found = attribute(reads, bank, spans=1000)
    assert sum(a.weight for a in found) <= float(mass) * 1.001
    assert attribute([], bank) == ()


def test_nothing_remembered_nothing_attributed():
    config = GenerationConfig(max_new_tokens=3, attribute=True)
    model = tiny()
    assert all(piece.sources == () for piece in generate(model, "Ada", config=config))
    assert all(piece.sources == () for piece in generate(model, "Ada", bank=model.new_bank(), config=config))


spans = st.builds(
    lambda source, start, length, weight, bank: Attribution(source, start, start + length, "x" * length, weight, bank),
    st.sampled_from("ab"),
    st.integers(0, 30),
    st.integers(1, 8),
    st.floats(0, 1),
    st.sampled_from([None, "notes"]),
)


@given(st.lists(spans, max_size=12))
def test_joined_spans_cover_the_same_characters_and_do_not_touch(some: list[Attribution]) -> None:
    def covered(given) -> set[tuple[str | None, str, int]]:
        return {(one.bank, one.source, at) for one in given for at in range(one.start, one.end)}

    found = joined(some)
    assert covered(found) == covered(some)
    for one in found:
        inside = [each.weight for each in some if covered([each]) <= covered([one])]
        assert one.weight == max(inside)
    for one in found:
        for other in found:
            apart = one.end < other.start or other.end < one.start
            assert one is other or apart or (one.bank, one.source) != (other.bank, other.source)
