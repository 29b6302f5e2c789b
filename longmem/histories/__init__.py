"""Training text for memory: histories of users who tell things and are asked for them much later."""

from longmem.histories.history import Asked, History, HistoryConfig, Told, generate_histories

__all__ = ["Asked", "History", "HistoryConfig", "Told", "generate_histories"]
