"""What a verification leaves for later measurements: the new encoder's query vectors, and what each query was worth."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migrator.verify.query_set.draw import question_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.ledger import Migration
    from migrator.project import Project

FILE = "answers.npz"


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one encoder, to one set of questions."""

    questions_sha256: str
    new_encoder_id: str
    rows: NDArray[np.int64]  # (q,) positions in the questions
    by_new: NDArray[np.float32]  # (q, dim) the queries' vectors
    old: dict[str, NDArray[np.float64]]
    """Metric -> value of each query in today's search, (q,)."""
    firsts_right: NDArray[np.float64]
    """1 where today's first answer is right, (q,); NaN where a query has no relevant item."""


def write_answers(project: Project, migration: Migration, answers: Answers) -> None:
    """Keeps the answers of the latest verification, whole or not at all. Raises `TemporarilyUnavailable`."""
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        names=np.array([answers.questions_sha256, answers.new_encoder_id]),
        rows=answers.rows,
        by_new=answers.by_new,
        metrics=np.array(list(answers.old)),
        old=np.stack(list(answers.old.values())),
        firsts_right=answers.firsts_right,
    )
    question_files(project, migration).write(FILE, content.getvalue())


def read_answers(project: Project, migration: Migration) -> Answers | None:
    """The answers of the latest verification; None where there are none that can be read.

    Raises `TemporarilyUnavailable`.
    """
    content = question_files(project, migration).read(FILE)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            sha256, encoder = found["names"].tolist()
            old = dict(zip(found["metrics"].tolist(), found["old"], strict=True))
            return Answers(sha256, encoder, found["rows"], found["by_new"], old, found["firsts_right"])
    except (ValueError, KeyError, OSError, EOFError):
        return None  # damaged: the measurement is left out, and says so
