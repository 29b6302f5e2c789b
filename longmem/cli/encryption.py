"""`longmem encrypt`, `destroy-key`."""

from __future__ import annotations

from typing import Annotated

import typer

from longmem.cli import common

Namespace = Annotated[str, typer.Argument(help="Name of a bank; its forks go with it.", show_default=False)]


def encrypt(namespace: Namespace, store: common.Store, keys: common.Keys = None) -> None:
    """Keep a bank and its forks encrypted from now on, with a key of their own beside the store.

    What it holds is written anew. There need be no such bank yet.
    """
    from longmem.store import KeyFolder, MemoryStore

    with MemoryStore.open(store, keys=keys) as opened:
        opened.encrypt(namespace)
        key_id = opened.seal(namespace).key_id
        assert key_id is not None
        keeper = opened.keys.provider
        assert isinstance(keeper, KeyFolder)
        key = keeper.path(key_id)
    common.out.print(
        f"{namespace} is encrypted. Its key: {key}. Without it nobody can read what is written there; keep copies of "
        "it apart from copies of the store.",
        markup=False,
        highlight=False,
    )


def destroy_key(
    namespace: Namespace,
    store: common.Store,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keys: common.Keys = None,
) -> None:
    """Destroy the key of an encrypted bank: all that it holds is forgotten, in every copy of the store, for good."""
    from longmem.store import MemoryStore

    with MemoryStore.open(store, create=False, keys=keys) as opened:
        opened.manifest.require_writable()
        names = [info.name for info in opened.banks() if info.namespace == namespace]
        if not yes and opened.seal(namespace).key_id is not None:
            what = f"all that {', '.join(names)} holds" if names else f"the key of {namespace}, which holds nothing yet"
            typer.confirm(f"Forget {what}, in every copy of this store, for good?", abort=True, err=True)
        receipt = opened.destroy_key(namespace)
    common.out.print(
        f"The key of {namespace} is destroyed. Copies of the key that you made yourself are not.\n"
        f"Receipt {receipt.number}: {receipt.signature}",
        markup=False,
        highlight=False,
    )
