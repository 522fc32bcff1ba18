"""Which images are held out, the order of an epoch, and its batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from migrator.trainer.errors import TrainingProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import torch
    from numpy.typing import NDArray


MIN_TO_HOLD_OUT = 3
"""All images of a smaller class stay in training."""
T = TypeVar("T")


def held_out_split(
    labels: NDArray[np.int64], share: float, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers (ascending) for training and for validation, with about `share` of every class held out.

    A class's expected number of held-out images is exact also where it is a fraction. Classes of fewer than three
    images stay in training, and at least two of every other do. Raises TrainingProblem where nothing can be held out.
    """
    if share == 0:
        return np.arange(len(labels)), np.empty(0, np.int64)
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        wanted = int(len(rows) * share + random.random())
        if len(rows) >= MIN_TO_HOLD_OUT:
            held_out[random.permutation(rows)[: min(wanted, len(rows) - 2)]] = True
    if not held_out.any():
        raise TrainingProblem(
            f"of {len(labels)} images none can be held out for validation: give more images of each class, "
            "or set train.validation to 0"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def epoch_rows(
    train: NDArray[np.int64], labels: NDArray[np.int64], *, balanced: bool, generator: torch.Generator
) -> NDArray[np.int64]:
    """The rows of an epoch in the order in which they are trained on, as many as `train` has.

    Plain: every row once. `balanced`: at each place the class is drawn first, all alike, then one of its images that
    was not drawn since the class was last used up. `labels` (n,) is looked up by row; `generator` is a CPU generator
    and decides alone.
    """
    import torch

    if not balanced:
        shuffled: NDArray[np.int64] = train[torch.randperm(len(train), generator=generator).numpy()]
        return shuffled
    classes, members = np.unique(labels[train], return_inverse=True)
    sizes = np.bincount(members)
    drawn = torch.randint(len(classes), (len(train),), generator=generator).numpy()
    wanted = np.bincount(drawn, minlength=len(classes))
    # Each class's images as often as it takes to fill its places, every repetition shuffled for itself.
    rounds = -(-wanted // sizes)
    image = np.repeat(np.arange(len(train)), rounds[members])
    first = np.cumsum(rounds[members]) - rounds[members]
    number = np.arange(len(image)) - np.repeat(first, rounds[members])
    shuffle = torch.rand(len(image), generator=generator, dtype=torch.float64).numpy()
    image = image[np.lexsort((shuffle, number, members[image]))]
    start = np.cumsum(rounds * sizes) - rounds * sizes
    places = np.argsort(drawn, kind="stable")
    rank = np.arange(len(train)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    rows = np.empty_like(train)
    rows[places] = train[image[np.repeat(start, wanted) + rank]]
    return rows


def batches_ahead(make: Callable[[int], T], count: int) -> Generator[T, None, None]:
    """`make(0)` to `make(count - 1)`, in this order; a thread makes the next one while the last one is in use.

    What `make` raises comes out in its place. Closing the iterator early waits for the batch in the making.
    """
    with ThreadPoolExecutor(1, "batch") as pool:
        following = pool.submit(make, 0) if count else None
        for number in range(1, count + 1):
            assert following is not None
            batch = following.result()
            following = pool.submit(make, number) if number < count else None
            yield batch
