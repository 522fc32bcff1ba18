"""A process that is killed while it fills the image cache loses at most the images that it had not told of yet."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from migrator.trainer.data import cache
from migrator.trainer.data.cache import ImageCache
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource

pytestmark = pytest.mark.crash

COUNT, CHUNK, TOLD = 600, 10, 12
SIZES = (Preprocessing(image_size=32), Preprocessing(image_size=24))
PATHS = [f"{number}.png" for number in range(COUNT)]


def fill(folder: Path, told: Connection) -> None:
    cache.CHUNK_IMAGES = CHUNK
    cache.SHARD_BYTES = 25 * 3 * 32 * 32
    with ImageCache(folder / "cache", SIZES, limit=2**30) as store:
        for batch in store.add(PATHS, ImageSource(str(folder)), workers=2):
            told.send(batch)


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0)
    for path in PATHS:
        PIL.Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / path)
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=fill, args=(tmp_path, there))
    process.start()
    there.close()
    with here:
        told = []
        for _ in range(TOLD):
            assert here.poll(60)
            told += here.recv()
        process.kill()
    process.join()
    assert process.exitcode == -9

    decoded: list[str] = []
    decode = ImageSource.decode

    def counted(self: ImageSource, data: bytes, path: str) -> PIL.Image.Image:
        decoded.append(path)
        return decode(self, data, path)

    monkeypatch.setattr(ImageSource, "decode", counted)
    images = ImageSource(str(tmp_path))
    with ImageCache(tmp_path / "cache", SIZES, limit=2**30) as store:
        digests: list[Any] = [digest for batch in store.add(PATHS, images, workers=2) for digest in batch]
        opened = [store.open(size, digests) for size in SIZES]
    assert digests[: len(told)] == told
    assert not {*decoded} & {*PATHS[: len(told)]}
    assert len(decoded) < COUNT
    for size, pixels in zip(SIZES, opened, strict=True):
        expected = np.stack([size.prepare(images.load(path)) for path in PATHS])
        np.testing.assert_array_equal(pixels.take(np.arange(COUNT)), expected)
