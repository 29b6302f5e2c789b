"""One contender on one task.

On a GPU cases are answered side by side; what some of them cost is then taken one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from longmem.comparison.result import Cell, Price, figures
from longmem.contenders.contender import Contender, Cost, Posed
from longmem.contenders.lockstep import Lockstep
from longmem.contenders.together import Speaker, log_likelihoods
from longmem.errors import ConfigError, LongMemError, UnavailableError
from longmem.tasks.task import Answer, Case, Round, Task

# Cases whose cost is taken where cases are answered side by side, and tokens of their answers at most.
_PRICED, _SPOKEN = 3, 8
# Cases side by side of those who converse.
_TALKS = 64
# Remembered tokens of all banks that wait with their questions, and how many questions wait.
_BANKS, _WAITING = 1 << 22, 256


@dataclass(frozen=True)
class RunConfig:
    """How cells are run.

    Attributes:
        rows: cases side by side.
        seconds: that a cell may take, about, before the rest of its cases is left out; 0 is no limit.
    """

    rows: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seconds < 0:
            raise ConfigError(
                f"rows must be at least 1 and seconds at least 0 (no limit); got {self.rows} and {self.seconds}."
            )


def run_cell(
    task: Task,
    rounds: Sequence[Round],
    contender: Contender,
    config: RunConfig,
    speaker: Speaker,
    on_case: Callable[[int, int], None] | None = None,
) -> Cell:
    """One contender on one task. Cases that it cannot be asked are left out; if that is all, the cell says why.

    Args:
        speaker: of the contender's model and memory.
    """
    # Memory may be short because other programs had it, or this one's own leftovers.
    for _ in range(2):
        run = _Run(task, rounds, contender, config, speaker, on_case)
        try:
            if run.config.rows == 1:
                run.one_by_one()
            elif contender.converses:
                run.talking()
            else:
                run.side_by_side()
            return run.cell()
        except LongMemError as error:
            return Cell(task.name, contender.name, reason=str(error))
        except torch.OutOfMemoryError:
            del run
        finally:
            if contender.model.device.type == "cuda":
                torch.cuda.empty_cache()
        speaker.release()
    return Cell(task.name, contender.name, reason=f"memory of {contender.model.device} was too small")


class _Run:
    """A cell that is being run."""

    def __init__(
        self,
        task: Task,
        rounds: Sequence[Round],
        contender: Contender,
        config: RunConfig,
        speaker: Speaker,
        on_case: Callable[[int, int], None] | None,
    ) -> None:
        self.task, self.rounds, self.contender, self.config = task, rounds, contender, config
        self.speaker, self.on_case = speaker, on_case
        # Cases have the same numbers for every contender.
        cases = [case for each in rounds for case in each.cases]
        self.numbers, self.count = {id(case): number for number, case in enumerate(cases)}, len(cases)
        # The same continuation, more and more told before it, is one text.
        first: dict[str, int] = {}
        self.groups = [
            first.setdefault(case.continuation, number) if case.continuation else number
            for number, case in enumerate(cases)
        ]
        self.rows: list[dict[str, Any]] = []
        self.left_out: Counter[str] = Counter()
        self.price: Price | None = None
        self.start = time.perf_counter()
        contender.cost = Cost()

    def one_by_one(self) -> None:
        told = 0
        for number, each in enumerate(self.rounds):
            if (self._late() and self.rows) or not self._told(number):
                continue
            told += 1
            for case in each.cases:
                if self._late() and self.rows:
                    break
                if answer := self._possible(lambda case=case: ask(self.contender, case)):
                    self._note(case, answer)
        if self.rows:
            self.price = Price.of(self.contender.cost, told)

    def side_by_side(self) -> None:
        """What the first cases cost is taken one by one; all are answered side by side."""
        waiting: list[tuple[Case, Posed]] = []
        told = 0
        for number, each in enumerate(self.rounds):
            if (self._late() and (self.rows or waiting)) or not self._told(number):
                continue
            told += 1
            for case in each.cases:
                if posed := self._possible(lambda case=case: self.contender.pose(case.prompt)):
                    waiting.append((case, posed))
                    if len(self.rows) + len(waiting) <= _PRICED:
                        self.price = priced(self.contender, case, told)
            banks = {id(posed.bank): posed.bank for _, posed in waiting if posed.bank is not None}
            if len(waiting) >= _WAITING or sum(bank.capacity for bank in banks.values()) >= _BANKS:
                self._answer(waiting)
        self._answer(waiting)

    def talking(self) -> None:
        """Of those who converse: rounds are told in lockstep, and asked so; one case is asked alone, for its cost."""
        asked = [(each, case) for each in self.rounds for case in each.cases]
        for first in range(0, len(asked), _TALKS):
            some = asked[first : first + _TALKS]
            if self._late() and self.rows:
                break
            lockstep = Lockstep(self.speaker)
            twins = self._twins(lockstep, [each for each, _ in some])
            some = [(case, twins[id(each)]) for each, case in some if id(each) in twins]
            if some and self.price is None:
                case, twin = some[0]
                alone = copy.copy(twin)
                alone.reader, alone.cost = self.contender.reader, dataclasses.replace(twin.cost, first_seconds=[])
                alone.reader.forget()
                self.price = priced(alone, case, 1)
            posed = lockstep.run([partial(_twin(lockstep, twin).pose, case.prompt) for case, twin in some])
            self._answer([(case, each) for (case, _), each in zip(some, posed, strict=True)])

    def cell(self) -> Cell:
        """What came out."""
        names = self.task.name, self.contender.name
        if not self.rows:
            reason = self.left_out.most_common(1)[0][0] if self.left_out else "the task has no cases"
            return Cell(*names, reason=reason)

        def counted(some: Sequence[dict[str, Any]]) -> Any:
            values, tokens, groups = ([row[name] for row in some] for name in ("values", "tokens", "group"))
            return figures(self.task.measures, values, tokens, self.task.config.seed, groups)

        kinds = dict.fromkeys(row["kind"] for row in self.rows)
        of_kinds = {kind: counted([row for row in self.rows if row["kind"] == kind]) for kind in kinds}
        return Cell(
            *names,
            counted(self.rows),
            of_kinds if len(of_kinds) > 1 else {},
            self.price,
            None,
            self.rows,
            self.count - len(self.rows) - self.left_out.total(),
            dict(self.left_out),
            round(time.perf_counter() - self.start, 1),
        )

    def _told(self, number: int) -> bool:
        """Whether the contender could be told a round."""
        each, other = self.rounds[number], self.task.other(self.rounds, number)
        try:
            self.contender.prepare(each.documents, other.documents if other else ())
        except UnavailableError as error:
            self.left_out[str(error)] += len(each.cases)
            return False
        return True

    def _twins(self, lockstep: Lockstep, rounds: Sequence[Round]) -> dict[int, Contender]:
        """A twin of the contender for each round that it can be told, by the round's id."""
        different = {id(each): each for each in rounds}
        twins = {number: _twin(lockstep, self.contender) for number in different}

        def tell(number: int) -> UnavailableError | None:
            try:
                twins[number].prepare(different[number].documents)
            except UnavailableError as error:
                return error
            return None

        for number, error in zip(twins, lockstep.run([partial(tell, each) for each in twins]), strict=True):
            if error is not None:
                self.left_out[str(error)] += sum(id(each) == number for each in rounds)
                del different[number]
        return {number: twins[number] for number in different}

    def _possible(self, do: Callable[[], Any]) -> Any:
        """What is done; None if the contender cannot."""
        try:
            return do()
        except UnavailableError as error:
            self.left_out[str(error)] += 1
            return None

    def _answer(self, waiting: list[tuple[Case, Posed]]) -> None:
        answers = ask_together(self.contender, waiting, self.speaker)
        for (case, _), answer in zip(waiting, answers, strict=True):
            self._note(case, answer)
        waiting.clear()

    def _note(self, case: Case, answer: Answer) -> None:
        values = dict(self.task.score(case, answer))
        number = self.numbers[id(case)]
        place = {"case": number, "group": self.groups[number], "kind": case.kind}
        self.rows.append({**place, **_row(case, answer), "values": values})
        if self.on_case is not None:
            self.on_case(len(self.rows), self.count)

    def _late(self) -> bool:
        return bool(self.config.seconds) and time.perf_counter() - self.start > self.config.seconds


def _twin(lockstep: Lockstep, of: Contender) -> Contender:
    """The same contender, who reads in lockstep."""
    made = copy.copy(of)
    made.reader, made.cost = lockstep.reader(), Cost()
    return made


def ask(contender: Contender, case: Case) -> Answer:
    """What a contender makes of a case."""
    losses = [contender.log_likelihood(case.prompt, text) for text in wanted(case)]
    if not asks_for_text(case):
        return scored(case, losses)
    said = contender.generate(case.prompt, case.stop, case.most)
    return scored(case, losses, said, contender.drawn_on())


def priced(contender: Contender, case: Case, rounds: int) -> Price:
    """What cases of so many rounds cost, with one more that is asked for that: not for its whole answer, whose tokens
    cost the same."""
    if not contender.cost.first_seconds:
        contender.rehearse(case.prompt)
    if asks_for_text(case):
        contender.generate(case.prompt, case.stop, min(case.most or case.prompt.room, _SPOKEN))
    else:
        contender.log_likelihood(case.prompt, wanted(case)[0])
    return Price.of(contender.cost, rounds)


def ask_together(contender: Contender, waiting: Sequence[tuple[Case, Posed]], speaker: Speaker) -> list[Answer]:
    """`ask` of many cases, side by side."""
    asked = [(posed, contender.reader.tokenize(text)) for case, posed in waiting for text in wanted(case)]
    losses = iter(log_likelihoods(contender.model, contender.memory, asked))
    answers = [scored(case, [next(losses) for _ in wanted(case)]) for case, _ in waiting]
    alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for number, (case, _) in enumerate(waiting):
        if asks_for_text(case):
            alike.setdefault((case.stop, case.most or case.prompt.room), []).append(number)
    # The longest first, for whose windows the others have room.
    for stop, most in sorted(alike, key=lambda each: each[1], reverse=True):
        numbers = alike[stop, most]
        texts = speaker.say([waiting[number][1] for number in numbers], most, stop)
        for number, (text, drawn_on) in zip(numbers, texts, strict=True):
            answers[number] = dataclasses.replace(answers[number], text=text.strip(), drawn_on=drawn_on)
    return answers


def wanted(case: Case) -> list[str]:
    """Texts whose probability is measured, as they follow the prompt."""
    if case.continuation:
        return [case.continuation]
    return [f" {each}" for each in case.choices or case.answers[:1]]


def asks_for_text(case: Case) -> bool:
    return not case.continuation and not case.choices


def scored(case: Case, losses: Sequence[list[float]], text: str = "", drawn_on: tuple[str, ...] = ()) -> Answer:
    """An answer, from the log-probabilities of what was wanted and what was said."""
    if case.choices:
        scores = torch.tensor([sum(each) for each in losses])
        right = case.choices.index(case.answers[0])
        return Answer(case.choices[int(scores.argmax())], float(scores.log_softmax(0)[right]), 1)
    (only,) = losses or ([],)
    return Answer(text.strip(), sum(only), len(only), drawn_on, tuple(only) if case.continuation else ())


def _row(case: Case, answer: Answer) -> dict[str, Any]:
    return {
        # Without the text before it, which may be another's.
        "query": case.prompt.query,
        "answers": list(case.answers),
        "given": answer.text,
        "log_probability": answer.log_probability,
        "tokens": answer.tokens,
        **({"log_probabilities": [round(each, 3) for each in answer.log_probabilities]} if case.continuation else {}),
    }
