"""Where images come from, and how their files become pictures.

Paths arrive from payloads and CSV files, and files from any uploader: both are treated as hostile.
"""

from __future__ import annotations

import functools
import importlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.trainer.errors import ImageProblem, TrainerError
from migrator.trainer.images.faults import TIMEOUT
from migrator.trainer.images.roots import open_root
from migrator.trainer.images.templates import NotText, parse
from migrator.trainer.text import one_line, sanitized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image, ImageFile

FORMATS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "DIB": "BmpImagePlugin",  # the same without its file header
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "AVIF": "AvifImagePlugin",
}
"""Formats that are decoded, with their Pillow modules; above all not EPS, which Pillow hands to Ghostscript."""


class ImageSource:
    """The images of a collection: a local folder, a web server's, or any fsspec URL (`s3://bucket/prefix`).

    `uri` is a template over the payload's fields and `{id}`; what it gives is a path below `root`, or an absolute path
    or URL that begins with `root`. Nothing outside `root` is read, whatever a payload holds. Files over `max_bytes`
    and pictures over `max_pixels` are refused before they are read or decoded. A server that does not answer within
    `timeout` seconds counts as unavailable. One source may be used from many threads.

    Raises ImagesUnavailable where the root cannot be opened, TrainerError for a malformed template or root.
    """

    def __init__(
        self,
        root: str,
        uri: str = "{path}",
        *,
        max_pixels: int = 100_000_000,
        max_bytes: int = 256 * 2**20,
        timeout: float = TIMEOUT,
    ) -> None:
        self.root = root
        self.uri = uri
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes
        try:
            self._template = parse(uri)
        except ValueError as error:
            raise TrainerError(f"image template {uri!r} cannot be used: {error}") from error
        self._root = open_root(root, timeout=timeout)

    def locate(self, item_id: int | str, payload: Mapping[str, Any]) -> str:
        """The item's image as a path below the root. Raises ImageProblem where the payload does not give a safe one."""
        try:
            path = self._template.fill({**payload, "id": item_id})
        except NotText as problem:
            raise ImageProblem(f"item {sanitized(item_id)} has no usable image path: {problem}") from None
        if path is None:
            raise ImageProblem(f"item {sanitized(item_id)} has no value in a field that {self.uri} names")
        return self.below_root(path)

    def below_root(self, path: str) -> str:
        """The one spelling of a path: `./a//b.jpg`, `/root/a/b.jpg` and `file:///root/a/b.jpg` are all `a/b.jpg`.

        Raises ImageProblem for what is not below the root, and for what is no path.
        """
        return self._root.below(path)

    def load(self, path: str) -> Image.Image:
        """The picture at `path` below the root: `read`, then `decode`, and raises what they raise."""
        return self.decode(self.read(path), path)

    def read(self, path: str) -> bytes:
        """The image file at `path` below the root, as it lies there.

        Raises ImageProblem where this image cannot be used, ImagesUnavailable where the source cannot be reached.
        """
        return self._root.read(self._root.below(path), self.max_bytes)

    def decode(self, data: bytes, path: str) -> Image.Image:
        """The picture in an image file's bytes, as it lies there: its own mode, not turned. `path` is its name.

        Of an animation it is the first frame. What becomes of mode, transparency and orientation is a matter of the
        encoder: see `Preprocessing.prepare`, or `migrator.trainer.images.conversion.to_rgb` to show a picture.

        Raises ImageProblem where it is no picture that can be used.
        """
        return decode(data, path, self.max_pixels)


def decode(data: bytes, path: str, max_pixels: int) -> Image.Image:
    """The picture in an image file's bytes, as `ImageSource.decode` gives it. Raises ImageProblem."""
    if not data:
        raise ImageProblem(f"image {sanitized(path)} is empty (0 bytes)")
    try:
        image = _open(data)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{width} x {height} pixels are over the limit of {max_pixels:,}")
        image.load()
        image.filename = path  # by which a problem found later is named; nothing reads from it
        return image
    except Exception as error:  # over a forged file a decoder may raise anything
        raise ImageProblem(f"image {sanitized(path)} cannot be decoded: {one_line(error)}") from error


def open_file(path: str | Path, max_pixels: int) -> Image.Image:
    """The picture in a file of this machine that its user names, wherever it lies: payloads' paths go to ImageSource.

    Raises ImageProblem where it cannot be read, or is no picture that can be used.
    """
    name = str(path)
    try:
        if not Path(path).is_file():
            raise ImageProblem(
                f"image {sanitized(name)} is {'not a regular file' if Path(path).exists() else 'not there'}"
            )
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise ImageProblem(f"image {sanitized(name)} cannot be read: {reason}") from error
    return decode(data, name, max_pixels)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header. Pixels are decoded by `load()`.

    Pillow's `Image.open` is left aside: it warns or refuses by a pixel limit of its own, global to the process.
    """
    from PIL import Image

    _load_plugins()
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        accepted = accept(data[:16]) if accept else False
        if factory and accepted and not isinstance(accepted, str):  # a string is the reason why this build cannot
            return factory(io.BytesIO(data), "")
    raise ValueError(f"it is none of {', '.join(FORMATS)}, or this Pillow was built without that format")


@functools.cache
def _load_plugins() -> None:
    for module in FORMATS.values():
        importlib.import_module(f"PIL.{module}")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of a folder's images: `.jpg` and all others that Pillow knows for the decoded formats.

    Whoever names an image may call it as they like.
    """
    from PIL import Image

    _load_plugins()
    known = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
    return frozenset(known | {".jif", ".jfi"})  # of JPEG files from before there was one habit
