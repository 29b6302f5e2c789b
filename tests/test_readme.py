"""The README's code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longmem.cli import app
from longmem.model import SHIPPED

README = Path(__file__).parent.parent / "README.md"

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "smollm2-135m" / "sidenet.safetensors").is_file(), reason="no SideNet ships with this checkout"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("We met in Lisbon, at the old harbour.\n\nThe soup was cold and the music was loud.\n")
    (code,) = blocks("python")
    exec(compile(code, str(README), "exec"), {})
    assert "notes.txt:0 We met in Lisbon" in capsys.readouterr().out


def test_shell(smollm2, tmp_path, monkeypatch):
    """Every command line of the README is one that exists, and those that need no training run."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(README.read_text(encoding="utf-8")[:2000])
    lines = [line.partition("  #")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("longmem ")]
    assert len(commands) > 8
    runner = CliRunner()
    for command in commands:
        words = [word for word in command if re.fullmatch(r"[a-z]+", word)]
        path = words[:2] if words[0] == "eval" else words[:1]
        options = [word for word in command if word.startswith("--")]
        usage = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
        assert usage.exit_code == 0 and all(option in usage.output for option in options), command
        if path[0] in ("setup", "write", "recall"):
            ran = runner.invoke(app, command)
            assert ran.exit_code == 0, (command, ran.output)
