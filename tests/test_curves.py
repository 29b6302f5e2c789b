"""Curves by how much was told, and perplexity by place."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from longmem.comparison.curves import by_position, curves, drawing, in_order, told_in
from longmem.comparison.html import html
from longmem.comparison.markdown import markdown
from longmem.comparison.result import Cell, Comparison, Figure, Named
from longmem.tasks.task import Measure

TASK = Named("language", "", (Measure("perplexity", "perplexity", higher=False),))


def compared(*kinds: str) -> Comparison:
    cells = {}
    for name, start in (("window", 30.0), ("longmem", 20.0)):
        of_kinds = {
            kind: {"perplexity": Figure(start - n, start - n - 1, start - n + 1, 2)} for n, kind in enumerate(kinds)
        }
        losses = [[-np.log(start)] * 64 + [-np.log(start / 2)] * 64] * 2
        rows = [
            {"case": n, "group": n, "kind": kind, "log_probabilities": losses[n], "values": {}, "tokens": 128}
            for kind in kinds
            for n in range(2)
        ]
        figures = {"perplexity": Figure(start, start - 1, start + 1, len(rows))}
        cells["language", name] = Cell("language", name, figures, of_kinds, cases=rows)
    return Comparison([TASK], [Named("window", ""), Named("longmem", "")], {"seed": 0}, {}, cells)


def test_curves_go_from_little_to_much() -> None:
    result = compared("4,096 told", "1,024 told", "1,048,576 told")
    found = curves(result, TASK)
    assert [told for told, _ in found["longmem"]] == [1024, 4096, 1048576]
    drawn = ElementTree.fromstring(drawing(result, TASK))
    assert len(drawn.findall("{*}polyline")) == 2 and len(drawn.findall("{*}circle")) == 6
    text = markdown(result)
    assert text.index("1,024 told") < text.index("4,096 told") < text.index("1,048,576 told")
    assert "<polyline" in html(result)


def test_places_are_of_what_was_told_most() -> None:
    head, rows = by_position(compared("4,096 told", "1,024 told"), TASK)
    assert head == ["4,096 told; tokens", "1 – 64", "65 – 128"]
    assert rows == [["window", "30.00", "15.00"], ["longmem", "20.00", "10.00"]]


@pytest.mark.parametrize("kinds", [(), ("SST-2", "MR"), ("told",)])
def test_no_curves_without_amounts(kinds: tuple[str, ...]) -> None:
    result = compared(*kinds)
    assert curves(result, TASK) == {} and drawing(result, TASK) == "" and by_position(result, TASK) == ([], [])


def test_kinds_that_are_no_amounts_stay_in_order() -> None:
    assert in_order(["b", "a"]) == ["b", "a"] and told_in("1,024 told") == 1024 and told_in("told") is None
