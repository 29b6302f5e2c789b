"""Several contenders that ask the model while they learn, as MemGPT does, in lockstep: what each of them asks next is
answered side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from longmem.contenders.contender import Posed
from longmem.contenders.reader import Reader
from longmem.contenders.together import Speaker, log_likelihoods


@dataclass(frozen=True)
class Scores:
    """How probable each of some continuations of a window is."""

    window: Posed
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Speech:
    """What would follow a window."""

    window: Posed
    most: int
    stop: tuple[str, ...]


class Lockstep:
    """Runs scripts, such as a contender's `prepare`, that read through readers of `reader`.

    Each script has a thread, of which one runs at a time, until it asks something: so a script is written as if it were
    alone, nothing races, and what is read together is the same in every run.

    Args:
        speaker: continues their windows.
    """

    def __init__(self, speaker: Speaker) -> None:
        self.model, self.memory, self._speaker = speaker.model, speaker.memory, speaker
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._script = threading.local()

    def reader(self) -> Reader:
        return _Asking(self)

    def run(self, scripts: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the scripts return, in their order; raises what the first one to fail raises."""
        answers = [SimpleQueue[Any]() for _ in scripts]
        results: list[Any] = [None] * len(scripts)
        for number, script in enumerate(scripts):
            run = threading.Thread(target=self._run, args=(script, number, answers[number], results), daemon=True)
            run.start()
        waiting: dict[int, Any] = dict.fromkeys(range(len(scripts)))
        while waiting:
            asked: dict[int, Any] = {}
            for number, answer in waiting.items():
                answers[number].put(answer)
                request = self._asked.get()
                if isinstance(request, BaseException):
                    raise request
                if request is not None:
                    asked[number] = request
            waiting = dict(zip(asked, self._answers(list(asked.values())), strict=True))
        return results

    def ask(self, request: Scores | Speech) -> Any:
        """Called by a script: hands over to the others until there is an answer."""
        self._asked.put(request)
        return self._script.answers.get()

    def _run(self, script: Callable[[], Any], number: int, answers: SimpleQueue[Any], results: list[Any]) -> None:
        self._script.answers = answers
        answers.get()
        try:
            results[number] = script()
        except Exception as error:
            self._asked.put(error)
        else:
            self._asked.put(None)

    def _answers(self, requests: Sequence[Scores | Speech]) -> list[Any]:
        found: dict[int, Any] = {}
        scores = [(n, each) for n, each in enumerate(requests) if isinstance(each, Scores)]
        asked = [(each.window, after) for _, each in scores for after in each.continuations]
        losses = iter(log_likelihoods(self.model, self.memory, asked))
        for number, each in scores:
            found[number] = [next(losses) for _ in each.continuations]
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, each in enumerate(requests):
            if isinstance(each, Speech):
                alike.setdefault((each.most, each.stop), []).append(number)
        for (most, stop), numbers in alike.items():
            windows = [requests[number].window for number in numbers]
            said = self._speaker.say(windows, most, stop)
            found |= {number: text for number, (text, _) in zip(numbers, said, strict=True)}
        return [found[number] for number in range(len(requests))]


class _Asking(Reader):
    """A reader whose windows are read when something is asked of them, along with others'."""

    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__(lockstep.model, lockstep.memory)
        self._lockstep = lockstep

    def read(self, token_ids: Sequence[int]) -> int:
        ids = [self.model.backbone.prefix_token_id, *token_ids]
        # As many as it would be alone.
        same = self._same(ids)
        new = 0 if same == len(ids) == len(self._ids) else len(ids) - min(same, len(ids) - 1)
        self._ids = ids
        return new

    def options(self, continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._lockstep.ask(Scores(self._window, tuple(map(tuple, continuations))))

    def say(self, most: int, stop: Sequence[str] = ()) -> tuple[str, int]:
        text = self._lockstep.ask(Speech(self._window, most, tuple(stop)))
        return text, len(self.tokenize(text))

    @property
    def _window(self) -> Posed:
        return Posed(tuple(self._ids[1:]), self.bank)
