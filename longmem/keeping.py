"""Keeping a stored bank to a cap: the backbone and the bank's readers give the scores, `longmem.retention` chooses.

N rows of a bank, M tokens of a source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from torch import Tensor

from longmem.errors import BankError, ConfigError
from longmem.model import LongMem
from longmem.retention import Cap, Plan, plan
from longmem.store import StoredBank


def retain(
    bank: StoredBank,
    cap: Cap,
    *,
    model: LongMem | None = None,
    preview: bool = False,
    on_tokens: Callable[[int], None] | None = None,
) -> Plan:
    """Bring a bank down to a cap, once. What it does not exceed stays as it is.

    Args:
        model: of the bank's backbone; only the policy "surprise" needs it, for what has not been scored before.
        preview: only say what would go.
        on_tokens: progress, called with the number of tokens just scored.

    Raises:
        ConfigError: the policy needs a model, or what reads have attended to, and there is none.
        BankError: another process has changed the bank meanwhile.
        StoreNotWritableError: the store is read-only or the disk is full.
    """
    bank.refresh()
    limit = cap.rows(bank.spec.bytes_per_token)
    score_N = None
    if limit is not None and len(bank) > limit and cap.policy in ("surprise", "attention"):
        score_N = _scores(bank, cap, model, on_tokens)
    chosen = plan(bank, cap, score_N, written=bank.written_last(), now=datetime.now(UTC))
    if preview:
        return chosen
    keep_N = chosen.keep_N
    if chosen.forgotten:
        gone = torch.tensor([bank.source_number(source) for source in chosen.forgotten])
        keep_N = keep_N[~torch.isin(bank.source_index_N, gone)]
        bank.forget_all(chosen.forgotten)
    if not bool(keep_N.all()):
        bank.thin(keep_N)
    return chosen


def keep_to_cap(bank: StoredBank, model: LongMem) -> Plan | None:
    """Bring a bank down to the cap that was set on it, after a write, which is done and must not fail for it.

    Only when the bank is a tenth too large, so that not every write makes segments anew. None if nothing was done.
    """
    cap = bank.cap
    if cap is None:
        return None
    limit = cap.rows(bank.spec.bytes_per_token)
    if (limit is None or len(bank) <= 1.1 * limit) and cap.days is None:
        return None
    if cap.policy == "attention" and not bank.scores("attention"):
        cap = dataclasses.replace(cap, policy="oldest")  # nothing has been attended to so far
    try:
        return retain(bank, cap, model=model)
    except BankError:
        return None  # somebody else has written meanwhile; their write, or the next one, sees to it


def _scores(bank: StoredBank, cap: Cap, model: LongMem | None, on_tokens: Callable[[int], None] | None) -> Tensor:
    """What the policy goes by, of each row (N,)."""
    bank.save_attention()
    known = bank.scores(cap.policy)
    if cap.policy == "attention" and not known:
        raise ConfigError(
            f"Nobody has attended to bank {bank.name!r} yet: `longmem generate --attribute` and `longmem chat` record "
            "it. Read the bank first, or choose another policy."
        )
    if cap.policy == "surprise":
        missing = _surprise(bank, known, model, on_tokens)
        if missing and bank.writable:
            bank.keep_scores("surprise", missing)
        known |= missing
    of_source: dict[str, list[Tensor]] = {}
    for piece in bank.pieces:
        of_source.setdefault(piece.source, []).append(known.get(piece.id, torch.zeros(piece.tokens)))
    score_N = torch.zeros(len(bank))
    for index, source in enumerate(bank.sources):
        mine_N = bank.source_index_N == index
        score_N[mine_N] = torch.cat(of_source[source])[bank.place_N[mine_N]]
    return score_N


def _surprise(
    bank: StoredBank, known: dict[int, Tensor], model: LongMem | None, on_tokens: Callable[[int], None] | None
) -> dict[int, Tensor]:
    """How badly the backbone predicts the tokens of pieces that have no score, by the piece's id."""
    found: dict[int, Tensor] = {}
    ends: dict[str, int] = {}
    for piece in bank.pieces:
        start = ends.get(piece.source, 0)
        ends[piece.source] = start + piece.tokens
        if piece.id in known:
            continue
        if model is None:
            raise ConfigError(
                "The policy 'surprise' needs the model of the bank's backbone, to see what it predicts badly. Give it, "
                "or choose another policy."
            )
        model.check(bank)
        tokens_M = bank.tokens_of(piece.source)[: start + piece.tokens]
        found[piece.id] = model.surprise(tokens_M, start, windows=bank.spec.encode, on_tokens=on_tokens)
    return found


__all__ = ["keep_to_cap", "retain"]
