"""The cache of prepared images: shared, cut off anywhere, damaged, full, and in use by others."""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from migrator.trainer.data import cache
from migrator.trainer.data.cache import ImageCache
from migrator.trainer.data.items import Excluded
from migrator.trainer.data.pixels import Pixels, open_pixels
from migrator.trainer.data.shards import pixel_key
from migrator.trainer.errors import ImageProblem, ImagesUnavailable, TrainingProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource

SMALL = Preprocessing(image_size=4)
ROW = 3 * 4 * 4
LARGE = 2**30


class Source(ImageSource):
    """Counts, and fails where it is told to."""

    def __init__(self, root: Path, unreachable: str = "") -> None:
        super().__init__(str(root))
        self.decoded: list[str] = []
        self.unreachable = unreachable

    def read(self, path: str) -> bytes:
        if path == self.unreachable:
            raise ImagesUnavailable("the images are gone")
        return super().read(path)

    def decode(self, data: bytes, path: str) -> PIL.Image.Image:
        self.decoded.append(path)
        return super().decode(data, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """0.png .. 29.png, 6 x 5 pixels of noise."""
    noise = np.random.default_rng(0)
    for number in range(30):
        PIL.Image.fromarray(noise.integers(0, 256, (5, 6, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images of 4 pixels a side to a shard, three to a chunk."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 7 * ROW)
    monkeypatch.setattr(cache, "CHUNK_IMAGES", 3)


def names(*numbers: int) -> list[str]:
    return [f"{number}.png" for number in numbers]


def add(
    folder: Path,
    paths: Sequence[str],
    *,
    preprocessings: Sequence[Preprocessing] = (SMALL,),
    limit: int = LARGE,
    source: Source | None = None,
) -> tuple[list[bytes | Excluded], Source]:
    source = source or Source(folder)
    with ImageCache(folder / "cache", preprocessings, limit=limit) as store:
        return [result for batch in store.add(paths, source, workers=2) for result in batch], source


def digests_of(results: Sequence[bytes | Excluded]) -> list[bytes]:
    digests = [result for result in results if isinstance(result, bytes)]
    assert len(digests) == len(results)
    return digests


def opened(folder: Path, digests: Sequence[bytes], preprocessing: Preprocessing = SMALL) -> Pixels:
    pixels = open_pixels(folder / "cache", preprocessing, digests)
    assert pixels is not None
    return pixels


def prepared(folder: Path, paths: Sequence[str], preprocessing: Preprocessing = SMALL) -> np.ndarray:
    return np.stack([preprocessing.prepare(ImageSource(str(folder)).load(path)) for path in paths])


def files(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "cache" / pixel_key(SMALL)).glob(f"*.{kind}"))


def refused(folder: Path, paths: Sequence[str], **options: object) -> str:
    with pytest.raises(TrainingProblem) as caught:
        add(folder, paths, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- what it gives


def test_images_come_back_in_any_order_from_several_shards(folder: Path) -> None:
    paths = names(*range(30))
    results, _ = add(folder, paths)
    pixels = opened(folder, digests_of(results))
    assert len(files(folder, "u8")) == 5
    assert len(pixels) == 30
    rows = np.random.default_rng(1).integers(0, 30, 50)
    np.testing.assert_array_equal(pixels.take(rows), prepared(folder, paths)[rows])
    assert pixels.take(np.empty(0, np.int64)).shape == (0, 3, 4, 4)
    some = opened(folder, digests_of(results)[20:3:-5])
    np.testing.assert_array_equal(some.take(np.arange(4)), prepared(folder, paths[20:3:-5]))


def test_an_image_is_decoded_once_whatever_its_name(folder: Path) -> None:
    (folder / "again.png").write_bytes((folder / "2.png").read_bytes())
    first, _ = add(folder, names(1, 2))
    second, source = add(folder, ["again.png", *names(2, 5)])
    assert source.decoded == ["5.png"]
    assert second[0] == second[1] == first[1]
    assert sum(path.stat().st_size for path in files(folder, "u8")) == 3 * ROW


def test_two_of_the_same_in_one_chunk_are_kept_once(folder: Path) -> None:
    (folder / "again.png").write_bytes((folder / "2.png").read_bytes())
    results, _ = add(folder, ["2.png", "again.png"])
    assert results[0] == results[1]
    assert sum(path.stat().st_size for path in files(folder, "u8")) == ROW


def test_what_decides_pixels_tells_caches_apart_and_normalisation_does_not(folder: Path) -> None:
    others = [Preprocessing(4, resize="crop"), Preprocessing(4, interpolation="bicubic"), Preprocessing(5)]
    assert len({pixel_key(preprocessing) for preprocessing in (SMALL, *others)}) == 4
    assert pixel_key(Preprocessing(4, mean=(0, 0, 0), std=(1, 1, 1))) == pixel_key(SMALL)
    results, source = add(folder, names(1, 2), preprocessings=(SMALL, *others))
    assert sorted(source.decoded) == names(1, 2)  # once for all of them
    for preprocessing in (SMALL, *others):
        pixels = opened(folder, digests_of(results), preprocessing).take(np.arange(2))
        np.testing.assert_array_equal(pixels, prepared(folder, names(1, 2), preprocessing))


def test_images_that_cannot_be_used_are_named_in_their_place(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    (folder / "3.png").unlink()
    results, _ = add(folder, names(0, 1, 2, 3, 4))
    assert [isinstance(result, Excluded) for result in results] == [False, True, False, True, False]
    assert isinstance(results[1], Excluded)
    assert results[1].path == "1.png"
    assert "cannot be decoded" in results[1].reason


def test_missing_images_are_not_opened(folder: Path) -> None:
    results, _ = add(folder, names(1, 2))
    assert open_pixels(folder / "cache", SMALL, [*digests_of(results), b"?" * 32]) is None
    assert open_pixels(folder / "cache", Preprocessing(5), digests_of(results)) is None
    assert open_pixels(folder / "nowhere", SMALL, digests_of(results)) is None
    with ImageCache(folder / "cache", [SMALL], limit=LARGE) as store:
        assert store.lacks([b"?" * 32, *digests_of(results), b"!" * 32]) == [0, 3]
        with pytest.raises(TrainingProblem, match="loses images"):
            store.open(SMALL, [b"?" * 32])


# --- cut off, damaged


def test_a_build_that_is_cut_off_goes_on(folder: Path) -> None:
    with pytest.raises(ImagesUnavailable):
        add(folder, names(*range(30)), source=Source(folder, unreachable="20.png"))
    results, source = add(folder, names(*range(30)))
    assert sorted(source.decoded) == sorted(names(*range(18, 30)))  # 18 .. 20 were a chunk
    np.testing.assert_array_equal(
        opened(folder, digests_of(results)).take(np.arange(30)), prepared(folder, names(*range(30)))
    )


def test_files_cut_off_at_any_byte_cost_only_what_is_cut_off(folder: Path) -> None:
    paths = names(*range(10))
    results, _ = add(folder, paths)
    expected = prepared(folder, paths)
    for kind, row in (("u8", ROW), ("keys", 36)):
        whole = files(folder, kind)[-1].read_bytes()  # of the second shard: three images
        assert len(whole) == 3 * row
        for length in range(0, len(whole) + 1, 5):
            file = files(folder, kind)[-1]
            file.write_bytes(whole[:length])
            _, source = add(folder, paths)
            assert len(source.decoded) == 3 - length // row
            np.testing.assert_array_equal(opened(folder, digests_of(results)).take(np.arange(10)), expected)
            whole = files(folder, kind)[-1].read_bytes()


def test_pixels_without_keys_are_written_over(folder: Path) -> None:
    add(folder, names(0, 1))
    with files(folder, "u8")[0].open("ab") as file:
        file.write(b"x" * 70)  # a kill came before the keys
    results, source = add(folder, names(0, 1, 2))
    assert source.decoded == ["2.png"]
    np.testing.assert_array_equal(
        opened(folder, digests_of(results)).take(np.arange(3)), prepared(folder, names(0, 1, 2))
    )


@pytest.mark.parametrize("harm", ["pixels of another set", "no pixels", "no keys", "garbage"])
def test_a_damaged_shard_is_made_again(folder: Path, harm: str) -> None:
    results, _ = add(folder, names(*range(7)))
    (pixels,), (keys,) = files(folder, "u8"), files(folder, "keys")
    if harm == "pixels of another set":
        pixels.write_bytes(np.random.default_rng(2).integers(0, 256, 7 * ROW, dtype=np.uint8).tobytes())
    elif harm == "no pixels":
        pixels.unlink()
    elif harm == "no keys":
        keys.unlink()
    else:
        keys.write_bytes(b"garbage" * 36)
    assert open_pixels(folder / "cache", SMALL, digests_of(results)) is None
    _, source = add(folder, names(*range(7)))
    assert len(source.decoded) == 7
    assert len(files(folder, "u8")) == 1
    np.testing.assert_array_equal(
        opened(folder, digests_of(results)).take(np.arange(7)), prepared(folder, names(*range(7)))
    )


def test_a_folder_of_something_else_is_refused_and_left_alone(folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "holiday.jpg").write_text("mine")
    assert "no image cache: it holds 'holiday.jpg'" in refused(folder, names(1))
    assert [path.name for path in (folder / "cache").iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("content", ['{"format": 7}', "[]", "torn"])
def test_a_cache_of_another_version_is_refused(folder: Path, content: str) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "cache.json").write_text(content)
    assert "not of this version's image cache" in refused(folder, names(1))


def test_a_cache_that_is_a_file_is_refused(folder: Path) -> None:
    (folder / "cache").write_text("a file")
    assert "cannot be used: File exists" in refused(folder, names(1))


# --- limits


def test_a_run_that_needs_more_than_the_limit_is_refused_before_it_reads(folder: Path) -> None:
    source = Source(folder)
    message = refused(folder, names(*range(30)), limit=2**10, source=source)
    assert "30 prepared images take 1.34e-06 GiB, more than the 9.54e-07 GiB of train.cache_gib" in message
    assert source.decoded == []


def age(folder: Path, *, oldest_first: Sequence[int]) -> None:
    """Makes the shards look as if they were last used in this order."""
    shards = files(folder, "keys")
    for time, which in enumerate(oldest_first):
        os.utime(shards[which], (1e9 + time, 1e9 + time))


def test_the_shards_used_least_recently_give_way(folder: Path) -> None:
    results, _ = add(folder, names(*range(21)))  # three shards of seven images
    first, second, third = files(folder, "u8")
    age(folder, oldest_first=[1, 2, 0])
    opened(folder, digests_of(results[7:8]))  # now the second is the last used
    size = 7 * (ROW + 36)
    add(folder, names(*range(21, 28)), limit=3 * size)
    assert first.exists()
    assert second.exists()
    assert not third.exists()
    assert sum(path.stat().st_size for path in (folder / "cache").glob("*/[0-9]*.*")) <= 3 * size


def test_shards_of_other_preprocessings_give_way_too(folder: Path) -> None:
    add(folder, names(*range(7)), preprocessings=[Preprocessing(5)])
    add(folder, names(*range(7)), limit=7 * (ROW + 36))
    assert not list((folder / "cache" / pixel_key(Preprocessing(5))).glob("*.u8"))


def test_shards_that_this_run_uses_stay(folder: Path) -> None:
    add(folder, names(*range(14)))
    age(folder, oldest_first=[0, 1])
    size = 7 * (ROW + 36)
    results, source = add(folder, names(0, *range(14, 21)), limit=2 * size)
    assert "0.png" not in source.decoded
    assert len(opened(folder, digests_of(results))) == 8


def test_a_lower_limit_holds_after_the_next_run(folder: Path) -> None:
    add(folder, names(*range(28)))
    add(folder, names(27), limit=7 * (ROW + 36))
    assert len(files(folder, "u8")) == 1


def test_a_shard_that_is_being_read_is_not_evicted(folder: Path) -> None:
    results, _ = add(folder, names(*range(7)))
    pixels = opened(folder, digests_of(results))
    message = refused(folder, names(*range(7, 14)), limit=9 * (ROW + 36))
    assert "that running trainings use" in message
    np.testing.assert_array_equal(pixels.take(np.arange(7)), prepared(folder, names(*range(7))))
    del pixels
    add(folder, names(*range(7, 14)), limit=9 * (ROW + 36))
    assert open_pixels(folder / "cache", SMALL, digests_of(results)) is None


def test_an_image_evicted_after_it_was_found_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, names(*range(7)))
    source, last_is_read = Source(folder), threading.Event()
    read, make_room = ImageCache._read, ImageCache._make_room

    def read_and_tell(self: ImageCache, path: str, images: ImageSource) -> object:
        result = read(self, path, images)
        if path == "2.png":
            last_is_read.set()
        return result

    def make_room_late(self: ImageCache, wanted: int, *, required: bool = True) -> None:
        assert last_is_read.wait(30)
        make_room(self, wanted, required=required)

    monkeypatch.setattr(ImageCache, "_read", read_and_tell)
    monkeypatch.setattr(ImageCache, "_make_room", make_room_late)
    with ImageCache(folder / "cache", [SMALL], limit=8 * (ROW + 36)) as store:
        results = [r for batch in store.add(names(7, 8, 9, 0, 1, 2), source, workers=1) for r in batch]
        pixels = store.open(SMALL, digests_of(results))
    assert source.decoded == names(7, 8, 9, 0, 1, 2)  # the last three only after the first three took their room
    np.testing.assert_array_equal(pixels.take(np.arange(6)), prepared(folder, names(7, 8, 9, 0, 1, 2)))


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Has the kernel refuse files that grow beyond a size, as it does where a quota or a disk ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [4 * ROW + 10, 3 * ROW, 5 * ROW])
def test_a_full_disk_is_told_in_one_line_and_loses_nothing(
    folder: Path, small_files: Callable[[int], None], room: int
) -> None:
    add(folder, names(0))
    small_files(room)
    message = refused(folder, names(*range(7)))
    small_files(0)
    assert "cannot be used: File too large; make room" in message
    assert files(folder, "u8")[0].stat().st_size % ROW == 0
    results, source = add(folder, names(*range(7)))
    assert sorted(source.decoded) == names(3, 4, 5, 6)  # the chunk that did not fit, and those behind it
    np.testing.assert_array_equal(
        opened(folder, digests_of(results)).take(np.arange(7)), prepared(folder, names(*range(7)))
    )


# --- one at a time


def test_the_second_process_waits_and_finds_everything_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_POLL_SECONDS", 0.01)
    first = ImageCache(folder / "cache", [SMALL], limit=LARGE)
    first.__enter__()
    digests = [result for batch in first.add(names(1, 2), Source(folder), workers=1) for result in batch]
    calls = []

    def let_go() -> None:
        calls.append(1)
        first.__exit__()

    with ImageCache(folder / "cache", [SMALL], limit=LARGE, waiting=let_go) as second:
        assert second.lacks(digests_of(digests)) == []
    assert calls == [1]


def test_reading_waits_for_nobody(folder: Path) -> None:
    results, _ = add(folder, names(1, 2))
    with ImageCache(folder / "cache", [SMALL], limit=LARGE):
        assert len(opened(folder, digests_of(results))) == 2


def test_a_source_may_refuse_single_images_without_reading_them(folder: Path) -> None:
    results, _ = add(folder, ["../outside.png", "1.png"])
    assert isinstance(results[0], Excluded)
    assert "leads out" in results[0].reason
    with pytest.raises(ImageProblem):
        Source(folder).read("../outside.png")
