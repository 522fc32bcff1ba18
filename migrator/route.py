"""Which encoder and which collection answer a query: one row in the ledger, read by the application.

`RouteClient` and `AsyncRouteClient` are what an application imports. They load neither torch nor a store's client.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from migrator.errors import MigratorError, PreconditionFailed, UsageProblem
from migrator.ledger import Ledger, Migration, Route, this_process

log = logging.getLogger(__name__)

REPORTS = 3
"""Reads, and reports, of a named client within its ttl."""
MIN_INTERVAL = 0.1
"""Least seconds between two of them."""
MAX_TTL = 3600.0


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


class _Chooser:
    """A route made ready for many keys. Reading a mapped row's columns costs more than the whole choice."""

    __slots__ = ("canary", "percent", "query", "salt")

    def __init__(self, route: Route) -> None:
        self.query = Choice(route.query_encoder, route.query_collection, route.epoch)
        self.canary: Choice | None = None
        if route.canary_encoder is not None:
            place = route.canary_collection or route.query_collection
            self.canary = Choice(route.canary_encoder, place, route.epoch)
        self.percent, self.salt = route.canary_percent, route.salt

    def choose(self, key: str) -> Choice:
        if self.canary is not None and bucket(self.salt, key) < self.percent:
            return self.canary
        return self.query


def choose(route: Route, key: str) -> Choice:
    """The encoder and collection for a key, sticky as long as the canary's share only grows."""
    return _Chooser(route).choose(key)


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
        "ttl": route.ttl,
        "write_encoders": route.write_encoders,
        "writes": [{"encoder": choice.encoder, "collection": choice.collection} for choice in writes(route)],
    }


class RouteClient:
    """Read-only view of one collection's route, for the application that searches it. Safe in many threads.

    No choice rests on a row that was read longer than the ttl ago: `rollback` and `rollout` rely on that, waiting
    before they delete what earlier rows name. Only while the ledger cannot be reached is the last row kept, with a
    warning; the very first read raises.
    """

    def __init__(self, ledger_url: str, migration: str, *, ttl: float | None = None, name: str | None = None) -> None:
        """`ledger_url` is the `ledger` of migrations.yaml, `migration` a name in it.

        `ttl` is in seconds; by default it is that of the route (`rollout.route_ttl`). With a `name` the client reports
        which epoch it answers with, from a thread of its own: `rollout` and `rollback` then name it while they wait
        for it, and its ttl may be longer than the route's. Make it in the process that uses it, after a fork.

        Raises `MigratorError`: `UsageProblem` for a ttl longer than the route's without a name.
        """
        if ttl is not None and not 0 <= ttl <= MAX_TTL:
            raise UsageProblem(f"ttl {ttl!r} must be from 0 to {MAX_TTL:g} seconds")
        self._ledger = Ledger(ledger_url)
        self._migration = migration
        self._own_ttl = ttl
        self._name = name
        self._owner = this_process()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._reachable = True
        try:
            self._read_at = time.monotonic()
            self._take(self._read())
            if ttl is not None and name is None and ttl > self._route.ttl:
                raise UsageProblem(
                    f"ttl {ttl:g} is longer than the {self._route.ttl:g} s of the route, after which nobody waits for "
                    "this client: give it a name, raise rollout.route_ttl before `prepare`, or leave ttl away"
                )
            if name is not None:
                self._report()
                threading.Thread(target=self._keep_reporting, name="route-client", daemon=True).start()
        except BaseException:
            self._ledger.close()
            raise

    def _read(self) -> Route:
        return current_route(self._ledger, self._migration)

    def _take(self, route: Route) -> None:
        own = self._own_ttl
        self._route, self._chooser = route, _Chooser(route)
        self._ttl = route.ttl if own is None else own if self._name is not None else min(own, route.ttl)

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._read_at < self._ttl

    def _refresh(self) -> None:
        """Reads the row again if it is due. Other threads wait for it, but not where the ledger has just been away."""
        if not self._lock.acquire(blocking=self._reachable):
            return
        try:
            if not self._is_fresh():
                self._reread()
        finally:
            self._lock.release()

    def _reread(self) -> None:
        """The caller holds the lock."""
        began = time.monotonic()
        try:
            self._take(self._read())
            self._reachable = True
        except MigratorError as error:
            self._reachable = False
            log.warning("keeping the route of epoch %d: %s", self._route.epoch, error)
        finally:
            self._read_at = began  # not its end: the row may have moved right after it was read

    def _keep_reporting(self) -> None:
        while not self._closed.wait(max(self._ttl / REPORTS, MIN_INTERVAL)):
            with self._lock:
                self._reread()
            if self._reachable:
                self._report()

    def _report(self) -> None:
        assert self._name is not None
        try:
            self._ledger.report_client(
                self._route.collection, self._owner, name=self._name, epoch=self._route.epoch, ttl=self._ttl
            )
        except MigratorError as error:
            log.warning("client %s could not report its epoch %d: %s", self._name, self._route.epoch, error)

    def route(self) -> Route:
        """The whole row, for instance for `write_encoders`."""
        if not self._is_fresh():
            self._refresh()
        return self._route

    def choose(self, key: str) -> Choice:
        """How to search for `key` (a user, session or query id): the same answer for the same key within an epoch."""
        if not self._is_fresh():
            self._refresh()
        return self._chooser.choose(key)

    def writes(self) -> list[Choice]:
        """Where to write an item, with which encoder each: see `writes`. A deletion goes to the same places."""
        return writes(self.route())

    def close(self) -> None:
        """Ends the reports, takes this client off the ledger's list, and releases the ledger."""
        self._closed.set()
        if self._name is not None:
            with self._lock:
                try:
                    self._ledger.forget_client(self._route.collection, self._owner)
                except MigratorError as error:
                    log.warning("client %s could not be removed from the ledger: %s", self._name, error)
        self._ledger.close()

    def __enter__(self) -> RouteClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncRouteClient:
    """`RouteClient` for asyncio: the loop never waits for the ledger. Made by `await AsyncRouteClient.open(...)`.

    A choice from a fresh row is made at once. One that needs a new row awaits a read in a thread, shared by all tasks.
    """

    def __init__(self, client: RouteClient) -> None:
        self._client = client
        self._reading = asyncio.Lock()

    @classmethod
    async def open(
        cls, ledger_url: str, migration: str, *, ttl: float | None = None, name: str | None = None
    ) -> AsyncRouteClient:
        """Takes what `RouteClient` takes and raises what it raises."""
        return cls(await asyncio.to_thread(RouteClient, ledger_url, migration, ttl=ttl, name=name))

    async def _refresh(self) -> None:
        if self._client._reachable or not self._reading.locked():
            async with self._reading:
                if not self._client._is_fresh():
                    await asyncio.to_thread(self._client._refresh)

    async def route(self) -> Route:
        """As `RouteClient.route`."""
        if not self._client._is_fresh():
            await self._refresh()
        return self._client._route

    async def choose(self, key: str) -> Choice:
        """As `RouteClient.choose`."""
        if not self._client._is_fresh():
            await self._refresh()
        return self._client._chooser.choose(key)

    async def writes(self) -> list[Choice]:
        """As `RouteClient.writes`."""
        return writes(await self.route())

    async def close(self) -> None:
        """As `RouteClient.close`."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> AsyncRouteClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def current_route(ledger: Ledger, name: str) -> Route:
    """The route of a migration's collection. Raises `PreconditionFailed` before `prepare` has made one."""
    migration = ledger.migration(name)
    route = ledger.route(migration.collection) if migration else None
    if route is None:
        raise PreconditionFailed(f"{name} has no route yet: `migrator rollout {name} --stage prepare`")
    return route


def initial_route(migration: Migration, *, salt: str, epoch: int, ttl: float | None = None) -> dict[str, Any]:
    """Every query to the old encoder, as it was before the migration. Without `ttl` the row keeps its own."""
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
        **({} if ttl is None else {"ttl": ttl}),
    }
