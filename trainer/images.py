"""Where images come from, and how they become upright RGB pictures.

Paths arrive from payloads and CSV files, and files from whoever could upload one: both are treated as hostile.
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import math
import os
import re
import stat
import string
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ImageProblem, ImagesUnavailable, TrainerError

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "AVIF": "AvifImagePlugin",
}
"""Formats that are decoded, with their Pillow modules; above all not EPS, which Pillow hands to Ghostscript."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".avif")
"""By which a folder's images are told from its other files. Whoever names an image may call it as they like."""

# An error with one of these numbers comes from the path; any other from the disk, the network or the process.
_PATH_ERRNOS = frozenset(
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
_SOURCE_STATUSES = frozenset({401, 407, 408, 425, 429})
_MAX_PATH_BYTES = 4096

_EXIF_ORIENTATION = 0x0112


def template_fields(uri: str) -> tuple[str, ...]:
    """The payload fields that an image template such as `{category}/{id}.jpg` names.

    Raises TrainerError for a template that is malformed, names nothing, or holds more than plain field names
    (no attributes, indexes, conversions or format specifications).
    """
    try:
        parts = list(string.Formatter().parse(uri))
    except ValueError as error:
        raise TrainerError(
            f"image template {uri!r} is malformed ({error}): write it like {{path}} or {{id}}.jpg"
        ) from error
    fields = []
    for _, field, specification, conversion in parts:
        if field is None:
            continue
        if not field or conversion or specification or not field.replace("-", "_").isidentifier():
            raise TrainerError(f"image template {uri!r} may hold plain field names only, like {{path}} or {{id}}.jpg")
        fields.append(field)
    if not fields:
        raise TrainerError(
            f"image template {uri!r} names no field, so all items would share one image: add {{path}} or {{id}}"
        )
    return tuple(fields)


class ImageSource:
    """The images of a collection: a local folder or any fsspec URL (`s3://bucket/prefix`, `memory://x`).

    `uri` is a template over the payload's fields and `{id}`; what it gives is a path below `root`, and nothing outside
    `root` is ever read, whatever a payload says. Files over `max_bytes` and pictures over `max_pixels` are refused
    before they are read or decoded. One source may be used from many threads.

    Raises ImagesUnavailable where the root cannot be opened, TrainerError for a malformed template.
    """

    def __init__(
        self, root: str, uri: str = "{path}", *, max_pixels: int = 100_000_000, max_bytes: int = 256 * 2**20
    ) -> None:
        self.root = root
        self.uri = uri
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes
        self._fields = template_fields(uri)
        self._reader: _LocalFolder | _RemoteFolder
        if root.startswith(("file://", "local://")):
            root = root.split("://", 1)[1]
        self._reader = _RemoteFolder(root) if "://" in root or "::" in root else _LocalFolder(root)

    def locate(self, item_id: int | str, payload: Mapping[str, Any]) -> str:
        """The item's image as a path below the root. Raises ImageProblem where the payload does not give a safe one."""
        values: dict[str, str] = {}
        for field in self._fields:
            value = item_id if field == "id" else payload.get(field)
            if isinstance(value, bool) or not isinstance(value, str | Real):
                raise ImageProblem(
                    f"item {_shown(item_id)} has no usable field {field!r} for its image: {_shown(value)}"
                )
            try:
                values[field] = str(value)
            except ValueError as error:  # Python does not write out integers of thousands of digits
                raise ImageProblem(f"item {_shown(item_id)} has an absurd number as field {field!r}") from error
            if values[field] == "" or (not isinstance(value, str) and values[field] in ("nan", "inf", "-inf")):
                raise ImageProblem(f"item {_shown(item_id)} has an empty field {field!r} where its image should be")
        path = self.uri.format_map(values)
        _require_safe(path, decoded=self._reader.decodes)
        return path

    def load(self, path: str) -> Image.Image:
        """The picture at `path` below the root: `read`, then `decode`, and raises what they raise."""
        return self.decode(self.read(path), path)

    def read(self, path: str) -> bytes:
        """The image file at `path` below the root, as it lies there.

        Raises ImageProblem where this image cannot be used, ImagesUnavailable where the source cannot be reached.
        """
        _require_safe(path, decoded=self._reader.decodes)
        return self._reader.read(path, self.max_bytes)

    def decode(self, data: bytes, path: str) -> Image.Image:
        """The picture in an image file's bytes: mode RGB, turned upright by its EXIF orientation. `path` is its name.

        Transparency is flattened on white, animations give their first frame, 16-bit greys are scaled to 8 bits.
        32-bit integer and floating-point greys carry no scale: they are read as 0..65535, and as 0..1 or 0..255, where
        all values fit, and stretched from their least to their greatest value otherwise. Colour profiles are ignored.

        Raises ImageProblem where it is no picture that can be used.
        """
        return _decode(data, path, self.max_pixels)


class _LocalFolder:
    """Regular files below a folder of this machine, symbolic links included as long as they stay below it."""

    decodes = False

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute()) if root else root
        os.close(self._open_root())
        self._real = os.path.realpath(root)

    def read(self, path: str, max_bytes: int) -> bytes:
        folder = self._open_root()
        try:
            resolved = os.path.realpath(Path(self._real, path), strict=True)
            inside = Path(os.path.relpath(resolved, self._real))
            if inside.parts[:1] == (os.pardir,):
                raise ImageProblem(f"image {_shown(path)} leads out of {self.root!r} through a symbolic link")
            descriptor = _open_beneath(folder, inside)
        except OSError as error:
            if error.errno in _PATH_ERRNOS:
                raise ImageProblem(f"image {_shown(path)} cannot be read: {error.strerror}") from error
            raise self._unavailable(error) from error
        finally:
            os.close(folder)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageProblem(f"image {_shown(path)} is not a regular file")
            _require_size(status.st_size, path, max_bytes)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)
        except OSError as error:
            raise self._unavailable(error) from error
        finally:
            os.close(descriptor)

    def _open_root(self) -> int:
        try:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> ImagesUnavailable:
        reason = getattr(error, "strerror", None) or error
        return ImagesUnavailable(f"image folder {self.root!r} cannot be read: {reason}; check images.root and mounts")


def _open_beneath(folder: int, relative: Path) -> int:
    """Opens a path without links, folder by folder, so that a link put in its way after the check is met, not followed.

    O_NONBLOCK keeps a FIFO from hanging the caller until somebody writes to it.
    """
    *folders, name = relative.parts or (os.curdir,)
    current = os.dup(folder)
    try:
        for part in folders:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
            os.close(current)
            current = below
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=current)
    finally:
        os.close(current)


class _RemoteFolder:
    """Objects below an fsspec URL."""

    decodes = True

    def __init__(self, root: str) -> None:
        import fsspec.core
        from fsspec.implementations.local import LocalFileSystem

        self.root = _without_credentials(root)
        self._http = root.rsplit("::", 1)[-1].startswith(("http://", "https://"))
        self._seen = False
        try:
            self._files, self._prefix = fsspec.core.url_to_fs(root)
        except Exception as error:
            raise self._unavailable(error) from error
        if isinstance(self._files, LocalFileSystem) or isinstance(getattr(self._files, "fs", None), LocalFileSystem):
            # fsspec would follow links out of the root
            raise TrainerError(f"image root {self.root!r} is a folder of this machine: write it as a plain path")

    def read(self, path: str, max_bytes: int) -> bytes:
        if self._http and any(mark in path for mark in "?#"):
            raise ImageProblem(f"image {_shown(path)} holds a query or fragment, which is not part of a file's name")
        try:
            with self._files.open(f"{self._prefix.rstrip('/')}/{path}", "rb") as file:
                _require_size(getattr(file, "size", None) or 0, path, max_bytes)
                data: bytes = file.read(max_bytes + 1)
        except ImageProblem:
            raise
        except Exception as error:
            # fsspec words every failed HTTP request as "not found" and keeps what happened as the cause
            cause = error.__cause__ if self._http and isinstance(error.__cause__, Exception) else error
            if not _blames_path(cause):
                raise self._unavailable(cause) from error
            self._require_root(again=isinstance(cause, PermissionError))
            raise ImageProblem(f"image {_shown(path)} cannot be read: {_reason(cause)}") from error
        self._seen = True
        _require_size(len(data), path, max_bytes)
        return data

    def _require_root(self, *, again: bool) -> None:
        """Tells a missing image from a missing bucket or from refused credentials, before the image gets the blame.

        Asked once, and `again` where access was refused, since credentials expire. A web server often has no page at
        the root: its answer about the image has to do.
        """
        if self._http or (self._seen and not again):
            return
        try:
            self._seen = self._files.exists(self._prefix)
        except Exception as error:
            raise self._unavailable(error) from error
        if not self._seen:
            raise ImagesUnavailable(
                f"image root {self.root!r} does not exist or may not be listed: check images.root and its credentials"
            )

    def _unavailable(self, error: Exception) -> ImagesUnavailable:
        return ImagesUnavailable(f"image root {self.root!r} cannot be reached: {_reason(error)}")


def _blames_path(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _SOURCE_STATUSES
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return True
    return isinstance(error, OSError) and error.errno in _PATH_ERRNOS


def is_safe(path: str) -> bool:
    """Whether `ImageSource.read` would take a path below a local root for what it says."""
    try:
        _require_safe(path, decoded=False)
    except ImageProblem:
        return False
    return True


def _require_safe(path: str, *, decoded: bool) -> None:
    """Refuses a path that could name something outside the root. `decoded`: also after URL decoding, however often."""
    reason = None
    if not path:
        reason = "is empty"
    elif len(path.encode("utf-8", "replace")) > _MAX_PATH_BYTES:
        reason = "is too long"
    elif any(ord(character) < 32 or 0xD800 <= ord(character) <= 0xDFFF or character == "\x7f" for character in path):
        reason = "holds control characters"
    elif path.startswith("/") or "\\" in path or "://" in path or "::" in path:
        reason = "must be a plain path below images.root"
    elif ".." in path.split("/"):
        reason = "leads out of images.root"
    if reason is not None:
        raise ImageProblem(f"image path {_shown(path)} {reason}")
    if decoded and (plain := unquote(path)) != path:
        _require_safe(plain, decoded=True)


def _require_size(size: int, path: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageProblem(f"image {_shown(path)} is larger than {max_bytes:,} bytes")


def _decode(data: bytes, path: str, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageProblem(f"image {_shown(path)} is empty (0 bytes)")
    try:
        image = _open(data)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{width} x {height} pixels are over the limit of {max_pixels:,}")
        image.load()
        return _upright(_rgb(image), image)
    except Exception as error:  # over a forged file a decoder may raise anything
        raise ImageProblem(f"image {_shown(path)} cannot be decoded: {_reason(error)}") from error


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header. Pixels are decoded by `load()`.

    Pillow's `Image.open` is left aside: it warns or refuses by a pixel limit of its own, global to the process.
    """
    from PIL import Image

    _load_plugins()
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        accepted = accept(data[:16]) if accept else False
        if factory and accepted and not isinstance(accepted, str):  # a string says why this build cannot
            return factory(io.BytesIO(data), "")
    raise ValueError(f"it is none of {', '.join(FORMATS)}, or this Pillow was built without that format")


@functools.cache
def _load_plugins() -> None:
    for module in FORMATS.values():
        importlib.import_module(f"PIL.{module}")


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return _grey((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535)
    if image.mode in ("I", "F"):
        return _grey(_stretched(np.asarray(image, dtype=np.float64), integers=image.mode == "I"))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(layer, mask=layer.getchannel("A"))
        return flat
    return image.convert("RGB")


def _grey(values: NDArray[Any]) -> Image.Image:
    from PIL import Image

    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _stretched(values: NDArray[np.float64], *, integers: bool) -> NDArray[np.float64]:
    """Greys (height, width) without a declared scale to 0..255."""
    least, greatest = float(values.min()), float(values.max())
    if not (math.isfinite(least) and math.isfinite(greatest)):
        raise ValueError("it holds pixels that are not finite numbers")
    for limit in (65535,) if integers else (1, 255):
        if least >= 0 and greatest <= limit:
            return np.round(values * 255 / limit)
    return np.round((values - least) * 255 / (greatest - least)) if greatest > least else np.zeros_like(values)


def _upright(picture: Image.Image, original: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    try:
        orientation = int(original.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata does not spoil the picture
        return picture
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _shown(value: object) -> str:
    """A value from outside as one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:190]}...{text[-1]}"


def _reason(error: Exception) -> str:
    """A foreign exception as one line of bounded length."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:200]}...") or type(error).__name__


def _without_credentials(url: str) -> str:
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)
