"""Text for probing where a user has none at hand."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from longmem.data import Document, TokenizedDocuments


@lru_cache(maxsize=1)  # reading and tokenising takes seconds
def default_documents(tokenizer: Any) -> TokenizedDocuments:
    """English text that ships with CPython: its language reference (`pydoc_data.topics`) and library docstrings."""
    return TokenizedDocuments.from_documents(python_documents(), tokenizer)


def python_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    yield Document("python topics", "\n\n".join(topics[name] for name in sorted(topics)))
    docstrings = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue  # a broken file of the installation is no concern of a probe
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                # One-liners all say much the same.
                if text and len(text) > 400:
                    docstrings.append(text)
    if docstrings:
        yield Document("python docstrings", "\n\n".join(docstrings))
