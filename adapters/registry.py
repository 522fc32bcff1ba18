"""Opening a store by the kind that a configuration names.

A kind is an entry point of the group `migrator.stores`: a factory `(config, *, write) -> Store`. Other packages join
by declaring one; nothing is imported before its kind is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from migrator.adapters.base import Store, StoreRejected

GROUP = "migrator.stores"
DISTRIBUTION = "advbct-migrator"


def known_kinds() -> list[str]:
    """The kinds that installed packages offer, sorted."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def open_store(config: Mapping[str, Any], *, write: bool) -> Store:
    """Opens the collection that `config` describes; `config["kind"]` picks the adapter.

    Raises `StoreRejected` for an unknown kind or a library that is not installed, and whatever the adapter raises:
    `StoreRejected`, `StoreUnavailable`, or `StoreBusy` where `write` needs a lock that another process holds.
    """
    kind = config.get("kind")
    entry = next(iter(entry_points(group=GROUP, name=kind)), None) if isinstance(kind, str) else None
    if entry is None:
        known = known_kinds()
        near = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StoreRejected(f"there is no store of kind {kind!r}: known are {', '.join(known) or 'none'}{hint}")
    try:
        return cast(Store, entry.load()(config, write=write))
    except ModuleNotFoundError as error:
        raise StoreRejected(f"store kind {kind!r} needs the library {error.name}: {_remedy(entry, error)}") from error


def _remedy(entry: EntryPoint, error: ModuleNotFoundError) -> str:
    if entry.dist is not None and entry.dist.name == DISTRIBUTION:
        return f"pip install '{DISTRIBUTION}[{entry.name}]'"
    return f"install {error.name}"
