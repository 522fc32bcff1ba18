"""`plan` finds out how the stored vectors were really made, and its advice leads to a plan that passes.

Every gallery here is made by the means of another library, with a model that sees each pixel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from tests.world import DIM, SIZE, World

Migrator = Callable[..., int]
Loader = Callable[[Path], Any]
"""From an image file to the tensor (3, S, S) that the model is fed."""

ITEMS = 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

FACTORY = f"""
import torch

def every_pixel():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear({3 * SIZE * SIZE}, {DIM}))
"""


def picture(number: int, mode: str = "RGB") -> Image.Image:
    """A picture with edges, 61 x 43 pixels."""
    rng = np.random.default_rng(number)
    image = Image.new(mode, (61, 43), tuple(rng.integers(0, 256, len(mode)).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, across, down = (int(value) for value in rng.integers((0, 0, 2, 1), (61, 43, 20, 9)))
        draw.rectangle(
            (x - across, y - down, x + across, y + down), fill=tuple(rng.integers(0, 256, len(mode)).tolist())
        )
    return image


class Gallery:
    """The world with images and vectors of the application's own making."""

    def __init__(self, world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self._migrator, self._capsys = world, migrator, capsys
        (world.folder / "every_pixel_model.py").write_text(FACTORY)
        world.configure(old_encoder={"module": "every_pixel_model:every_pixel", "dim": DIM, "image_size": SIZE})

    def fill(self, images: Sequence[Image.Image], suffix: str, loader: Loader, model: Any = None) -> None:
        """Saves the images and makes index and table with the loader's vectors."""
        self.write([self.save(image, f"{number}{suffix}") for number, image in enumerate(images)], loader, model)

    def save(self, image: Image.Image, name: str, **saving: Any) -> Path:
        file = self.world.images / name
        image.save(file, **saving)
        return file

    def write(self, files: Sequence[Path], loader: Loader, model: Any = None) -> None:
        import faiss
        import pyarrow as pa
        import pyarrow.parquet as pq
        import torch

        if model is None:
            scope: dict[str, Any] = {}
            exec(FACTORY, scope)
            model = scope["every_pixel"]()
        with torch.no_grad():
            made = model(torch.stack([torch.as_tensor(loader(file)) for file in files]))
        vectors = torch.nn.functional.normalize(made).numpy()
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        faiss.write_index(index, str(self.world.gallery / "index.faiss"))
        names = [file.name for file in files]
        table = {"id": range(len(names)), "path": names, "kind": [f"kind {row % 3}" for row in range(len(names))]}
        pq.write_table(pa.table({key: list(column) for key, column in table.items()}), self._items)

    @property
    def _items(self) -> Path:
        return self.world.gallery / "items.parquet"

    def plan(self) -> tuple[int, dict[str, Any], str]:
        """Exit code, the JSON document and stderr of `migrator plan --json`."""
        self._capsys.readouterr()
        code = self._migrator("plan", "--json")
        printed = self._capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    def refused(self) -> tuple[Mapping[str, Any], str]:
        """The keys that the refusal names, and its first line."""
        code, found, err = self.plan()
        assert code == 3, err
        first, *table = [line for line in err.splitlines() if not line.startswith("sampling: ")]
        assert first.startswith("migrator: ")
        assert table
        assert all(line.startswith("  ") for line in table)
        assert "old_encoder: stored" in table[-1]
        assert found["plan"] is None
        best = found["old_encoder_check"]["best"]
        keys = {} if best is None else best["keys"]
        for key in keys:
            assert f"old_encoder.{key} to " in first
        return keys, first

    def follow(self, keys: Mapping[str, Any]) -> None:
        """Sets what the refusal says; then every vector is known."""
        self.world.configure(**{f"old_encoder__{key}": value for key, value in keys.items()})
        code, found, err = self.plan()
        assert code == 0, err
        assert found["old_encoder_check"]["median_cosine"] >= 0.9995
        assert not [risk for risk in found["risks"] if "old encoder" in risk]


@pytest.fixture
def gallery(world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Gallery:
    return Gallery(world, migrator, capsys)


def normalised(image: Image.Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Any:
    """As torchvision's ToTensor and Normalize do it."""
    from torchvision.transforms import v2

    from migrator.trainer.torchvision_cpu import import_timm

    import_timm()  # torchvision needs help on some machines without CUDA
    import torch

    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)(image)


def plain(file: Path) -> Image.Image:
    """What timm's, torchvision's and CLIP's loaders do."""
    return Image.open(file).convert("RGB")


def squashed(image: Image.Image, resampling: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    return image.resize((SIZE, SIZE), resampling)


def pictures() -> list[Image.Image]:
    return [picture(number) for number in range(ITEMS)]


# -- resizing and normalising -----------------------------------------------------------------------------------------


def test_timms_transform_is_found_by_three_changes(gallery: Gallery) -> None:
    from migrator.trainer.torchvision_cpu import import_timm

    transform = import_timm().data.create_transform(
        (3, SIZE, SIZE), interpolation="bicubic", crop_pct=0.9, mean=MEAN, std=STD, crop_mode="center"
    )
    gallery.fill(pictures(), ".png", lambda file: transform(plain(file)))
    keys, first = gallery.refused()
    assert keys == {"resize": "crop", "crop_pct": 0.9, "interpolation": "bicubic"}
    assert "were not made by this encoder: median cosine" in first
    gallery.follow(keys)


def test_clips_way_is_found(gallery: Gallery) -> None:
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)])
    gallery.fill(pictures(), ".png", lambda file: normalised(resize(plain(file)), CLIP_MEAN, CLIP_STD))
    keys, _ = gallery.refused()
    assert keys == {"resize": "crop", "interpolation": "bicubic", "mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    gallery.follow(keys)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3), ((0.0,) * 3, (1 / 255,) * 3)]
)
def test_another_normalisation_is_found(gallery: Gallery, mean: Sequence[float], std: Sequence[float]) -> None:
    gallery.fill(pictures(), ".png", lambda file: normalised(squashed(plain(file)), mean, std))
    keys, _ = gallery.refused()
    assert keys == {"mean": pytest.approx(list(mean)), "std": pytest.approx(list(std))}
    gallery.follow(keys)


@pytest.mark.parametrize("resampling", ["NEAREST", "BOX"])
def test_another_filter_is_found(gallery: Gallery, resampling: str) -> None:
    gallery.fill(pictures(), ".png", lambda file: normalised(squashed(plain(file), Image.Resampling[resampling])))
    keys, _ = gallery.refused()
    assert keys == {"interpolation": resampling.lower()}
    gallery.follow(keys)


@pytest.mark.parametrize("resampling", ["LANCZOS", "HAMMING"])
def test_a_filter_that_hardly_differs_is_named_by_a_plan_that_passes(gallery: Gallery, resampling: str) -> None:
    gallery.fill(pictures(), ".png", lambda file: normalised(squashed(plain(file), Image.Resampling[resampling])))
    code, found, err = gallery.plan()
    assert code == 0, err
    assert 0.99 <= found["old_encoder_check"]["median_cosine"] < 0.999
    (risk,) = [risk for risk in found["risks"] if "old encoder" in risk]
    assert f"set old_encoder.interpolation to {resampling.lower()}" in risk
    gallery.follow({"interpolation": resampling.lower()})


def test_opencvs_way_is_found(gallery: Gallery) -> None:
    """BGR as cv2.imread reads it, resized without looking at what lies between, and scaled to 0..1."""
    import cv2

    def load(file: Path) -> np.ndarray:
        pixels = cv2.imread(str(file))
        assert pixels is not None
        return cv2.resize(pixels, (SIZE, SIZE)).transpose(2, 0, 1).astype(np.float32) / 255

    gallery.fill(pictures(), ".png", load)
    keys, _ = gallery.refused()
    assert keys == {"channels": "bgr", "antialias": False, "mean": [0, 0, 0], "std": [1, 1, 1]}
    gallery.follow(keys)


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_letterbox_is_found(gallery: Gallery, colour: str) -> None:
    gallery.fill(
        pictures(),
        ".png",
        lambda file: normalised(ImageOps.pad(plain(file), (SIZE, SIZE), Image.Resampling.BILINEAR, color=colour)),
    )
    keys, _ = gallery.refused()
    assert keys == {"resize": "letterbox", **({} if colour == "black" else {"fill": colour})}
    gallery.follow(keys)


# -- from the file to RGB ---------------------------------------------------------------------------------------------


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def turned(gallery: Gallery, every: int, orientation: int = 6) -> list[Path]:
    """JPEGs of which one in `every` bears an EXIF orientation."""
    return [
        gallery.save(
            picture(number), f"{number}.jpg", **({} if number % every else {"exif": with_orientation(orientation)})
        )
        for number in range(ITEMS)
    ]


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_loader_that_does_not_turn_pictures_is_found(gallery: Gallery, orientation: int) -> None:
    files = turned(gallery, 1, orientation)
    gallery.write(files, lambda file: normalised(squashed(plain(file))))
    keys, first = gallery.refused()
    assert keys == {"exif": "ignore"}
    assert "with exif: ignore the median cosine is 1.000 and all 48 agree: set old_encoder.exif to ignore" in first
    gallery.follow(keys)


def test_a_share_of_turned_pictures_is_found_though_the_median_agrees(gallery: Gallery) -> None:
    gallery.write(turned(gallery, 3), lambda file: normalised(squashed(plain(file))))
    keys, first = gallery.refused()
    assert keys == {"exif": "ignore"}
    assert "16 of 48 sampled vectors were not made by this encoder as it is declared" in first
    gallery.follow(keys)


def test_turned_pictures_and_another_filter_are_found_together(gallery: Gallery) -> None:
    files = turned(gallery, 3)
    gallery.write(files, lambda file: normalised(squashed(plain(file), Image.Resampling.NEAREST)))
    keys, _ = gallery.refused()
    assert keys == {"exif": "ignore", "interpolation": "nearest"}
    gallery.follow(keys)


def test_cut_outs_whose_transparency_was_dropped(gallery: Gallery) -> None:
    gallery.fill(
        [picture(number, "RGBA") for number in range(ITEMS)], ".png", lambda file: normalised(squashed(plain(file)))
    )
    keys, _ = gallery.refused()
    assert keys == {"alpha": "drop"}
    gallery.follow(keys)


def test_cut_outs_on_black(gallery: Gallery) -> None:
    def on_black(file: Path) -> Any:
        image = Image.open(file)
        flat = Image.new("RGB", image.size, "black")
        flat.paste(image, mask=image.getchannel("A"))
        return normalised(squashed(flat))

    gallery.fill([picture(number, "RGBA") for number in range(ITEMS)], ".png", on_black)
    keys, _ = gallery.refused()
    assert keys == {"alpha": "black"}
    gallery.follow(keys)


def test_a_palette_with_a_transparent_colour(gallery: Gallery) -> None:
    images = [picture(number).quantize(16) for number in range(ITEMS)]
    for image in images:
        image.info["transparency"] = image.getpixel((0, 0))
    gallery.fill(images, ".png", lambda file: normalised(squashed(plain(file))))
    keys, _ = gallery.refused()
    assert keys == {"alpha": "drop"}
    gallery.follow(keys)


def test_16_bit_greys_that_pillow_cut_off(gallery: Gallery) -> None:
    images = [
        Image.fromarray(np.asarray(picture(number).convert("L")).astype(np.uint16) * (2 + number % 3))
        for number in range(ITEMS)
    ]
    gallery.fill(images, ".png", lambda file: normalised(squashed(plain(file))))
    keys, _ = gallery.refused()
    assert keys == {"convert": "pil"}
    gallery.follow(keys)


# -- what no key explains ---------------------------------------------------------------------------------------------


def test_images_that_were_replaced_are_a_risk_and_no_refusal(gallery: Gallery) -> None:
    files = [gallery.save(image, f"{number}.png") for number, image in enumerate(pictures())]
    gallery.write(files, lambda file: normalised(squashed(plain(file))))
    for number in range(12):
        gallery.save(picture(1000 + number), f"{number}.png")
    code, found, err = gallery.plan()
    assert code == 0, err
    (risk,) = [risk for risk in found["risks"] if "old encoder" in risk]
    assert risk.startswith("12 of 48 sampled items hold a vector that the old encoder does not give for their image")
    assert "no other declaration of the encoder explains it" in risk


def test_a_gallery_that_was_filled_in_two_ways_is_said_to_be(gallery: Gallery) -> None:
    from torchvision.transforms import v2

    crop = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE)])

    def load(file: Path) -> Any:
        image = plain(file)
        return normalised(squashed(image) if int(file.stem) % 3 else crop(image))

    gallery.fill(pictures(), ".png", load)
    code, found, err = gallery.plan()
    assert code == 0, err
    (risk,) = [risk for risk in found["risks"] if "old encoder" in risk]
    assert risk.startswith("16 of 48 sampled items hold a vector")
    assert "16 of the 16 of them that were tried agree with resize: crop: the gallery was filled in two ways" in risk


def test_a_loader_that_no_key_describes_is_not_explained_away(gallery: Gallery) -> None:
    gallery.fill(pictures(), ".png", lambda file: normalised(ImageOps.flip(squashed(plain(file)))))
    keys, first = gallery.refused()
    assert keys == {}
    assert "the weights or the images are other ones, or the loader does what no key says" in first
    assert "give it as old_encoder.transform" in first
    (gallery.world.folder / "own_loader.py").write_text(
        "from PIL import Image, ImageOps\n"
        "from torchvision.transforms import v2\n"
        "import torch\n\n"
        "def transform():\n"
        "    return v2.Compose([\n"
        f"        lambda image: ImageOps.flip(image.resize(({SIZE}, {SIZE}), Image.Resampling.BILINEAR)),\n"
        f"        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize({list(MEAN)}, {list(STD)})])\n"
    )
    own = {"module": "every_pixel_model:every_pixel", "dim": DIM, "transform": "own_loader:transform"}
    gallery.world.configure(old_encoder=own)
    gallery.follow({})


def test_a_transform_leaves_what_comes_before_it_to_the_keys(gallery: Gallery) -> None:
    (gallery.world.folder / "turning.py").write_text(
        "from torchvision.transforms import v2\n"
        "import torch\n\n"
        "def transform():\n"
        f"    return v2.Compose([v2.Resize(({SIZE}, {SIZE})), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])\n"
    )
    own = {"module": "every_pixel_model:every_pixel", "dim": DIM, "transform": "turning:transform"}
    gallery.world.configure(old_encoder=own)
    gallery.write(
        turned(gallery, 1),
        lambda file: normalised(squashed(ImageOps.exif_transpose(plain(file))), (0.0,) * 3, (1.0,) * 3),
    )
    keys, _ = gallery.refused()
    assert keys == {"exif": "apply"}
    gallery.follow(keys)


def test_a_manifest_that_records_another_declaration_is_named(gallery: Gallery) -> None:
    """The weights of an encoder that migrator trained have a file beside them that pins its preprocessing."""
    from migrator.trainer.encoders.loading import load_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing
    from tests.world import encoder_config

    world = gallery.world
    world.configure(old_encoder=encoder_config("old.safetensors"))
    spec = EncoderSpec("test_resnet", DIM, Preprocessing(image_size=SIZE), weights=world.folder / "old.safetensors")
    model = load_encoder(spec).model
    gallery.fill(pictures(), ".png", lambda file: normalised(squashed(plain(file)), (0.0,) * 3, (1.0,) * 3), model)
    keys, first = gallery.refused()
    assert first.endswith("and move old.json away, which records the other declaration")
    (world.folder / "old.json").rename(world.folder / "old.json.away")
    gallery.follow(keys)


# -- another part of the weights --------------------------------------------------------------------------------------


def test_pooled_features_are_found_where_the_classifier_is_as_wide(gallery: Gallery) -> None:
    import torch

    from migrator.trainer.torchvision_cpu import import_timm

    timm = import_timm()
    width = timm.create_model("test_resnet", num_classes=0).num_features
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=width).eval()
    torch.save(model.state_dict(), gallery.world.folder / "whole.pth")
    gallery.world.configure(
        old_encoder={"arch": "test_resnet", "weights": "whole.pth", "dim": width, "image_size": SIZE},
        rollout__strategy="shadow",
    )

    def pooled(tensors: Any) -> Any:
        return model.forward_head(model.forward_features(tensors), pre_logits=True)

    gallery.fill(pictures(), ".png", lambda file: normalised(squashed(plain(file))), model=pooled)
    keys, _ = gallery.refused()
    assert keys == {"head": "none"}
    gallery.follow(keys)


def test_the_other_weights_of_a_checkpoint_are_found(gallery: Gallery) -> None:
    import torch

    from migrator.trainer.torchvision_cpu import import_timm

    def network(seed: int) -> Any:
        torch.manual_seed(seed)
        return import_timm().create_model("test_resnet", num_classes=DIM).eval()

    averaged = network(5)
    both = {"epoch": 3, "state_dict": network(4).state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save(both, gallery.world.folder / "checkpoint.pth.tar")
    gallery.world.configure(
        old_encoder={
            "arch": "test_resnet", "weights": "checkpoint.pth.tar", "checkpoint_key": "state_dict", "dim": DIM,
            "image_size": SIZE,
        }
    )  # fmt: skip
    gallery.fill(pictures(), ".png", lambda file: normalised(squashed(plain(file))), averaged)
    keys, _ = gallery.refused()
    assert keys == {"checkpoint_key": "state_dict_ema"}
    gallery.follow(keys)
