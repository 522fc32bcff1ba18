from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator import route as module
from migrator.errors import MigratorError, PreconditionFailed, TemporarilyUnavailable, UsageProblem
from migrator.ledger import Ledger, Migration, Route
from migrator.route import AsyncRouteClient, Choice, RouteClient, bucket, choose, current_route, describe, initial_route
from tests.unit.test_ledger import until

KEYS = [f"user-{number}" for number in range(5_000)]


def a_route(percent: float = 0.0, **columns: Any) -> Route:
    return Route(
        collection="digits", migration_id=1, epoch=3, query_encoder="old", query_collection="digits",
        canary_encoder="new", canary_collection="digits", canary_percent=percent, write_encoders=["old"], salt="s1",
        phase="canary", **columns,
    )  # fmt: skip


# --- who goes where --------------------------------------------------------------------------------------------------


def test_keys_are_spread_evenly():
    counts = Counter(int(bucket("s1", key)) for key in KEYS)
    assert set(counts) == set(range(100))
    expected = len(KEYS) / 100
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert 60 < chi_square < 149  # 99 degrees of freedom: beyond this in one case of a thousand, on either side


def test_another_salt_spreads_anew():
    first = {key for key in KEYS if bucket("s1", key) < 10}
    second = {key for key in KEYS if bucket("s2", key) < 10}
    assert 0.05 < len(first & second) / len(first) < 0.15


@given(salt=st.text(), key=st.text(st.characters()))
def test_a_bucket_is_a_number_from_0_to_below_100(salt, key):
    assert 0 <= bucket(salt, key) < 100
    assert bucket(salt, key) == bucket(salt, key)


def test_a_key_that_cannot_be_encoded_is_a_key_all_the_same():
    assert 0 <= bucket("s1", "\ud800") < 100


@pytest.mark.parametrize(("byte", "encoder"), [(b"\xff", "new"), (b"\x00", "new")])
def test_at_100_percent_no_key_is_left_behind(monkeypatch, byte, encoder):
    """A bucket that rounded up to 100 would send an old query into a gallery of new vectors."""

    class Digest:
        def digest(self) -> bytes:
            return byte * 32

    monkeypatch.setattr(hashlib, "sha256", lambda _: Digest())
    assert choose(a_route(100.0), "any").encoder == encoder


@given(key=st.text(), low=st.floats(0, 100), high=st.floats(0, 100))
def test_raising_the_share_never_moves_a_key_back(key, low, high):
    low, high = sorted((low, high))
    if choose(a_route(low), key).encoder == "new":
        assert choose(a_route(high), key).encoder == "new"


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 100])
def test_the_share_is_what_was_asked_for(percent):
    new = sum(choose(a_route(float(percent)), key).encoder == "new" for key in KEYS)
    assert abs(new / len(KEYS) * 100 - percent) < 3
    if percent in (0, 100):
        assert new == len(KEYS) * percent / 100


def test_a_key_stays_where_it_is_when_the_route_changes_otherwise():
    before, after, elsewhere = a_route(50.0), a_route(50.0), a_route(50.0)
    after.epoch, after.phase, elsewhere.salt = 4, "backfill", "s2"
    new = [choose(before, key).encoder for key in KEYS]
    assert [choose(after, key).encoder for key in KEYS] == new
    assert [choose(elsewhere, key).encoder for key in KEYS] != new


def test_a_choice_names_encoder_collection_and_epoch():
    assert choose(a_route(0.0), "k") == Choice("old", "digits", 3)
    route = a_route(100.0)
    route.canary_collection = "digits-new"
    assert choose(route, "k") == Choice("new", "digits-new", 3)
    route.canary_collection = None
    assert choose(route, "k") == Choice("new", "digits", 3)
    route.canary_encoder = None
    assert choose(route, "k") == Choice("old", "digits", 3)


def test_the_first_route_is_as_before_the_migration():
    migration = Migration(id=1, collection="faiss:digits", source="digits", old_encoder_id="old", new_encoder_id="new")
    columns = initial_route(migration, salt="s", epoch=7)
    route = Route(collection="digits", **{**columns, "epoch": 8, "migration_id": 1})
    assert {choose(route, key) for key in KEYS[:1000]} == {Choice("old", "digits", 8)}
    assert route.write_encoders == ["old"]
    assert set(describe(route)) == set(Route.__table__.columns.keys()) - {
        "migration_id",
        "changed_at",
        "settled_at",
    } | {"writes"}


# --- the client ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/migrator.db")
    for encoder in ("old", "new"):
        ledger.save_encoder(encoder, "{}")
    ledger.save_plan(
        "digits-v2", collection="digits", source="digits", alias=None,
        strategy="in_place", old_encoder_id="old", new_encoder_id="new",
        fingerprint="f", bound={}, content={},
    )  # fmt: skip
    yield ledger
    ledger.close()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the client sees, in seconds; a test changes it."""
    now = [1000.0]
    monkeypatch.setattr("migrator.route.time.monotonic", lambda: now[0])
    return now


def prepare(ledger: Ledger, *, ttl: float | None = None) -> Migration:
    migration = ledger.migration("digits-v2")
    assert migration is not None
    return ledger.move(
        migration,
        stage="prepare",
        state="active",
        event="prepare",
        route=initial_route(migration, salt="s", epoch=0, ttl=ttl),
    )


def to_canary(ledger: Ledger, migration: Migration, percent: float, *, epoch: int) -> Migration:
    columns = {"epoch": epoch, "canary_encoder": "new", "canary_percent": percent, "phase": "canary"}
    return ledger.move(migration, stage="canary", event="canary", route=columns)


def test_the_client_reads_once_in_a_while(ledger, clock):
    migration = prepare(ledger)
    client = RouteClient(str(ledger.url), "digits-v2", ttl=5.0)
    assert client.choose("k") == Choice("old", "digits", 1)
    to_canary(ledger, migration, 100.0, epoch=1)
    clock[0] += 4.9
    assert client.choose("k") == Choice("old", "digits", 1)
    clock[0] += 0.2
    assert client.choose("k") == Choice("new", "digits", 2)
    assert client.route().write_encoders == ["old"]
    client.close()


@pytest.mark.parametrize("harm", ["removed", "emptied", "garbage", "a folder"])
def test_the_client_keeps_what_it_knew_when_the_ledger_is_gone(ledger, clock, caplog, harm):
    migration = prepare(ledger)
    path = Path(ledger.url.database or "")
    client = RouteClient(str(ledger.url), "digits-v2", ttl=5.0)
    ledger.close()
    kept = shutil.copy(path, f"{path}.kept")
    for file in path.parent.glob("migrator.db*"):
        if not str(file).endswith(".kept"):
            file.unlink()
    if harm == "emptied":
        path.touch()
    elif harm == "garbage":
        path.write_bytes(b"no database" * 1000)
    elif harm == "a folder":
        path.mkdir()
    clock[0] += 6
    with caplog.at_level(logging.WARNING):
        assert client.choose("k") == Choice("old", "digits", 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "keeping the route of epoch 1" in caplog.text
    assert client.choose("k") == Choice("old", "digits", 1)
    assert len(caplog.records) == 1, "it does not ask again before the time is up"

    for file in path.parent.glob("migrator.db*"):
        if file.is_dir():
            file.rmdir()
        elif not str(file).endswith(".kept"):
            file.unlink()
    shutil.move(kept, path)
    to_canary(ledger, migration, 100.0, epoch=1)
    clock[0] += 6
    assert client.choose("k") == Choice("new", "digits", 2), "it recovers by itself"
    client.close()


def test_the_ttl_is_the_routes_own(ledger, clock):
    migration = prepare(ledger, ttl=20.0)
    with RouteClient(str(ledger.url), "digits-v2") as client, RouteClient(str(ledger.url), "digits-v2", ttl=1) as quick:
        to_canary(ledger, migration, 100.0, epoch=1)
        clock[0] += 19.9
        assert client.choose("k").epoch == 1
        assert quick.choose("k").epoch == 2
        clock[0] += 0.2
        assert client.choose("k").epoch == 2


def test_a_client_that_nobody_knows_keeps_no_row_for_longer_than_the_route_says(ledger):
    prepare(ledger, ttl=2.0)
    url = str(ledger.url)
    with pytest.raises(UsageProblem, match=r"ttl 30 is longer than the 2 s of the route.*give it a name"):
        RouteClient(url, "digits-v2", ttl=30)
    with RouteClient(url, "digits-v2", ttl=30, name="search-1"):
        (row,) = ledger.clients_behind("digits", 2)
        assert (row.name, row.epoch, row.ttl) == ("search-1", 1, 30)
    assert ledger.clients_behind("digits", 2) == []
    for ttl in (-1, 3601, float("nan")):
        with pytest.raises(UsageProblem, match="must be from 0 to 3600 seconds"):
            RouteClient(url, "digits-v2", ttl=ttl)


def test_a_named_client_reports_its_epoch_by_itself(ledger, monkeypatch):
    """Also while nobody searches; then a wait for it ends."""
    monkeypatch.setattr(module, "MIN_INTERVAL", 0.01)
    migration = prepare(ledger, ttl=0.0)
    with RouteClient(str(ledger.url), "digits-v2", ttl=0.03, name="search-1") as client:
        to_canary(ledger, migration, 100.0, epoch=1)
        until(lambda: [row.epoch for row in ledger.clients_behind("digits", 99)] == [2])
        assert client.choose("k").encoder == "new"


def replaced_by_a_folder(path: Path) -> bool:
    for file in path.parent.glob("migrator.db*"):
        file.unlink(missing_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def test_a_named_client_searches_on_when_the_ledger_is_gone(ledger, monkeypatch, caplog):
    monkeypatch.setattr(module, "MIN_INTERVAL", 0.01)
    prepare(ledger, ttl=0.0)
    path = Path(ledger.url.database or "")
    client = RouteClient(str(ledger.url), "digits-v2", name="search-1")
    ledger.close()
    until(lambda: replaced_by_a_folder(path))  # the client's thread may make the file once more in between
    with caplog.at_level(logging.WARNING):
        until(lambda: "keeping the route of epoch 1" in caplog.text)
        assert client.choose("k") == Choice("old", "digits", 1)
        client.close()
    assert "client search-1 could not be removed from the ledger" in caplog.text


def test_no_thread_answers_with_a_row_that_is_too_old_while_another_reads(ledger, clock, monkeypatch):
    migration = prepare(ledger)
    client = RouteClient(str(ledger.url), "digits-v2")
    to_canary(ledger, migration, 100.0, epoch=1)
    reading, allowed = threading.Event(), threading.Event()
    read = client._read

    def slow_read() -> Route:
        reading.set()
        assert allowed.wait(20)
        return read()

    monkeypatch.setattr(client, "_read", slow_read)
    clock[0] += 6
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.choose, "k")
        assert reading.wait(20)
        second = pool.submit(client.choose, "k")
        allowed.set()
        assert first.result(20).epoch == second.result(20).epoch == 2
    client.close()


def test_threads_do_not_wait_for_a_ledger_that_is_known_to_be_away(ledger, clock, monkeypatch):
    prepare(ledger)
    client = RouteClient(str(ledger.url), "digits-v2")
    reading, allowed = threading.Event(), threading.Event()

    def gone() -> Route:
        raise TemporarilyUnavailable("gone")

    def slow_and_gone() -> Route:
        reading.set()
        assert allowed.wait(20)
        raise TemporarilyUnavailable("gone")

    monkeypatch.setattr(client, "_read", gone)
    clock[0] += 6
    assert client.choose("k").epoch == 1
    monkeypatch.setattr(client, "_read", slow_and_gone)
    clock[0] += 6
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.choose, "k")
        assert reading.wait(20)
        assert client.choose("k").epoch == 1, "this thread does not wait for the other one's read"
        allowed.set()
        assert first.result(20).epoch == 1
    client.close()


def test_with_asyncio_the_loop_runs_while_the_row_is_read(ledger, clock, monkeypatch):
    migration = prepare(ledger)
    url = str(ledger.url)

    async def search() -> None:
        async with await AsyncRouteClient.open(url, "digits-v2") as client:
            assert await client.choose("k") == Choice("old", "digits", 1)
            assert await client.writes() == [Choice("old", "digits", 1)]
            to_canary(ledger, migration, 100.0, epoch=1)
            allowed, reads = threading.Event(), []
            read = client._client._read

            def slow_read() -> Route:
                reads.append(threading.current_thread())
                assert allowed.wait(20), "the loop was blocked"
                return read()

            monkeypatch.setattr(client._client, "_read", slow_read)
            clock[0] += 6

            async def allow() -> None:
                allowed.set()

            *found, _ = await asyncio.gather(*(client.choose("k") for _ in range(20)), allow())
            assert found == [Choice("new", "digits", 2)] * 20
            assert len(reads) == 1
            assert reads[0] is not threading.main_thread()
            assert (await client.route()).epoch == 2

    asyncio.run(search())
    with pytest.raises(PreconditionFailed):
        asyncio.run(AsyncRouteClient.open(url, "no-such"))


def test_the_very_first_read_raises(tmp_path, ledger):
    with pytest.raises(TemporarilyUnavailable):
        RouteClient(f"sqlite:///{tmp_path}/missing/migrator.db", "digits-v2")
    with pytest.raises(MigratorError):
        RouteClient("nonsense", "digits-v2")
    for name in ("digits-v2", "no-such"):
        with pytest.raises(PreconditionFailed, match=f"migrator rollout {name} --stage prepare"):
            RouteClient(str(ledger.url), name)


def test_the_route_of_a_migration(ledger):
    prepare(ledger)
    assert current_route(ledger, "digits-v2").query_encoder == "old"


def test_the_client_loads_nothing_heavy():
    code = (
        "import sys; import migrator; migrator.RouteClient, migrator.AsyncRouteClient;"
        "heavy = {'torch', 'faiss', 'timm', 'pydantic', 'numpy', 'PIL', 'pyarrow', 'fsspec', 'alembic', 'click'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
