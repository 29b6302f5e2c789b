"""Settings: what goes together, what does not, and the way to JSON and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longmem.config import BankSpec, EncodeConfig, MemoryHead, SideNetConfig, read_json
from longmem.errors import CheckpointError, ConfigError


@st.composite
def sidenet_configs(draw: st.DrawFn) -> tuple[SideNetConfig, int]:
    """A SideNet around random memory heads, and the layers of its backbone."""
    layers = draw(st.integers(1, 40))
    head = st.tuples(st.integers(0, layers - 1), st.integers(0, 3))
    heads = draw(st.lists(head, min_size=1, max_size=6, unique=True))
    chunk_size = draw(st.integers(1, 4))
    config = SideNetConfig.around(
        heads,
        layers,
        below=draw(st.integers(0, 4)),
        above=draw(st.integers(1, 4)),
        update=draw(st.sampled_from(["alpha", "difference"])),
        init=draw(st.sampled_from(["first", "last"])),
        top_k=chunk_size * draw(st.integers(1, 9)),
        chunk_size=chunk_size,
        fusion=draw(st.sampled_from(["joint", "gate"])),
        encode=EncodeConfig(draw(st.integers(1, 99)), draw(st.integers(0, 99))),
    )
    return config, layers


@given(sidenet_configs())
def test_spans_around_memory_heads_reach_the_top_without_a_gap(case: tuple[SideNetConfig, int]) -> None:
    config, layers = case
    assert config.spans[-1][1] == layers
    for (lo, hi), (next_lo, _) in zip(config.spans, config.spans[1:], strict=False):
        assert lo < hi == next_lo
    assert set(config.memory_layers) <= {lo for lo, _ in config.spans}


@given(sidenet_configs())
def test_each_layer_finds_its_own_heads(case: tuple[SideNetConfig, int]) -> None:
    config, layers = case
    found = [config.memory_heads[config.heads_of(layer)] for layer in range(layers)]
    assert all(head.layer == layer for layer, heads in enumerate(found) for head in heads)
    assert sum(found, start=()) == config.memory_heads


@given(sidenet_configs())
def test_a_config_survives_json(case: tuple[SideNetConfig, int]) -> None:
    config, _ = case
    assert SideNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_spans_below_are_there_only_where_there_is_room() -> None:
    assert SideNetConfig.around([(0, 0)], 4, below=3, above=1).spans == ((0, 4),)
    assert SideNetConfig.around([(2, 0)], 4, below=1, above=2).spans == ((0, 2), (2, 3), (3, 4))
    assert SideNetConfig.around([(2, 0)], 4).spans == ((2, 3), (3, 4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spans": ()}, "at least one span"),
        ({"spans": ((0, 0),)}, "ascending"),
        ({"spans": ((0, 3), (2, 4))}, "ascending"),
        ({"spans": ((2, 4), (0, 2))}, "ascending"),
        ({"memory_heads": (MemoryHead(1, 0),)}, r"Memory layers \[1\]"),
        ({"memory_heads": (MemoryHead(2, 0), MemoryHead(2, 0))}, "listed twice"),
        ({"memory_heads": (MemoryHead(2, 1), MemoryHead(2, 0))}, "ascending order"),
        ({"top_k": 0}, "top_k"),
        ({"chunk_size": 0}, "top_k"),
        ({"top_k": 10, "chunk_size": 4}, "multiple of chunk_size"),
        ({"passage_evidence": True, "fusion": "gate"}, "passage_evidence"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SideNetConfig(**{"spans": ((0, 2), (2, 4)), "memory_heads": (MemoryHead(2, 0),), **settings})


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 60), st.integers(0, 60))
def test_each_token_is_kept_in_the_window_of_its_cell(stride: int, overlap: int, start: int, total: int) -> None:
    windows = EncodeConfig(stride, overlap).windows(start, total)
    assert [token for _, kept, end in windows for token in range(kept, end)] == list(range(start, total))
    for first, kept, end in windows:
        assert first == max(0, kept // stride * stride - overlap) and kept // stride == (end - 1) // stride


@pytest.mark.parametrize(("stride", "overlap"), [(0, 8), (-1, 8), (8, -1)])
def test_windows_have_a_stride_and_no_negative_overlap(stride: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=f"stride={stride}, overlap={overlap}"):
        EncodeConfig(stride, overlap)


GOOD = SideNetConfig(((0, 2), (2, 4)), (MemoryHead(2, 0),)).to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**GOOD, "spans": [[1, 2, 3]]},
        {**GOOD, "spans": None},
        {**GOOD, "memory_heads": [[1]]},
        {**GOOD, "encode": 3},
        {**GOOD, "colour": "red"},
        {name: value for name, value in GOOD.items() if name != "encode"},
    ],
)
def test_fields_of_something_else_are_not_a_config(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not the configuration of a SideNet"):
        SideNetConfig.from_dict(fields)


specs = st.builds(
    BankSpec,
    backbone=st.text(max_size=9),
    weights=st.text("0123456789abcdef", min_size=64, max_size=64),
    memory_heads=st.lists(st.builds(MemoryHead, st.integers(0, 40), st.integers(0, 8))).map(tuple),
    head_dim=st.integers(1, 256),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    encode=st.builds(EncodeConfig, st.integers(1, 9000), st.integers(0, 999)),
)


@given(specs)
def test_a_spec_survives_json(spec: BankSpec) -> None:
    again = BankSpec.from_json(spec.to_json())
    assert again == spec and again.backbone == spec.backbone and again.encode == spec.encode
    assert EncodeConfig.from_text(str(spec.encode)) == spec.encode
    assert all(isinstance(head, MemoryHead) for head in again.memory_heads)


def test_banks_that_do_not_say_their_windows_have_those_that_all_had() -> None:
    """The format's, not the default, should that ever change."""
    spec = BankSpec("tiny", "0", (MemoryHead(1, 0),), 8)
    assert "encode" not in json.loads(spec.to_json())
    assert BankSpec.from_json(spec.to_json()).encode == EncodeConfig(768, 256)


@pytest.mark.parametrize("text", ["", "768", "768+", "+256", "768+256+1", "768-256", "a+b", "-1+3", "0+5", "٣+1"])
def test_what_is_no_windows_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="windows"):
        EncodeConfig.from_text(text)


def test_bytes_of_a_token_are_those_of_its_keys_and_values() -> None:
    heads = (MemoryHead(1, 0), MemoryHead(2, 1), MemoryHead(3, 0))
    assert BankSpec("tiny", "0" * 64, heads, 64).bytes_per_token == 2 * 3 * 64 * 2
    assert BankSpec("tiny", "0" * 64, heads, 64, "float32").bytes_per_token == 2 * 3 * 64 * 4


def test_a_spec_is_the_weights_and_not_the_name() -> None:
    heads = (MemoryHead(1, 0),)
    assert BankSpec("a", "0" * 64, heads, 64) == BankSpec("b", "0" * 64, heads, 64)
    assert BankSpec("a", "0" * 64, heads, 64) != BankSpec("a", "1" * 64, heads, 64)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "is missing"),
        (b"", "cannot be read as JSON"),
        (b'{"a": ', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[1, 2]", "holds list, expected a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(raw: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words) as refused:
        read_json(path)
    assert str(path) in str(refused.value)


def test_only_int4_keys_have_a_grid() -> None:
    spec = BankSpec("tiny", "0" * 64, (MemoryHead(1, 0),), 8, precision="int4", grid="AAAA")
    assert BankSpec.from_json(spec.to_json()).grid == "AAAA"
    assert BankSpec("other", "0" * 64, (MemoryHead(1, 0),), 8) == spec
    with pytest.raises(ConfigError, match="a bank of int8 was given one"):
        BankSpec("tiny", "0" * 64, (MemoryHead(1, 0),), 8, precision="int8", grid="AAAA")
