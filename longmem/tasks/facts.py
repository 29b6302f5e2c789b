"""Facts a user told in earlier chats: the conversations of `longmem eval facts`, for every contender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.evals.answers import RIGHT, answer_in
from longmem.evals.chats import KINDS, ChatConfig, generate_chats
from longmem.evals.facts import between, question_of, session_text
from longmem.tasks.task import Answer, Case, Measure, Round, Task


class Facts(Task):
    name = "facts"
    title = "facts told in earlier chats, once or corrected later; and what was never told"
    order = 12
    measures = (
        Measure("right"),
        Measure("stale", higher=False),
        Measure("invented", higher=False),
        Measure("log-probability", "number"),
    )

    def rounds(self) -> Iterator[Round]:
        filler = [Document(f"passage {n}", text) for n, text in enumerate(self.filler(self.config.told))]
        count = max(len(KINDS), self.config.cases)
        for chat in generate_chats(count, "unseen", ChatConfig(seed=self.config.seed)):
            texts = [session_text(self.tokenizer, session) for session in chat.sessions]
            question = question_of(chat, self.tokenizer)
            sessions = [Document(f"session {number}", text) for number, text in enumerate(texts)]
            prompt = Prompt(question.prompt, chat.question, question.opening, ("".join(texts),), room=10)
            case = Case(prompt, (question.answer,), kind=chat.kind, notes=question.labels)
            yield Round(tuple(between(filler, sessions)), (case,))

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        given = answer_in(answer.text, list(case.notes))
        label = None if given is None else case.notes[given]
        if case.kind == "silent":
            return {"invented": float(label is not None)}
        values = {"right": float(label == RIGHT), "log-probability": answer.log_probability}
        return values | ({"stale": float(label == "stale")} if case.kind == "corrected" else {})
