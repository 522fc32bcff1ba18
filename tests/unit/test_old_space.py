"""Centres and radii on hand-made data, and against plain numpy class by class."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.trainer import old_space
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.old_space import measure_old_space, stored_vectors


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_centre_is_the_mean_and_not_normalised_again() -> None:
    space = measure_old_space(on_circle(0, 90), np.array([0, 0]), classes=1, quantile=1.0)
    np.testing.assert_allclose(space.centres, [[0.5, 0.5]], atol=1e-7)
    np.testing.assert_allclose(space.radii, [np.sqrt(0.5)], atol=1e-6)
    assert space.known.tolist() == [True]


def test_vectors_count_by_direction_only() -> None:
    vectors = on_circle(0, 30, 100, 140)
    labels = np.array([0, 0, 1, 1])
    stretched = vectors * np.array([[0.1], [2], [30], [1]], np.float32)
    plain, scaled = (measure_old_space(v, labels, classes=2, quantile=0.5) for v in (vectors, stretched))
    np.testing.assert_allclose(plain.centres, scaled.centres, atol=1e-6)
    np.testing.assert_allclose(plain.radii, scaled.radii, atol=1e-6)


def test_a_class_with_one_vector_or_none_has_no_ball_where_nothing_is_borrowed() -> None:
    space = measure_old_space(on_circle(0, 20, 90), np.array([0, 0, 2]), classes=4, quantile=0.5, shrink=False)
    assert space.known.tolist() == [True, False, False, False]
    assert not space.centres[1:].any()
    assert not space.radii[1:].any()


def test_radii_of_rare_classes_are_drawn_to_the_median() -> None:
    # Classes of 4, 4, 3, 2, 1 and 0 images.
    labels = np.repeat(np.arange(6), [4, 4, 3, 2, 1, 0])
    vectors = np.random.default_rng(0).normal(size=(14, 4)).astype(np.float32)
    own, drawn = (
        measure_old_space(vectors, labels, classes=6, quantile=0.5, shrink=shrink).radii for shrink in (False, True)
    )
    usual = np.median(own[:2])
    expected = [own[0], own[1], (2 * own[2] + usual) / 3, (own[3] + 2 * usual) / 3, usual, 0]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    known = measure_old_space(vectors, labels, classes=6, quantile=0.5)
    assert known.known.tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(known.centres[4], vectors[13] / np.linalg.norm(vectors[13]), atol=1e-6)


def test_where_every_class_is_rare_the_median_is_of_those_with_two() -> None:
    space = measure_old_space(on_circle(0, 60, 120), np.array([0, 0, 1]), classes=2, quantile=1.0)
    np.testing.assert_allclose(space.radii, [0.5, 0.5], atol=1e-6)
    alone = measure_old_space(on_circle(0, 60), np.array([0, 1]), classes=2, quantile=1.0)
    assert alone.known.tolist() == [False, False]


def test_an_outlier_is_dropped_from_four_images_on() -> None:
    # Seven vectors near 0 degrees and one opposite: the centre lies near 0.75, the outlier 1.75 away.
    degrees = [-12, -8, -4, 1, 5, 9, 13, 180]
    labels = np.zeros(8, int)
    space = measure_old_space(on_circle(*degrees), labels, classes=1, quantile=1.0)
    assert space.radii[0] < 0.4
    np.testing.assert_allclose(space.centres[0], on_circle(*degrees).mean(axis=0), atol=1e-6)  # it stays in the centre
    three = measure_old_space(on_circle(0, 0, 180), labels[:3], classes=1, quantile=1.0, shrink=False)
    np.testing.assert_allclose(three.radii, [4 / 3], atol=1e-6)  # the largest, though it lies far out


def test_equal_distances_are_no_outliers() -> None:
    space = measure_old_space(on_circle(0, 90, 180, 270), np.zeros(4, int), classes=1, quantile=1.0)
    np.testing.assert_allclose(space.radii, [1.0], atol=1e-6)


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    quantile=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_numpy_class_by_class(labels: list[int], quantile: float, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(labels), 4)).astype(np.float32)
    by_row = np.array(labels)
    space = measure_old_space(vectors, by_row, classes=6, quantile=quantile, shrink=False)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    for c in range(6):
        mine = unit[by_row == c]
        assert space.known[c] == (len(mine) >= 2)
        if len(mine) < 2:
            continue
        distances = np.linalg.norm(mine - mine.mean(axis=0), axis=1)
        if len(mine) >= 4:
            q1, q3 = np.quantile(distances, [0.25, 0.75])
            reach = 1.5 * (q3 - q1) + 1e-9
            distances = distances[(distances >= q1 - reach) & (distances <= q3 + reach)]
        np.testing.assert_allclose(space.centres[c], mine.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(space.radii[c], np.quantile(distances, quantile), atol=1e-5)


def test_the_size_of_the_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    vectors, labels = rng.normal(size=(100, 4)).astype(np.float32), rng.integers(0, 9, 100)
    whole = measure_old_space(vectors, labels, classes=9, quantile=0.5)
    monkeypatch.setattr(old_space, "CHUNK", 7)
    parts = measure_old_space(vectors, labels, classes=9, quantile=0.5)
    np.testing.assert_allclose(parts.centres, whole.centres, atol=1e-7)
    np.testing.assert_allclose(parts.radii, whole.radii, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_an_unusable_vector_is_named(bad: float) -> None:
    vectors = on_circle(0, 10, 20)
    vectors[1] = bad
    with pytest.raises(TrainingProblem, match=r"1 of 3 old vectors .*row 1"):
        measure_old_space(vectors, np.zeros(3, int), classes=1, quantile=0.5)
    with pytest.raises(TrainingProblem, match=r"1 of 3 old vectors .*row 1"):
        stored_vectors(vectors)


def test_stored_vectors_are_of_unit_length_and_known_by_what_they_are() -> None:
    vectors = on_circle(0, 30, 100)
    stored, longer, other = (stored_vectors(v) for v in (vectors, 2 * vectors, vectors[::-1]))
    np.testing.assert_allclose(longer.vectors, vectors, atol=1e-6)
    assert longer.vectors.dtype == np.float32
    assert stored.dim == 2
    assert stored.id == longer.id != other.id
    assert stored.id.startswith("stored-")
    assert len(stored.id) == len("stored-") + 16
