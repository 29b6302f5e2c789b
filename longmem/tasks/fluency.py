"""No harm to what is written: texts continued while what was told has nothing to do with them.

How varied it is (distinct-2: different pairs of words among all pairs), and how much is said again (repeated: runs of
four words that stood there before).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.tasks.task import Answer, Case, Measure, Round, Task

_BEGINNINGS = (
    "In the morning the harbour was quiet. A man in a grey coat",
    "The committee met on Tuesday to discuss the new bridge. Its chairwoman said that",
    "To bake a simple loaf of bread you need flour, water, salt and yeast. First",
    "The river rises in the mountains and flows north. Along its banks",
    "Most people think of winter as a time of rest. For a gardener, however,",
    "She opened the letter at the kitchen table. It began:",
    "There are three reasons why the experiment failed. The first is that",
    "When the train stopped between two stations, the passengers",
)


class Fluency(Task):
    name = "fluency"
    title = "texts continued, nothing of use told"
    order = 81
    measures = (Measure("distinct-2"), Measure("repeated", higher=False))

    def rounds(self) -> Iterator[Round]:
        documents = tuple(Document(f"passage {n}", text) for n, text in enumerate(self.filler(self.config.told)))
        room = 48 if self.short else 96
        prompts = [Prompt(text, evidence=(), room=room) for text in _BEGINNINGS[: self.config.cases]]
        yield Round(documents, tuple(Case(prompt, stop=()) for prompt in prompts))

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        words = answer.text.split()
        pairs = list(pairwise(words))
        runs = [tuple(words[n : n + 4]) for n in range(len(words) - 3)]
        again = sum(run in runs[:n] for n, run in enumerate(runs))
        return {
            "distinct-2": len(set(pairs)) / len(pairs) if pairs else 0.0,
            "repeated": again / len(runs) if runs else 0.0,
        }
