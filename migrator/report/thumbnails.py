"""Small pictures of the examples, as data: URIs, so that the page needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrator.formatting import sanitized
from migrator.trainer.errors import ImageProblem, TrainerError

if TYPE_CHECKING:
    from PIL import Image

    from migrator.trainer.images.source import ImageSource

SIDE = 96
"""Pixels of a thumbnail's longer side at most."""
_TINY = 48  # below this a picture is shown enlarged, with its pixels as they are


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture of an example, or the reason why there is none."""

    uri: str | None
    """data:image/png or data:image/jpeg."""
    tiny: bool = False
    problem: str = ""


def thumbnails(
    open_images: Callable[[], ImageSource],
    paths: Iterable[object],
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> dict[str, Thumbnail]:
    """A thumbnail for each path; what cannot be read gets its reason, and nothing is raised.

    A source that cannot be reached is asked once: the others get the same reason without waiting for it.
    """
    from migrator.trainer.images.preprocessing import Preprocessing

    upright = Preprocessing(SIDE)  # as a browser shows them, whatever an encoder makes of them
    wanted = list(dict.fromkeys(path for path in paths if isinstance(path, str)))
    found: dict[str, Thumbnail] = {}
    unreachable: str | None = None
    images: ImageSource | None = None
    for done, path in enumerate(wanted):
        report(done, len(wanted))
        if unreachable is None:
            try:
                images = images or open_images()
                found[path] = Thumbnail(*_data_uri(upright.to_rgb(images.load(path))))
                continue
            except ImageProblem as error:
                found[path] = Thumbnail(None, problem=sanitized(str(error), 200))
                continue
            except TrainerError as error:
                unreachable = sanitized(str(error), 200)
        found[path] = Thumbnail(None, problem=unreachable)
    return found


def _data_uri(image: Image.Image) -> tuple[str, bool]:
    tiny = max(image.size) < _TINY
    small = image.copy()
    small.info = {}  # a file's comments and colour profile may be large, and are nobody's business here
    small.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    if tiny:
        small.save(encoded, "PNG")
    else:
        small.save(encoded, "JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}", tiny
