"""Everything that can go wrong for a user of longmem.

    LongMemError
    ├── BackboneError             the language model itself
    │   ├── UnsupportedBackboneError   its family has no adapter
    │   └── BackboneNotFoundError      its weights are not on this machine
    ├── SideNetError              the trained part
    │   └── SideNetNotFoundError       no SideNet has been trained for this backbone
    ├── CheckpointError           a checkpoint on disk is missing, damaged or of another shape
    ├── BankError                 remembered keys and values
    │   ├── BankNotFoundError          no bank of that name
    │   ├── BankMismatchError          the bank belongs to another backbone
    │   └── BankIndexError             its index is missing, or was made for other tokens
    ├── StoreError                the folder that holds banks
    │   ├── StoreNotWritableError      it cannot be written
    │   ├── StoreCorruptError          a file is missing or does not match its checksum
    │   ├── StoreUnreachableError      segments that lie elsewhere cannot be read or written there
    │   └── StoreKeyError              the key of an encrypted namespace is missing, or another
    ├── SourceError               a text handed in: missing, empty, binary, malformed
    ├── ConfigError               settings that do not go together
    ├── DeviceError               a device that this machine does not have
    ├── CompilerError             a step that a C++ compiler should compile, and cannot
    ├── MissingExtraError         an optional package that is not installed
    └── UnavailableError          a contender or a task of a comparison that cannot be run here

Each message says what was given, what was expected and what to do next.
"""

from __future__ import annotations


class LongMemError(Exception):
    """Base of all errors that longmem raises on purpose."""


class BackboneError(LongMemError):
    """The backbone language model cannot be used."""


class UnsupportedBackboneError(BackboneError):
    """No adapter knows the family of this model."""


class BackboneNotFoundError(BackboneError):
    """The weights of the backbone are not on this machine and cannot be fetched."""


class SideNetError(LongMemError):
    """The SideNet cannot be used."""


class SideNetNotFoundError(SideNetError):
    """No SideNet has been trained for this backbone."""


class CheckpointError(LongMemError):
    """A checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class BankError(LongMemError):
    """A memory bank cannot do what was asked."""


class BankNotFoundError(BankError):
    """The store holds no bank of that name."""


class BankMismatchError(BankError):
    """The bank was written by another backbone, or with other memory heads."""


class BankIndexError(BankError):
    """The bank has no index, or one that was made for other tokens."""


class StoreError(LongMemError):
    """The folder that holds the banks cannot be used."""


class StoreNotWritableError(StoreError):
    """The store's folder cannot be written."""


class StoreCorruptError(StoreError):
    """A file of the store is missing or its bytes have changed."""


class StoreUnreachableError(StoreError):
    """The location of a store's segments cannot be reached, or refuses."""


class StoreKeyError(StoreError):
    """The key that opens an encrypted namespace is missing or another."""


class SourceError(LongMemError):
    """A text handed in is missing, empty, binary or malformed."""


class ConfigError(LongMemError):
    """Settings that are out of range or do not go together."""


class DeviceError(LongMemError):
    """A device was asked for that this machine does not have."""


class CompilerError(LongMemError):
    """Decoding was to be compiled, and there is no working C++ compiler."""


class MissingExtraError(LongMemError):
    """An optional package is not installed."""


class UnavailableError(LongMemError):
    """A contender or a task of a comparison cannot be run here; the report says why."""
