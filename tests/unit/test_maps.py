"""Maps from one space to another: what they promise, and their formulas worked out plainly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.config import POST_HOC as CONFIGURED
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.maps import POST_HOC, Map, best_ridge, fit_map, procrustes, ridge

SEEDS = st.integers(0, 2**32 - 1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rotation(random: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(n, n)))[0]


def pairs(seed: int, n: int = 60, d: int = 6, out: int = 5, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of two encoders that see the same things in different ways."""
    random = np.random.default_rng(seed)
    seen = random.normal(size=(n, 4))
    new = np.tanh(seen @ random.normal(size=(4, d))) + noise * random.normal(size=(n, d))
    old = np.tanh(seen @ random.normal(size=(4, out))) + noise * random.normal(size=(n, out))
    return unit(new), unit(old)


def mapped(fitted: Map, new: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return F.normalize(fitted(torch.tensor(new))).numpy()


# --- Procrustes


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, d=st.integers(2, 12))
def test_procrustes_recovers_a_rotation(seed: int, d: int) -> None:
    random = np.random.default_rng(seed)
    true = rotation(random, d)
    new = unit(random.normal(size=(5 * d, d)))
    old = unit(new @ true.T)
    assert np.abs(procrustes(new, old) - true).max() < 1e-5
    assert np.abs(mapped(fit_map("procrustes", new, old, seed=0), new) - old).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, d=st.integers(2, 8), out=st.integers(2, 8))
def test_procrustes_turns_with_both_sides(seed: int, d: int, out: int) -> None:
    random = np.random.default_rng(seed)
    new, old = pairs(seed, d=d, out=out)
    turn_new, turn_old = rotation(random, d), rotation(random, out)
    weight = procrustes(new, old)
    turned = procrustes(new @ turn_new.T, old @ turn_old.T)
    # Where a direction is hardly told from another, W itself is not unique; the sum of inner products always is.
    reached = np.einsum("nd,nd->", new @ weight.T, old)
    assert np.einsum("nd,nd->", new @ turn_new.T @ turned.T, old @ turn_old.T) == pytest.approx(reached, rel=1e-5)
    singular = np.linalg.svd(old.T.astype(float) @ new, compute_uv=False)
    if singular.min() > 0.1:
        assert np.abs(turned - turn_old @ weight @ turn_new.T).max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, d=st.integers(1, 9), out=st.integers(1, 9))
def test_procrustes_only_turns_and_no_other_turn_is_better(seed: int, d: int, out: int) -> None:
    random = np.random.default_rng(seed)
    new, old = pairs(seed, d=d, out=out)
    weight = procrustes(new, old)
    product = weight @ weight.T if out <= d else weight.T @ weight
    assert np.abs(product - np.eye(min(d, out))).max() < 1e-9
    other = rotation(random, max(d, out))[:out, :d]
    assert np.sum((new @ weight.T) * old) >= np.sum((new @ other.T) * old) - 1e-6


# --- ridge


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_ridge_without_penalty_is_least_squares(seed: int) -> None:
    new, old = pairs(seed)
    with_ones = np.hstack([new, np.ones((len(new), 1))]).astype(float)
    plain = np.linalg.lstsq(with_ones, old.astype(float), rcond=None)[0]
    weight, bias = ridge(new, old, 1e-12)
    assert np.abs(weight - plain[:-1].T).max() < 1e-5
    assert np.abs(bias - plain[-1]).max() < 1e-5


def test_ridge_is_the_minimum_of_its_sum() -> None:
    new, old = pairs(3)
    weight, bias = ridge(new, old, 0.7)

    def total(weight: np.ndarray, bias: np.ndarray) -> float:
        sum_ = 0.7 * float((weight**2).sum())
        for x, y in zip(new.astype(float), old.astype(float), strict=True):
            sum_ += float(((weight @ x + bias - y) ** 2).sum())
        return sum_

    least = total(weight, bias)
    random = np.random.default_rng(0)
    for _ in range(20):
        assert total(weight + 0.01 * random.normal(size=weight.shape), bias) > least
        assert total(weight, bias + 0.01 * random.normal(size=bias.shape)) > least


def test_the_penalty_is_that_of_generalised_cross_validation() -> None:
    new, old = pairs(1, noise=0.5)
    x, y = (vectors.astype(float) - vectors.astype(float).mean(axis=0) for vectors in (new, old))
    n, d = x.shape

    def gcv(penalty: float) -> float:
        hat = x @ np.linalg.inv(x.T @ x + penalty * np.eye(d)) @ x.T + 1 / n  # of the bias
        return float(n * ((y - hat @ y) ** 2).sum() / (n - np.trace(hat)) ** 2)

    scale = np.trace(x.T @ x) / d
    errors = {float(penalty): gcv(penalty) for penalty in np.logspace(-6, 2, 33) * scale}
    best = best_ridge(new, old)
    assert gcv(best) == pytest.approx(min(errors.values()), rel=1e-9)
    assert 1e-6 * scale < best < 100 * scale  # noise as strong as this wants some penalty, and not all


def test_the_penalty_when_there_are_fewer_pairs_than_directions() -> None:
    new, old = pairs(0, n=12, d=40, out=8)
    weight, _ = ridge(new, old, best_ridge(new, old))
    assert np.isfinite(weight).all()
    assert np.abs(weight).max() < 100


# --- residual MLP


def curved(n: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    seen = random.normal(size=(n, 2))
    return unit(np.tanh(seen @ random.normal(size=(2, 8)))), unit(np.tanh(3 * seen @ random.normal(size=(2, 6))))


@pytest.fixture(scope="module")
def mlp() -> Map:
    torch.set_num_threads(1)
    new, old = curved(600)
    return fit_map("residual_mlp", new[:400], old[:400], seed=0)


def test_the_residual_learns_what_ridge_leaves(mlp: Map) -> None:
    new, old = curved(600)
    linear = mapped(fit_map("ridge", new[:400], old[:400], seed=0), new[400:])
    left_by_ridge = 1 - (linear * old[400:]).sum(axis=1).mean()
    left = 1 - (mapped(mlp, new[400:]) * old[400:]).sum(axis=1).mean()
    assert left < 0.5 * left_by_ridge


def test_the_residual_is_kept_out_where_it_does_not_gain() -> None:
    random = np.random.default_rng(0)
    new, old = unit(random.normal(size=(20, 4))), unit(random.normal(size=(20, 4)))  # nothing to learn
    fitted = fit_map("residual_mlp", new, old, seed=0)
    assert fitted.kind == "residual_mlp"
    assert np.abs(mapped(fitted, new) - mapped(fit_map("ridge", new, old, seed=0), new)).max() < 1e-6


def test_the_seed_decides_and_others_random_numbers_are_left_alone(mlp: Map) -> None:
    new, old = curved(600)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = fit_map("residual_mlp", new[:400], old[:400], seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in mlp.state_dict().items())


# --- all kinds


def test_the_kinds_are_those_of_the_configuration() -> None:
    assert POST_HOC == CONFIGURED


@pytest.mark.parametrize("kind", ["procrustes", "ridge"])
@pytest.mark.parametrize(("d", "out"), [(6, 6), (9, 4), (4, 9)])
def test_a_map_comes_back_from_its_state(kind: str, d: int, out: int) -> None:
    new, old = pairs(2, d=d, out=out)
    fitted = fit_map(kind, new, old, seed=0)
    state = fitted.state_dict()
    again = Map.like(state)
    again.load_state_dict(state)
    assert (again.kind, again.inputs, again.outputs) == (kind, d, out)
    assert np.array_equal(mapped(again, new), mapped(fitted, new))


def test_a_residual_map_comes_back_from_its_state(mlp: Map) -> None:
    again = Map.like(mlp.state_dict())
    again.load_state_dict(mlp.state_dict())
    assert again.kind == "residual_mlp"
    new, _ = curved(10)
    assert np.array_equal(mapped(again, new), mapped(mlp, new))


def test_what_is_no_map_is_refused() -> None:
    for state in ({}, {"linear.bias": torch.ones(3)}, {"linear.weight": torch.ones(3)}):
        with pytest.raises(ValueError, match="no map"):
            Map.like(state)


def test_pairs_that_nothing_can_be_learnt_from_are_refused() -> None:
    new, old = pairs(0)
    broken = new.copy()
    broken[3, 1] = np.nan
    for kind, x, y, said in (
        ("affine", new, old, "'affine' is not known: use one of procrustes, ridge"),
        ("ridge", new[:50], old, "are not pairs"),
        ("ridge", new[0], old, "are not pairs"),
        ("procrustes", new[:9], old[:9], "9 images are too few"),
        ("procrustes", broken, old, "1 of 60 new vectors are not finite .first: row 3"),
        ("ridge", old, broken, "old vectors are not finite"),
        ("ridge", np.repeat(new[:1], 60, axis=0), old, "the same vector for every image"),
    ):
        with pytest.raises(TrainingProblem, match=said):
            fit_map(kind, x, y, seed=0)
