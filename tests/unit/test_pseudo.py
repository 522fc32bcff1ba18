"""Pseudo-classes: clusters that are there are found, and odd numbers are refused."""

import sys

import numpy as np
import pytest

from migrator.trainer.data.pseudo import default_k, pseudo_classes
from migrator.trainer.errors import TrainingProblem


def blobs(count: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Tight clusters round random directions, shuffled, and which one each vector is of."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, count)))[0].T
    labels = rng.permutation(np.repeat(np.arange(count), each))
    vectors = centres[labels] + 0.05 * rng.normal(size=(len(labels), 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def test_clusters_are_found_again() -> None:
    vectors, labels = blobs(4, 30)
    # With more centres than clusters k-means may divide one, but must not mix two.
    found = pseudo_classes(vectors, 12, seed=0)
    pairs = set(zip(found.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist()))


def test_the_seed_decides() -> None:
    vectors = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    first, again, other = (pseudo_classes(vectors, 10, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_centres_placed_by_some_of_the_images_give_a_class_to_all() -> None:
    vectors, labels = blobs(2, 150)  # more than twice 64
    found = pseudo_classes(vectors, 2, seed=0)
    assert len(found) == 300
    assert len(set(zip(found.tolist(), labels.tolist(), strict=True))) == 2


def test_classes_are_numbered_without_gaps_where_vectors_coincide() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    found = pseudo_classes(vectors, 6, seed=0)
    assert sorted(set(found.tolist())) == list(range(found.max() + 1))
    for start in (0, 5, 10):
        assert len(set(found[start : start + 5].tolist())) == 1


@pytest.mark.parametrize("k", [1, 11])
def test_a_number_of_classes_that_does_not_suit_is_refused(k: int) -> None:
    with pytest.raises(TrainingProblem, match=rf"10 images cannot be made into {k} pseudo-classes"):
        pseudo_classes(np.eye(10, dtype=np.float32), k, seed=0)


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(TrainingProblem, match=r"pip install advbct-migrator\[faiss\]"):
        pseudo_classes(np.eye(10, dtype=np.float32), 2, seed=0)


def test_default_k_leaves_every_class_some_images() -> None:
    assert [default_k(n) for n in (3, 16, 100, 10_000, 1_000_000)] == [2, 2, 12, 400, 4000]
