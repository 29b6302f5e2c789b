"""Lost in the middle: the value of one of 75 random keys (Liu et al. 2023; MIT), told in advance as lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.errors import UnavailableError
from longmem.tasks.task import Answer, Case, Measure, Round, Task

_LINE = 90  # tokens of a key and its value, about


class KeyValues(Task):
    name = "key-values"
    title = "lost in the middle: the value of one of up to 75 keys"
    order = 42
    measures = (Measure("right"), Measure("log-probability", "number"))

    def rounds(self) -> Iterator[Round]:
        folder = self.data_file("lost_in_the_middle", "kv_retrieval_data")
        files = sorted(folder.glob("*.jsonl.gz"))
        if not files:
            raise UnavailableError(f"no data: {folder} holds no .jsonl.gz file")
        with gzip.open(files[0], "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rng = self.rng()
        for place in rng.permutation(len(rows))[: self.config.cases]:
            row = rows[place]
            wanted = [row["key"], row["value"]]
            others = [pair for pair in row["ordered_kv_records"] if pair != wanted]
            # As many as are to be told, the wanted one at a random place.
            pairs = others[: max(1, min(len(others), self.config.told // _LINE - 1))]
            pairs.insert(int(rng.integers(len(pairs) + 1)), wanted)
            lines = [f'"{key}": "{value}"' for key, value in pairs]
            key, value = wanted
            prompt = Prompt(f'"{key}":', key, evidence=(f'"{key}": "{value}"',), room=48)
            case = Case(prompt, (f'"{value}"',))
            yield Round((Document("keys", ",\n".join(lines)),), (case,))

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        right = answer.text.strip().startswith(case.answers[0])
        return {"right": float(right), "log-probability": answer.log_probability}
