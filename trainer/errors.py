"""What can go wrong with images, encoders and training. Every message is one line: what, where, what next."""

from __future__ import annotations

from migrator.errors import MigratorError


class TrainerError(MigratorError):
    """The base of everything this package raises on purpose."""

    exit_code = 2


class ImageProblem(TrainerError):
    """This image cannot be used; the others can. The message names its path."""


class ImagesUnavailable(TrainerError):
    """The image source cannot be reached (network, credentials, the root itself); the same call may work later.

    `retry_after` is the delay in seconds that the server asks for, if it does.
    """

    exit_code = 4

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EncoderProblem(TrainerError):
    """An encoder's weights, architecture, manifest or output cannot be used.

    `rows` are the rows of the batch that it concerns, where only some images of a batch got a bad vector.
    """

    def __init__(self, message: str, *, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class EncoderMismatch(EncoderProblem):
    """The encoder is not what it was: the message names what differs: weights, preprocessing or output."""

    exit_code = 3


class TableProblem(TrainerError):
    """A file that lists images cannot be used; the message names file and line or row."""


class TrainingProblem(TrainerError):
    """The training data, settings or run folder cannot be used as they are."""


class TrainingInterrupted(TrainerError):
    """The training was stopped after writing a checkpoint, from which the same call continues."""

    exit_code = 130


class TrainingFailed(TrainerError):
    """The training diverged: a loss or a weight is no longer a finite number."""

    exit_code = 3
