"""Upgrade the embedding model behind an image-search vector database without downtime.

What applications import: `RouteClient`, `AsyncRouteClient` and `load_encoder`. Each is loaded when it is first used, so
that `import migrator` loads neither torch nor a database driver.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migrator.route import AsyncRouteClient as AsyncRouteClient
    from migrator.route import RouteClient as RouteClient
    from migrator.served_encoder import ServedEncoder as ServedEncoder
    from migrator.served_encoder import load_encoder as load_encoder

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncRouteClient": "migrator.route",
    "RouteClient": "migrator.route",
    "ServedEncoder": "migrator.served_encoder",
    "load_encoder": "migrator.served_encoder",
}

__all__ = ["AsyncRouteClient", "RouteClient", "ServedEncoder", "__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
