"""A migration whose images are on a web server, and a server that stops answering."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator import retry
from tests.web import Web, serve
from tests.world import World

Migrator = Callable[..., int]


@pytest.fixture
def web(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The world's images on a web server, under names that a URL has to quote; payloads hold whole URLs of the half."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    table = pq.read_table(world.gallery / "items.parquet")
    with serve(world.folder) as server:
        paths = []
        for row, name in enumerate(table.column("path").to_pylist()):
            (world.images / name).rename(world.images / f"50% #{name}")
            quoted = f"50%25%20%23{name}"
            paths.append(f"{server.url}/images/{quoted}" if row % 2 else f"50% #{name}")
        place = table.schema.get_field_index("path")
        pq.write_table(table.set_column(place, "path", pa.array(paths)), world.gallery / "items.parquet")
        world.configure(images__root=f"{server.url}/images/", images__timeout=1, backfill__retry_for=2.5)
        yield server


def test_images_over_http_are_planned_and_verified(web: Web, migrator: Migrator) -> None:
    assert migrator("plan") == 0
    web.requests.clear()
    assert migrator("verify") == 0
    assert len(set(web.requests)) == 120


def test_a_server_that_hangs_ends_plan_with_exit_code_4_and_a_line_before(
    web: Web,
    world: World,
    migrator: Migrator,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    web.hanging = True
    monkeypatch.setattr(retry, "NOTICEABLE", 0.5)  # shorter than the least timeout, as it is in earnest
    monkeypatch.setattr("migrator.cli.common.PLAIN_EVERY", 1.0)
    assert migrator("plan") == 4
    *before, told = capsys.readouterr().err.strip().splitlines()
    assert set(before) == {"sampling: started"}
    assert f"image root '{web.url}/images/' cannot be reached: no answer within 1 s" in told
    assert "cannot be reached: no answer within 1 s; trying again in" in caplog.text
    assert not (world.folder / "artifacts").exists()


def test_another_timeout_leaves_the_plan_as_it_is(web: Web, world: World, migrator: Migrator) -> None:
    assert migrator("plan") == 0
    world.configure(images__timeout=5)
    assert migrator("verify") == 0
