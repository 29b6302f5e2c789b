"""Differences are of the same cases, and say who is better whichever way a measure counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longmem.comparison.differences import best_rival, difference, differences, standing_lines
from longmem.comparison.result import Cell, Comparison, Named, figures
from longmem.tasks.task import Measure


def compared(measure: Measure, **values: dict[int, float]) -> Comparison:
    cells = {}
    for name, of_case in values.items():
        name = name.replace("__", "+").replace("_", "-")
        rows = [{"case": case, "values": {measure.name: value}, "tokens": 4} for case, value in of_case.items()]
        counted = figures([measure], [row["values"] for row in rows], [4] * len(rows), 0)
        cells["t", name] = Cell("t", name, counted, cases=rows)
    names = [Named(name, "") for _, name in cells]
    return Comparison([Named("t", "", (measure,))], names, {"seed": 0}, {}, cells)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20),
    st.sampled_from(["percent", "number", "perplexity"]),
    st.booleans(),
)
def test_a_difference_is_one_way_and_the_other(pairs: list[tuple[float, float]], form: str, higher: bool) -> None:
    measure = Measure("m", form, higher)  # type: ignore[arg-type]
    ones, others = ({n: pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    result = compared(measure, longmem=ones, window={**others, 99: 0.5})
    (task,) = result.tasks
    found, back = (difference(result, task, *names) for names in (("longmem", "window"), ("window", "longmem")))
    assert found is not None and back is not None and found.cases == len(pairs)
    gap = np.mean([one - other for one, other in pairs]) * (1 if higher else -1)
    assert np.sign(round(found.value, 6)) in (0, np.sign(gap))
    if form == "percent":
        assert found.value == pytest.approx(100 * gap) == pytest.approx(-back.value)
    assert found.low is not None and found.high is not None
    assert found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high


def test_where_it_loses_is_said() -> None:
    right, wrong = ({n: value for n in range(30)} for value in (1.0, 0.0))
    result = compared(
        Measure("right"), window=wrong, rag_dense=right, rag_bm25=wrong, longmem_empty=wrong, longmem=wrong
    )
    (line,) = standing_lines(result, "longmem")
    assert line == "`longmem` **loses**: t -100 (-100 – -100) points against `rag-dense`."
    other = compared(Measure("right"), window=wrong, longmem__rag=right, rag_bm25=wrong)
    (line,) = standing_lines(other, "longmem+rag")
    assert "`longmem+rag` **wins**: t +100" in line
    worth = {each.worth: each.verdict for each in differences(result, result.tasks[0])}
    assert worth["the bank"] == 0 and worth["against the best without LongMem"] == -1


def test_who_was_asked_fewer_cases_is_not_the_best() -> None:
    result = compared(Measure("right"), window={0: 0.0, 1: 0.0}, extended={0: 1.0}, longmem={0: 1.0, 1: 0.0})
    assert best_rival(result, result.tasks[0], "longmem") == "window"
    assert difference(compared(Measure("right"), longmem={0: 1.0}), result.tasks[0], "longmem", "window") is None
