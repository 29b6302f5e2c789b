"""The look-up test: which heads find where in memory the present text went on before.

N remembered tokens, P counted positions, E head size, K key-value heads.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from longmem.backbone import Backbone
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError
from longmem.probe.config import ProbeConfig, Progress


def look_up_rates(
    backbone: Backbone, documents: TokenizedDocuments, config: ProbeConfig, rng: np.random.Generator, progress: Progress
) -> tuple[tuple[tuple[float, ...], ...], int, float]:
    """Hit rates L × H, positions counted, and the hit rate of chance.

    Raises:
        ConfigError: no document is long enough, or no position counts.
    """
    window = min(config.window, backbone.max_positions - 1)
    hits_LH = torch.zeros(backbone.num_layers, backbone.num_heads)
    positions, chance = 0, 0.0
    # One token more than is read: the last position's next token.
    for done, tokens in enumerate(stretches(documents, config.remembered + window + 1, config.texts, rng)):
        progress("look-up", done, config.texts)
        memory_N, new_T = tokens[: config.remembered], tokens[config.remembered :]
        places = repeated_pairs(memory_N, new_T, config.max_pair, config.max_current)
        if not places:
            continue
        wanted_PN = torch.zeros(len(places), config.remembered, dtype=torch.bool, device=backbone.device)
        for row, targets in enumerate(places.values()):
            wanted_PN[row, targets] = True
            chance += chance_of_hit(config.remembered, len(targets), config.top_k)
        positions += len(places)
        hits_LH += _hits(backbone, memory_N, new_T[:-1], list(places), wanted_PN, window, config.top_k)
    progress("look-up", config.texts, config.texts)
    if not positions:
        raise ConfigError(
            f"In {config.texts} texts nothing new repeats a pair of tokens that is remembered from before. "
            "Give natural text, or more of it (texts, remembered)."
        )
    rates = (hits_LH / positions).tolist()
    return tuple(tuple(row) for row in rates), positions, chance / positions


def repeated_pairs(memory_N: np.ndarray, new_T: np.ndarray, max_pair: int, max_current: int) -> dict[int, list[int]]:
    """Positions t of new text whose (current, next) pair stands in memory, each with the places of that next token.

    The place is the token *after* the earlier occurrence of the current one: the value there is the next token's, and
    the key there carries the token before it (that is how induction heads find it).

    Args:
        memory_N, new_T: token ids.
        max_pair: pairs that stand in memory more often do not count.
        max_current: nor do current tokens.
    """
    after: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    memory, new = memory_N.tolist(), new_T.tolist()
    for place, pair in enumerate(pairwise(memory), start=1):
        after[pair].append(place)
    current = Counter(memory)
    return {
        t: after[pair]
        for t, pair in enumerate(pairwise(new))
        if pair in after and len(after[pair]) <= max_pair and current[pair[0]] <= max_current
    }


def chance_of_hit(remembered: int, targets: int, top_k: int) -> float:
    """Probability that `top_k` of `remembered` tokens, drawn without replacement, hold one of `targets`."""
    if top_k > remembered - targets:
        return 1.0
    return 1.0 - math.exp(sum(math.log1p(-targets / (remembered - drawn)) for drawn in range(top_k)))


def in_top(query_KPE: Tensor, key_KNE: Tensor, wanted_PN: Tensor, top_k: int) -> Tensor:
    """(K, P) bool: whether one of the wanted keys is among the `top_k` of highest q·k. Each head K has its own keys."""
    score_KPN = query_KPE.float() @ key_KNE.float().transpose(1, 2)
    best_KP1 = score_KPN.masked_fill(~wanted_PN, -torch.inf).amax(-1, keepdim=True)
    return (score_KPN > best_KP1).sum(-1) < top_k


def _hits(
    backbone: Backbone,
    memory_N: np.ndarray,
    new_T: np.ndarray,
    positions: list[int],
    wanted_PN: Tensor,
    window: int,
    top_k: int,
) -> Tensor:
    """How many positions each query head got right, (L, H)."""
    keys: list[list[Tensor]] = [[] for _ in range(backbone.num_layers)]
    for start in range(0, len(memory_N), window):
        for layer, hidden_1TD in enumerate(hidden_states_of(backbone, memory_N[start : start + window])):
            key_1KTE, _ = backbone.keys_values(layer, hidden_1TD)
            keys[layer].append(key_1KTE[0, :, 1:])  # the prefix is never remembered
    hits_LH = []
    group = backbone.num_heads // backbone.num_key_value_heads
    rows = torch.tensor(positions, device=backbone.device) + 1
    for layer, hidden_1TD in enumerate(hidden_states_of(backbone, new_T)):
        query_1HTE, _, _ = backbone.family.qkv(backbone.layers[layer], hidden_1TD)
        query_KGPE = query_1HTE[0, :, rows].unflatten(0, (-1, group))
        # The query heads of a group become more queries of one head.
        right = in_top(query_KGPE.flatten(1, 2), torch.cat(keys[layer], dim=1), wanted_PN.repeat(group, 1), top_k)
        hits_LH.append(right.view(query_KGPE.shape[:3]).sum(-1).flatten().float().cpu())
    return torch.stack(hits_LH)


@torch.no_grad()
def hidden_states_of(backbone: Backbone, tokens_T: np.ndarray) -> list[Tensor]:
    """Each layer's input for one window behind the prefix token, (1, 1 + T, D)."""
    ids = [backbone.prefix_token_id, *tokens_T.tolist()]
    input_ids_1T = torch.tensor([ids], dtype=torch.int64, device=backbone.device)
    hidden_states = backbone(input_ids_1T, boundaries=range(backbone.num_layers)).hidden_states
    return [hidden_states[layer] for layer in range(backbone.num_layers)]


def stretches(documents: TokenizedDocuments, length: int, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` stretches of text at random places; different documents as long as there are any."""
    usable = np.flatnonzero(documents.lengths >= length)
    if not len(usable):
        raise ConfigError(
            f"The probe needs a document of {length} tokens; the longest of {len(documents)} has "
            f"{int(documents.lengths.max(initial=0))}. Give longer documents, or let it remember fewer tokens."
        )
    order = rng.permutation(usable)
    for index in np.resize(order, count):
        start = rng.integers(documents.lengths[index] - length + 1)
        yield documents[int(index)][start : start + length]
