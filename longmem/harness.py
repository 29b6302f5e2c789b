"""Any contender as a model of EleutherAI's lm-evaluation-harness (extra `harness`).

from lm_eval import simple_evaluate
from longmem import LongMem
from longmem.harness import LongMemLM

lm = LongMemLM(LongMem.from_pretrained("smollm2-135m"), documents=[Path("notes/")])
simple_evaluate(model=lm, tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import longmem.contenders
from longmem.contenders.contender import Contender, ContenderConfig, Prompt
from longmem.data import Document, read_documents
from longmem.errors import MissingExtraError
from longmem.model import LongMem
from longmem.registry import chosen

if TYPE_CHECKING:
    LM: Any = object
else:
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise MissingExtraError(
            "longmem.harness needs lm-evaluation-harness, which is not installed. Run: pip install 'longmem[harness]'."
        ) from error

_SAID = 256  # tokens of an answer, where a task does not say


class LongMemLM(LM):
    """What `simple_evaluate(model=…)` takes.

    Args:
        model: a SideNet and its backbone.
        documents: what is told before anything is asked: texts, or paths of files and folders.
        contender: name of any contender, or the path of a Python file that defines one.
        config: sizes of windows.

    Raises:
        ConfigError: there is no such contender.
        UnavailableError: it cannot be used here.
        SourceError: a document cannot be read.
    """

    def __init__(
        self,
        model: LongMem,
        documents: Sequence[Document | Path] = (),
        contender: str = "longmem",
        config: ContenderConfig | None = None,
    ) -> None:
        super().__init__()
        kind: Any = chosen([contender], longmem.contenders, Contender)[0]
        self.contender: Contender = kind(model, config or ContenderConfig())
        told = [each for each in documents if isinstance(each, Document)]
        told += read_documents(each for each in documents if isinstance(each, Path))
        self.contender.prepare(told)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what would be said."""
        return [self._likelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text, cut into windows that do not overlap."""
        found = []
        for request in requests:
            (text,) = request.args
            encoded = self.contender.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, _ in encoded["offset_mapping"]]
            size = self.contender.config.window // 2
            edges = [*starts[::size], len(text)]
            pieces = [text[first:last] for first, last in pairwise(edges)]
            before = ["", *pieces]
            found.append(sum(self._likelihood(*each)[0] for each in zip(before, pieces, strict=False)))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What is said after each context, greedily."""
        answers = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            room = int(settings.get("max_gen_toks") or _SAID)
            answers.append(self.contender.generate(Prompt(context, room=room), until))
        return answers

    def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        room = len(self.contender.reader.tokenize(continuation))
        losses, greedy = self.contender.likelihood(Prompt(context, room=room), continuation)
        return sum(losses), greedy
