"""BankGroup: several banks that are read in one answer, each with a weight: a user's, a team's, a domain's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longmem.bank import MemoryBank
from longmem.errors import BankMismatchError, ConfigError


class BankGroup:
    """Banks that are read together; the first is the one that is written to.

    A weight multiplies the exponentiated attention scores of all tokens of a bank: it is as if each were remembered so
    many times. 1 changes nothing, 0 is as if the bank were not there. Every bank is searched by itself and gives its
    own best tokens, so that a large one cannot crowd a small one out.

    Args:
        banks: of one model.
        weights: one a bank, 0 or more; 1 each by default.

    Raises:
        ConfigError: no banks, one given twice, or weights that are not 0 or more, one a bank.
        BankMismatchError: they belong to different models.
    """

    def __init__(self, banks: Sequence[MemoryBank], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(banks) if weights is None else weights
        if not banks or len(weights) != len(banks):
            raise ConfigError(
                f"A group has at least one bank, and one weight for each; got {len(banks)} banks and "
                f"{len(weights)} weights."
            )
        for weight in weights:
            if not (weight >= 0 and math.isfinite(weight)):
                raise ConfigError(f"A bank's weight is 0 (not read) or more, 1 being as it is by itself; got {weight}.")
        for number, bank in enumerate(banks):
            if any(bank is other for other in banks[:number]):
                raise ConfigError("A bank is in the group twice. Give it once, with the sum of its weights.")
            if bank.spec != banks[0].spec:
                raise BankMismatchError(
                    f"These banks were written by different models, {banks[0].spec.backbone!r} and "
                    f"{bank.spec.backbone!r}, and cannot be read together. Copy one with the other's model: "
                    "`longmem copy`."
                )
        self.banks = tuple(banks)
        self.weights = tuple(map(float, weights))

    @property
    def first(self) -> MemoryBank:
        """The bank that is written to."""
        return self.banks[0]

    @property
    def read(self) -> tuple[tuple[MemoryBank, float], ...]:
        """The banks that are read, and their weights: those of weight 0 are not."""
        return tuple((bank, weight) for bank, weight in zip(self.banks, self.weights, strict=True) if weight > 0)

    def with_first(self, bank: MemoryBank) -> BankGroup:
        """The same group, with a part of the first bank in its place."""
        return BankGroup((bank, *self.banks[1:]), self.weights)

    def __len__(self) -> int:
        """Remembered tokens of the banks that are read."""
        return sum(len(bank) for bank, _ in self.read)

    def __repr__(self) -> str:
        return f"BankGroup({', '.join(f'{b!r}: {w:g}' for b, w in zip(self.banks, self.weights, strict=True))})"


# What can be read: nothing, a bank, or several.
Readable = MemoryBank | BankGroup


def members(banks: Readable) -> tuple[tuple[MemoryBank, float], ...]:
    """The banks that are read, and their weights, in the order in which readers number them."""
    return banks.read if isinstance(banks, BankGroup) else ((banks, 1.0),)
