"""Images from hostile paths and hostile files."""

import io
import os
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from migrator.trainer.errors import ImageProblem, ImagesUnavailable, TrainerError
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(folder: Path, data: bytes, **options: Any) -> Image.Image:
    (folder / "x").write_bytes(data)
    return Preprocessing(8).to_rgb(ImageSource(str(folder), **options).load("x"))


def refused(folder: Path, data: bytes, **options: Any) -> str:
    with pytest.raises(ImageProblem) as caught:
        loaded(folder, data, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "'x'" in message
    return message


def corners() -> Image.Image:
    """24 x 16, a different grey in each corner, so that every turn of it is recognised."""
    pixels = np.full((16, 24), 128, np.uint8)
    pixels[:8, :12], pixels[:8, 12:], pixels[8:, :12] = 0, 80, 255
    return Image.fromarray(pixels).convert("RGB")


# --- templates and payloads


def test_locate_fills_the_template_from_payload_and_id(tmp_path: Path) -> None:
    source = ImageSource(str(tmp_path), "{category}/{id}_{size}.jpg")
    assert source.locate(7, {"category": "a b", "size": 2.5, "id": "not this one"}) == "a b/7_2.5.jpg"
    assert source.locate("k", {"category": "nan", "size": 3}) == "nan/k_3.jpg"


@pytest.mark.parametrize(
    "uri", ["plain.jpg", "{}", "{0}", "{a.}", "{a[0]}", "{a!r}", "{a:>10}", "{a:{b}}", "{a", "a}", "{ a }", ""]
)
def test_a_template_holds_fields_only(tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrainerError, match="image template"):
        ImageSource(str(tmp_path), uri)


@pytest.mark.parametrize(
    "value",
    [None, "", [1], {"a": 1}, b"\xff", float("nan"), np.float32("inf"), 10**5000, [10**5000], object()],
    ids=lambda value: type(value).__name__,
)
def test_a_payload_without_a_usable_value_is_the_items_problem(tmp_path: Path, value: object) -> None:
    with pytest.raises(ImageProblem, match="item 'k' has"):
        ImageSource(str(tmp_path)).locate("k", {"path": value})
    with pytest.raises(ImageProblem, match="item 'k' has"):
        ImageSource(str(tmp_path)).locate("k", {})


# --- nothing outside the root

ESCAPES = [
    "../secret.png",
    "a/../../secret.png",
    "a/..",
    "..",
    "/etc/passwd",
    "//etc/passwd",
    "..\\secret.png",
    "a\\b.png",
    "a\0.png",
    "a\n.png",
    "file:///etc/passwd",
    "s3://other/key",
    "zip://x.png::file:///a.zip",
    "a::b",
    "\udcff.png",
    "x" * 5000,
    "",
]
ENCODED_ESCAPES = [
    "%2e%2e/secret.png",
    "%252e%252e/secret.png",
    "a/%2E./%2e%2E/secret",
    "%2fetc/passwd",
    "a%00.png",
    "a%5c..%5cb",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_unsafe_paths_are_refused_whatever_the_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(corners()))
    for source in (ImageSource(str(tmp_path / "root")), ImageSource("memory://root")):
        with pytest.raises(ImageProblem):
            source.load(path)
        with pytest.raises(ImageProblem):
            source.locate(1, {"path": path})


@pytest.mark.parametrize("path", ENCODED_ESCAPES)
def test_encoded_traversal_is_refused_on_remote_roots(path: str) -> None:
    with pytest.raises(ImageProblem):
        ImageSource("memory://root").locate(1, {"path": path})


def test_odd_but_harmless_names_are_read(tmp_path: Path) -> None:
    for name in ("%2e%2e.png", "100%.png", "..a.png", "a..", "~", "-", "ü b.png", "*.png", "a:b", "#?.png"):
        (tmp_path / name).write_bytes(encoded(corners()))
        assert ImageSource(str(tmp_path)).load(name).size == (24, 16), name


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["..", ".", "a", "", "link", "%2e%2e", "\\", "~", "out.png", "in.png"]), max_size=6).map(
        "/".join
    )
)
def test_no_path_ever_reads_the_file_outside(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    base = tmp_path_factory.getbasetemp() / "escape"
    if not base.exists():
        (base / "root" / "a").mkdir(parents=True)
        (base / "root" / "link").symlink_to("..")
        (base / "out.png").write_bytes(encoded(Image.new("RGB", (1, 1), RED)))
        for folder in (base / "root", base / "root" / "a"):
            (folder / "in.png").write_bytes(encoded(Image.new("RGB", (2, 2), WHITE)))
    try:
        image = ImageSource(str(base / "root")).load(path)
    except ImageProblem:
        return
    assert image.size == (2, 2)


def test_links_are_followed_below_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.png").write_bytes(encoded(corners()))
    (tmp_path / "secret.png").write_bytes(encoded(corners()))
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "a.png").write_bytes(encoded(corners()))
    (root / "file.png").symlink_to("real/a.png")
    (root / "folder").symlink_to(root / "real")
    (root / "out.png").symlink_to("../secret.png")
    (root / "up").symlink_to("..")
    (root / "twin").symlink_to("../root-twin")
    (root / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to("root")
    for start in ("root", "alias"):
        source = ImageSource(str(tmp_path / start))
        assert source.load("file.png").size == source.load("folder/a.png").size == (24, 16)
        for path in ("out.png", "up/secret.png", "twin/a.png"):
            with pytest.raises(ImageProblem, match="symbolic link"):
                source.load(path)
        with pytest.raises(ImageProblem, match="cannot be read"):
            source.load("loop")


@pytest.mark.parametrize("victim", ["d", "d/x"])
def test_a_link_put_in_the_way_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    for folder in ("root/d", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x").write_bytes(encoded(corners()))
    source = ImageSource(str(tmp_path / "root"))
    assert source.load("d/x").size == (24, 16)
    resolve = os.path.realpath

    def resolve_then_swap(path: Any, *, strict: bool = False) -> Any:
        resolved = resolve(path, strict=strict)
        (tmp_path / "root" / victim).rename(tmp_path / "root" / "kept")
        (tmp_path / "root" / victim).symlink_to(tmp_path / victim.replace("d", "outside"))
        return resolved

    monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
    with pytest.raises(ImageProblem, match="cannot be read"):
        source.load("d/x")
    assert (tmp_path / "root" / victim).is_symlink()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        source = ImageSource(str(tmp_path))
        for path in ("fifo", "folder", ".", "socket"):
            with pytest.raises(ImageProblem, match=r"regular file|cannot be read"):
                source.load(path)


def test_too_large_a_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageProblem, match="larger than"):
        ImageSource(str(tmp_path)).load("x")
    assert "larger than 10 bytes" in refused(tmp_path, b"x" * 11, max_bytes=10)
    fsspec.filesystem("memory").pipe("/big/x", b"x" * 11)
    with pytest.raises(ImageProblem, match="larger than 10 bytes"):
        ImageSource("memory://big", max_bytes=10).load("x")


# --- the source itself


def test_a_missing_root_is_not_the_images_fault(tmp_path: Path) -> None:
    for root in (str(tmp_path / "missing"), "", "a\0b"):
        with pytest.raises(ImagesUnavailable, match=r"images\.root"):
            ImageSource(root)
    (tmp_path / "root").mkdir()
    source = ImageSource(str(tmp_path / "root"))
    with pytest.raises(ImageProblem, match="No such file"):
        source.load("a.png")
    (tmp_path / "root").rmdir()
    with pytest.raises(ImagesUnavailable, match="No such file"):
        source.load("a.png")


def test_remote_images_are_read_and_missing_ones_told_from_a_missing_root() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/gallery/a/x.png", encoded(corners()))
    for root in ("memory://gallery", "memory://gallery/", "memory:///gallery"):
        assert ImageSource(root).load("a/x.png").size == (24, 16)
        with pytest.raises(ImageProblem, match=r"'a/y\.png' cannot be read"):
            ImageSource(root).load("a/y.png")
    with pytest.raises(ImagesUnavailable, match="does not exist"):
        ImageSource("memory://galery").load("a/x.png")


def test_images_inside_a_remote_archive(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("p/x.png", encoded(corners()))
        archive.writestr("zero", b"")
    source = ImageSource(f"zip://::{tmp_path / 'a.zip'}")
    assert source.load("p/x.png").size == (24, 16)
    with pytest.raises(ImageProblem, match="empty"):
        source.load("zero")
    with pytest.raises(ImageProblem, match="cannot be read"):
        source.load("p/y.png")


def test_file_urls_are_local_folders(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(corners()))
    (tmp_path / "out").symlink_to("/etc")
    source = ImageSource(f"file://{tmp_path}")
    assert source.load("x.png").size == (24, 16)
    with pytest.raises(ImageProblem, match="symbolic link"):
        source.load("out/hostname")
    with pytest.raises(TrainerError, match="plain path"):
        ImageSource(f"simplecache::file://{tmp_path}")


def test_a_root_that_cannot_be_opened() -> None:
    with pytest.raises(ImagesUnavailable, match="cannot be reached"):
        ImageSource("zip://::/nowhere/a.zip")
    with pytest.raises(TrainerError, match="of no known kind: Protocol not known: nosuch"):  # no use in trying again
        ImageSource("nosuch://bucket")


def test_credentials_in_a_root_are_not_shown() -> None:
    with pytest.raises(TrainerError) as caught:
        ImageSource("nosuch://user:hunter2@host/bucket")
    assert "hunter2" not in str(caught.value)
    assert "host/bucket" in str(caught.value)


class StatusError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class TroubledFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no stubs
    """A file system whose paths say which trouble they meet."""

    protocol = "troubled"
    listable = True

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        troubles = {
            "timeout": TimeoutError("slow"),
            "refused": ConnectionRefusedError(111, "Connection refused"),
            "broken": RuntimeError("endpoint\nexploded"),
            "forbidden": PermissionError("Access Denied"),
            "long": OSError(36, "File name too long"),
            "410": StatusError(410),
            "401": StatusError(401),
            "429": StatusError(429),
            "503": StatusError(503),
        }
        raise troubles[path.rsplit("/", 1)[-1]]

    def exists(self, path: str, **options: Any) -> bool:
        return self.listable


@pytest.fixture
def troubled() -> ImageSource:
    fsspec.register_implementation("troubled", TroubledFiles, clobber=True)
    return ImageSource("troubled://x")


@pytest.mark.parametrize("trouble", ["timeout", "refused", "broken", "401", "429", "503"])
def test_trouble_of_the_source_is_worth_another_try(troubled: ImageSource, trouble: str) -> None:
    with pytest.raises(ImagesUnavailable) as caught:
        troubled.load(trouble)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trouble", ["forbidden", "long", "410"])
def test_trouble_of_one_image_is_its_own(troubled: ImageSource, trouble: str) -> None:
    with pytest.raises(ImageProblem):
        troubled.load(trouble)


def test_refused_credentials_are_not_blamed_on_the_images(
    troubled: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageProblem):
        troubled.load("forbidden")
    monkeypatch.setattr(TroubledFiles, "listable", False)
    with pytest.raises(ImagesUnavailable, match="credentials"):
        troubled.load("forbidden")


# --- formats, modes, orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_every_allowed_format_is_decoded(tmp_path: Path, kind: str) -> None:
    image = loaded(tmp_path, encoded(corners(), kind))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(corners(), int)).mean() < 6


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for data in (
        encoded(corners(), "EPS"),
        encoded(corners(), "TGA"),
        encoded(corners(), "ICO"),
        encoded(corners(), "PDF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"hello",
    ):
        assert "is none of JPEG" in refused(tmp_path, data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = np.asarray(corners(), int)
    # what a camera stores for each orientation, from the EXIF definition of row 0 and column 0
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored).astype(np.uint8)), kind, exif=exif.tobytes())
    image = np.asarray(loaded(tmp_path, data), int)
    assert image.shape == upright.shape
    assert np.abs(image - upright).mean() < 8


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what is wrong with the metadata
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"\xff" * 40])
def test_broken_exif_does_not_spoil_the_picture(tmp_path: Path, exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert loaded(tmp_path, encoded(corners(), kind, exif=exif)).size == (24, 16)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_ignored(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert loaded(tmp_path, encoded(corners(), "JPEG", exif=exif)).size == (24, 16)


def test_transparency_is_flattened_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    for image in (clear, clear.convert("LA")):
        flat = loaded(tmp_path, encoded(image))
        assert flat.getpixel((3, 3)) == WHITE
        assert flat.getpixel((1, 0)) == (127, 127, 127)
    assert loaded(tmp_path, encoded(clear)).getpixel((0, 0)) == RED

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    assert loaded(tmp_path, encoded(palette)).getpixel((3, 3)) == (0, 0, 255)
    for transparency in (1, bytes([255, 0])):
        flat = loaded(tmp_path, encoded(palette, transparency=transparency))
        assert (flat.getpixel((0, 0)), flat.getpixel((3, 3))) == (RED, WHITE)
    assert loaded(tmp_path, encoded(palette, "GIF", transparency=1)).getpixel((3, 3)) == WHITE

    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), (0, 0, 255))
    flat = loaded(tmp_path, encoded(keyed, transparency=(0, 0, 255)))
    assert (flat.getpixel((0, 0)), flat.getpixel((1, 0))) == (RED, WHITE)


def test_cmyk_and_one_bit(tmp_path: Path) -> None:
    for kind in ("JPEG", "TIFF"):
        red = np.asarray(loaded(tmp_path, encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind)), int)
        assert np.abs(red - RED).max() < 8
    bits = Image.new("1", (2, 1), 1)
    bits.putpixel((0, 0), 0)
    assert list(np.asarray(loaded(tmp_path, encoded(bits)))[0, :, 0]) == [0, 255]


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    big_endian = b"P5\n16 16\n65535\n" + ramp.astype(">u2").tobytes()
    for data in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "TIFF"), big_endian):
        assert np.array_equal(np.asarray(loaded(tmp_path, data))[..., 1], expected)
    assert np.asarray(loaded(tmp_path, encoded(Image.fromarray(np.array([[65535, 40000]], np.uint16)))))[0, 1, 0] == 156


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 30000, 65535]], np.int32), [0, 117, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[70000, 70000, 70000]], np.int32), [0, 0, 0]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 50, 200]], np.float32), [0, 50, 200]),
        (np.array([[-1e30, 0, 1e30]], np.float32), [0, 128, 255]),
    ],
)
def test_greys_without_a_scale(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    image = np.asarray(loaded(tmp_path, encoded(Image.fromarray(values), "TIFF")))
    assert np.array_equal(image[0], np.array([expected] * 3).T)


def test_greys_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        data = encoded(Image.fromarray(np.array([[0, value]], np.float32)), "TIFF")
        assert "not finite" in refused(tmp_path, data)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_give_their_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    image = loaded(tmp_path, encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(np.asarray(image, int) - RED).max() < 8


# --- damaged and forged files


def forged_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    for width, height in ((12_000, 9_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)):
        message = refused(tmp_path, forged_png(width, height))
        assert "over the limit of 100,000,000" in message or "decoded" in message
    assert "24 x 16 pixels are over the limit of 383" in refused(tmp_path, encoded(corners()), max_pixels=383)
    assert loaded(tmp_path, encoded(corners()), max_pixels=384).size == (24, 16)


@pytest.mark.parametrize("limit", [300, 100])  # Pillow warns over its limit and refuses over twice its limit
def test_pillows_own_limit_neither_warns_nor_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert loaded(tmp_path, encoded(corners()), max_pixels=384).size == (24, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.05, 0.3, 0.6, 0.9):
        assert "cannot be decoded" in refused(tmp_path, data[: int(len(data) * share)])


def test_empty_files_are_refused(tmp_path: Path) -> None:
    assert "is empty (0 bytes)" in refused(tmp_path, b"")
    assert "cannot be decoded" in refused(tmp_path, forged_png(0, 5))


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_flipped_bytes_give_a_picture_or_an_image_problem(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edits: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(corners(), kind))
    for place, value in edits:
        data[int(place * min(len(data), 200))] = value
    try:
        image = loaded(tmp_path_factory.getbasetemp(), bytes(data), max_pixels=1_000_000)
    except ImageProblem as problem:
        assert "\n" not in str(problem)  # noqa: PT017
    else:
        assert image.mode == "RGB"


def test_one_source_serves_many_threads(tmp_path: Path) -> None:
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    for number in range(60):
        image = Image.new("RGB", (number + 1, 5))
        (tmp_path / str(number)).write_bytes(encoded(image, kinds[number % len(kinds)]))
    source = ImageSource(str(tmp_path), "{id}")
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda number: source.load(source.locate(number, {})).size, list(range(60)) * 5))
    assert sizes == [(number + 1, 5) for number in range(60)] * 5


def test_loading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(corners()))
    (tmp_path / "bad").write_bytes(b"no")
    os.mkfifo(tmp_path / "fifo")
    source = ImageSource(str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        source.load("x")
        for path in ("bad", "fifo", "gone", "../x", "x/y"):
            with pytest.raises(ImageProblem):
                source.load(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@given(st.text(max_size=40))
def test_url_quoting_never_hides_a_traversal(text: str) -> None:
    source = ImageSource("memory://root")
    for path in (f"../{text}", f"{text}/../x"):
        with pytest.raises(ImageProblem):
            source.locate(1, {"path": quote(path, safe="", errors="replace")})
