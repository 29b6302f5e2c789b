"""Prompts are many and none is kept for evaluation; replies are the backbone's own and end where a sentence does."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import tiny
from test_histories import flat, unseen

from longmem.errors import ConfigError, SourceError
from longmem.evals import ordinary
from longmem.evals.ordinary import conversation_ids
from longmem.histories import PROMPTS, Prompts, Reply, generate_replies, read_replies
from longmem.histories.replies import finished, unrepeated
from longmem.model import LongMem


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    made = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    tiny.randomise(made.sidenet, 0.5)
    return made


# ---- prompts -------------------------------------------------------------------------------------------------


def test_prompts_are_many_and_different() -> None:
    prompts = list(PROMPTS.draw(3000))
    assert len(set(prompts)) == 3000
    assert all(text == text.strip() and text[0] == text[0].upper() and len(text) > 1 for text in prompts)
    assert not any(re.search(r"[{}|]|  ", text) for text in prompts)
    # Nobody asks for what must be remembered: what a user has is asked for nowhere.
    assert not any(re.search(r"\b(?:what|who|where|when|which)\b[^.?!]* (?:is|was|are) my\b", p, re.I) for p in prompts)


def test_a_seed_gives_the_same_prompts() -> None:
    assert list(islice(PROMPTS.draw(1000, seed=3), 50)) == list(PROMPTS.draw(50, seed=3)) != list(PROMPTS.draw(50))


def test_every_frame_is_used_and_filled() -> None:
    used = {name for frame in PROMPTS.frames for name in re.findall(r"{(\w+)}", frame)}
    assert used == PROMPTS.words.keys()
    assert len(set(PROMPTS.frames)) == len(PROMPTS.frames)
    read = Prompts.read("# talk\n\nx: a | b | c\n+ {x} and {x}? | so\n")
    assert set(read.draw(7)) == {"So", *(f"{x.upper()} and {y}?" for x in "abc" for y in "abc" if x != y)}


def test_more_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="9 different prompts were asked for"):
        list(Prompts(("one", "two"), {}).draw(9))


def test_no_prompt_is_kept_for_evaluation() -> None:
    together = "|".join(f" {flat(text)} " for text in PROMPTS.draw(4000))
    kept = [*unseen(), *ordinary.PROMPTS]
    assert [text for text in kept if f" {flat(text)} " in together] == []


# ---- replies -------------------------------------------------------------------------------------------------


def test_replies_are_those_of_the_backbone_alone(model: LongMem) -> None:
    prompts = ["Who are you?", "Count to three.", "Hello!"]
    found = dict(generate_replies(model, prompts, longest=20, rows=2))
    assert found.keys() == {0, 1, 2}
    for number, prompt in enumerate(prompts):
        pieces = list(model.generate(conversation_ids(model, prompt), max_new_tokens=20, memory=0.0))
        said = "".join(piece.text for piece in pieces).strip()
        ended = pieces[-1].token_id == model.tokenizer.eos_token_id
        expected = unrepeated(said if ended else finished(said))
        assert found[number] == (Reply(prompt, expected) if expected else None)


def test_replies_end_with_a_sentence() -> None:
    assert finished("Yes. It is 3.5 metres. And then") == "Yes. It is 3.5 metres."
    assert finished("Two things:\n\n1. Bread\n2. But") == "Two things:\n\n1. Bread"
    assert finished('He said "No." And') == 'He said "No."'
    assert finished("1. Tea") == finished("no end") == finished("") == ""


def test_replies_do_not_go_round_in_circles() -> None:
    assert unrepeated("I like bees. I like bees a lot. I like bees.") == "I like bees. I like bees a lot."
    assert unrepeated("A kite,\nsoaring and soaring,\nSoaring and soaring.") == "A kite,\nsoaring and soaring,"
    assert unrepeated("Ha! Ha! Ha! It works.") == "Ha! Ha! Ha! It works."


def test_replies_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"prompt": "Hi!", "reply": "Hello.\\nHow are you?"}\n', encoding="utf-8")
    assert read_replies(path) == (Reply("Hi!", "Hello.\nHow are you?"),)
    for line, mistake in (
        ("", "has no replies in it"),
        ("hello", "line 1: expected"),
        (json.dumps({"prompt": "Hi!"}), "line 1: expected"),
        (json.dumps(["Hi!"]), "line 1: expected"),
        (json.dumps({"prompt": "Hi!", "reply": " "}), "line 1: prompt and reply must be texts"),
    ):
        path.write_text(line + "\n" * bool(line), encoding="utf-8")
        with pytest.raises(SourceError, match=mistake):
            read_replies(path)
