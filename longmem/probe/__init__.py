"""Finds the memory heads of a backbone: the key-value heads whose keys and values are worth remembering.

Two tests, since few heads do either of two things. *Look-up* heads find where in memory the present text went on
before. *Copy-out* heads bring what was found to the output; their queries are only right once they have seen the
finding, so nothing but their effect betrays them.

1. Look-up, on text. The last window of a text queries the earlier windows by q·k before rotary, as a bank is queried.
   At every token whose next token already followed the same token in memory: is that next token among the `top_k`
   best keys?
2. Cause, on generated facts. Facts told in a chat, other text, then a question whose answer is begun. Cutting one
   head off from the chat costs log-probability of the answer: its effect. Then no head looks at all, and heads are let
   look again one by one: first the look-up heads, then at each step the one that helps most.

B sessions, T question tokens, S context tokens, N remembered tokens, P counted positions, D hidden size, L layers,
H query heads, K key-value heads, G query heads that share one, E head size.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from longmem.backbone import Backbone
from longmem.data import TokenizedDocuments
from longmem.probe.cause import Questions, add_greedily, make_sessions
from longmem.probe.config import ProbeConfig, Progress
from longmem.probe.lookup import look_up_rates
from longmem.probe.result import Addition, Evidence, ProbeResult, best_of_group
from longmem.probe.text import default_documents

__all__ = ["Addition", "Evidence", "ProbeConfig", "ProbeResult", "default_documents", "probe"]


def probe(
    backbone: Backbone,
    documents: TokenizedDocuments,
    *,
    config: ProbeConfig | None = None,
    on_progress: Progress | None = None,
) -> ProbeResult:
    """Find the memory heads of a backbone. About 5 minutes for 135M parameters in bfloat16 on two CPU cores.

    Args:
        backbone: with its tokenizer. Facts are told in its chat template if it has one.
        documents: text the backbone reads well, at least one document of `remembered + window` tokens;
            `default_documents` if there is none at hand.
        on_progress: called with stage, steps done and steps in all.

    Raises:
        ConfigError: no document is long enough, the backbone has no tokenizer, or its window holds no session.
    """
    config = config or ProbeConfig()
    progress: Progress = on_progress or (lambda stage, done, total: None)
    rng = np.random.default_rng(config.seed)
    seconds: dict[str, float] = {}

    begin = time.perf_counter()
    questions = Questions(backbone, make_sessions(backbone, documents, config, rng))
    seconds["context"] = time.perf_counter() - begin

    begin = time.perf_counter()
    look_up, positions, chance = look_up_rates(backbone, documents, config, rng, progress)
    seconds["look-up"] = time.perf_counter() - begin

    begin = time.perf_counter()
    knock_out = questions.knock_out(lambda done, total: progress("knock-out", done, total))
    seconds["knock-out"] = time.perf_counter() - begin

    begin = time.perf_counter()
    path = add_greedily(questions, best_of_group(look_up, backbone.num_key_value_heads), knock_out, config, progress)
    seconds["addition"] = time.perf_counter() - begin

    everywhere = torch.ones(backbone.num_layers, backbone.num_key_value_heads, dtype=torch.bool)
    score_all, right_all = questions.answer(everywhere)
    score_none, _ = questions.answer(~everywhere)
    evidence = Evidence(
        positions, chance, config.sessions * config.facts, questions.context, score_all, score_none, right_all
    )
    memory_heads = tuple(sorted(step.head for step in path if step.chosen))
    return ProbeResult(backbone.name, memory_heads, look_up, knock_out, path, evidence, config, seconds)
