"""Training text for memory: histories of users who tell things and are asked for them much later."""

from longmem.histories.history import Asked, History, HistoryConfig, Replied, Told, generate_histories
from longmem.histories.prompts import PROMPTS, Prompts
from longmem.histories.replies import Reply, generate_replies, read_replies

__all__ = [
    "PROMPTS",
    "Asked",
    "History",
    "HistoryConfig",
    "Prompts",
    "Replied",
    "Reply",
    "Told",
    "generate_histories",
    "generate_replies",
    "read_replies",
]
