"""ChatSession: a conversation that never ends and is remembered.

A conversation is one stream of tokens through one `LocalWindow`; each turn adds its own tokens and nothing is read
twice. When a turn ends, its tokens (the user's and the assistant's) are appended to the bank under `chat/<name>`, so a
crash loses at most the turn it interrupts. They stay in the window as well until they are its older half; until then
the model reads the bank without them, so it never sees a token twice, and when they leave the window they are not
written again. The system prompt is not remembered: it would be repeated in every session.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from types import TracebackType
from typing import Any, Self

from jinja2 import TemplateError

from longmem.errors import ConfigError
from longmem.generation import GenerationConfig, Piece, continue_text, sampler, stop_token_ids
from longmem.group import Readable
from longmem.local_window import LocalWindow
from longmem.model import LongMem
from longmem.recall import Hit
from longmem.text import tokenize

# Stands for an earlier reply where the template is asked how the next turn begins.
_REPLY = "8c1f9e"


class ChatSession:
    """A conversation with memory. What was said in earlier sessions with the same bank is remembered.

    Args:
        bank: what is remembered, and where this conversation goes (of a group, the first); None keeps only the window.
        name: the conversation is source `chat/<name>` of the bank, continued if it is there already.
        system: the system prompt, the template's own by default.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses the system prompt.
        BankMismatchError: the bank belongs to another model.
    """

    def __init__(
        self,
        model: LongMem,
        bank: Readable | None,
        name: str,
        config: GenerationConfig | None = None,
        *,
        system: str | None = None,
    ) -> None:
        if not name.strip():
            raise ConfigError(f"A conversation needs a name that is not empty; got {name!r}.")
        if not getattr(model.tokenizer, "chat_template", None):
            raise ConfigError(
                f"The tokenizer of backbone {model.backbone.name!r} has no chat template, so it cannot chat. "
                "Continue text with `generate`, or use an instruction-tuned backbone."
            )
        self.model = model
        self.config = config or GenerationConfig()
        self.source = f"chat/{name}"
        self._system = system
        self._window = LocalWindow(model, bank, self.config, source=self.source)
        self._generator = sampler(self.config)
        self._started = False
        self._closed = False
        self._first_turn("-")  # a template that refuses the system prompt should do so now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def send(self, text: str) -> Iterator[Piece]:
        """Say something and stream the reply. The turn is remembered when the reply ends, or its iterator is closed.

        Raises:
            ConfigError: the text is empty, or the session is closed.
        """
        if self._closed:
            raise ConfigError(f"Conversation {self.source!r} is closed. Begin a new session to continue it.")
        if not text.strip():
            raise ConfigError("There is nothing to answer: the message is empty.")
        return self._turn(text)

    @property
    def recalled(self) -> tuple[Hit, ...]:
        """Passages that the window shows, put there for the last turn (`GenerationConfig.recall`)."""
        return self._window.recalled

    def close(self) -> None:
        """End the session. Everything said is in the bank already unless a reply is still being streamed."""
        if not self._closed:
            self._closed = True
            self._remember()

    def _turn(self, text: str) -> Iterator[Piece]:
        window = self._window
        if self._started:
            turn = tokenize(self.model, self._next_turn(text))
            # The model has usually ended its reply with the token that the template would put there.
            if turn[:1] == window.token_ids[-1:] and turn[0] in self._ends:
                del turn[0]
        else:
            system, first = self._first_turn(text)
            turn = tokenize(self.model, first)
            head = tokenize(self.model, system)
            # Some templates begin with the very token that the window puts first.
            window.extend(head[head[:1] == [self.model.backbone.prefix_token_id] :], remember=False)
            self._started = True
        window.recollect(text, room=len(turn))
        try:
            yield from continue_text(window, turn, self._generator)
        finally:
            self._remember()

    def _remember(self) -> None:
        if self.config.remember:
            self._window.remember()

    @property
    def _ends(self) -> frozenset[int]:
        return stop_token_ids(self.model, self.config)

    def _first_turn(self, text: str) -> tuple[str, str]:
        """How the template opens a conversation: what comes before the user's turn, and the turn."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        opening = self._render([*system, {"role": "user", "content": text}])
        # A later turn has no system prompt, so what both end with is the turn.
        backwards = zip(reversed(opening), reversed(self._next_turn(text)), strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
        return opening[: len(opening) - common], opening[len(opening) - common :]

    def _next_turn(self, text: str) -> str:
        """What the template puts between a reply and the next one."""
        messages = [("user", "-"), ("assistant", _REPLY), ("user", text)]
        _, _, turn = self._render([{"role": role, "content": content} for role, content in messages]).partition(_REPLY)
        return turn

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self.model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(
                f"The chat template of backbone {self.model.backbone.name!r} refuses this conversation: {error}. "
                "Some take no system prompt: leave it out, or put it into the first message."
            ) from error


__all__ = ["ChatSession"]
