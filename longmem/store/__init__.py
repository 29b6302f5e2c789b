"""MemoryStore: named banks in a folder. What `append` has acknowledged survives a crash; what it has not is invisible.

    memories/manifest.sqlite             which banks there are, and which segments each holds
    memories/twin.sqlite                 a second copy of that, from which it can be mended
    memories/segments/<hex>.safetensors  immutable: keys, values, tokens and text of one `BankEntry` or more
    memories/indexes/<id>.safetensors    a cache: the index of a bank, of the bank's id in the manifest

A segment is committed by a single manifest transaction, after its file is complete and synced. Files that no
manifest row names are left-overs of a crash and mean nothing. docs/format.md describes every byte.
"""

from __future__ import annotations

from longmem.store.algebra import ChangedSource, Diff
from longmem.store.bank_info import BankInfo, check_bank_name
from longmem.store.consolidate import Consolidation
from longmem.store.forgetting import Generated, Preview, Stretch
from longmem.store.keys import KeyFolder, KeyProvider
from longmem.store.rebuild import Rebuilt
from longmem.store.receipts import Receipt
from longmem.store.repair import Quarantined, Repair
from longmem.store.store import MemoryStore
from longmem.store.stored_bank import SourceInfo, StoredBank
from longmem.store.verify import Fault, Report
from longmem.store.versions import Version

__all__ = [
    "BankInfo",
    "ChangedSource",
    "Consolidation",
    "Diff",
    "Fault",
    "Generated",
    "KeyFolder",
    "KeyProvider",
    "MemoryStore",
    "Preview",
    "Quarantined",
    "Rebuilt",
    "Receipt",
    "Repair",
    "Report",
    "SourceInfo",
    "StoredBank",
    "Stretch",
    "Version",
    "check_bank_name",
]
