from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrator.adapters.base import StoreRejected, StoreUnavailable
from migrator.embedding.embed import Embedded, embed, encode_batch, locate
from migrator.retry import with_retries
from migrator.trainer.errors import EncoderProblem, ImageProblem, ImagesUnavailable


class Images:
    """Images that are their own names: "7" holds a 7. A name with a ! cannot be read."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.lock = threading.Lock()

    def load(self, path: str) -> Any:
        with self.lock:
            self.loaded.append(path)
        if "!" in path:
            raise ImageProblem(f"{path}: torn")
        return int(path)

    def locate(self, item: int | str, payload: Any) -> str:
        if payload is None:
            raise ImageProblem(f"item {item}: no path")
        return f"{payload['path']}"


class Encoder:
    """Gives the image's number times a factor. Numbers in `bad` have no vector."""

    def __init__(self, factor: float = 1.0, *, dim: int = 2, bad: frozenset[int] = frozenset()) -> None:
        self.factor, self.dim, self.bad = factor, dim, bad
        self.batches: list[int] = []

    def prepare(self, image: int) -> NDArray[np.uint8]:
        return np.full((2, 2, 3), image, np.uint8)

    def encode(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(len(batch))
        numbers = batch[:, 0, 0, 0]
        rows = tuple(row for row, number in enumerate(numbers) if int(number) in self.bad)
        if rows:
            raise EncoderProblem("the vector is not finite", rows=rows)
        return np.repeat(numbers[:, None].astype(np.float32) * np.float32(self.factor), self.dim, axis=1)


def run(paths: Any, *encoders: Any, images: Any = None, batch_size: int = 4, **options: Any) -> Embedded:
    given = {"threads": 2, "retry_for": 0.0, **options}
    return embed(images or Images(), paths, encoders or [Encoder()], batch_size=batch_size, **given)  # type: ignore[arg-type]


# --- embedding -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 255), max_size=40),
    torn=st.sets(st.integers(0, 39)),
    bad=st.frozensets(st.integers(0, 255), max_size=60),
    batch_size=st.integers(1, 9),
)
def test_every_row_has_its_own_vector_or_its_own_problem(numbers, torn, bad, batch_size):
    paths = [f"{number}!" if row in torn else str(number) for row, number in enumerate(numbers)]
    first, second = Encoder(1.0, dim=2, bad=bad), Encoder(2.0, dim=3)
    found = run(paths, first, second, batch_size=batch_size)
    good = [row for row, n in enumerate(numbers) if row not in torn and n not in bad]
    assert found.rows.tolist() == good
    assert set(found.problems) == set(range(len(numbers))) - set(good)
    assert all("torn" in why if row in torn else "not finite" in why for row, why in found.problems.items())
    assert found.rows.dtype == np.int64
    for vectors, encoder in zip(found.vectors, (first, second), strict=True):
        assert (vectors.shape, vectors.dtype) == ((len(good), encoder.dim), np.dtype(np.float32))
        assert vectors[:, 0].tolist() == [numbers[row] * encoder.factor for row in good]


def test_order_is_kept_though_images_come_as_they_like():
    class Slow(Images):
        """The first image is ready only when a later one is."""

        later = threading.Event()

        def load(self, path: str) -> Any:
            if path == "0":
                assert self.later.wait(20)
            if path == "5":
                self.later.set()
            return super().load(path)

    found = run(map(str, range(8)), images=Slow())
    assert found.rows.tolist() == list(range(8))
    assert found.vectors[0][:, 0].tolist() == list(range(8))


def test_an_image_is_loaded_once_for_all_encoders():
    images = Images()
    run(map(str, range(10)), Encoder(), Encoder(2.0), Encoder(3.0), images=images)
    assert sorted(images.loaded) == sorted(map(str, range(10)))


def test_a_problem_in_place_of_a_path_is_passed_on():
    images = Images()
    found = run(["1", ImageProblem("item 2: no path"), "3"], images=images)
    assert found.rows.tolist() == [0, 2]
    assert found.problems == {1: "item 2: no path"}
    assert sorted(images.loaded) == ["1", "3"]


def test_nothing_to_embed():
    found = run([], Encoder(dim=5))
    assert (found.rows.shape, found.vectors[0].shape, found.problems) == ((0,), (0, 5), {})


def test_batches_are_full_but_for_the_last_and_are_reported():
    encoder = Encoder()
    told: list[int] = []
    run(["1", "2!", *map(str, range(8))], encoder, batch_size=4, report=told.append)
    assert encoder.batches == [4, 4, 1]
    assert sum(told) == 10  # one of them cannot be loaded


def test_few_images_are_in_memory_at_a_time():
    """The encoder is slow and there are many images: loading waits for it."""
    images, batch_size = Images(), 3
    most = 0

    class Counting(Encoder):
        encoded = 0

        def encode(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
            nonlocal most
            until = time.monotonic() + 0.05  # lets the loaders run as far ahead as they may
            while time.monotonic() < until and len(images.loaded) - self.encoded <= 5 * batch_size:
                time.sleep(0.001)
            most = max(most, len(images.loaded) - self.encoded)
            self.encoded += len(batch)
            return super().encode(batch)

    taken = 0

    def paths() -> Iterator[str]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield str(number)

    found = run(paths(), Counting(), images=images, batch_size=batch_size, threads=4)
    assert len(found.rows) == taken == 60
    assert batch_size < most <= 5 * batch_size


def test_a_fault_of_the_encoder_itself_is_raised():
    class Broken(Encoder):
        def encode(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
            raise EncoderProblem("out of memory")

    with pytest.raises(EncoderProblem, match="out of memory"):
        run(["1", "2"], Broken())


def test_an_unreachable_source_is_raised_and_not_asked_for_every_image():
    asked = []

    class Gone(Images):
        def load(self, path: str) -> Any:
            asked.append(path)
            raise ImagesUnavailable("the bucket cannot be reached")

    with pytest.raises(ImagesUnavailable):
        run(map(str, range(200)), images=Gone(), batch_size=50, threads=1)
    # The first answer ends it; a few more may have been asked before the others were called off.
    assert len(asked) < 100


def test_rows_of_a_batch():
    images = [(10, np.full((1, 1, 3), 1, np.uint8)), (20, np.full((1, 1, 3), 2, np.uint8))]
    encoder = Encoder(bad=frozenset({1}))
    answers = dict(encode_batch(encoder, images))  # type: ignore[arg-type]
    assert answers[10] == "the vector is not finite"
    vector = answers[20]
    assert isinstance(vector, np.ndarray)
    assert vector.tolist() == [2.0, 2.0]
    everything = dict(encode_batch(Encoder(bad=frozenset({1, 2})), images))  # type: ignore[arg-type]
    assert everything == {10: "the vector is not finite", 20: "the vector is not finite"}


def test_locating():
    found = locate(Images(), [(1, {"path": "a.png"}), ("1", None)])  # type: ignore[arg-type]
    assert found[0] == "a.png"
    assert isinstance(found[1], ImageProblem)
    assert str(found[1]) == "item 1: no path"


# --- trying again ----------------------------------------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """What was slept between tries; the clock moves on by it, and nobody waits."""
    slept: list[float] = []
    started = time.monotonic()

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return started + sum(slept)

        @staticmethod
        def sleep(seconds: float) -> None:
            slept.append(seconds)

    monkeypatch.setattr(tenacity.nap, "time", Clock)
    monkeypatch.setattr(tenacity, "time", Clock)
    return slept


class Flaky:
    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_a_passing_fault_passes(naps):
    call = Flaky(StoreUnavailable("busy"), ImagesUnavailable("slow"), StoreUnavailable("busy"))
    assert with_retries(call, seconds=60) == "done"
    assert call.calls == 4
    assert len(naps) == 3
    assert 0.2 <= naps[0] <= 0.7
    assert 0.8 <= naps[2] <= 1.3, "exponential, with jitter"


def test_the_stores_own_advice_is_heard(naps):
    assert with_retries(Flaky(StoreUnavailable("busy", retry_after=7.0)), seconds=60) == "done"
    assert naps == [7.0]


def test_there_is_a_deadline(naps):
    call = Flaky(*[StoreUnavailable(f"busy {number}") for number in range(1000)])
    with pytest.raises(StoreUnavailable, match="busy"):
        with_retries(call, seconds=60)
    assert 30 < sum(naps) <= 60


def test_advice_beyond_the_deadline_is_not_waited_for(naps):
    with pytest.raises(StoreUnavailable):
        with_retries(Flaky(StoreUnavailable("come tomorrow", retry_after=86_400)), seconds=60)
    assert naps == []


@pytest.mark.parametrize("error", [StoreRejected("wrong dim"), ImageProblem("torn"), ValueError("a bug")])
def test_what_will_not_pass_is_raised_at_once(naps, error):
    call = Flaky(error)
    with pytest.raises(type(error)):
        with_retries(call, seconds=60)
    assert (call.calls, naps) == (1, [])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_view_is_of_the_picture_as_each_encoder_declares_it(orientation: int):
    """And is not turned a second time, however often it is converted."""
    from PIL import Image

    from migrator.trainer.images.preprocessing import Preprocessing

    image = Image.new("RGBA", (6, 4), (10, 20, 30, 0))
    image.paste((10, 20, 30, 255), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()

    class Pictures(Images):
        def load(self, path: str) -> Any:
            return image

    class Declared(Encoder):
        def __init__(self, **fields: Any) -> None:
            super().__init__()
            self.manifest: Any = type("Manifest", (), {"preprocessing": Preprocessing(4, **fields)})
            self.seen: list[Any] = []

        def prepare(self, image: Any) -> NDArray[np.uint8]:
            self.seen.append(self.manifest.preprocessing.to_rgb(image))
            return np.zeros((2, 2, 3), np.uint8)

    first, second = Declared(), Declared(exif="ignore", alpha="#0000ff")
    run(["a"], first, second, images=Pictures(), view=lambda picture, path: picture.crop((0, 0, *picture.size)))
    turned, kept = first.seen[0], second.seen[0]
    assert (turned.size, kept.size) == ((4, 6) if orientation == 6 else (6, 4), (6, 4))
    assert turned.getpixel((0, 0)) == kept.getpixel((0, 0)) == (10, 20, 30)
    assert turned.getpixel((0, 5) if orientation == 6 else (5, 0)) == (255, 255, 255)
    assert kept.getpixel((5, 0)) == (0, 0, 255)
