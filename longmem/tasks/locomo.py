"""LoCoMo: long conversations told in advance, questions about them (Maharana et al. 2024; CC BY-NC 4.0)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from longmem.data import Document
from longmem.tasks.scoring import QuestionTask, asking
from longmem.tasks.task import Case, Round

# The fifth kind has no answer in the conversation.
_KINDS = {1: "several sessions", 2: "when", 3: "world knowledge", 4: "one session"}


class Locomo(QuestionTask):
    name = "locomo"
    title = "LoCoMo: questions on long conversations"
    order = 41

    def rounds(self) -> Iterator[Round]:
        files = sorted(self.data_file("locomo").glob("*.json"))
        samples = [sample for file in files for sample in json.loads(file.read_text("utf-8"))]
        rng = self.rng()
        share = max(4, -(-self.config.cases // len(samples)))
        left = self.config.cases
        for sample in samples:
            documents, turns = self.sessions(sample["conversation"])
            cases = [
                self.case(question, turns)
                for question in sample["qa"]
                if question["category"] in _KINDS and question["evidence"] and turns.keys() >= set(question["evidence"])
            ]
            some = [cases[place] for place in rng.permutation(len(cases))[: min(share, left)]]
            left -= len(some)
            if some:
                yield Round(documents, tuple(some))

    def sessions(self, conversation: dict[str, Any]) -> tuple[tuple[Document, ...], dict[str, str]]:
        """Sessions up to the tokens to be told, and each turn by its name, with when it was said."""
        documents, turns, size = [], {}, 0
        number = 1
        while f"session_{number}" in conversation and size < self.config.told:
            when = conversation[f"session_{number}_date_time"]
            lines = []
            for turn in conversation[f"session_{number}"]:
                lines.append(f"{turn['speaker']}: {turn['text']}")
                turns[turn["dia_id"]] = f"Conversation at {when}:\n{lines[-1]}"
            text = f"Conversation at {when}:\n" + "\n".join(lines)
            documents.append(Document(f"session {number}", text))
            size += len(self.tokens(text))
            number += 1
        return tuple(documents), turns

    def case(self, question: dict[str, Any], turns: dict[str, str]) -> Case:
        evidence = tuple(turns[name] for name in question["evidence"])
        kind = _KINDS[question["category"]]
        return Case(asking(question["question"], evidence, room=32), (str(question["answer"]),), kind=kind)
