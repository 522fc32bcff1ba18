"""Post-hoc maps: from the vectors of a finished encoder to the old space, fitted in seconds to minutes.

No image passes through a network while a map is fitted, only pairs of vectors of the same images: x (d numbers, unit
length) from the new encoder, y (D numbers, unit length) from the old one. They need no labels, and are the baseline
that a trained encoder must beat.

Sources: Drift-Adapter, https://arxiv.org/abs/2509.23471 (the three kinds); Schoenemann, "A generalized solution of
the orthogonal Procrustes problem", Psychometrika 31, 1966; lambda-orthogonality, https://arxiv.org/abs/2509.16664 (why
a map that may only rotate keeps what the new encoder has learnt); Golub, Heath and Wahba, "Generalized cross-validation
as a method for choosing a good ridge parameter", Technometrics 21, 1979.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from migrator.trainer.errors import TrainingProblem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

POST_HOC = ("procrustes", "ridge", "residual_mlp")

_HIDDEN = 256
_STEPS = 2_000
"""Of the residual MLP: seconds to minutes on a CPU, for as many vectors as there may be."""
_BATCH = 512
_EVALUATE_EVERY = 50
_RATE = 0.01
"""Learning rate at the start. Lower ones, and stopping early, gave up while the first gain was still to come."""


class Map(nn.Module):
    """A map of unit vectors, (n, d) -> (n, D): linear, and where the kind has them a bias and a small residual network.

    The results are not of unit length.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, *, hidden: int = _HIDDEN) -> None:
        super().__init__()
        self.kind = kind
        self.inputs = inputs  # d
        self.outputs = outputs  # D
        self.linear = nn.Linear(inputs, outputs, bias=kind != "procrustes")
        self.residual: nn.Module | None = None
        if kind == "residual_mlp":
            self.residual = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> Map:
        """An empty map whose state dict has these names and shapes. Raises ValueError where no map has."""
        weight, hidden = state.get("linear.weight"), state.get("residual.0.weight")
        if weight is None or weight.ndim != 2 or (hidden is not None and hidden.ndim != 2):
            raise ValueError("no map has such weights")
        kind = "residual_mlp" if hidden is not None else "ridge" if "linear.bias" in state else "procrustes"
        return cls(kind, weight.shape[1], weight.shape[0], hidden=_HIDDEN if hidden is None else hidden.shape[0])

    def forward(self, vectors: Tensor) -> Tensor:  # noqa: D102
        mapped: Tensor = self.linear(vectors)
        return mapped if self.residual is None else mapped + self.residual(vectors)


def fit_map(kind: str, new: NDArray[np.float32], old: NDArray[np.float32], *, seed: int) -> Map:
    """The map that brings new vectors nearest to old ones, row by row. On the CPU; the same for the same seed.

    Args:
        kind: One of `POST_HOC`.
        new: (n, d) float32 of unit length.
        old: (n, D) float32 of unit length, of the same images.
        seed: Of the random numbers of `residual_mlp`.

    Raises:
        TrainingProblem: The kind is unknown, or nothing can be learnt from these pairs.
    """
    _require_pairs(kind, new, old)
    with torch.random.fork_rng(devices=[]):  # new layers draw their first weights: not from the caller's numbers
        if kind == "procrustes":
            return _linear(kind, procrustes(new, old))
        if kind == "ridge":
            return _linear(kind, *ridge(new, old, best_ridge(new, old)))
        return _residual_mlp(new, old, seed=seed)


def apply_map(fitted: Map, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (n, d) of unit length -> (n, D) of unit length."""
    with torch.inference_mode():
        mapped: NDArray[np.float32] = F.normalize(fitted(torch.tensor(vectors))).numpy()
    return mapped


def procrustes(new: NDArray[np.floating], old: NDArray[np.floating]) -> NDArray[np.float64]:
    """W (D, d), orthogonal, or with orthonormal rows or columns where D and d differ, for the largest sum of <W x, y>.

    For D >= d that is the least sum of squares of W x - y as well (Schoenemann). For D < d, where W cuts off
    directions, least squares has no closed form; the inner product is what search ranks by.
    """
    u, _, vt = np.linalg.svd(old.astype(np.float64).T @ new.astype(np.float64), full_matrices=False)
    weight: NDArray[np.float64] = u @ vt
    return weight


def ridge(
    new: NDArray[np.floating], old: NDArray[np.floating], penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """W (D, d) and b (D,) for the least sum of squares of W x + b - y, plus `penalty` times that of W's entries."""
    x, y = new.astype(np.float64), old.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += penalty
    weight: NDArray[np.float64] = np.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean


def best_ridge(new: NDArray[np.floating], old: NDArray[np.floating]) -> float:
    """The penalty with the least generalised cross-validation error, of 33 from 1e-6 to 100 times x's mean variance.

    GCV(p) = n RSS(p) / (n - trace of the hat matrix)^2, after Golub, Heath and Wahba. From the eigenvalues of x'x it
    costs as much as one ridge regression, for all penalties together.
    """
    x, y = new.astype(np.float64), old.astype(np.float64)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    n = len(x)
    values, vectors = np.linalg.eigh(x.T @ x)
    real = values > max(values[-1], 0) * 1e-10
    if not real.any():
        raise TrainingProblem("the new encoder gives the same vector for every image: check its weights")
    values, vectors = values[real], vectors[:, real]
    explained = ((vectors.T @ (x.T @ y)) ** 2).sum(axis=1) / values  # of y's squares, by each direction of x
    unexplained = max(float((y**2).sum() - explained.sum()), 0.0)
    scale = float(values.sum()) / x.shape[1]
    errors = []
    penalties = np.logspace(-6, 2, 33) * scale
    for penalty in penalties:
        left = penalty / (values + penalty)
        residual = unexplained + float((left**2 * explained).sum())
        freedom = n - 1 - float((1 - left).sum())  # 1 for the bias
        errors.append(n * residual / max(freedom, 1e-9) ** 2)
    return float(penalties[int(np.argmin(errors))])


def _residual_mlp(new: NDArray[np.float32], old: NDArray[np.float32], *, seed: int) -> Map:
    """Ridge, and beside it an MLP that starts at zero and learns what ridge leaves, by the cosine to the old vectors.

    A tenth of the pairs is held out, and the state that was best there is kept; where that is the start, the MLP stays
    zero and the rest is ridge on all pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(new), generator=generator)
    held_out, train = order.tensor_split([max(1, len(new) // 10)])
    weight, bias = ridge(new[train], old[train], best_ridge(new[train], old[train]))
    fitted = _linear("residual_mlp", weight, bias)
    assert isinstance(fitted.residual, nn.Sequential)
    first, _, last = fitted.residual
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    nn.init.kaiming_uniform_(first.weight, a=5**0.5, generator=generator)
    for parameter in (first.bias, last.weight, last.bias):
        nn.init.zeros_(parameter)
    # Unit vectors have small entries, 1/sqrt(d): as they are, GELU would see next to nothing.
    with torch.no_grad():
        first.weight.mul_(new.shape[1] ** 0.5)
    # The linear part stays: the residual only has to learn what is left.
    residual = fitted.residual.requires_grad_(True)
    x, y = (torch.tensor(vectors, dtype=torch.float32) for vectors in (new, old))
    with torch.no_grad():
        linear = fitted.linear(x)
    optimizer = torch.optim.AdamW(residual.parameters(), lr=_RATE, weight_decay=0.01)

    def loss_of(rows: Tensor) -> Tensor:
        return _cosine_loss(linear[rows] + residual(x[rows]), y[rows])

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(loss_of(held_out))

    least, best = held_out_loss(), None
    for step in range(1, _STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        rows = train[torch.randint(len(train), (min(_BATCH, len(train)),), generator=generator)]
        optimizer.zero_grad()
        loss_of(rows).backward()
        optimizer.step()
        if step % _EVALUATE_EVERY == 0 and (loss := held_out_loss()) < least:
            least, best = loss, {name: tensor.clone() for name, tensor in residual.state_dict().items()}
    if best is None:
        fitted = _linear("residual_mlp", *ridge(new, old, best_ridge(new, old)))
        assert isinstance(fitted.residual, nn.Sequential)
        for parameter in fitted.residual.parameters():
            nn.init.zeros_(parameter)
        return fitted
    residual.load_state_dict(best)
    return fitted.requires_grad_(False)


def _cosine_loss(mapped: Tensor, old: Tensor) -> Tensor:
    """Mean of 1 - cosine: half the squared distance of the unit vectors."""
    return 1 - F.cosine_similarity(mapped, old).mean()


def _linear(kind: str, weight: NDArray[np.float64], bias: NDArray[np.float64] | None = None) -> Map:
    fitted = Map(kind, weight.shape[1], weight.shape[0])
    fitted.linear.load_state_dict(
        {"weight": torch.tensor(weight, dtype=torch.float32)}
        | ({} if bias is None else {"bias": torch.tensor(bias, dtype=torch.float32)})
    )
    return fitted.requires_grad_(False)


def _require_pairs(kind: str, new: NDArray[np.float32], old: NDArray[np.float32]) -> None:
    if kind not in POST_HOC:
        raise TrainingProblem(f"map {kind!r} is not known: use one of {', '.join(POST_HOC)}")
    if new.ndim != 2 or old.ndim != 2 or len(new) != len(old):
        raise TrainingProblem(
            f"new vectors {new.shape} and old ones {old.shape} are not pairs: both need one row for each image"
        )
    if len(new) < 10:
        raise TrainingProblem(f"{len(new)} images are too few for a map: give at least 10, better some thousands")
    for side, vectors in (("new", new), ("old", old)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise TrainingProblem(
                f"{len(bad)} of {len(vectors)} {side} vectors are not finite (first: row {bad[0]}): check that encoder"
            )
