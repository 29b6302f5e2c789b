"""`longmem place`."""

from __future__ import annotations

from typing import Annotated

import typer

from longmem.cli import common


def place(
    location: Annotated[
        str, typer.Argument(help="A folder of a location that fsspec knows: s3://bucket/folder.", show_default=False)
    ],
    store: common.Store,
) -> None:
    """Make a new store whose segments lie elsewhere; its manifest, and copies of what is used, stay in its folder.

    How to get there (keys, addresses) comes from the environment, as for other programs.
    """
    from longmem.store import MemoryStore

    with MemoryStore.open(store, segments=location):
        common.out.print(f"The segments of {store} are in {location}.", markup=False, highlight=False)
