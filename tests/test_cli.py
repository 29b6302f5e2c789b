from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_TEXT
from typer.testing import CliRunner

import longmem
from longmem.attribution import Attribution
from longmem.cli import app, banks, learn, measure
from longmem.cli.talk import stretches
from longmem.focus import FOCUS, Focus
from longmem.generation import Piece


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("LONGMEM_STORE", raising=False)
    monkeypatch.delenv("LONGMEM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    # Other processes run the same code, installed or not.
    monkeypatch.setenv("PYTHONPATH", str(Path(longmem.__file__).parents[1]))


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder, and the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def notes(work, tiny_model_dir) -> Path:
    """`notes.txt`, remembered in bank `notes` of `memories/`."""
    (work / "notes.txt").write_text(TINY_TEXT)
    ok("write", *at("notes"), "notes.txt", "--model", tiny_model_dir, *CPU)
    return work


CPU = ("--device", "cpu")


def at(bank: str) -> tuple[str, ...]:
    return ("--store", "memories", "--bank", bank)


def cli(*arguments, input=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def ok(*arguments, input=None) -> str:
    """Standard output of a command that must succeed."""
    result = cli(*arguments, input=input)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments, code: int = 1, input=None) -> str:
    """Standard error of a command that must fail, in one line, and leave the current folder as it was."""
    before = disk()
    result = cli(*arguments, input=input)
    assert result.exit_code == code, (result.output, result.exception)
    assert disk() == before
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if code == 1:
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert line.startswith("error: ")
    return result.stderr


def process(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longmem", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def disk() -> tuple:
    """Every file of the current folder, and the rows of its manifest."""
    files = sorted(
        (str(path), path.stat().st_size if path.is_file() and "manifest" not in path.name else None)
        for path in Path().rglob("*")
        if path.suffix not in (".sqlite-wal", ".sqlite-shm")
    )
    rows = []
    if Path("memories/manifest.sqlite").exists():
        database = sqlite3.connect("memories/manifest.sqlite")
        rows = [database.execute(f"SELECT * FROM {table}").fetchall() for table in ("bank", "segment")]
        database.close()
    return files, rows


# ---- the command itself ------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from longmem.cli import app\n"
        "evaluations = [['eval', name, '--help'] for name in ('perplexity', 'recall', 'facts', 'ordinary')]\n"
        "for words in (['--help'], ['train', '--help'], *evaluations, ['--version']):\n"
        "    app(words, standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"longmem {longmem.__version__}" in done.stdout


def test_banks_loads_no_model(notes):
    code = (
        "import sys; from longmem.cli import app\n"
        "app(['banks', '--store', 'memories'], standalone_mode=False)\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "notes" in done.stdout


@pytest.mark.parametrize(
    ("command", "name", "without"),
    [
        (learn.train, "longmem.train.TrainConfig", set()),
        (learn.histories, "longmem.histories.HistoryConfig", set()),
        (measure.perplexity, "longmem.evals.perplexity.PerplexityConfig", {"conditions", "context"}),
        (measure.recall, "longmem.evals.recall.RecallConfig", {"remembered", "tasks", "context"}),
        (measure.facts, "longmem.evals.facts.FactsConfig", set()),
        (measure.ordinary, "longmem.evals.ordinary.OrdinaryConfig", set()),
        (measure.bench, "longmem.bench.BenchConfig", {"sizes"}),
        (measure.probe, "longmem.probe.ProbeConfig", {"top_k", "max_pair", "max_current"}),
    ],
)
def test_options_have_the_defaults_of_the_config(command, name, without):
    module, _, name = name.rpartition(".")
    config = getattr(__import__(module, fromlist=[name]), name)
    options = inspect.signature(command).parameters
    for field in dataclasses.fields(config):
        if field.name in without or field.name.startswith("min_"):
            continue
        default = "auto" if (command, field.name) == (learn.train, "dtype") else field.default
        assert options[field.name].default == default, field.name


def test_usage_errors_exit_2(work):
    assert "Missing option" in fails("banks", code=2)
    assert "No such command" in fails("remember", code=2)
    assert "LONGMEM_STORE" in fails("generate", "a", "--bank", "b", code=2)
    assert "nothing to draw on" in fails("generate", "a", "--attribute", code=2)
    assert "names one text" in fails("write", *at("n"), "a", "b", "--source", "c", code=2)


def test_debug_shows_the_traceback(work):
    code = "from longmem.cli import main; main()"
    words = [sys.executable, "-c", code, "banks", "--store", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=os.environ | {"LONGMEM_DEBUG": "1"})
    assert done.returncode == 1 and "Traceback" in done.stderr and "StoreError: No store in nowhere" in done.stderr


def test_interrupt_exits_130(work, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("longmem.store.MemoryStore.open", interrupted)
    assert cli("banks", "--store", "memories").exit_code == 130


def test_setup_lists_the_embedded_models(work, monkeypatch):
    monkeypatch.setenv("LONGMEM_CACHE", str(work))
    (row,) = json.loads(ok("setup", "--json"))
    assert row["name"] == "smollm2-135m" and not row["ready"]
    assert "longmem setup smollm2-135m" in ok("setup")
    assert "smollm2-135m" in fails("setup", "gpt-9")


# ---- remember and read -------------------------------------------------------------------------------------


def test_what_one_process_writes_another_reads(work, tiny_model_dir, monkeypatch):
    (work / "notes.txt").write_text(TINY_TEXT)
    (work / "more.txt").write_text("The moon is full. " * 20)
    model = ("--model", tiny_model_dir, *CPU)
    written = process("write", *at("notes"), "notes.txt", "more.txt", *model)
    assert written.returncode == 0, written.stderr
    assert "notes.txt: " in written.stdout and "2 sources" in written.stdout
    assert written.stderr == ""

    monkeypatch.setenv("LONGMEM_STORE", "memories")
    hits = json.loads(ok("recall", "honey and wax", "--bank", "notes", "--json", *model))
    assert hits[0]["source"] == "notes.txt" and "honey" in hits[0]["text"]
    assert hits[0]["text"] == TINY_TEXT[hits[0]["start"] : hits[0]["end"]]
    assert set(hits[0]) == {"rank", "bank", "source", "start", "end", "text", "score", "memory_score", "word_score"}

    words = ("generate", "Ada keeps", "--bank", "notes", "--attribute", "--max-new-tokens", 4, "--json")
    answer = json.loads(ok(*words, *model))
    assert answer["tokens"] == len(answer["pieces"]) == 4 or answer["pieces"][-1]["token_id"] == 1
    assert answer["text"] == "".join(piece["text"] for piece in answer["pieces"])
    assert {source["source"] for piece in answer["pieces"] for source in piece["sources"]} <= {"notes.txt", "more.txt"}
    assert answer["pieces"][0]["sources"]


def test_recall_shows_a_table(notes, tiny_model_dir):
    shown = ok("recall", "paints boats", *at("notes"), "--top-k", 1, "--words", 1, "--model", tiny_model_dir, *CPU)
    assert "notes.txt:0–" in shown and "paints boats in" in " ".join(shown.split()) and "1.00" in shown


def test_standard_input_can_be_remembered(work, tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    written = json.loads(ok("write", *at("n"), "-", "--source", "talk", "--json", *model, input="Hello there, Ada."))
    assert [row["source"] for row in written["written"]] == ["talk"]
    assert written["tokens"] == written["written"][0]["tokens"] > 3
    assert written["sources"] == 1
    assert "is empty" in fails("write", *at("n"), "-", *model, input=" \n")
    assert "binary" in fails("write", *at("n"), "-", *model, input="a\0b")
    assert "not UTF-8" in fails("write", *at("n"), "-", *model, input=b"\xff\xfe\xfd")


def test_generate_streams_and_prints_footnotes(notes, tiny_model_dir):
    words = ("generate", "Ada keeps", "--max-new-tokens", 6, "--model", tiny_model_dir, *CPU)
    plain = ok(*words)
    assert plain == ok(*words)  # greedy
    footnoted = ok(*words, *at("notes"), "--attribute")
    assert "[1] “" in footnoted and "notes.txt:" in footnoted and "% of the memory heads' attention" in footnoted
    alone = json.loads(ok(*words, *at("notes"), "--memory", 0, "--json"))
    assert alone["text"] + "\n" == plain  # a dial at 0 is the model without its bank


def test_decoding_is_compiled_on_request(work, tiny_model_dir, monkeypatch):
    asked = []
    monkeypatch.setattr("longmem.model.LongMem.compile_decoding", lambda model: asked.append(model))
    words = ("--max-new-tokens", 3, "--model", tiny_model_dir, *CPU)
    for flags, times in (((), 0), (("--compile",), 1)):
        asked.clear()
        ok("generate", "Ada keeps", *words, *flags)
        assert len(asked) == times
        ok("chat", *words, *flags, input="/quit\n")
        assert len(asked) == 2 * times


def test_a_stretch_ends_where_its_source_changes():
    def piece(text, *spans):
        return Piece(text, 0, tuple(Attribution(s, a, b, "", w) for s, a, b, w in spans))

    found = stretches(
        [
            piece("In", ("a", 10, 20, 0.5), ("b", 0, 5, 0.1)),
            piece(" the", ("a", 15, 30, 0.3)),
            piece(" end", ("a", 900, 910, 0.3)),
            piece(" of", ("a", 900, 910, 0.001)),
            piece(" it"),
            piece(" all", ("b", 0, 9, 0.4)),
        ]
    )
    assert [(s.text, s.source, s.start, s.end) for s in found] == [
        ("In the", "a", 10, 30),
        (" end", "a", 900, 910),
        (" of it", None, 0, 0),
        (" all", "b", 0, 9),
    ]
    assert found[0].weights == [0.5, 0.3]


def test_chat_is_remembered(work, tiny_model_dir):
    words = ("chat", *at("talks"), "--session", "ada", "--max-new-tokens", 4, "--model", tiny_model_dir, *CPU)
    said = ok(*words, input="Ada keeps bees.\n/sources\n/help\n/nonsense\nAnd boats?\n/sources\n/quit\n")
    assert "Ctrl-C" in said and "in particular" in said
    (row,) = json.loads(ok("sources", *at("talks"), "--json"))
    assert row["source"] == "chat/ada"
    assert "chat/ada:" in ok(*words, input="Again.\n/sources\n")  # Ctrl-D leaves
    (again,) = json.loads(ok("sources", *at("talks"), "--json"))
    assert again["tokens"] > row["tokens"]
    assert "forgotten" in cli("chat", "--model", tiny_model_dir, *CPU, input="/quit\n").stderr


def test_what_is_recalled_stands_in_the_window(tiny_model_dir, notes, monkeypatch):
    words = ("--max-new-tokens", 3, "--model", tiny_model_dir, *CPU)
    for flags, shown in (((), True), (("--recall", 1), True), (("--recall", 0), False)):
        said = ok("chat", *at("notes"), *words, *flags, input="Ada keeps bees.\n/sources\n/quit\n")
        assert ("in the window: notes.txt:" in said) == shown
    monkeypatch.setattr("longmem.cli.talk._CUT_SOON", 10)
    for flags, shown in (((), False), (("--recall", 1), True)):
        said = cli("chat", *at("notes"), *words, *flags, input="Ada keeps bees.\n/sources\n/quit\n")
        assert ("in the window: " in said.stdout) == shown == ("--recall 4" not in said.stderr)
    for command in (("chat",), ("generate", "Ada")):
        assert "nothing to recall" in fails(*command, "--recall", 2, *words, code=2)
    texts = [ok("generate", "Ada keeps", *at("notes"), *words, "--recall", n, "--no-remember") for n in (0, 2)]
    assert texts[0] != texts[1]


def test_how_much_of_a_large_bank_is_read_can_be_said(work, tiny_model_dir, monkeypatch):
    (work / "notes.txt").write_text(TINY_TEXT * 4)
    model = ("--model", tiny_model_dir)
    ok("write", *at("notes"), "notes.txt", *model, *CPU)
    ok("index", *at("notes"), "--recall", 1, *model)
    asked, made = [], Focus.__init__
    monkeypatch.setattr(Focus, "__init__", lambda self, tokens: (asked.append(tokens), made(self, tokens))[1])
    for command, said in ((("generate", "Ada keeps", "--no-remember"), None), (("chat",), "Ada?\n/quit\n")):
        words = (*command, *at("notes"), "--max-new-tokens", 3, *model, *CPU)
        for flags, tokens in (
            ((), FOCUS),
            (("--search", "index"), 0),
            (("--focus", 0), 0),
            (("--focus", 4096), 4096),
            (("--focus", 4096, "--search", "index"), 4096),
        ):
            asked.clear()
            ok(*words, *flags, input=said)
            assert set(asked) == {tokens}
        for tokens in (-1, 100):
            assert f"focus must be 0 (banks are read whole) or at least 2048 tokens; got {tokens}." in fails(
                *words, "--focus", tokens
            )
    assert FOCUS == 65536


def test_ctrl_c_stops_a_reply_and_keeps_the_turn(work, tiny_model_dir, monkeypatch):
    from longmem import generation

    original, calls = generation.sample, []

    def sample(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(generation, "sample", sample)
    words = ("--max-new-tokens", 8, "--session", "x", "--model", tiny_model_dir, *CPU)
    ok("chat", *at("talks"), *words, input="Ada keeps bees.\n/quit\n")
    assert len(calls) == 3
    (row,) = json.loads(ok("sources", *at("talks"), "--json"))
    assert row["chars"] > len("Ada keeps bees.")


def test_a_bank_in_few_bits(tiny_model_dir, notes):
    words = ("--model", tiny_model_dir, *CPU)
    ok("write", *at("few"), "notes.txt", "--precision", "int4", *words)
    ok("write", *at("few"), "notes.txt", "--source", "again", *words)  # without the option, as the bank is
    rows = {row["name"]: row for row in json.loads(ok("banks", "--store", "memories", "--json"))}
    assert rows["few"]["precision"] == "int4" and rows["notes"]["precision"] == "full"
    assert 0 < rows["few"]["bytes_per_token"] < rows["notes"]["bytes_per_token"]
    assert "int4" in ok("banks", "--store", "memories")
    for bank, asked in (("few", "int8"), ("few", "full"), ("notes", "int4")):
        said = fails("write", *at(bank), "notes.txt", "--source", "x", "--precision", asked, *words)
        assert "precision is chosen when it is made" in said
    assert ok("recall", *at("few"), "bees", *words)


def test_a_bank_in_windows_of_its_own(tiny_model_dir, notes):
    words = ("--model", tiny_model_dir, *CPU)
    ok("write", *at("long"), "notes.txt", "--windows", "99+29", *words)
    ok("write", *at("long"), "notes.txt", "--source", "again", *words)
    for bank, asked in (("long", "98+29"), ("notes", "99+29")):
        said = fails("write", *at(bank), "notes.txt", "--source", "x", "--windows", asked, *words)
        assert "windows are chosen when it is made" in " ".join(said.split())
    assert "768+256" in fails("write", *at("new"), "notes.txt", "--windows", "much", *words)
    assert "windows" in fails("merge", "long", *at("notes"))


def test_a_bank_is_brought_down_to_a_size(tiny_model_dir, notes):
    words = ("--model", tiny_model_dir, "--unit", "4")
    (before,) = json.loads(ok("banks", "--store", "memories", "--json"))
    said = ok("retain", *at("notes"), "--cap", 20, "--policy", "surprise", "--dry-run", *words)
    assert f"would keep 20 of {before['tokens']} tokens" in said and "notes.txt: " in said
    assert json.loads(ok("banks", "--store", "memories", "--json")) == [before]
    assert cli("retain", *at("notes"), "--cap", 20, *words, input="n\n").exit_code == 1
    assert json.loads(ok("banks", "--store", "memories", "--json")) == [before]
    made = json.loads(ok("retain", *at("notes"), "--cap", 20, "--policy", "surprise", "--always", "--json", *words))
    assert made["done"] and made["tokens"] == 20 and made["tokens_before"] == before["tokens"]
    (after,) = json.loads(ok("banks", "--store", "memories", "--json"))
    assert after["rows"] == 20 and after["tokens"] == before["tokens"] and after["bytes"] < before["bytes"]
    assert f"20 of {before['tokens']}" in " ".join(ok("banks", "--store", "memories").split())
    ok("write", *at("notes"), "notes.txt", "--source", "again", "--model", tiny_model_dir, *CPU)
    assert json.loads(ok("banks", "--store", "memories", "--json"))[0]["rows"] <= 22
    assert "without limit" in ok("retain", *at("notes"), "--never")
    for wrong in ((), ("--never", "--cap", 5)):
        assert "--never alone" in fails("retain", *at("notes"), *wrong, code=2)
    assert "more than 0" in fails("retain", *at("notes"), "--cap", 0)


def test_banks_sources_and_forget(notes):
    (row,) = json.loads(ok("banks", "--store", "memories", "--json"))
    assert row["name"] == "notes" and row["sources"] == 1 and row["tokens"] > 0 and row["bytes"] > 0
    assert "notes" in ok("banks", "--store", "memories")
    (source,) = json.loads(ok("sources", *at("notes"), "--json"))
    assert source["source"] == "notes.txt" and source["chars"] == len(TINY_TEXT) and source["tokens"] == row["tokens"]
    assert "notes.txt" in ok("sources", *at("notes"))

    before = disk()
    refused = cli("forget", "notes.txt", *at("notes"), input="n\n")
    assert refused.exit_code == 1 and disk() == before and f"{row['tokens']:,} tokens" in refused.stderr
    assert "It has: notes" in fails("forget", "notes.txt", *at("other"))
    assert "remembers: notes.txt" in fails("forget", "x.txt", *at("notes"))
    assert f"{row['tokens']:,} tokens" in ok("forget", "notes.txt", *at("notes"), "--yes")
    assert "remembers nothing" in ok("sources", *at("notes"))
    assert list(Path("memories/segments").iterdir()) == []


def test_parts_are_shown_asked_for_and_forgotten(notes, tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    gone = "Her brother paints boats in Brest. "
    start = TINY_TEXT.index(gone)
    span = ("forget", "notes.txt", "--span", f"{start}:{start + len(gone)}", *at("notes"))
    before = disk()
    shown = cli(*span, "--preview")
    assert shown.exit_code == 0 and disk() == before and gone.strip() in shown.stderr and shown.stdout == ""
    refused = cli(*span, *model, input="n\n")
    assert refused.exit_code == 1 and disk() == before and "encoded again" in refused.stderr
    said = json.loads(ok(*span, *model, "--yes", "--json"))
    assert [text["text"] for text in said["text"]] == [gone] and said["receipts"][0]["banks"][0]["tokens"] > 0
    (source,) = json.loads(ok("sources", *at("notes"), "--json"))
    assert source["chars"] == len(TINY_TEXT) - len(gone)
    listed = json.loads(ok("receipts", "--store", "memories", "--json"))
    assert listed == {"genuine": True, "receipts": said["receipts"]}
    assert said["receipts"][0]["signature"][:20] in ok("receipts", "--store", "memories")

    # By a query: the passage that it finds.
    match = ("--match", "honey wax moon", "--top-k", 1, "--preview", "--json")
    found = json.loads(ok("forget", *at("notes"), *match, *model))
    assert found["receipts"] == [] and "honey" in found["text"][0]["text"]
    # By time.
    assert "Nothing" in cli("forget", *at("notes"), "--after", "2999-01-01", "--yes").stderr
    assert "forgot" in ok("forget", *at("notes"), "--after", "2020-01-01", "--before", "2999-01-01T00:00", "--yes")
    assert "remembers nothing" in ok("sources", *at("notes"))
    with sqlite3.connect("memories/manifest.sqlite") as database:
        database.execute("UPDATE receipt SET said = replace(said, 'notes', 'other')")
    database.close()
    altered = cli("receipts", "--store", "memories")
    assert altered.exit_code == 1


def test_versions_forks_and_files(notes, tiny_model_dir, other_tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    (notes / "more.txt").write_text("The lighthouse of Brest. ")
    ok("write", *at("notes"), "more.txt", *model)
    first, second = json.loads(ok("log", *at("notes"), "--json"))
    assert (first["operation"], first["sources"], second["sources"]) == ("append", ["notes.txt"], ["more.txt"])
    assert second["tokens"] == first["tokens"] + second["added"] > 0
    assert "append" in ok("log", *at("notes"))
    assert "Version 1" in ok("tag", "first", *at("notes"), "--version", 1)
    for version in ("1", "first"):
        (source,) = json.loads(ok("sources", *at("notes"), "--version", version, "--json"))
        assert source["source"] == "notes.txt"
    assert "more.txt" not in ok("recall", "lighthouse", *at("notes"), "--version", "first", *model)
    assert "has no tag 'x'" in fails("sources", *at("notes"), "--version", "x")

    assert "shares files with notes" in ok("fork", *at("notes"), "--to", "notes/draft", "--version", "first")
    assert "files of its own" in ok("fork", *at("notes"), "--to", "copy")
    assert "already" in fails("fork", *at("notes"), "--to", "copy")
    assert json.loads(ok("diff", "notes/draft", *at("notes"), "--json"))["ours"] == ["more.txt"]
    assert ok("diff", "notes/draft", *at("notes")) == "- more.txt\n"
    assert "the same" in ok("diff", "copy", *at("notes"))
    assert ok("diff", *at("notes"), "--version", 2, "--other-version", 1) == "- more.txt\n"
    assert f"{second['added']:,} tokens" in ok("merge", "copy", *at("notes/draft"))
    assert "no tag first any more" in ok("tag", "first", *at("notes"), "--remove")

    ok("export", "notes.longmem", *at("notes"))
    assert "exists already" in fails("export", "notes.longmem", *at("notes"))
    assert "Bank notes holds" in ok("import", "notes.longmem", "--store", "elsewhere")
    ok("import", "notes.longmem", *at("again"))
    assert ok("sources", *at("again"), "--json") == ok("sources", *at("notes"), "--json")
    assert "cannot be read as an exported bank" in fails("import", "more.txt", *at("x"))
    ok("copy", *at("notes"), "--to", "new", "--model", other_tiny_model_dir, *CPU)
    assert "lighthouse" in ok("recall", "lighthouse", *at("new"), "--model", other_tiny_model_dir, *CPU)


def test_several_banks_are_read_in_one_answer(work, tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    (work / "bees.txt").write_text("Ada keeps bees on the roof of the old town hall.")
    (work / "wax.txt").write_text("Wax melts at low heat, and bees make more of it.")
    ok("write", *at("user/1234"), "bees.txt", *model)
    ok("write", *at("domain/wax"), "wax.txt", *model)
    both = ("--store", "memories", "--bank", "user/1234", "--bank", "domain/wax:0.5")
    hits = json.loads(ok("recall", "bees", *both, "--json", *model))
    assert {hit["bank"] for hit in hits} == {"user/1234", "domain/wax"}
    assert "domain/wax, wax.txt" in " ".join(ok("recall", "bees", *both, *model).split())
    said = json.loads(ok("generate", "Ada keeps", *both, "--max-new-tokens", 6, "--attribute", "--json", *model))
    assert {span["bank"] for piece in said["pieces"] for span in piece["sources"]} == {"user/1234", "domain/wax"}
    ok("generate", "Ada keeps", *both, "--max-new-tokens", 9, "--attribute", *model)
    talked = cli("chat", *both, "--max-new-tokens", 4, "--session", "x", *model, input="Hello bees.\n/quit\n")
    assert talked.exit_code == 0 and "of bank user/1234" in talked.stderr
    assert "Bank domain/wax remembers" in talked.stderr
    assert "chat/x" in ok("sources", *at("user/1234")) and "chat/x" not in ok("sources", *at("domain/wax"))
    # What it drew on is noted with its bank.
    shown = cli("forget", "wax.txt", *at("domain/wax"), "--preview")
    assert shown.exit_code == 0
    # A past version can be read beside others, and is not written to.
    ok("generate", "Ada keeps", *both, "--version", 1, "--max-new-tokens", 4, *model)
    fails("recall", "bees", "--store", "memories", "--bank", "user/1234:x", *model, code=2)
    assert "weight" in fails("recall", "bees", "--store", "memories", "--bank", "user/1234:-1", *model)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("notes.txt", "--match", "x"),
        ("--span", "1:2"),
        ("notes.txt", "--span", "1-2"),
        ("--after", "yesterday"),
    ],
)
def test_what_to_forget_is_said_in_one_way(notes, words):
    fails("forget", *words, *at("notes"), code=2)


def test_what_was_said_of_it_is_offered(work, tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    (work / "notes.txt").write_text(TINY_TEXT)
    ok("write", *at("notes"), "notes.txt", *model)
    talk = ("--max-new-tokens", 8, "--session", "x", *model)
    ok("chat", *at("notes"), *talk, input="Ada keeps bees.\n/quit\n")
    with sqlite3.connect("memories/manifest.sqlite") as database:
        drew = database.execute("SELECT bank, source, weight FROM drew").fetchall()
    database.close()
    assert drew and all(row[:2] == ("notes", "notes.txt") and row[2] >= 0.05 for row in drew)
    forget = ("forget", "notes.txt", *at("notes"))
    assert "chat/x" in cli(*forget, "--preview").stderr
    kept = cli(*forget, input="y\nn\n")
    assert kept.exit_code == 0 and "chat/x" in ok("sources", *at("notes"))
    ok("write", *at("notes"), "notes.txt", *model)
    ok("chat", *at("notes"), *talk[:2], "--session", "y", *model, input="Ada keeps bees.\n/quit\n")
    ok(*forget, "--generated", "--yes", *model)
    assert "chat/y" not in ok("sources", *at("notes"))


def test_an_index_is_made_used_and_dropped(work, tiny_model_dir):
    (work / "notes.txt").write_text(TINY_TEXT * 4)
    model = ("--model", tiny_model_dir)
    ok("write", *at("notes"), "notes.txt", *model, *CPU)
    generate = ("generate", "Ada keeps", *at("notes"), "--max-new-tokens", 4, *model, *CPU)
    recall = ("recall", "honey and wax", *at("notes"), "--json", *model, *CPU)
    exact = ok(*generate), json.loads(ok(*recall))
    for words in (generate, recall, ("chat", *at("notes"), *model, *CPU)):
        assert "longmem index --store memories --bank notes" in fails(*words, "--search", "index")

    shown = ok("index", *at("notes"), "--recall", 1, *model)
    assert "1.0" in shown and "2.1" in shown and "coordinates" in shown and "--search" in shown
    made = json.loads(ok("index", *at("notes"), "--recall", 1, "--text", "notes.txt", "--json", *model))
    assert (
        made["top_k"] == 8 and made["tokens"] == json.loads(ok("banks", "--store", "memories", "--json"))[0]["tokens"]
    )
    assert [(row["layer"], row["kv_head"]) for row in made["heads"]] == [(1, 0), (2, 1)]
    assert all(row["recall"] > 0.95 for row in made["heads"])
    assert ok(*generate, "--search", "index") == exact[0]
    hits = json.loads(ok(*recall, "--search", "index"))
    assert [hit["text"] for hit in hits] == [hit["text"] for hit in exact[1]]
    ok("chat", *at("notes"), "--search", "index", "--max-new-tokens", 3, *model, *CPU, input="Ada?\n/quit\n")

    assert "searched exactly" in ok("index", *at("notes"), "--drop")
    assert "There was none" in ok("index", *at("notes"), "--drop")
    assert json.loads(ok("index", *at("notes"), "--drop", "--json")) == {"bank": "notes", "dropped": False}
    assert "has no index" in fails(*generate, "--search", "index")


def test_what_an_index_needs(notes, tiny_model_dir, other_tiny_model_dir):
    model = ("--model", tiny_model_dir)
    assert "a share" in fails("index", *at("notes"), "--recall", 2, *model)
    assert "It has: notes" in fails("index", *at("other"), *model)
    assert "84 tokens" in fails("index", *at("notes"), *model)
    assert "weights differ" in fails("index", *at("notes"), "--model", other_tiny_model_dir)
    assert "nothing to search" in fails("generate", "a", "--search", "index", code=2)
    (notes / "short.txt").write_text("Ada.")
    (notes / "long.txt").write_text(TINY_TEXT * 2)
    ok("write", *at("notes"), "long.txt", *model, *CPU)
    assert "expected at least 136" in fails("index", *at("notes"), "--text", "short.txt", *model)
    words = ("chat", *at("new"), "--search", "index", *model, *CPU)
    assert "No bank 'new'" in fails(*words)


BENCH = ("--size", 0, "--size", 40, "--write", 30, "--prompt", 8, "--tokens", 5)


def test_bench_shows_what_memory_costs(notes, tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    shown = ok("bench", *BENCH, *at("notes"), *model)
    for words in ("backbone alone", "empty", "random", "notes, exact", "tokens/s", "of it, search", "Writing: "):
        assert words in shown
    assert "GB" not in shown and "torch" in shown
    figures = json.loads(ok("bench", *BENCH, "--json", "-", *model))
    assert [cost["size"] for cost in figures["costs"]] == [None, 0, 40] and figures["machine"]["processor"]
    ok("bench", *BENCH, "--json", "made/figures.json", "--plot", "made/cost.png", *model)
    assert json.loads(Path("made/figures.json").read_text())["config"]["sizes"] == [0, 40]
    assert Path("made/cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_bench_that_cannot_run_says_why(notes, tiny_model_dir, monkeypatch):
    model = ("--model", tiny_model_dir, *CPU)
    assert "tokens of a bench must be at least 5" in fails("bench", *BENCH[:-1], 4, *model)
    assert "needs a window of" in fails("bench", "--prompt", 2000, *model)
    assert "LONGMEM_STORE" in fails("bench", "--bank", "notes", *model, code=2)
    assert "has no index" in fails("bench", *at("notes"), "--search", "index", *model)
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert "longmem[plot]" in fails("bench", "--plot", "a.png", *model)


# ---- bad input changes nothing -----------------------------------------------------------------------------


def bad_files(work: Path) -> dict[str, str]:
    """Names of files that cannot be written, and what the error says."""
    (work / "empty.txt").write_text(" \n")
    (work / "mark.txt").write_bytes(b"\xef\xbb\xbf \n")
    (work / "binary.txt").write_bytes(b"PK\0\1")
    (work / "latin.txt").write_bytes("café".encode("latin-1"))
    (work / "folder").mkdir()
    with open(work / "huge.txt", "wb") as file:
        file.truncate(1 << 42)  # sparse
    return {
        "missing.txt": "does not exist",
        "empty.txt": "is empty",
        "mark.txt": "is empty",
        "binary.txt": "binary",
        "latin.txt": "not UTF-8",
        "folder": "is a folder",
        "huge.txt": "Too much text at once: about 1,466,015,503,",
        "notes.txt": "remembers 'notes.txt' already",
    }


def test_one_bad_file_and_nothing_is_written(notes, tiny_model_dir):
    (notes / "good.txt").write_text("The moon is full.")
    for file, message in bad_files(notes).items():
        error = fails("write", *at("notes"), "good.txt", file, "--model", tiny_model_dir, *CPU)
        assert message in error, file
    assert "given twice" in fails("write", *at("notes"), "good.txt", "good.txt", "--model", tiny_model_dir, *CPU)


def test_a_text_larger_than_memory_or_disk_is_refused(notes, tiny_model_dir, monkeypatch):
    (notes / "good.txt").write_text("The moon is full. " * 100)
    words = ("write", *at("notes"), "good.txt", "--model", tiny_model_dir, *CPU)
    with monkeypatch.context() as patch:
        patch.setattr(banks, "available_disk", lambda folder: 1000)
        assert "1.0 kB are. Nothing was written. Split" in fails(*words)
    # Enough to read and tokenize it, not enough for its keys and values:
    monkeypatch.setattr(banks, "available_memory", lambda: 200_000)
    assert "200.0 kB are available" in fails(*words)
    monkeypatch.undo()
    assert banks.available_memory() > 0 and banks.available_disk(Path("no/such/folder")) > 0


def test_unknown_banks_and_stores(notes, tiny_model_dir):
    for command in (("recall", "x"), ("generate", "x"), ("sources",), ("forget", "x")):
        assert "No bank 'other' in memories. It has: notes." in fails(*command, *at("other"))
        assert "No store in nowhere" in fails(*command, "--store", "nowhere", "--bank", "other")
    assert "cannot name a bank" in fails("write", *at("../x"), "notes.txt", "--model", tiny_model_dir, *CPU)
    assert "No store in nowhere" in fails("banks", "--store", "nowhere")


def test_a_bank_of_another_backbone(notes, other_tiny_model_dir):
    (notes / "good.txt").write_text("The moon is full.")
    model = ("--model", other_tiny_model_dir, *CPU)
    assert "was written by another model" in fails("write", *at("notes"), "good.txt", *model)
    assert "their weights differ" in fails("recall", "moon", *at("notes"), *model)
    assert "their weights differ" in fails("generate", "moon", *at("notes"), *model)
    assert "was written by another model" in fails("chat", *at("notes"), *model)


def test_an_unwritable_store(notes, tiny_model_dir, monkeypatch):
    (notes / "file").write_text("not a folder")
    model = ("--model", tiny_model_dir, *CPU)
    error = fails("write", "--store", "file/memories", "--bank", "n", "notes.txt", *model)
    assert "No store can be created in file/memories" in error
    (notes / "good.txt").write_text("The moon is full.")
    monkeypatch.setattr("longmem.store.store.can_write", lambda path: False)  # root may write everywhere
    assert "cannot be written, only read" in fails("write", *at("notes"), "good.txt", *model)
    assert "open for reading only" in fails("forget", "notes.txt", *at("notes"), "--yes")


def test_a_damaged_store(notes, tiny_model_dir):
    (segment,) = Path("memories/segments").iterdir()
    segment.write_bytes(segment.read_bytes()[:-1] + b"?")
    assert "is damaged: its sha256" in fails("recall", "moon", *at("notes"), "--model", tiny_model_dir, *CPU)


def test_a_damaged_store_is_verified_and_repaired(notes, tiny_model_dir):
    (notes / "more.txt").write_text("The moon is full.")
    model = ("--model", tiny_model_dir, *CPU)
    ok("write", *at("notes"), "more.txt", *model)
    assert "all is well" in ok("verify", "--store", "memories")
    assert json.loads(ok("verify", *at("notes"), "--json"))["ok"]
    hits = ok("recall", "moon", *at("notes"), *model, "--json")
    made = json.loads(ok("consolidate", *at("notes"), "--json"))
    assert (made["segments_before"], made["segments"]) == (2, 1)
    assert "1 segments are 1 now" in ok("consolidate", *at("notes"))
    (segment,) = Path("memories/segments").iterdir()
    segment.unlink()
    assert "longmem repair --store memories --bank notes" in fails("recall", "moon", *at("notes"), *model)
    before = disk()
    result = cli("verify", "--store", "memories")
    assert result.exit_code == 1 and disk() == before
    assert "missing: bank notes, source notes.txt, more.txt" in result.stdout and segment.name in result.stdout
    found = cli("verify", *at("notes"), "--json")
    assert found.exit_code == 1 and json.loads(found.stdout)["faults"][0]["kind"] == "missing"
    assert "Bank notes: 2 pieces encoded again" in ok("repair", *at("notes"), *model)
    assert "nothing to mend" in ok("repair", "--store", "memories", *model)
    assert json.loads(ok("repair", *at("notes"), *model, "--json"))[0]["pieces"] == 0
    assert "all is well" in ok("verify", "--store", "memories")
    assert ok("recall", "moon", *at("notes"), *model, "--json") == hits
    Path("memories/manifest.sqlite").unlink()
    assert "longmem repair --store memories" in fails("verify", "--store", "memories").replace("\n", " ")
    mended = cli("repair", "--store", "memories", *model)
    assert mended.exit_code == 0 and "made anew from its second copy" in mended.output
    assert ok("recall", "moon", *at("notes"), *model, "--json") == hits
    assert "It has: notes" in fails("verify", *at("x"))
    assert "It has: notes" in fails("repair", *at("x"), *model)
    assert "It has: notes" in fails("consolidate", *at("x"))


def test_a_damaged_checkpoint(notes, tiny_model_dir, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    weights = (tiny_model_dir / "sidenet.safetensors").read_bytes()
    (copy / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    words = ("generate", "x", *at("notes"), "--model", copy, *CPU)
    assert "sidenet.safetensors is missing" in fails(*words)
    (copy / "sidenet.safetensors").write_bytes(weights[:100])
    assert "is damaged" in fails(*words)
    (copy / "sidenet.safetensors").write_bytes(weights)
    (copy / "config.json").write_text("{")
    assert "cannot be read as JSON" in fails(*words)
    assert "longmem train" in fails("generate", "x", "--model", "no-such-model")


def test_a_device_that_is_not_there(notes, tiny_model_dir):
    (notes / "good.txt").write_text("The moon is full.")
    for command in (("write", *at("notes"), "good.txt"), ("recall", "x", *at("notes")), ("generate", "x")):
        error = fails(*command, "--model", tiny_model_dir, "--device", "cuda:99")
        assert "'cuda:99' is not on this machine, which has:" in error


def test_settings_out_of_range(notes, tiny_model_dir):
    model = ("--model", tiny_model_dir, *CPU)
    assert "temperature must be" in fails("generate", "x", "--temperature", -1, *model)
    assert "memory must be" in fails("chat", *at("new"), "--memory", 2, *model)
    assert "does not fit backbone" in fails("chat", *at("new"), "--window", 5000, *model)
    assert "top_k must be" in fails("recall", "x", *at("notes"), "--top-k", 0, *model)
    assert "query is empty" in fails("recall", " ", *at("notes"), *model)


# ---- train and measure -------------------------------------------------------------------------------------


@pytest.fixture
def texts(work, tiny_model_dir) -> tuple[str, ...]:
    """Options of the tiny backbone, with two text files and a JSONL file in `texts/`."""
    (work / "texts").mkdir()
    (work / "texts" / "a.txt").write_text(TINY_TEXT * 6)
    (work / "texts" / "b.md").write_text(TINY_TEXT[::-1] * 6)
    (work / "texts" / "c.jsonl").write_text(json.dumps({"text": TINY_TEXT.upper() * 6, "name": "c"}) + "\n")
    return ("--backbone", str(tiny_model_dir.parent / "backbone"))


SMALL = "--rows 2 --segment 16 --bank-tokens 64 --log-every 1 --eval-prefill 32 --eval-segments 2 --top-k 8"
SMALL_PROBE = "--texts 1 --remembered 64 --window 32 --sessions 1 --facts 2 --filler 8 --max-heads 2"


def train(*arguments) -> tuple:
    return ("train", *SMALL.split(), *CPU, *arguments)


def test_tokenize_train_evaluate(texts):
    assert "3 documents" in ok("tokenize", "texts", "--out", "tokens", *texts)
    shape = ("--heads", "1.0 2.1", "--heldout", "texts/a.txt", "--heldout", "texts/b.md", *texts)
    result = cli(*train("tokens", "texts/a.txt", "--out", "runs/x", "--steps", 3, "--save-every", 2, *shape))
    assert result.exit_code == 0, result.output
    assert "step 3 of 3: loss" in result.stderr and "gain from memory" in result.stdout
    assert {p.name for p in Path("runs/x").iterdir()} >= {"config.json", "sidenet.safetensors", "log.jsonl", "state"}

    assert "holds a run already" in fails(*train("tokens", "--out", "runs/x", "--steps", 3, *shape))
    assert "other settings: steps 3 (now 4)" in fails(
        *train("tokens", "texts/a.txt", "--out", "runs/x", "--steps", 4, "--save-every", 2, "--resume", *shape)
    )
    ok(*train("tokens", "texts/a.txt", "--out", "runs/x", "--steps", 3, "--save-every", 2, "--resume", *shape))
    ok(*train("tokens", "--out", "runs/warm", "--steps", 1, "--warm-from", "runs/x", *texts))
    more = "--newest-wins", "--passage-evidence", "--windows", "20+4"
    ok(*train("tokens", "--out", "runs/newest", "--steps", 1, "--warm-from", "runs/x", *more, *texts))
    grown = json.loads(Path("runs/newest/config.json").read_text())["sidenet"]
    assert grown["newest_wins"] and grown["passage_evidence"] and grown["encode"] == {"stride": 20, "overlap": 4}
    ok(*train("tokens", "texts/a.txt", "--mix", "0.75 0.25", "--out", "runs/mix", "--steps", 1, *shape))
    assert json.loads(Path("runs/mix/config.json").read_text())["training"]["shares"] == [0.75, 0.25]

    sizes = ("--segment", 16, "--segments", 2, "--prefill", 32, "--context", 16, "--stride", 16)
    words = ("eval", "perplexity", "tokens", "--model", "runs/x", *sizes, *CPU)
    names = "backbone_local", "backbone_window", "bank_off", "bank_on", "bank_wrong"
    figures = json.loads(ok(*words, "--protocol", "blocks", "--json", "-"))
    assert all(figures[name] > 1 for name in names) and figures["documents"] == 3 and figures["tokens"] == 96
    assert len(figures["gain_interval"]) == 2 and set(figures["intervals"]) == set(names)
    shown = ok(*words, "--only", "bank_off,bank_on", "--json", "figures.json")
    assert "bank empty" in shown and "bank wrong" not in shown and "96 tokens of 3 documents scored." in shown
    assert json.loads(Path("figures.json").read_text())["gain_percent"] is not None
    crowded = ok(*words, "--only", "bank_crowded,bank_focused", "--focus", 2048, "--json", "figures.json")
    assert "bank among others, a part read" in crowded
    figures = json.loads(Path("figures.json").read_text())
    assert figures["bank_focused"] == pytest.approx(figures["bank_crowded"])  # all of so few tokens is read
    assert "focus must be 0" in fails(*words, "--focus", 9)
    assert "Unknown conditions" in fails(*words, "--only", "bank_of")
    assert "needs (remembered and scored)" in fails(*words, "--prefill", 100_000)


def test_recall_of_hidden_things(notes, tiny_model_dir):
    words = ("eval", "recall", "--model", tiny_model_dir, "--filler", "notes.txt", "--passage", 32, *CPU)
    sizes = ("--remembered", 64, "--remembered", 512, "--cases", 1)
    result = cli(*words, *sizes, "--json", "new/figures.json")
    assert result.exit_code == 0, result.output
    assert "passkey, 512 remembered" in result.stdout and "in the backbone's window" in result.stdout
    assert "warning: the filler is too short" in result.stderr
    saved = Path("new/figures.json").read_text()
    assert set(json.loads(saved)["groups"]) == {"passkey", "pairs"}
    printed = ok(*words, *sizes, "--task", "passkey", "--json", "-")
    assert json.loads(printed)["groups"]["passkey"] == json.loads(saved)["groups"]["passkey"]
    assert json.loads(saved)["config"]["focus"] == FOCUS
    for tokens in (0, 2048):
        printed = ok(*words, "--remembered", 64, "--cases", 1, "--focus", tokens, "--json", "-")
        assert json.loads(printed)["config"]["focus"] == tokens
    assert "focus must be 0" in fails(*words, "--focus", 9)
    assert "some of passkey, pairs; got passkeys" in fails(*words, "--task", "passkeys")
    assert "at least one passage" in fails(*words, "--remembered", 8)
    assert "expected a file" in fails(*words, "--json", ".", code=2)


def test_replies_to_ordinary_prompts(notes, tiny_model_dir):
    words = ("eval", "ordinary", "--model", tiny_model_dir, "--prompts", 2, "--tokens", 3, *CPU)
    shown = ok(*words, "--filler", "notes.txt", "--passage", 32, "--remembered", 64, "--json", "figures.json")
    assert all(title in shown for title in ("of 2", "first 3 tokens", "bank on", "bank empty"))
    assert len(json.loads(Path("figures.json").read_text())["cases"]) == 2
    assert json.loads(ok(*words, "--remembered", 0, "--chats", 0, "--json", "-"))["bank_tokens"] == 0


def test_recall_of_facts(notes, tiny_model_dir):
    small = ("--sessions", 2, "--facts", 1, "--small-talk", 1, "--cases", 3)
    words = ("eval", "facts", "--model", tiny_model_dir, *small, *CPU)
    shown = ok(*words, "--filler", "notes.txt", "--passage", 32, "--remembered", 64, "--json", "figures.json")
    assert all(title in shown for title in ("told once", "corrected later", "never told", "stale"))
    saved = json.loads(Path("figures.json").read_text())
    assert set(saved["groups"]) == {"once", "corrected", "silent"} and len(saved["cases"]) == 3
    assert json.loads(ok(*words, "--remembered", 0, "--json", "-"))["bank_tokens"] == 0
    assert saved["config"]["focus"] == FOCUS
    for tokens in (0, 2048):
        printed = ok(*words, "--remembered", 0, "--focus", tokens, "--json", "-")
        assert json.loads(printed)["config"]["focus"] == tokens
    assert "focus must be 0" in fails(*words, "--focus", 9)
    assert "4 conversations" in ok("eval", "facts", "--cases", 4, "--write", "new/chats.jsonl")
    rows = [json.loads(line) for line in Path("new/chats.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["once", "corrected", "silent", "once"]
    telling = next(t for t in rows[0]["tellings"] if t["attribute"] == rows[0]["attribute"])
    content = rows[0]["sessions"][telling["session"]][telling["turn"]]["content"]
    assert content[slice(*telling["span"])] == rows[0]["answer"]
    assert "sessions must be at least 2" in fails(*words, "--sessions", 1)


def test_the_recipe_of_the_paper(texts):
    ok(*train("texts", "--out", "runs/paper", "--steps", 1, "--recipe", "paper", "--no-memory", *texts))
    sidenet = json.loads(Path("runs/paper/config.json").read_text())["sidenet"]
    assert sidenet["memory_heads"] == [[3, 0], [3, 1]]  # 0.63 of 4 layers
    assert (sidenet["chunk_size"], sidenet["fusion"]) == (4, "gate")


def test_probe_writes_what_train_reads(texts):
    files = ("--out", "probe.json", "--plot", "probe.png")
    shown = ok("probe", "texts", *files, *SMALL_PROBE.split(), *texts, *CPU)
    assert "look-up" in shown and Path("probe.png").stat().st_size > 0
    found = json.loads(Path("probe.json").read_text())
    found["memory_heads"] = [[2, 1]]
    Path("probe.json").write_text(json.dumps(found))
    ok(*train("texts", "--out", "runs/p", "--steps", 1, "--probe", "probe.json", *texts))
    assert json.loads(Path("runs/p/config.json").read_text())["sidenet"]["memory_heads"] == [[2, 1]]


def test_histories_are_written_tokenised_and_trained_on(texts):
    lengths = ("--tokens", 3000, "--shortest", 1500, "--longest", 1600, "--distance", 100)
    told = ok("histories", "texts", "--out", "told", *lengths, *texts)
    assert "histories" in told and "of them answers" in told
    assert ok("histories", "texts", "--out", "told.jsonl", *lengths, *texts).startswith(
        "told.jsonl: histories of 3,000"
    )
    ok("tokenize", "told.jsonl", "--out", "again", *texts)
    for name in ("tokens.npy", "answers.npy", "documents.json"):
        assert (Path("told") / name).read_bytes() == (Path("again") / name).read_bytes()
    options = ("--heads", "1.0", "--mix", "0.5 0.5", "--answer-weight", 5, "--steps", 3)
    ok(*train("texts", "told", "--out", "runs/told", *options, *texts))
    training = json.loads(Path("runs/told/config.json").read_text())["training"]
    assert training["train"]["answer_weight"] == 5 and training["shares"] == [0.5, 0.5]
    assert "longer than the distance" in fails("histories", "texts", "--out", "x", "--distance", 20000, *texts)
    assert "is a file" in fails("histories", "texts", "--out", "texts/a.txt", *lengths, *texts)


def test_replies_are_written_and_stand_in_histories(texts):
    from longmem.histories import read_replies

    said = ok("replies", "--out", "talk/replies.jsonl", "--count", 12, "--longest", 60, *texts, *CPU)
    replies = read_replies(Path("talk/replies.jsonl"))
    assert f"{len(replies)} replies to 12 prompts" in said
    lengths = ("--tokens", 3000, "--shortest", 1500, "--longest", 1600, "--distance", 100)
    share = ("--reply-share", 0.9)
    ok("histories", "texts", "--out", "told.jsonl", *lengths, "--replies", "talk/replies.jsonl", *share, *texts)
    written = [json.loads(line)["text"] for line in Path("told.jsonl").read_text("utf-8").splitlines()]
    assert any(f"{reply.prompt}<|end|>" in text for reply in replies for text in written)
    Path("bad.jsonl").write_text("{}\n")
    wrong = fails("histories", "texts", "--out", "x", *lengths, "--replies", "bad.jsonl", *texts)
    assert "bad.jsonl, line 1: expected" in wrong and "longmem replies" in wrong


def test_training_refuses_what_cannot_work(texts, notes):
    heads = ("--heads", "1.0")

    def refused(*arguments, code=1):
        return fails(*train(*arguments, "--out", "runs/bad"), *texts, code=code)

    assert "longmem probe" in refused("texts")
    assert "expected layer.head pairs" in refused("texts", "--heads", "17,1", code=2)
    assert "expected 1 shares such as" in refused("texts", *heads, "--mix", "0.8 0.2", code=2)
    assert "add up to 1; got 0.8" in refused("texts", *heads, "--mix", "0.8")
    assert "give one of them" in refused("texts", *heads, "--recipe", "paper", code=2)
    assert "Memory heads [(9, 0)] do not exist" in refused("texts", "--heads", "1.0 9.0")
    assert "holds no state to resume from" in refused("texts", *heads, "--resume")
    assert "notes.txt is a file" in fails(*train("texts", *heads, "--out", "notes.txt"), *texts)
    assert "does not exist" in refused("nowhere.txt", *heads)
    assert "No document has two segments" in refused("texts", *heads, "--segment", 9000)
    assert "needs (remembered and scored)" in refused("texts", *heads, "--heldout", "texts", "--eval-prefill", 10**6)
    assert "rows must be at least 1" in refused("texts", *heads, "--rows", 0)
    assert "is not on this machine" in refused("texts", *heads, "--device", "cuda:99")
    assert "is missing" in refused("texts", "--probe", "nothing.json")
    assert "cannot be loaded" in fails(*train("texts", *heads, "--out", "runs/bad", "--backbone", "no/model"))


def test_a_missing_optional_package(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = fails("probe", "texts", "--plot", "probe.png", *texts, *CPU)
    assert "needs matplotlib" in error and "pip install 'longmem[plot]'" in error


def test_segments_lie_elsewhere(work, tiny_model_dir):
    elsewhere, model = f"file://{work}/elsewhere", ("--model", tiny_model_dir, *CPU)
    ok("place", elsewhere, "--store", "away")
    (work / "moon.txt").write_text("The moon is made of rock.", encoding="utf-8")
    ok("write", "moon.txt", "--bank", "notes", "--store", "away", *model)
    assert len(list((work / "elsewhere").glob("*.safetensors"))) == 1
    assert "all is well" in ok("verify", "--store", "away")
    assert "of another store" in fails("place", elsewhere, "--store", "other")


def test_a_bank_is_encrypted_and_its_key_destroyed(notes, monkeypatch):
    pytest.importorskip("cryptography")
    assert "memories.keys" in ok("encrypt", "notes", "--store", "memories").replace("\n", "")
    assert "encrypted already" in fails("encrypt", "notes", "--store", "memories")
    assert "plain=True" in fails("export", "notes.longmem", *at("notes"))
    assert "notes.longmem is not" in ok("export", "notes.longmem", *at("notes"), "--plain")
    assert "notes.txt" in ok("sources", *at("notes"))
    assert "yes" in ok("banks", "--store", "memories")
    Path("memories.keys").rename("elsewhere")
    assert "key missing" in ok("banks", "--store", "memories")
    assert "is not in" in fails("sources", *at("notes"))
    monkeypatch.setenv("LONGMEM_KEYS", "elsewhere")
    ok("sources", *at("notes"))
    monkeypatch.delenv("LONGMEM_KEYS")
    ok("sources", *at("notes"), "--keys", "elsewhere")
    Path("elsewhere").rename("memories.keys")
    assert cli("destroy-key", "notes", "--store", "memories", input="n\n").exit_code == 1
    ok("sources", *at("notes"))
    assert "Receipt 1: " in ok("destroy-key", "notes", "--store", "memories", "--yes")
    assert "all: its key" in ok("receipts", "--store", "memories")
    assert json.loads(ok("banks", "--store", "memories", "--json"))[0]["key"] == "destroyed"
    assert "was destroyed" in fails("sources", *at("notes"))
    assert "no key" in fails("destroy-key", "other", "--store", "memories", "--yes")
