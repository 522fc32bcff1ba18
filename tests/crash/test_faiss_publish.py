"""A writer of a FAISS folder is killed, again and again; whatever it had reached, the folder is whole and tells the
truth about each vector, and the same command run again ends as if nothing had happened.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from migrator.adapters.base import Store
from migrator.adapters.testing import payloads_of, unit_vectors
from tests.integration.stores.galleries import Flavour, Gallery

pytestmark = pytest.mark.crash

N, CHUNK, STAMP = 120, 10, "new"
IDS = list(range(N))
NEW = unit_vectors(N, seed=1)
FLAVOURS = [Flavour("Flat"), Flavour("IVF8,Flat"), Flavour("HNSW8"), Flavour("PQ8x6np")]

Job = Callable[[Store, np.ndarray, Callable[[str], None]], None]

# -- in the process that is killed ------------------------------------------------------------------------------------


def forward(store: Store, _: np.ndarray, progress: Callable[[str], None]) -> None:
    """The backfill: what has no stamp gets its new vector."""
    ids = store.unstamped(STAMP, after=None, limit=N)
    for number, start in enumerate(range(0, len(ids), CHUNK)):
        some = [int(item) for item in ids[start : start + CHUNK]]
        store.write_vectors(some, NEW[some], STAMP)
        progress("chunk")
        if number % 3 == 2:
            store.publish()
            progress("published")
    store.publish(final=True)


def back(store: Store, old: np.ndarray, progress: Callable[[str], None]) -> None:
    """The rollback: what has a stamp gets its old vector, in another order than it came."""
    stamps = store.read_stamps(IDS).stamps
    ids = [item for item, stamp in zip(IDS, stamps, strict=True) if stamp == STAMP][::-1]
    for number, start in enumerate(range(0, len(ids), CHUNK)):
        some = ids[start : start + CHUNK]
        store.write_vectors(some, old[some], None)
        progress("chunk")
        if number % 3 == 2:
            store.publish()
            progress("published")
    store.publish(final=True)


def just_publish(store: Store, _: np.ndarray, __: Callable[[str], None]) -> None:
    """Nothing is left to be written."""
    store.publish(final=True)


def work(gallery: Gallery, job: Job, old: np.ndarray, progress: Callable[[str], None], die_at: int | None) -> None:
    """Runs a job; with `die_at`, dies before its so-and-so-many-th change of a file."""
    events = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal events
        writes = event == "open" and isinstance(args[1], str) and args[1] not in ("r", "rb")
        if writes or event in ("os.rename", "os.remove", "os.link", "os.mkdir"):
            events += 1
            if events == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if die_at is not None:
        sys.addaudithook(watch)
    with closing(gallery.open()) as store:
        job(store, old, progress)


def nursery(pipe: Connection) -> None:
    """Forks a process for each order, from one that has the heavy libraries loaded and no thread yet."""
    faiss.omp_set_num_threads(1)
    pid = 0
    while order := pipe.recv():
        if pid:
            os.waitpid(pid, 0)  # only now is its number free for other processes
        pid = os.fork()
        if pid == 0:
            try:
                gallery, job, old, die_at = order
                work(gallery, job, old, pipe.send, die_at)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pipe.send(pid)
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        pipe.send((end.si_code, end.si_status))


# -- in the test ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=nursery, args=(theirs,))
    process.start()
    theirs.close()
    yield ours
    ours.send(None)
    process.join(60)


def run(
    pipe: Connection, scene: Scene, job: Job, *, dice: random.Random | None = None, die_at: int | None = None
) -> bool:
    """Runs a job in a process of its own, and kills it at a moment that the dice choose; whether it came to its end."""
    pipe.send((scene.gallery, job, scene.old, die_at))
    pid: int | None = None
    reports = dice.randrange(5) if dice else -1
    while True:
        if dice and pid and reports == 0 and not pipe.poll(dice.choice([0, 0.005, 0.03])):
            os.kill(pid, signal.SIGKILL)
        assert pipe.poll(60)
        report = pipe.recv()
        if isinstance(report, int):
            pid = report
        elif isinstance(report, tuple):
            break
        elif reports > 0:
            reports -= 1
    assert report in ((os.CLD_EXITED, 0), (os.CLD_KILLED, signal.SIGKILL))
    return bool(report[0] == os.CLD_EXITED)


class Scene:
    """A gallery, and what each of its vectors may be."""

    def __init__(self, folder: Path, flavour: Flavour) -> None:
        self.gallery = Gallery(folder / "gallery", flavour)
        self.gallery.fill(IDS, unit_vectors(N), payloads_of(IDS))
        self.items = self.gallery.items_file.read_bytes()
        self.index = self.gallery.index_file.read_bytes()
        self.exact = flavour.factory != "PQ8x6np"
        self.old = self.vectors()

    def vectors(self) -> np.ndarray:
        """What a stranger reads from the two files."""
        visible = self.gallery.visible()
        return np.array([visible[item] for item in IDS])

    def is_new(self, vectors: np.ndarray) -> np.ndarray:
        """Which vectors are new; every one must be either old or new."""
        to_new = np.linalg.norm(vectors - NEW, axis=1)
        to_old = np.linalg.norm(vectors - self.old, axis=1)
        assert (np.minimum(to_new, to_old) <= (0 if self.exact else 0.8)).all(), "a vector that nobody wrote"
        return to_new < to_old

    def check(self) -> np.ndarray:
        """The folder is whole, and its stamps say what its vectors are; returns which items carry the stamp."""
        assert self.gallery.items_file.read_bytes() == self.items
        self.is_new(self.vectors())
        with closing(self.gallery.open(write=False)) as store:
            page = store.read_vectors(IDS)
            stamped = np.array([stamp == STAMP for stamp in page.stamps])
            np.testing.assert_array_equal(self.is_new(page.vectors), stamped)
            assert store.count(stamp=STAMP) == stamped.sum()
        return stamped

    def finish(self, job: Job) -> None:
        """Runs a job to its end."""
        with closing(self.gallery.open()) as store:
            job(store, self.old, lambda _: None)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_killed_at_random_moments(tmp_path: Path, pipe: Connection, flavour: Flavour) -> None:
    unharmed, scene = Scene(tmp_path / "unharmed", flavour), Scene(tmp_path / "harmed", flavour)
    dice = random.Random(f"{flavour}")
    kills = 0
    for job in (forward, back):
        unharmed.finish(job)
        before = scene.check()
        for _ in range(4):
            kills += not run(pipe, scene, job, dice=dice)
            now = scene.check()
            assert (now >= before if job is forward else now <= before).all(), "work was lost"
            before = now
        assert run(pipe, scene, job)
        assert (scene.check() == (job is forward)).all()
        if scene.exact:  # the code books of PQ are learnt from what was there when it was rebuilt
            np.testing.assert_array_equal(scene.vectors(), unharmed.vectors())
    assert kills > 0
    assert scene.gallery.index_file.read_bytes() == scene.index


@pytest.mark.parametrize(
    ("flavour", "published", "written", "job"),
    [
        (FLAVOURS[0], False, ["new"], forward),
        (FLAVOURS[3], False, ["new"], forward),
        (FLAVOURS[3], True, ["old"], back),
        (FLAVOURS[0], False, ["new", "old"], just_publish),
    ],
    ids=["Flat-forward", "PQ-forward", "PQ-back", "Flat-taken-back-before-it-was-published"],
)
def test_killed_before_every_change_of_a_file(
    tmp_path: Path, pipe: Connection, flavour: Flavour, published: bool, written: list[str], job: Job
) -> None:
    scene = Scene(tmp_path, flavour)
    if published:
        scene.finish(forward)
    most = IDS[:-CHUNK]  # the last chunk and the last publication are what is left
    with closing(scene.gallery.open()) as store:
        for what in written:
            store.write_vectors(most, NEW[most] if what == "new" else scene.old[most], STAMP if what == "new" else None)
    start = scene.gallery.path.with_name("start")
    shutil.copytree(scene.gallery.path, start)
    step = 0
    finished = False
    while not finished:
        step += 1
        shutil.rmtree(scene.gallery.path)
        shutil.copytree(start, scene.gallery.path)
        finished = run(pipe, scene, job, die_at=step)
        assert (scene.check()[most] == (written[-1] == "new")).all(), "work was lost"
        scene.finish(job)
        assert (scene.check() == (job is forward)).all()
        assert (scene.is_new(scene.vectors()) == (job is forward)).all()
        if job is not forward:
            assert scene.gallery.index_file.read_bytes() == scene.index
        assert not list(scene.gallery.path.rglob("*.tmp"))
        assert not list(scene.gallery.path.rglob("segments/*"))
    assert step > 5, "the hook did not see the changes"
