"""From a file to a model's input, as Pillow, torchvision, timm and OpenCV themselves have it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from migrator.trainer.data.shards import pixel_key
from migrator.trainer.encoders.manifest import Manifest
from migrator.trainer.encoders.timm_models import timm_preprocessing
from migrator.trainer.errors import EncoderProblem, ImageProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.torchvision_cpu import import_timm

SIZE = 24


def smooth(width: int, height: int, seed: int = 0, *, channels: int = 3) -> NDArray[np.uint8]:
    """As smooth as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, channels), dtype=np.uint8)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    small = Image.fromarray(noise.squeeze(), mode)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(folder: Path, data: bytes) -> Image.Image:
    (folder / "x").write_bytes(data)
    return ImageSource(str(folder)).load("x")


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency that is dropped
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- to RGB ----------------------------------------------------------------------------------------------------------


def rgba() -> Image.Image:
    pixels = smooth(30, 20, channels=4).copy()
    pixels[:, :10, 3] = 0
    pixels[:, 20:, 3] = 255
    return Image.fromarray(pixels)


def palette(transparency: Any) -> bytes:
    image = Image.fromarray(smooth(30, 20)).quantize(16)
    return encoded(image, "PNG", transparency=transparency)


def deep(dtype: Any, *, most: float) -> Image.Image:
    return Image.fromarray((np.linspace(0, 1, 600).reshape(20, 30) * most).astype(dtype))


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(smooth(30, 20, seed)) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


FILES = {
    "RGB": encoded(Image.fromarray(smooth(30, 20)), "PNG"),
    "L": encoded(Image.fromarray(smooth(30, 20, channels=1)), "PNG"),
    "1": encoded(Image.fromarray(smooth(30, 20, channels=1)).convert("1"), "PNG"),
    "RGBA": encoded(rgba(), "PNG"),
    "RGBA in WebP": encoded(rgba(), "WEBP", lossless=True, exact=True),
    "LA": encoded(rgba().convert("LA"), "PNG"),
    "P": encoded(Image.fromarray(smooth(30, 20)).quantize(16), "PNG"),
    "P with alpha": palette(bytes(range(0, 256, 16))),
    "P with one clear colour": palette(3),
    "L with a clear grey": encoded(Image.fromarray(smooth(30, 20, channels=1)), "PNG", transparency=120),
    "RGB with a clear colour": encoded(Image.fromarray(smooth(30, 20)), "PNG", transparency=(1, 2, 3)),
    "CMYK": encoded(Image.fromarray(smooth(30, 20)).convert("CMYK"), "JPEG"),
    "LAB": encoded(Image.fromarray(smooth(30, 20)).convert("RGB").convert("LAB"), "TIFF"),
    "YCbCr": encoded(Image.fromarray(smooth(30, 20)).convert("YCbCr"), "TIFF"),
    "I;16": encoded(deep(np.uint16, most=65535), "PNG"),
    "I;16 in TIFF": encoded(deep(np.uint16, most=4095), "TIFF"),
    "I": encoded(deep(np.int32, most=70_000), "TIFF"),
    "F": encoded(deep(np.float32, most=1.0), "TIFF"),
    "F up to 255": encoded(deep(np.float32, most=255.0), "TIFF"),
    "GIF": animated("GIF"),
    "animated WebP": animated("WEBP"),
    "animated PNG": animated("PNG"),
    "several TIFF pages": animated("TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_convert_pil_is_what_pillow_does(tmp_path: Path, name: str) -> None:
    preprocessing = Preprocessing(SIZE, convert="pil", exif="ignore")
    assert np.array_equal(np.asarray(preprocessing.to_rgb(decoded(tmp_path, FILES[name]))), by_pillow(FILES[name]))


@pytest.mark.parametrize("name", FILES)
def test_alpha_drop_is_what_pillow_does_but_for_deep_greys(tmp_path: Path, name: str) -> None:
    ours = np.asarray(Preprocessing(SIZE, alpha="drop").to_rgb(decoded(tmp_path, FILES[name])))
    if name[0] in "IF":
        scaled = np.asarray(Preprocessing(SIZE).to_rgb(decoded(tmp_path, FILES[name])))
        assert np.array_equal(ours, scaled)
        assert (ours.min(), ours.max()) == ((0, 16) if name == "I;16 in TIFF" else (0, 255))
    else:
        assert np.array_equal(ours, by_pillow(FILES[name]))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("RGBA", "LA", "P", "L with", "RGB with"))])
@pytest.mark.parametrize(("alpha", "colour"), [("white", "white"), ("black", "black"), ("#1080F0", (16, 128, 240))])
def test_alpha_is_laid_on_a_colour(tmp_path: Path, name: str, alpha: str, colour: Any) -> None:
    layer = Image.open(io.BytesIO(FILES[name])).convert("RGBA")
    below = Image.new("RGBA", layer.size, colour)
    expected = np.asarray(Image.alpha_composite(below, layer).convert("RGB"), int)
    ours = np.asarray(Preprocessing(SIZE, alpha=alpha).to_rgb(decoded(tmp_path, FILES[name])), int)
    assert np.abs(ours - expected).max() <= 1


def test_a_premultiplied_palette_is_not_lost(tmp_path: Path) -> None:
    """Mode PA, which files do not have, but applications that call `prepare` may."""
    image = rgba().convert("LA").convert("PA")
    for alpha in ("white", "drop"):
        expected = Preprocessing(SIZE, alpha=alpha).prepare(image.convert("RGBA"))
        assert np.array_equal(Preprocessing(SIZE, alpha=alpha).prepare(image), expected)


def test_a_picture_that_is_transparent_everywhere_is_a_problem_of_its_own(tmp_path: Path) -> None:
    pixels = smooth(30, 20, channels=4).copy()
    pixels[..., 3] = 0
    data = encoded(Image.fromarray(pixels), "PNG")
    with pytest.raises(ImageProblem, match=r"'x' cannot be converted: .*transparent everywhere.*alpha: drop"):
        Preprocessing(SIZE).prepare(decoded(tmp_path, data))
    dropped = Preprocessing(SIZE, alpha="drop").to_rgb(decoded(tmp_path, data))
    assert np.array_equal(np.asarray(dropped), by_pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth(30, 20)), kind, exif=exif.tobytes())
    image = decoded(tmp_path, data)
    kept = np.asarray(Preprocessing(SIZE, exif="ignore").to_rgb(image))
    assert np.array_equal(kept, by_pillow(data))  # Pillow turns a TIFF when it opens it
    turned = Preprocessing(SIZE).to_rgb(image)
    opened = Preprocessing(SIZE).to_rgb(Image.open(io.BytesIO(data)))  # not loaded yet
    assert np.array_equal(np.asarray(opened), np.asarray(turned))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(turned), np.asarray(upright))
    again = Preprocessing(SIZE).to_rgb(turned)
    assert np.array_equal(np.asarray(again), np.asarray(turned)), "what is upright stays so"


def test_orientation_in_xmp_is_read_as_pillow_does(tmp_path: Path) -> None:
    """Some editors write it there alone."""
    xmp = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""
    data = encoded(Image.fromarray(smooth(30, 20)), "JPEG", xmp=xmp)
    image = decoded(tmp_path, data)
    assert Preprocessing(SIZE, exif="ignore").to_rgb(image).size == (30, 20)
    turned = Preprocessing(SIZE).to_rgb(image)
    assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert Preprocessing(SIZE).to_rgb(turned).size == (20, 30)


def test_an_application_gets_the_same_pixels_from_a_picture_that_it_opened(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, data in enumerate([*FILES.values(), encoded(rgba(), "PNG", exif=exif.tobytes())]):
        for fields in ({}, {"exif": "ignore", "convert": "pil"}, {"alpha": "black", "resize": "letterbox"}):
            preprocessing = Preprocessing(SIZE, **fields)  # type: ignore[arg-type]
            ours = preprocessing.prepare(decoded(tmp_path, data))
            assert np.array_equal(preprocessing.prepare(Image.open(io.BytesIO(data))), ours), number


def test_a_picture_is_left_as_it_was(tmp_path: Path) -> None:
    image = decoded(tmp_path, FILES["P with alpha"])
    before = (image.mode, image.tobytes(), dict(image.info))
    for convert in ("scaled", "pil"):
        Preprocessing(SIZE, convert=convert, alpha="drop").prepare(image)
    assert (image.mode, image.tobytes(), image.info) == before


# --- size ------------------------------------------------------------------------------------------------------------

FILTERS = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
MODES = {"crop": "center", "squash": "squash", "border": "border"}


def by_timm(picture: Image.Image, size: tuple[int, int], mode: str, **options: Any) -> NDArray[np.uint8]:
    transform = import_timm().data.create_transform((3, *size), crop_mode=mode, normalize=False, **options)
    pixels: NDArray[np.uint8] = transform(picture).numpy()
    return pixels


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(40, 300),  # of a narrower picture timm leaves nothing, and fails
    height=st.integers(40, 300),
    size=st.tuples(st.integers(8, 60), st.integers(8, 60)) | st.integers(8, 60).map(lambda side: (side, side)),
    resize=st.sampled_from(["squash", "crop", "border"]),
    crop_pct=st.sampled_from([0.5, 0.875, 0.95, 1.0, 1.15, 1.5]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos", "hamming"]),
)
def test_pixels_are_those_of_timm(
    width: int, height: int, size: tuple[int, int], resize: Any, crop_pct: float, interpolation: Any
) -> None:
    picture = Image.fromarray(smooth(width, height, width * 301 + height))
    options = {"interpolation": interpolation, "crop_pct": crop_pct, "mean": (0.2, 0.4, 0.6)}
    theirs = by_timm(picture, size, MODES[resize], **options).astype(int)
    ours = Preprocessing(size, resize, interpolation, mean=(0.2, 0.4, 0.6), crop_pct=crop_pct).prepare(picture)
    apart = np.abs(ours - theirs)
    assert apart.max() <= 4  # Pillow rounds between its two passes, and takes the cheaper one first
    assert apart.mean() < 0.6


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("width", "height"), [(30, 20), (97, 201), (24, 24), (10, 7)])
def test_squash_is_pillows_resize(interpolation: Any, width: int, height: int) -> None:
    picture = Image.fromarray(smooth(width, height))
    expected = picture.resize((SIZE, SIZE), Image.Resampling[interpolation.upper()])
    ours = Preprocessing(SIZE, interpolation=interpolation).prepare(picture)
    assert np.array_equal(ours, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_crop_is_torchvisions(interpolation: Any) -> None:
    import_timm()
    from torchvision import transforms

    picture = Image.fromarray(smooth(97, 201))
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(32, mode), transforms.CenterCrop(28)])(picture)
    ours = Preprocessing(28, "crop", interpolation, crop_pct=28 / 32).prepare(picture)
    apart = np.abs(ours.astype(int) - np.asarray(theirs).transpose(2, 0, 1))
    assert apart.max() <= (8 if interpolation in ("nearest", "box") else 2)
    assert apart.mean() < 0.5


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 60), (33, 33), (200, 13)])
@pytest.mark.parametrize("fill", ["black", "white", "#727272"])
def test_letterbox_is_pillows_pad(width: int, height: int, fill: str) -> None:
    """Pillow's rounding may place a picture one pixel elsewhere: compared where it does not."""
    picture = Image.fromarray(smooth(width, height))
    ours = Preprocessing(SIZE, "letterbox", "bicubic", fill=fill).prepare(picture)
    inner = ImageOps.contain(picture, (SIZE, SIZE), Image.Resampling.BICUBIC)
    expected = Image.new("RGB", (SIZE, SIZE), fill)
    expected.paste(inner, ((SIZE - inner.width) // 2, (SIZE - inner.height) // 2))
    assert np.array_equal(ours, np.asarray(expected).transpose(2, 0, 1))
    if (SIZE - inner.width) % 2 == (SIZE - inner.height) % 2 == 0:
        padded = ImageOps.pad(picture, (SIZE, SIZE), Image.Resampling.BICUBIC, fill)
        assert np.array_equal(ours, np.asarray(padded).transpose(2, 0, 1))


def test_letterbox_of_two_sides_fits_into_both() -> None:
    picture = Image.fromarray(smooth(60, 40))
    ours = Preprocessing((30, 50), "letterbox", fill="white").prepare(picture)
    expected = ImageOps.pad(picture, (50, 30), Image.Resampling.BILINEAR, "white")
    assert ours.shape == (3, 30, 50)
    assert np.abs(ours - np.asarray(expected).transpose(2, 0, 1).astype(int)).max() <= 1 or (ours[:, :, 0] == 255).all()


def test_channels_in_reverse() -> None:
    picture = Image.fromarray(smooth(60, 40))
    rgb = Preprocessing(SIZE, "border", mean=(0.1, 0.2, 0.3)).prepare(picture)
    bgr = Preprocessing(SIZE, "border", mean=(0.3, 0.2, 0.1), channels="bgr").prepare(picture)
    assert np.array_equal(bgr, rgb[::-1])
    assert bgr.flags.c_contiguous


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("resize", ["crop", "letterbox", "border", "squash"])
def test_a_long_picture_is_not_blown_up(resize: Any, antialias: bool) -> None:
    colour = np.array([7, 8, 9])[:, None, None]
    preprocessing = Preprocessing(
        32, resize, crop_pct=0.5, antialias=antialias, mean=(7 / 255, 8 / 255, 9 / 255), fill="#070809"
    )
    for sides in ((200_000, 1), (1, 200_000)):
        prepared = preprocessing.prepare(Image.new("RGB", sides, (7, 8, 9)))
        assert np.array_equal(prepared, np.broadcast_to(colour, (3, 32, 32)))


# --- without antialias -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
def test_without_antialias_pixels_are_opencvs(
    width: int, height: int, size: tuple[int, int], interpolation: Any
) -> None:
    import cv2

    pixels = np.random.default_rng(width * 301 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    known = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
    theirs = cv2.resize(pixels, size[::-1], interpolation=known[interpolation])
    ours = Preprocessing(size, interpolation=interpolation, antialias=False).prepare(Image.fromarray(pixels))
    assert np.abs(ours.transpose(1, 2, 0).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    ("interpolation", "width", "height", "most"),
    [("hamming", 640, 480, 1.0), ("hamming", 301, 457, 1.0), ("box", 448, 672, 0.5)],
)
def test_opencvs_area_is_near_to_what_the_docs_name(interpolation: Any, width: int, height: int, most: float) -> None:
    import cv2

    pixels = smooth(width, height)
    theirs = cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_AREA)
    ours = Preprocessing(224, interpolation=interpolation).prepare(Image.fromarray(pixels)).transpose(1, 2, 0)
    assert np.abs(ours.astype(int) - theirs).mean() < most


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(10, 200),
    height=st.integers(10, 200),
    resize=st.sampled_from(["squash", "crop"]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),  # nearest: between two pixels it rounds unlike OpenCV
)
def test_without_antialias_pixels_are_those_of_torchvisions_tensors(
    width: int, height: int, resize: Any, interpolation: Any
) -> None:
    import torch

    import_timm()
    from torchvision import transforms

    pixels = np.random.default_rng(width * 301 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mode = transforms.InterpolationMode(interpolation)
    scaled: Any = 32 if resize == "crop" else (32, 32)
    steps = [transforms.Resize(scaled, mode, antialias=False), transforms.CenterCrop(28)]
    theirs = transforms.Compose(steps)(torch.tensor(pixels).permute(2, 0, 1).float())
    ours = Preprocessing(28, resize, interpolation, crop_pct=28 / 32, antialias=False).prepare(Image.fromarray(pixels))
    assert np.abs(ours - theirs.numpy().round().clip(0, 255)).max() <= 1


# --- declared --------------------------------------------------------------------------------------------------------

OTHERS: list[dict[str, Any]] = [
    {"image_size": (24, 32)},
    {"image_size": (32, 24)},
    {"exif": "ignore"},
    {"alpha": "drop"},
    {"alpha": "#102030"},
    {"convert": "pil"},
    {"resize": "letterbox"},
    {"resize": "border"},
    {"fill": "white"},
    {"interpolation": "lanczos"},
    {"antialias": False},
    {"channels": "bgr"},
    {"crop_pct": 1.2},
]


def manifest(preprocessing: Preprocessing) -> Manifest:
    return Manifest.make(
        arch="a", dim=1, head="none", preprocessing=preprocessing, weights_sha256="0", fingerprint=[1.0]
    )


def test_encoders_from_before_these_fields_keep_their_ids() -> None:
    declared = Preprocessing(SIZE).declared()
    assert declared.keys() == {"image_size", "resize", "interpolation", "mean", "std", "crop_pct"}
    assert manifest(Preprocessing(SIZE)).id == "enc-450fda8bb98cec30"
    assert Preprocessing((SIZE, SIZE)).declared() == declared
    same = Preprocessing(SIZE, exif="apply", alpha="#FFFFFF", convert="scaled", fill="#000000", antialias=True)
    assert manifest(same).id == manifest(Preprocessing(SIZE)).id


def test_every_field_is_part_of_the_id_the_manifest_and_the_cache() -> None:
    ids = {manifest(Preprocessing(SIZE)).id}
    keys = {pixel_key(Preprocessing(SIZE))}
    for fields in OTHERS:
        preprocessing = Preprocessing(**{"image_size": SIZE, **fields})
        assert Manifest.from_json(manifest(preprocessing).to_json()).preprocessing == preprocessing
        ids.add(manifest(preprocessing).id)
        keys.add(pixel_key(preprocessing))
    assert len(ids) == len(keys) == len(OTHERS) + 1
    means = {"mean": (0.1, 0.2, 0.3)}
    assert pixel_key(Preprocessing(SIZE, **means)) in keys, "applied per batch"  # type: ignore[arg-type]
    assert pixel_key(Preprocessing(SIZE, "border", **means)) not in keys, "it pads with this colour"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_size": (24,)}, "image_size"),
        ({"image_size": (24, 0)}, "image_size"),
        ({"image_size": (24, 24.0)}, "image_size"),
        ({"image_size": "24"}, "image_size"),
        ({"exif": "rotate"}, "exif 'rotate' must be one of apply, ignore"),
        ({"alpha": "drap"}, "alpha 'drap' must be drop, white, black, or a colour as \"#rrggbb\""),
        ({"alpha": "#fff"}, "alpha"),
        ({"alpha": None}, "alpha"),
        ({"fill": "drop"}, "fill"),
        ({"convert": "PIL"}, "convert"),
        ({"convert": "none"}, "convert none goes with a transform"),
        ({"resize": "pad"}, "resize"),
        ({"antialias": 0}, "antialias"),
        ({"antialias": False, "interpolation": "lanczos"}, "antialias false goes with"),
        ({"channels": "RGB"}, "channels"),
        ({"crop_pct": 2.5}, "crop_pct"),
    ],
)
def test_what_is_not_one_of_its_values_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(EncoderProblem, match=said) as caught:
        Preprocessing(**{"image_size": SIZE, **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arch",
    ["volo_d5_512", "vit_base_patch16_sapiens2", "vit_base_patch16_siglip_224", "vit_so400m_patch16_siglip_gap_256"],
)
def test_timms_data_configs_are_taken_as_they_are(arch: str) -> None:
    """crop_pct above 1, an input that is not square, squash: pixel for pixel what timm makes."""
    timm = import_timm()
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict())
    preprocessing = timm_preprocessing(arch)
    assert preprocessing.size == config["input_size"][-2:]
    picture = Image.fromarray(smooth(640, 500))
    theirs = timm.data.create_transform(**config, normalize=False)(picture).numpy()
    assert np.abs(preprocessing.prepare(picture).astype(int) - theirs).max() <= 3


def test_every_data_config_of_timm_is_taken() -> None:
    """But for what has no pixels that are declared: other numbers of channels."""
    timm = import_timm()
    refused = {}
    for arch in timm.list_models():
        settings = timm.get_pretrained_cfg(arch)
        if settings is None or not settings.input_size:
            continue
        try:
            assert timm_preprocessing(arch).size == tuple(settings.input_size[-2:])
        except EncoderProblem as problem:
            refused[arch] = str(problem)
    assert refused == {}
