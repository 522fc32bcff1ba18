"""Who sees what: the images of a training and of a test, for a data set, a protocol and a seed.

The protocols are AdvBCT's (arXiv 2305.02610, section 4.1) at our size: the old encoder saw a part of the images
(`extended_data`) or a part of the classes (`extended_class`) that the new one sees, or all of them with a smaller
backbone (`extended_backbone`). A seed decides everything: subsample, classes held out, what the old encoder saw.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.datasets import Images

PROTOCOLS = ("extended_data", "extended_class", "extended_backbone")
OLD_SHARE = 0.3
OPEN_SHARE = 0.3
"""Of the emoji's classes, those kept for testing."""
QUERY_ARTISTS = ("openmoji", "twitter")
"""The two whose drawings resemble the others' least."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Test:
    """Queries and the gallery they are asked of, as rows of the data set; no image is in both."""

    queries: Rows
    gallery: Rows


@dataclass(frozen=True)
class Split:
    """Rows of the data set."""

    train: Rows
    tests: tuple[Test, ...]

    @property
    def test_rows(self) -> Rows:
        """Every row that some test needs, ascending."""
        return np.unique(np.concatenate([rows for test in self.tests for rows in (test.queries, test.gallery)]))


@dataclass(frozen=True)
class Size:
    """How many images at most; None for all."""

    train: int | None = None
    queries: int | None = None
    gallery: int | None = None


def split(images: Images, size: Size, seed: int) -> Split:
    """Emoji, an open set: other classes in the tests, one test for each query artist. Fashion-MNIST, a closed set."""
    random = np.random.default_rng([seed, zlib.crc32(images.name.encode())])
    return (open_set if images.artists.any() else closed_set)(images, size, random)


def open_set(images: Images, size: Size, random: np.random.Generator) -> Split:
    classes = random.permutation(images.classes)
    held_out = np.isin(images.labels, classes[: round(OPEN_SHARE * len(classes))])
    tests = []
    for artist in QUERY_ARTISTS:
        asks = images.artists == artist
        tests.append(Test(np.flatnonzero(held_out & asks), np.flatnonzero(held_out & ~asks)))
    train = np.flatnonzero(~held_out)
    if size.train is not None and size.train < len(train):
        # Whole classes go: a class with fewer drawings would be another problem, not a smaller one.
        kept = classes[round(OPEN_SHARE * len(classes)) :]
        kept = kept[: round(len(kept) * size.train / len(train))]
        train = np.flatnonzero(np.isin(images.labels, kept))
    return Split(train, tuple(tests))


def closed_set(images: Images, size: Size, random: np.random.Generator) -> Split:
    train = random.permutation(np.flatnonzero(images.parts == "train"))[: size.train]
    test = random.permutation(np.flatnonzero(images.parts == "test"))
    queries = size.queries or len(test) // 5
    gallery = test[queries:][: size.gallery]
    return Split(np.sort(train), (Test(np.sort(test[:queries]), np.sort(gallery)),))


def seen_by_old(images: Images, train: Rows, protocol: str, seed: int) -> Rows:
    """Of the training images those that the old encoder saw."""
    random = np.random.default_rng([seed, zlib.crc32(protocol.encode())])
    if protocol == "extended_data":
        return np.sort(random.permutation(train)[: round(OLD_SHARE * len(train))])
    if protocol == "extended_class":
        classes = random.permutation(np.unique(images.labels[train]))
        known = classes[: max(2, round(OLD_SHARE * len(classes)))]
        return train[np.isin(images.labels[train], known)]
    return train
