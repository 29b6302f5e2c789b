"""Figures, where matplotlib (extra `plot`) is installed."""

from __future__ import annotations

from typing import Any

from longmem.errors import MissingExtraError


def new_figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure` of so many inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Plots need matplotlib, which is not installed. Run: pip install 'longmem[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
