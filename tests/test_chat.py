from __future__ import annotations

import dataclasses

import pytest
from texts import FACTS, tiny, tokenizer

from longmem.backbone import Backbone
from longmem.chat import ChatSession
from longmem.errors import ConfigError
from longmem.generation import GenerationConfig
from longmem.model import LongMem
from longmem.store import MemoryStore

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|endoftext|>system\nBe kind.<|end|>\n{% endif %}"
    "<|endoftext|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)
CONFIG = GenerationConfig(max_new_tokens=6, window=100)


@pytest.fixture
def model(monkeypatch) -> LongMem:
    monkeypatch.setattr(tokenizer(), "chat_template", TEMPLATE)
    return tiny()


def say(session: ChatSession, text: str) -> str:
    return "".join(piece.text for piece in session.send(text))


def window_text(session: ChatSession) -> str:
    return tokenizer().decode(session._window.token_ids, clean_up_tokenization_spaces=False)


def test_the_stream_is_what_the_template_would_give(model):
    session = ChatSession(model, model.new_bank(), "a", CONFIG)
    replies = [say(session, text) for text in ("Hello", "And you?")]
    messages = []
    for text, reply in zip(("Hello", "And you?"), replies, strict=True):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    whole = tokenizer().apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    # The window puts the first token there itself.
    assert ("<|endoftext|>" + window_text(session)).startswith(whole)


def test_a_reply_that_ended_itself_is_not_ended_twice(model):
    first = ChatSession(model, None, "a", CONFIG)
    ids = [piece.token_id for piece in first.send("Hello")]
    end = tokenizer().eos_token_id
    session = ChatSession(model, None, "a", CONFIG)
    pieces = session.send("Hello")
    assert next(pieces).token_id == ids[0]
    pieces.close()
    session._window.extend([end])
    list(session.send("More"))
    assert "<|end|><|end|>" not in window_text(session)
    assert window_text(session).count("<|end|>") == 4


def test_every_turn_is_in_the_bank_when_it_ends(model):
    bank = model.new_bank()
    session = ChatSession(model, bank, "ada", CONFIG)
    assert bank.sources == ()
    for n, text in enumerate(["Ada keeps bees.", "Boats are green."], start=1):
        reply = say(session, text)
        remembered = bank.text_of("chat/ada")
        assert remembered.count("user\n") == n
        assert text in remembered and remembered.endswith(f"assistant\n{reply}")
    assert "Be kind" not in remembered
    tokens = bank.tokens_of("chat/ada").tolist()
    assert tokens == session._window.token_ids[-len(tokens) :]
    session.close()
    assert len(bank) == len(tokens)


def test_a_long_conversation_is_remembered_once(model):
    bank = model.new_bank()
    config = dataclasses.replace(CONFIG, window=32)
    stream: list[int] = []
    with ChatSession(model, bank, "ada", config) as session:
        extend = session._window.extend

        def recorded(token_ids, *, remember=True, silent=False):
            if remember:
                stream.extend(token_ids)
            return extend(token_ids, remember=remember, silent=silent)

        session._window.extend = recorded
        moved = [sum(piece.moved for piece in session.send(FACTS[:50])) for _ in range(4)]
    assert all(moved[1:])
    assert bank.tokens_of("chat/ada").tolist() == stream


def test_an_interrupted_reply_is_remembered(model):
    bank = model.new_bank()
    pieces = ChatSession(model, bank, "ada", CONFIG).send("Ada keeps bees.")
    next(pieces)
    pieces.close()
    assert "Ada keeps bees." in bank.text_of("chat/ada")


def test_a_later_session_remembers_earlier_ones(model, tmp_path):
    with MemoryStore.open(tmp_path) as store:
        bank = store.bank("mine", spec=model.bank_spec)
        with ChatSession(model, bank, "ada", CONFIG) as session:
            say(session, "Ada keeps bees.")
    with MemoryStore.open(tmp_path) as store:
        bank = store.bank("mine")
        before = bank.text_of("chat/ada")
        session = ChatSession(model, bank, "ada", dataclasses.replace(CONFIG, attribute=True))
        pieces = list(session.send("What does Ada keep?"))
        assert {one.source for piece in pieces for one in piece.sources} == {"chat/ada"}
        # What is still in the window is no memory.
        assert all(one.end <= len(before) for piece in pieces for one in piece.sources)
        assert bank.text_of("chat/ada").startswith(before) and "What does Ada keep?" in bank.text_of("chat/ada")


def test_what_is_said_is_not_written_without_leave(model):
    bank = model.new_bank()
    with ChatSession(model, bank, "ada", dataclasses.replace(CONFIG, remember=False)) as session:
        say(session, "Hello")
    assert len(bank) == 0
    assert say(ChatSession(model, None, "ada", CONFIG), "Hello") is not None


def test_a_conversation_goes_on_while_its_bank_grows_large(model):
    said, sizes = [], []
    for cache in (True, False):
        bank = model.new_bank()
        model.write_text(bank, FACTS * 17, source="facts")
        assert 1900 < len(bank) < 2048
        config = dataclasses.replace(CONFIG, focus=2048, window=80, stop_token_ids=(), cache=cache)
        with ChatSession(model, bank, "ada", config) as session:
            for number in range(9):
                said.append(say(session, f"Who paints boats in Brest, {number}?"))
                sizes.append((len(bank), len(session._window.visible)))
    assert said[:9] == said[9:] and sizes[:9] == sizes[9:]
    assert sizes[0][0] < 2048 < sizes[-1][0] and all(read <= 2048 for _, read in sizes)


def test_a_turn_shows_what_it_recalls(model):
    bank = model.new_bank()
    for number, text in enumerate(FACTS.split(". ")[:2]):
        model.write_text(bank, text, source=f"note {number}")
    config = dataclasses.replace(CONFIG, recall=1, window=120)
    session = ChatSession(model, bank, "a", config, system="Be brief.")
    for turn, opening in (("Who keeps bees?", "Be brief."), ("Who paints boats?", "")):
        say(session, turn)
        (hit,) = session.recalled
        text = window_text(session)
        assert hit.text in text and text.count(hit.text) == 1 and text.index(hit.text) < text.index(turn)
        assert opening in text
    session.close()
    assert FACTS[:20] not in bank.text_of("chat/a")
    assert "Who paints boats?" in bank.text_of("chat/a")


def test_system_prompt(model):
    session = ChatSession(model, model.new_bank(), "a", CONFIG, system="Be brief.")
    say(session, "Hello")
    assert window_text(session).startswith("system\nBe brief.<|end|>\n<|endoftext|>user\nHello<|end|>")
    assert "brief" not in session._window.bank.text_of("chat/a")


def test_mistakes(model, monkeypatch):
    session = ChatSession(model, None, "a", CONFIG)
    with pytest.raises(ConfigError, match="empty"):
        session.send("  ")
    with pytest.raises(ConfigError, match="name"):
        ChatSession(model, None, " ", CONFIG)
    session.close()
    with pytest.raises(ConfigError, match="closed"):
        session.send("Hello")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(tokenizer(), "chat_template", refusing)
    with pytest.raises(ConfigError, match="no system role"):
        ChatSession(model, None, "a", CONFIG, system="Be brief.")
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        ChatSession(model, None, "a", CONFIG)


def test_a_backbone_without_tokenizer(model):
    bare = LongMem(Backbone(model.backbone.model), model.config)
    with pytest.raises(ConfigError, match="tokenizer"):
        ChatSession(bare, None, "a", CONFIG)
