"""docs/how-to/match-the-gallery.md: the keys that it gives for a loader make that loader's pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from migrator.config import OldEncoder
from migrator.embedding.agreement import MODELS, PIXELS
from migrator.trainer.encoders.timm_models import timm_preprocessing
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from tests.unit.test_docs import section, table

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "match-the-gallery.md").read_text()
SIZE = 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A photograph that lies on its side, a cut-out, and a wide picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (9, 13, 4), np.uint8)
    photograph = Image.fromarray(coarse[..., :3]).resize((640, 480), Image.Resampling.BICUBIC)
    cut_out = Image.fromarray(coarse).resize((500, 700), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(folder / "photograph.jpg", exif=exif, quality=95)
    cut_out.save(folder / "cut_out.png")
    photograph.resize((900, 300)).save(folder / "wide.png")
    return sorted(folder.iterdir())


def keys_of(row: str) -> dict[str, Any]:
    """The keys in the second cell of the row that begins so, as they stand in migrations.yaml."""
    (found,) = [cells[1] for cells in table(section(PAGE, "What your loader does")) if cells[0].startswith(row)]
    if "CLIP's `mean`" in found:
        found += "".join(f" `{line.strip()}`" for line in re.findall(r"^  (?:mean|std): .*$", PAGE, re.MULTILINE))
    pairs = [text for text in re.findall(r"`([^`]+)`", found) if ": " in text]
    return {key: value for text in pairs for key, value in yaml.safe_load(text).items()}


def plain(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def torchvision_transform(*steps: Any, mean: Any = MEAN, std: Any = STD) -> Any:
    from migrator.trainer.torchvision_cpu import import_timm

    import_timm()
    import torch
    from torchvision.transforms import v2

    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def by_timm(file: Path) -> Any:
    from migrator.trainer.torchvision_cpu import import_timm

    timm = import_timm()
    config = timm.data.resolve_data_config(timm.models.get_pretrained_cfg("resnet50").to_dict())
    return timm.data.create_transform(**config)(plain(file))


def by_torchvision(file: Path) -> Any:
    from torchvision.transforms import v2

    return torchvision_transform(v2.Resize(256), v2.CenterCrop(SIZE))(plain(file))


def squashed(file: Path) -> Any:
    from torchvision.transforms import v2

    return torchvision_transform(v2.Resize((SIZE, SIZE)))(plain(file))


def by_decode_image(file: Path) -> Any:
    from torchvision.transforms import v2

    # Where torchvision was built with its decoders: decode_image(str(file))[:3], the same bytes.
    tensor = v2.functional.pil_to_tensor(Image.open(file))[:3]
    return torchvision_transform(v2.Resize((SIZE, SIZE), antialias=False))(tensor)


def by_clip(file: Path) -> Any:
    from torchvision.transforms import v2

    steps = (v2.Resize(SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torchvision_transform(*steps, mean=mean, std=std)(plain(file))


def by_opencv(file: Path) -> Any:
    import cv2

    pixels = cv2.imread(str(file))
    assert pixels is not None
    return cv2.resize(pixels, (SIZE, SIZE)).transpose(2, 0, 1) / 255


def turned(file: Path) -> Any:
    from torchvision.transforms import v2

    return torchvision_transform(v2.Resize((SIZE, SIZE)))(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))


def letterboxed(file: Path) -> Any:
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    return torchvision_transform()(ImageOps.pad(upright, (SIZE, SIZE), Image.Resampling.BILINEAR))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "timm": by_timm,
    "torchvision:": by_torchvision,
    "the same with `Resize((224": squashed,
    "`torchvision.io": by_decode_image,
    "CLIP and open_clip": by_clip,
    "`cv2.imread": by_opencv,
    "`ImageOps.exif_transpose": turned,
    "`ImageOps.pad": letterboxed,
}


@pytest.mark.parametrize("row", LOADERS)
def test_the_keys_make_the_pixels_of_the_loader(row: str, files: list[Path]) -> None:
    keys = keys_of(row)
    assert keys
    if keys.pop("preprocessing", None) == "timm":
        preprocessing = timm_preprocessing("resnet50", **keys)
    else:
        preprocessing = Preprocessing(image_size=SIZE, **keys)
    if row == "`ImageOps.pad":  # on black, and with nothing beneath transparency
        preprocessing = Preprocessing(image_size=SIZE, resize="letterbox", convert="pil")
    source = ImageSource(str(files[0].parent))
    mean, std = (np.reshape(numbers, (3, 1, 1)) for numbers in (preprocessing.mean, preprocessing.std))
    for file in files:
        made = (preprocessing.prepare(source.load(file.name)) / 255 - mean) / std
        expected = np.asarray(LOADERS[row](file))
        assert made.shape == expected.shape
        cosine = np.vdot(made, expected) / np.linalg.norm(made) / np.linalg.norm(expected)
        assert cosine > 0.9995, (file.name, cosine)


def test_every_key_that_is_tried_is_one_and_is_listed() -> None:
    listed = {name for cells in table(section(PAGE, "Read the refusal")) for name in re.findall(r"`(\w+)`", cells[0])}
    tried = {key for keys in (*PIXELS, *MODELS) for key in keys} | {"checkpoint_key"}
    assert tried <= OldEncoder.model_fields.keys()
    assert tried == listed


def test_what_the_page_sets_can_be_set() -> None:
    for text in re.findall(r"^ *```yaml\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL):
        document = yaml.safe_load(text)
        OldEncoder.model_validate(document["old_encoder"], context={"folder": Path()})
