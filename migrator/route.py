"""Which encoder and which collection answer a query: one row in the ledger, read by the application.

`RouteClient` is what an application imports. It loads neither torch nor a store's client.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from migrator.errors import MigratorError, Refused
from migrator.ledger import Ledger, Migration, Route

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer to "how do I search for this key?". Log `epoch` beside each query: it names the route's version."""

    encoder: str
    collection: str
    """What the store's own client calls it: a collection's name, or the folder of a FAISS gallery."""
    epoch: int


def bucket(salt: str, key: str) -> float:
    """A number in [0, 100) that is fixed for a key: raising the canary's share never moves a key back."""
    digest = hashlib.sha256(f"{salt}:{key}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48 * 100  # 48 bits: more would round up to 100


def choose(route: Route, key: str) -> Choice:
    """The encoder and collection for a key, sticky as long as the canary's share only grows."""
    if route.canary_encoder is not None and bucket(route.salt, key) < route.canary_percent:
        return Choice(route.canary_encoder, route.canary_collection or route.query_collection, route.epoch)
    return Choice(route.query_encoder, route.query_collection, route.epoch)


def writes(route: Route) -> list[Choice]:
    """Where an item that is inserted, changed or deleted is to be written, and with which encoder.

    One place, but for the window around a shadow's cutover, when both collections must be kept up.
    """
    return [
        Choice(
            encoder,
            route.query_collection
            if encoder == route.query_encoder
            else route.canary_collection or route.query_collection,
            route.epoch,
        )
        for encoder in route.write_encoders
    ]


def describe(route: Route) -> dict[str, Any]:
    """The route as `migrator route` prints it."""
    return {
        "collection": route.collection,
        "epoch": route.epoch,
        "phase": route.phase,
        "query_encoder": route.query_encoder,
        "query_collection": route.query_collection,
        "canary_encoder": route.canary_encoder,
        "canary_collection": route.canary_collection,
        "canary_percent": route.canary_percent,
        "salt": route.salt,
        "write_encoders": route.write_encoders,
        "writes": [{"encoder": choice.encoder, "collection": choice.collection} for choice in writes(route)],
    }


class RouteClient:
    """Read-only view of one collection's route, for the application that searches it.

    The row is read at most once every `ttl` seconds. While the ledger cannot be reached the last known good row is
    used and a warning is logged; only the very first read raises.
    """

    def __init__(self, ledger_url: str, migration: str, *, ttl: float = 5.0) -> None:
        """`ledger_url` is the `ledger` of migrations.yaml, `migration` a name in it. Raises `MigratorError`."""
        self._ledger = Ledger(ledger_url)
        self._migration = migration
        self._ttl = ttl
        self._route = self._read()
        self._read_at = time.monotonic()

    def _read(self) -> Route:
        return current_route(self._ledger, self._migration)

    def route(self) -> Route:
        """The whole row, for instance for `write_encoders`."""
        if time.monotonic() - self._read_at >= self._ttl:
            self._read_at = time.monotonic()
            try:
                self._route = self._read()
            except MigratorError as error:
                log.warning("keeping the route of epoch %d: %s", self._route.epoch, error)
        return self._route

    def choose(self, key: str) -> Choice:
        """How to search for `key` (a user, session or query id): the same answer for the same key within an epoch."""
        return choose(self.route(), key)

    def writes(self) -> list[Choice]:
        """Where to write an item, with which encoder each: see `writes`. A deletion goes to the same places."""
        return writes(self.route())

    def close(self) -> None:
        """Lets go of the ledger."""
        self._ledger.close()


def current_route(ledger: Ledger, name: str) -> Route:
    """The route of a migration's collection. Refused before `prepare` has made one."""
    migration = ledger.migration(name)
    route = ledger.route(migration.collection) if migration else None
    if route is None:
        raise Refused(f"{name} has no route yet: `migrator rollout {name} --stage prepare`")
    return route


def initial_route(migration: Migration, *, salt: str, epoch: int) -> dict[str, Any]:
    """Every query to the old encoder, as it was before the migration."""
    return {
        "epoch": epoch,
        "query_encoder": migration.old_encoder_id,
        "query_collection": migration.source,
        "canary_encoder": None,
        "canary_collection": None,
        "canary_percent": 0.0,
        "write_encoders": [migration.old_encoder_id],
        "salt": salt,
        "phase": "old",
    }
