"""A task and a contender are a file each; a rerun gives the same figures; an empty cell says why."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
from conftest import TINY_TEXT
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import longmem
import longmem.contenders
import longmem.tasks
from longmem.cli import app
from longmem.comparison.cell import RunConfig
from longmem.comparison.html import html, plot
from longmem.comparison.markdown import Notes, markdown, summary
from longmem.comparison.own import read_questions
from longmem.comparison.result import Cell, Comparison, Named, figure
from longmem.comparison.run import BROKE, compare
from longmem.comparison.tokens import key_share, token_figures
from longmem.contenders.contender import Contender, ContenderConfig, Prompt
from longmem.contenders.extended import Extended
from longmem.contenders.longmem import LongMemContender
from longmem.contenders.longmem_wrong import LongMemWrong
from longmem.contenders.memgpt import MemGpt
from longmem.contenders.oracle import Oracle
from longmem.contenders.window import Window
from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, SourceError, UnavailableError
from longmem.model import LongMem
from longmem.registry import chosen, found
from longmem.tasks import language
from longmem.tasks import task as task_module
from longmem.tasks.many_shot import ManyShot
from longmem.tasks.needles import PassKey
from longmem.tasks.task import Case, Measure, Round, Task, TaskConfig

TASK = """
from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.tasks.task import Case, Measure, Round, Task


class Colours(Task):
    name = "colours"
    title = "which colour was told"
    measures = (Measure("right"),)

    def rounds(self):
        for number in range(self.config.cases):
            colour = str(self.rng(number).choice(["red", "blue"]))
            prompt = Prompt("The colour is", evidence=(f"The colour is {colour}.",), room=4)
            yield Round((Document("colour", f"The colour is {colour}."),), (Case(prompt, (colour,), ("red", "blue")),))

    def score(self, case, answer):
        return {"right": float(answer.text == case.answers[0])}
"""
CONTENDER = """
from longmem.contenders.contender import Contender, View


class Nothing(Contender):
    name = "nothing"
    title = "backbone, told nothing"

    def learn(self, documents):
        return None

    def view(self, prompt):
        return self.fitted([], prompt, self.config.window)

    def kept_bytes(self):
        return 0
"""
SMALL_WINDOWS = ContenderConfig(window=128)
SMALL = ContenderConfig(window=96, extended=256, chunk=32, chunks=2)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.1)
    return made


@pytest.fixture(autouse=True)
def short_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's documentation takes seconds to read."""

    def few(tokenizer: Any) -> TokenizedDocuments:
        return TokenizedDocuments.from_documents([Document("bees", TINY_TEXT * 10)], tokenizer)

    monkeypatch.setattr(task_module, "default_documents", few)
    monkeypatch.setattr(language, "python_documents", lambda: [Document("bees", TINY_TEXT * 10)])


@pytest.fixture
def own(tmp_path: Path) -> tuple[type[Task], type[Contender]]:
    """A task and a contender, one file each."""
    for name, text in (("task.py", TASK), ("contender.py", CONTENDER)):
        assert len(text.splitlines()) <= 80
        (tmp_path / name).write_text(text)
    (task,) = chosen([str(tmp_path / "task.py")], longmem.tasks, Task)
    (contender,) = chosen([str(tmp_path / "contender.py")], longmem.contenders, Contender)
    return task, contender


def test_a_new_task_and_a_new_contender_meet_the_others(
    model: LongMem, own: tuple[type[Task], type[Contender]]
) -> None:
    task, contender = own
    seen: list[tuple[str, str]] = []
    result = compare(
        model,
        [PassKey, task],
        [Window, contender, Oracle],
        TaskConfig(cases=2, told=64),
        ContenderConfig(window=800),
        on_cell=lambda comparison, cell: seen.append((cell.task, cell.contender)),
    )
    assert seen == [(t, c) for c in ("window", "nothing", "oracle") for t in ("passkey", "colours")]
    assert all(cell.reason is None and cell.figures for cell in result.cells.values())
    # Told nothing, it chooses the same colour whatever was told.
    given = {row["given"] for row in result.cell("colours", "nothing").cases}
    assert len(given) == 1
    assert result.cell("colours", "nothing").price is not None
    for cell in result.cells.values():
        for each in cell.figures.values():
            assert each.low is not None and each.high is not None and each.low <= each.value <= each.high


def test_a_rerun_gives_the_same_figures(model: LongMem, own: tuple[type[Task], type[Contender]]) -> None:
    def run(seed: int) -> list[tuple[object, object]]:
        config = TaskConfig(cases=3, told=64, seed=seed)
        result = compare(model, [own[0], PassKey], [LongMemContender], config, ContenderConfig(window=64))
        return [(cell.figures, cell.cases) for cell in result.cells.values()]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_rerun_in_another_process_gives_the_same_figures(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Whatever order Python gives to sets there."""
    (tmp_path / "bees.txt").write_text("\n\n".join(f"Hive {n} stands on roof {n % 3}." for n in range(40)))
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n" + GOOD.replace("the bees", "hive 7"))
    command = [sys.executable, "-m", "longmem", "eval", "qa", "--model", str(tiny_model_dir), "--device", "cpu"]
    command += ["--documents", "bees.txt", "--questions", "q.jsonl", "--window", "600"]
    command += ["--contenders", "window,rag-bm25,memgpt,longmem"]
    path = f"{Path(longmem.__file__).parent.parent}"
    runs = [
        subprocess.Popen(
            [*command, "--out", seed],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    assert [(run.wait(), run.stderr.read() if run.returncode and run.stderr else b"") for run in runs] == [(0, b"")] * 2
    one, two = (Comparison.load(tmp_path / seed / "report.json").cells for seed in ("1", "2"))
    assert {contender for (_, contender), cell in one.items() if cell.figures} >= {"window", "memgpt", "longmem"}
    assert {place: (c.figures, c.cases) for place, c in one.items()} == {
        place: (c.figures, c.cases) for place, c in two.items()
    }


def test_an_empty_cell_says_why(model: LongMem, tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(
        TASK.replace('evidence=(f"The colour is {colour}.",), ', "").replace("room=4", "room=4")
    )
    (task,) = chosen([str(tmp_path / "t.py")], longmem.tasks, Task)
    (data_task,) = chosen(["xquad"], longmem.tasks, Task)
    result = compare(model, [task, data_task], [Window, Oracle], TaskConfig(cases=2), SMALL)
    assert result.cell("colours", "window").reason is None
    assert "does not say where" in str(result.cell("colours", "oracle").reason)
    assert "--data" in str(result.cell("xquad", "window").reason)
    text, page = markdown(result), html(result)
    for reason in ("does not say where the answers stand", "no data: give --data DIR with xquad in it"):
        assert reason in text and reason in page
    # No cell of the summary is blank.
    table = text.split("## Summary")[1].split("## Each task")[0]
    for line in table.strip().splitlines()[2:]:
        assert all(cell.strip() for cell in line.strip("|").split("|"))
    unfinished = Comparison(result.tasks, result.contenders, {}, {})
    assert "not run yet" in markdown(unfinished)


def test_the_page_stands_alone(model: LongMem, own: tuple[type[Task], type[Contender]]) -> None:
    result = compare(model, [own[0]], [Window, own[1], Oracle], TaskConfig(cases=3), SMALL)
    page = html(result)
    assert not re.search(r"(src|href)=|@import|url\(|<script", page)
    (svg,) = re.findall(r"<svg.*?</svg>", page)
    drawn = ElementTree.fromstring(svg)
    assert len(drawn.findall("{*}circle")) == 3
    assert plot(Measure("F1"), [result.cell("colours", "window")]) == ""
    for name in ("commit", "torch", "processor", "seed 0"):
        assert name in page and name in markdown(result)
    assert "nothing" in summary(result, Notes())


def test_side_by_side_the_same_is_answered(model: LongMem, own: tuple[type[Task], type[Contender]]) -> None:
    def run(rows: int) -> Comparison:
        config, rivals = TaskConfig(cases=6, told=64), [LongMemContender, MemGpt, Oracle]
        return compare(model, [own[0], PassKey], rivals, config, ContenderConfig(window=800), RunConfig(rows))

    one, many = run(1), run(4)
    for place, cell in one.cells.items():
        other = many.cells[place]
        assert [row["given"] for row in cell.cases] == [row["given"] for row in other.cases]
        for name, value in cell.figures.items():
            assert value.value == pytest.approx(other.figures[name].value, abs=1e-3)
        # Of the first cases alone, asked one by one.
        assert cell.price is not None and other.price is not None
        assert other.price.first_seconds > 0 and other.price.kept_bytes <= cell.price.kept_bytes


def test_another_case_is_told_by_mistake(model: LongMem, own: tuple[type[Task], type[Contender]]) -> None:
    result = compare(model, [PassKey], [LongMemContender, LongMemWrong], TaskConfig(cases=3, told=64), SMALL_WINDOWS)
    right, wrong = (result.cell("passkey", name) for name in ("longmem", "longmem-wrong"))
    assert [row["answers"] for row in right.cases] == [row["answers"] for row in wrong.cases]
    assert [row["log_probability"] for row in right.cases] != [row["log_probability"] for row in wrong.cases]
    alone = compare(model, [PassKey], [LongMemWrong], TaskConfig(cases=1, told=64), SMALL_WINDOWS)
    assert "no others to tell" in str(alone.cell("passkey", "longmem-wrong").reason)


def test_what_is_strange_to_a_case(model: LongMem) -> None:
    def rounds(*told: tuple[str, str, str]) -> list[Round]:
        return [Round((Document(name, text),), (Case(Prompt("?"), ("a",), kind=kind),)) for name, text, kind in told]

    config = TaskConfig(cases=1)
    some = rounds(("a", "one", "x"), ("a", "two", "y"), ("b", "three", "x"), ("b", "three", "y"))
    numbers = {
        kind.name: [
            next((n for n, each in enumerate(some) if each is kind(config, model.tokenizer).other(some, number)), None)
            for number in range(4)
        ]
        for kind in (PassKey, language.Language, ManyShot)
    }
    assert numbers == {"passkey": [1, 2, 0, 0], "language": [2, 3, 0, 1], "many-shot-4": [1, 2, 3, 0]}
    assert PassKey(config, model.tokenizer).other(some[:1], 0) is None


def scored_by_token(**losses: list[list[float]]) -> Comparison:
    """Contenders that were each given the same continuations."""
    cells = {}
    for name, cases in losses.items():
        name = name.replace("_", "-")
        rows = [
            {"kind": "", "case": n, "group": n, "values": {}, "tokens": len(row), "log_probabilities": row}
            for n, row in enumerate(cases)
        ]
        cells["language", name] = Cell("language", name, cases=rows)
    names = [Named(name, "") for _, name in cells]
    return Comparison([Named("language", "", language.Language.measures)], names, {"seed": 0}, {}, cells)


def test_key_tokens_are_what_the_long_window_alone_knows() -> None:
    result = scored_by_token(
        window=[[-5.0, -5.0, -1.0, -9.0], [-1.0, -1.0]],
        extended=[[-1.0, -2.5, -1.0, -1.0], [-1.0, -1.0]],
        longmem_empty=[[-4.0, -4.0, -1.0, -4.0], [-1.0, -1.05]],
        longmem=[[-2.0, -4.5, -1.0, -3.0], [-1.0, -1.0]],
    )
    # The second token gained as much, but is not likely even so.
    assert key_share(result, "language") == pytest.approx(100 * 2 / 6)
    found = token_figures(result, "language")
    losses = {"window": 7.0, "extended": 1.0, "longmem-empty": 4.0, "longmem": 2.5}
    assert {name: np.log(each.figures["key tokens"].value) for name, each in found.items()} == pytest.approx(losses)
    assert (found["longmem"].base, found["extended"].base) == ("longmem-empty", "window")
    # Two of four better and one worse; none of two by more than the margin.
    assert [found["longmem"].figures[name].value for name in ("better", "worse")] == pytest.approx([25.0, 12.5])
    assert set(found["longmem-empty"].figures) == {"key tokens"}
    assert "Key tokens, 33.3 % of all" in markdown(result) and "Key tokens, 33.3 % of all" in html(result)


def test_no_key_tokens_without_a_judge() -> None:
    result = scored_by_token(window=[[-5.0]], longmem=[[-2.0]])
    assert token_figures(result, "language") == {} and "Key tokens" not in markdown(result)
    # None of the tokens is one: shares alone.
    alike = scored_by_token(window=[[-1.0]], extended=[[-1.0]], longmem=[[-0.5]])
    assert {name: set(each.figures) for name, each in token_figures(alike, "language").items()} == {
        "extended": {"better", "worse"},
        "longmem": {"better", "worse"},
    }
    assert token_figures(alike, "language")["longmem"].base == "window"


def test_continuations_are_kept_token_by_token(model: LongMem) -> None:
    rivals = [Window, Extended, LongMemContender]
    config = ContenderConfig(window=800, extended=1000)
    result = compare(model, [language.Language], rivals, TaskConfig(cases=1, told=64), config)
    cells = [result.cell("language", each.name) for each in rivals]
    assert all(len(cell.cases) == 1 for cell in cells), [cell.reason for cell in cells]
    for row in (row for cell in cells for row in cell.cases):
        assert len(row["log_probabilities"]) == row["tokens"]
        assert sum(row["log_probabilities"]) == pytest.approx(row["log_probability"], abs=0.001 * row["tokens"])
    assert set(token_figures(result, "language")) >= {"extended", "longmem"}


def test_a_cell_ends_when_its_time_is_up(model: LongMem, own: tuple[type[Task], type[Contender]]) -> None:
    config = TaskConfig(cases=5)
    result = compare(model, [own[0]], [Window], config, SMALL, RunConfig(seconds=1e-9))
    cell = result.cell("colours", "window")
    assert len(cell.cases) == 1 and cell.unasked == 4
    assert "window had time for 1." in markdown(result) and "window had time for 1." in html(result)
    whole = compare(model, [own[0]], [Window], config, SMALL, RunConfig(seconds=1e9)).cell("colours", "window")
    assert whole.unasked == 0 and whole.cases[:1] == cell.cases
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        RunConfig(0)


def test_what_was_done_is_not_done_again(
    model: LongMem, own: tuple[type[Task], type[Contender]], tmp_path: Path
) -> None:
    (data_task,) = chosen(["xquad"], longmem.tasks, Task)
    config, path = TaskConfig(cases=2), tmp_path / "report.json"
    whole = compare(model, [own[0], data_task], [Window, own[1]], config, SMALL)
    part = compare(model, [own[0], data_task], [Window], config, SMALL)
    part.save(path)
    before = Comparison.load(path)
    assert before.cells == part.cells and before.tasks == part.tasks and before.contenders == part.contenders
    run: list[tuple[str, str]] = []
    result = compare(
        model,
        [own[0], data_task],
        [Window, own[1]],
        config,
        SMALL,
        before=before,
        on_cell=lambda comparison, cell: run.append((cell.task, cell.contender)),
    )
    # What had a reason may have none any more.
    assert run == [("xquad", "window"), ("colours", "nothing"), ("xquad", "nothing")]
    assert result.cells["colours", "window"] is before.cells["colours", "window"]
    figures = {place: cell.figures for place, cell in result.cells.items()}
    assert figures == {place: cell.figures for place, cell in whole.cells.items()}
    with pytest.raises(ConfigError, match="settings differ, seed is 0 in one and 1 in the other"):
        compare(model, [own[0]], [Window], TaskConfig(cases=2, seed=1), SMALL, before=before)
    other = Comparison([], [], before.settings, {**before.machine, "torch": "0.1"})
    with pytest.raises(ConfigError, match="machine differ, torch is"):
        before.joined(other)
    # What has no figures here is taken from elsewhere and says so; what has stays.
    bare = {place: dataclasses.replace(cell, figures={}, reason="no memory") for place, cell in result.cells.items()}
    own_place, other_place = ("colours", "window"), ("colours", "nothing")
    gaps = dataclasses.replace(result, cells={**result.cells, own_place: bare[own_place]})
    settings = {**result.settings, "precision": "float32, elsewhere", "rows": 7}
    there = dataclasses.replace(result, settings=settings, machine={"processor": "an abacus"})
    filled = gaps.filled(there)
    assert filled.cells[own_place].figures == result.cells[own_place].figures
    assert filled.cells[own_place].elsewhere == "an abacus, float32, elsewhere"
    assert filled.cells[other_place].elsewhere == "" and filled.machine == result.machine
    assert "run elsewhere: an abacus, float32, elsewhere" in markdown(filled) and "elsewhere" not in markdown(gaps)
    assert "run elsewhere: an abacus" in html(filled)
    with pytest.raises(ConfigError, match="settings differ, seed"):
        gaps.filled(dataclasses.replace(there, settings={**settings, "seed": 1}))
    for text in ("{", "[]", "{}", '{"tasks": [{"name": "a"}]}'):
        path.write_text(text)
        with pytest.raises(SourceError, match="is no report of a comparison"):
            Comparison.load(path)


def test_reports_are_merged(tiny_model_dir: Path, tmp_path: Path, own: tuple[type[Task], type[Contender]]) -> None:
    def runs(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    task, a = tmp_path / "task.py", tmp_path / "a"
    more = ("--model", tiny_model_dir, "--device", "cpu", "--quick", "--seconds", "0")
    for name, contender in (("a", "window"), ("b", "oracle")):
        runs("compare", f"{task}:cases=3,told=77", "--contenders", contender, "--out", tmp_path / name, *more)
    text = runs("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert "window" in text and "oracle" in text
    both = Comparison.load(tmp_path / "both" / "report.json")
    assert [cell.figures["right"].cases for cell in both.cells.values()] == [3, 3]
    assert both.tasks[0].settings == {"cases": 3, "told": 77} and both.settings["cases"] == 4
    assert "3 cases, cases 3, told 77." in (tmp_path / "both" / "report.md").read_text()
    # The same report goes on; with other settings it does not, and stays what it was.
    rivals = ("--contenders", "window,oracle", "--out", a, "--resume")
    runs("compare", f"{task}:cases=3,told=77", *rivals, *more)
    assert len(Comparison.load(a / "report.json").cells) == 2
    kept = (a / "report.json").read_text()
    told = runs("compare", task, *rivals, *more, code=1)
    assert "settings of colours differ" in " ".join(told.split())
    assert (a / "report.json").read_text() == kept
    assert "is not one of cases=NUMBER" in runs("compare", f"{task}:case=3", *more, code=1)
    assert "cases must be" in runs("compare", f"{task}:cases=0", *more, code=1)
    assert "does not exist" in runs("merge", tmp_path / "none", code=1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from(["percent", "number", "perplexity"]))
def test_intervals_hold_the_figure(values: list[float], form: str) -> None:
    value_C = np.array(values)
    found = figure(Measure("m", form), value_C, np.arange(1, len(values) + 1), 0)  # type: ignore[arg-type]
    assert found.cases == len(values)
    assert found == figure(Measure("m", form), value_C, np.arange(1, len(values) + 1), 0)  # type: ignore[arg-type]
    if form != "perplexity":
        assert found.value == pytest.approx(value_C.mean() * (100 if form == "percent" else 1))
    if len(values) == 1:
        assert found.low is None
    else:
        assert found.low is not None and found.high is not None
        assert found.low <= found.high
        # No interval is narrower than nothing where cases differ.
        assert found.low < found.high or len(set(values)) == 1 or np.ptp(value_C) < 1e-6


def test_rates_have_intervals_at_their_ends() -> None:
    found = figure(Measure("right"), np.zeros(8), np.ones(8), 0)
    assert (found.value, found.low) == (0.0, 0.0) and 30 < float(found.high or 0) < 35


GOOD = '{"question": "Where are the bees?", "answer": "on the roof"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ('["a"]', "expected an object"),
        ('{"answer": "x"}', "`question` must be a text; got None"),
        ('{"question": " ", "answer": "x"}', "`question` must be a text"),
        ('{"question": "Where?"}', "`answer` must be a text or a list of texts; got None"),
        ('{"question": "Where?", "answer": []}', "`answer` must be"),
        ('{"question": "Where?", "answer": 3}', "`answer` must be"),
        ('{"question": "Where?", "answer": "x", "evidence": 3}', "`evidence` must be"),
    ],
)
def test_malformed_questions_are_named_by_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(SourceError, match=f"q.jsonl, line 3: .*{re.escape(words)}"):
        list(read_questions(path))


def test_own_questions_for_every_contender(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "bees.txt").write_text("Ada keeps bees on the roof.\n\nHer brother paints boats.")
    questions = tmp_path / "questions.jsonl"
    more = {
        "question": "Who paints?",
        "answer": ["Her brother", "the brother"],
        "evidence": "Her brother paints boats.",
    }
    questions.write_text(f"{GOOD}\n{json.dumps(more)}\n")
    report = tmp_path / "report"
    arguments = ["eval", "qa", "--documents", tmp_path / "documents", "--questions", questions, "--out", report]
    arguments += ["--model", tiny_model_dir, "--device", "cpu", "--window", "600", "--extended", "800"]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads((report / "report.json").read_text())
    assert str(tmp_path) not in (report / "report.json").read_text()
    cells = {cell["contender"]: cell for cell in told["cells"]}
    assert len(cells) == len(told["contenders"])
    for name, cell in cells.items():
        assert (cell["reason"] is None) == bool(cell["figures"]), name
        # One question has no evidence to show.
        assert cell["reason"] or cell["figures"]["F1"]["cases"] == (1 if name == "oracle" else 2)
    assert cells["oracle"]["figures"] and cells["longmem"]["figures"] and cells["window"]["figures"]
    assert (report / "report.md").read_text().startswith("# Comparison")
    assert (report / "report.html").exists()
    assert "qa, F1 %" in result.stdout


def test_mistakes_on_the_command_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--model", str(tiny_model_dir)])
        assert result.exit_code == 1 and "Traceback" not in result.output
        return result.stderr

    out = tmp_path / "report"
    assert "no contender 'windows'" in fails("compare", "passkey", "--contenders", "windows", "--out", out)
    assert "no task 'passkeys'" in fails("compare", "passkeys", "--contenders", "window", "--out", out)
    assert "cases must be" in fails("compare", "passkey", "--contenders", "window", "--cases", "0", "--out", out)
    (tmp_path / "q.jsonl").write_text("{\n")
    command = ("qa", "--documents", tmp_path, "--questions", tmp_path / "q.jsonl", "--out", out)
    assert "q.jsonl, line 1: not JSON" in fails(*command)
    assert not out.exists()


def test_all_tasks_meet_a_contender(tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ["eval", "all", "--quick", "--cases", "2", "--told", "512", "--contenders", "window", "--device", "cpu"]
    arguments += ["--model", str(tiny_model_dir), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads((tmp_path / "report.json").read_text())
    assert [cell["task"] for cell in told["cells"]] == list(found(longmem.tasks, Task))
    for cell in told["cells"]:
        assert bool(cell["figures"]) != bool(cell["reason"])
    assert {cell["task"] for cell in told["cells"] if cell["figures"]} >= {"passkey", "pairs", "facts", "fluency"}
    settings = {name: told["settings"][name] for name in ("cases", "told", "draws", "seconds")}
    assert settings == {"cases": 2, "told": 512, "draws": 1, "seconds": 2}


def test_what_breaks_takes_nothing_with_it(
    model: LongMem, own: tuple[type[Task], type[Contender]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own[1], "kept_bytes", lambda self: 1 // 0)
    config, rivals, order = TaskConfig(cases=1), [own[1], Window], []
    result = compare(model, [own[0]], rivals, config, SMALL)
    assert result.cell("colours", "nothing").reason == f"{BROKE}: ZeroDivisionError: integer division or modulo by zero"
    assert result.cell("colours", "window").figures
    # The next time it comes last.
    monkeypatch.undo()
    after = compare(
        model,
        [own[0], PassKey],
        rivals,
        config,
        SMALL,
        before=result,
        on_cell=lambda _, cell: order.append((cell.task, cell.contender)),
    )
    assert order[-1] == ("colours", "nothing") and after.cell("colours", "nothing").figures

    def lost(self: Window) -> int:
        raise torch.AcceleratorError("the device is gone")

    monkeypatch.setattr(Window, "kept_bytes", lost)
    with pytest.raises(torch.AcceleratorError):
        compare(model, [own[0]], [Window], config, SMALL, on_cell=lambda _, cell: order.append(cell.reason))
    assert BROKE in order[-1]


@pytest.mark.parametrize("times", [1, 2])
def test_short_memory_is_asked_for_once_more(
    times: int, model: LongMem, own: tuple[type[Task], type[Contender]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, calls = Window.kept_bytes, []

    def short(self: Window) -> int:
        calls.append(1)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("others have it")
        return kept(self)

    monkeypatch.setattr(Window, "kept_bytes", short)
    cell = compare(model, [own[0]], [Window], TaskConfig(cases=2), SMALL).cell("colours", "window")
    assert bool(cell.figures) == (times == 1)
    assert cell.reason == (None if times == 1 else "memory of cpu was too small")
    assert len(cell.cases) == (2 if times == 1 else 0)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_one_cannot_be_told_is_left_out(
    rows: int, model: LongMem, own: tuple[type[Task], type[Contender]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(self: Contender, documents: Any) -> None:
        if "red" in documents[0].text:
            raise UnavailableError("red is not for me")

    monkeypatch.setattr(own[1], "learn", picky)
    for converses in (False, True):
        monkeypatch.setattr(own[1], "converses", converses)
        result = compare(model, [own[0]], [Window, own[1]], TaskConfig(cases=6), SMALL, RunConfig(rows))
        whole, cell = (result.cell("colours", name) for name in ("window", "nothing"))
        red = [row["case"] for row in whole.cases if row["answers"] == ["red"]]
        assert 0 < len(red) < 6 and cell.left_out == {"red is not for me": len(red)} and cell.unasked == 0
        assert [row["case"] for row in cell.cases] == [n for n in range(6) if n not in red]
        assert f"nothing was not asked {len(red)}: red is not for me." in markdown(result)
        assert f" of {6 - len(red)} |" in summary(result, Notes())
        assert cell.price is not None and cell.price.first_seconds > 0


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.sampled_from(["number", "perplexity"]))
def test_cases_about_one_text_are_drawn_together(texts: list[int], form: Any) -> None:
    """As if each text were one case."""
    group_C = np.array(texts)
    value_C, weight_C = group_C / 4, np.ones(len(texts))
    measure = Measure("m", form)
    together = figure(measure, value_C, weight_C, 0, group_C)
    different, count = np.unique(group_C, return_counts=True)
    if len(different) < 2:
        assert together.low is None
        return
    # What a perplexity weighs, a mean over as many cases does.
    wanted = figure(Measure("m", "perplexity"), different / 4, count, 0)
    low, high = np.log([wanted.low, wanted.high]) if form == "number" else (wanted.low, wanted.high)
    assert (together.low, together.high) == (pytest.approx(low), pytest.approx(high))
