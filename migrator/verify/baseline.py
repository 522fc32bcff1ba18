"""What a verification keeps for health checks: the new encoder's query vectors, and each query's baseline."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migrator.verify.query_set.pinned import old_files, query_set_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.ledger import Migration
    from migrator.project import Project

FILE = "baseline.npz"
OLD_FILE = "answers.npz"
"""Its name, and that of `first_relevant`, in migrations that were verified before ledger version 0007."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Of one encoder and one query set."""

    query_set_sha256: str
    new_encoder_id: str
    rows: NDArray[np.int64]  # (q,) positions in the query set
    by_new: NDArray[np.float32]  # (q, dim) the queries' vectors
    values: dict[str, NDArray[np.float64]]
    """Metric -> value of each query with the old encoder, (q,)."""
    first_relevant: NDArray[np.float64]
    """1 where the old encoder's first result is relevant, (q,); NaN where a query has no relevant item."""


def write_baseline(project: Project, migration: Migration, baseline: Baseline) -> None:
    """Keeps the baseline of the latest verification, whole or not at all. Raises `TemporarilyUnavailable`."""
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        names=np.array([baseline.query_set_sha256, baseline.new_encoder_id]),
        rows=baseline.rows,
        by_new=baseline.by_new,
        metrics=np.array(list(baseline.values)),
        old=np.stack(list(baseline.values.values())),
        first_relevant=baseline.first_relevant,
    )
    query_set_files(project, migration).write(FILE, content.getvalue())


def read_baseline(project: Project, migration: Migration) -> Baseline | None:
    """The baseline of the latest verification; None if there is none that can be read.

    Raises `TemporarilyUnavailable`.
    """
    content = query_set_files(project, migration).read(FILE) or old_files(project, migration).read(OLD_FILE)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            sha256, encoder = found["names"].tolist()
            values = dict(zip(found["metrics"].tolist(), found["old"], strict=True))
            first_relevant = found["first_relevant" if "first_relevant" in found else "firsts_right"]
            return Baseline(sha256, encoder, found["rows"], found["by_new"], values, first_relevant)
    except (ValueError, KeyError, OSError, EOFError):
        return None  # damaged: search is not evaluated, and the health check says so
