"""No harm: short tasks while what was told has nothing to do with them.

What a contender loses here against `oracle`, whose window holds the task alone, is what useless memory costs it.
"""

from __future__ import annotations

from collections.abc import Iterator

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.tasks.many_shot import ManyShot
from longmem.tasks.task import Case, Round


class NoHarmLabels(ManyShot):
    name = "no-harm-labels"
    title = "classification, 4 examples in the prompt, nothing of use told"
    order = 80

    def rounds(self) -> Iterator[Round]:
        documents = tuple(Document(f"passage {n}", text) for n, text in enumerate(self.filler(self.config.told)))
        cases = []
        for number, (kind, labelled) in enumerate(self.sets.items()):
            train, test = (self.examples(labelled, file) for file in (labelled.train, labelled.test))
            rng = self.rng(number)
            places = rng.permutation(len(train))[: self.shots]
            shots = "".join(f"{self.shown(labelled, *train[place])}\n\n" for place in places)
            for place in rng.permutation(len(test))[: self.each]:
                text, label = test[place]
                prompt = Prompt(f"{shots}{self.shown(labelled, text)}", text, evidence=(), room=8)
                cases.append(Case(prompt, (labelled.words[label],), labelled.words, kind=kind))
        yield Round(documents, tuple(cases))
