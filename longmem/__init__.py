"""Long-term memory for Hugging Face language models, after LongMem (Wang et al. 2023, arXiv 2306.07174).

from longmem import LongMem, MemoryStore

model = LongMem.from_pretrained("smollm2-135m")
bank = MemoryStore.open("memories/").bank("my-notes", spec=model.bank_spec)
model.write(bank, "notes.txt")
for piece in model.generate("We met in", bank=bank):
    print(piece.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported when they are first used: `import longmem` alone loads neither torch nor transformers.
_HOME = {
    "Backbone": "backbone",
    "BankGroup": "group",
    "BankSpec": "config",
    "ChatSession": "chat",
    "GenerationConfig": "generation",
    "LongMem": "model",
    "LongMemError": "errors",
    "MemoryBank": "bank",
    "MemoryHead": "config",
    "MemoryStore": "store",
    "SideNetConfig": "config",
    "TrainConfig": "train",
}

__all__ = [
    "Backbone",
    "BankGroup",
    "BankSpec",
    "ChatSession",
    "GenerationConfig",
    "LongMem",
    "LongMemError",
    "MemoryBank",
    "MemoryHead",
    "MemoryStore",
    "SideNetConfig",
    "TrainConfig",
    "__version__",
]

if TYPE_CHECKING:
    from longmem.backbone import Backbone
    from longmem.bank import MemoryBank
    from longmem.chat import ChatSession
    from longmem.config import BankSpec, MemoryHead, SideNetConfig
    from longmem.errors import LongMemError
    from longmem.generation import GenerationConfig
    from longmem.group import BankGroup
    from longmem.model import LongMem
    from longmem.store import MemoryStore
    from longmem.train import TrainConfig


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"longmem.{_HOME[name]}"), name)
    raise AttributeError(f"module 'longmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
