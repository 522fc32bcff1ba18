"""Which errors blame one path, and which the whole image root."""

from __future__ import annotations

import errno

from migrator.trainer.errors import TrainerError
from migrator.trainer.text import one_line, without_credentials

TIMEOUT = 30.0
"""Seconds without a byte from a server, unless another number is given."""
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""Scheme -> the extra that brings what reads it."""
# An error with one of these numbers comes from the path; any other from the disk, the network or the process.
PATH_ERRNOS = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ENXIO,
        errno.EACCES,
        errno.EPERM,
    }
)
# A server may ask for patience or credentials; any other 4xx is its answer about this one path.
SOURCE_STATUSES = frozenset({401, 407, 408, 425, 429})


def missing_package(scheme: str, root: str, error: ImportError) -> TrainerError:
    """The problem that a scheme needs a package that is not installed, and how to install it."""
    extra = EXTRAS.get(scheme)
    advice = f"pip install 'advbct-migrator[{extra}]'" if extra else "install the fsspec package of this scheme"
    return TrainerError(f"image root {without_credentials(root)!r} needs a package ({one_line(error)}): {advice}")
