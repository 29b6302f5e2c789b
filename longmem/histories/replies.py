"""What the backbone alone replies to ordinary prompts: trained on, they keep a SideNet from answering otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longmem.batch import generate_batch
from longmem.errors import SourceError
from longmem.evals.ordinary import conversation_ids
from longmem.generation import GenerationConfig
from longmem.model import LongMem

# Where a reply may be cut: behind a sentence, but not behind the number of a list, or behind a line.
_FINISHED = re.compile(r'(?<![\s\d]\d)(?<!^\d)[.!?…]["”)]?(?=\s|$)|\S(?=\n)')
_SENTENCE = re.compile(r"\S[^.!?\n]*[.!?\n]*")
# Tokens of the window, where a prompt and a reply have their places.
_WINDOW = 512


@dataclass(frozen=True)
class Reply:
    """What a user says and what the backbone replies."""

    prompt: str
    reply: str


def generate_replies(
    model: LongMem, prompts: Sequence[str], *, longest: int = 80, rows: int = 32
) -> Iterator[tuple[int, Reply | None]]:
    """The backbone's most likely replies, each in a conversation of its own, as they are ready.

    Args:
        longest: tokens of a reply, which is cut behind its last sentence if it has more.
        rows: prompts side by side.

    Yields:
        Number of the prompt, and the reply; None if it has no finished sentence, or is the prompt again.
    """
    texts = [conversation_ids(model, prompt) for prompt in prompts]
    ends = model.tokenizer.eos_token_id
    window = min(_WINDOW, model.backbone.max_positions)
    config = GenerationConfig(max_new_tokens=longest, memory=0.0, window=window, remember=False)
    pieces: dict[int, list[str]] = {}
    lengths: dict[int, int] = {}
    for number, piece in generate_batch(model, texts, config=config, rows=rows):
        pieces.setdefault(number, []).append(piece.text)
        lengths[number] = lengths.get(number, 0) + 1
        ended = piece.token_id == ends
        if ended or lengths[number] == longest:
            text = "".join(pieces.pop(number)).strip()
            text = unrepeated(text if ended else finished(text))
            # An echo of the prompt is no reply.
            yield number, Reply(prompts[number], text) if text not in ("", prompts[number]) else None


def finished(text: str) -> str:
    """A text up to its last finished sentence or line; empty if there is none."""
    ends = [match.end() for match in _FINISHED.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def unrepeated(text: str) -> str:
    """A text up to where it begins to say the same again."""
    said: set[str] = set()
    for match in _SENTENCE.finditer(text):
        sentence = match[0].strip(" .,!?\n").lower()
        if sentence in said:
            return text[: match.start()].strip()
        if len(sentence) > 8:
            said.add(sentence)
    return text


def read_replies(path: Path) -> tuple[Reply, ...]:
    """Replies from lines of JSON, `prompt` and `reply` in each.

    Raises:
        SourceError: the file has no line, or another one.
    """
    replies = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            reply = Reply(fields["prompt"], fields["reply"])
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f'{path}, line {number}: expected {{"prompt": …, "reply": …}}. `longmem replies` writes such files.'
            ) from error
        if not all(isinstance(text, str) and text.strip() for text in (reply.prompt, reply.reply)):
            raise SourceError(f"{path}, line {number}: prompt and reply must be texts that are not empty.")
        replies.append(reply)
    if not replies:
        raise SourceError(f"{path} has no replies in it. `longmem replies --out {path}` writes some.")
    return tuple(replies)
