"""A factory that brings its own transform: what torchvision makes of a picture, and what is no transform."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from migrator.trainer.data.cache import ImageCache
from migrator.trainer.data.items import Excluded
from migrator.trainer.data.shards import pixel_key
from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import EncoderMismatch, EncoderProblem, ImageProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.images.transforms import learn_transform

HEIGHT, WIDTH, DIM = 12, 20, 5
LOADER = f"""
import numpy as np
import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

made = []

def first():
    return transforms.Compose([
        transforms.Resize(({HEIGHT}, {WIDTH})), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)
    ])

def second():  # a torch.nn.Module itself
    return v2.Compose([v2.ToImage(), v2.Resize(({HEIGHT}, {WIDTH})), v2.ToDtype(torch.float32, scale=True)])

def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * {HEIGHT} * {WIDTH}, {DIM}))

def pair():
    made.append("pair")
    return model(), first()

def triple():
    return model(), first(), first()

def turned_round():
    return first(), "model"

def number():
    return 3

class Odd:
    def __init__(self, change):
        self.change, self.first = change, first()
    def __call__(self, image):
        return self.change(self.first(image), image)

def chance(): return Odd(lambda tensor, image: tensor + torch.randn(()))
def grows(): return Odd(lambda tensor, image: tensor if image.width == 192 else tensor[:, :-1])
def array(): return Odd(lambda tensor, image: tensor.numpy())
def batch(): return Odd(lambda tensor, image: tensor[None])
def grey(): return Odd(lambda tensor, image: tensor[:1])
def integers(): return Odd(lambda tensor, image: (tensor * 255).to(torch.uint8))
def nan(): return Odd(lambda tensor, image: tensor / 0 * 0)
def fails(): return Odd(lambda tensor, image: 1 / 0)
def leaves(): return Odd(lambda tensor, image: exit("no"))
def none(): return Odd(lambda tensor, image: None)
def huge(): return Odd(lambda tensor, image: torch.zeros(3, 1, 5000))
def empty(): return Odd(lambda tensor, image: tensor[:, :0])

def picky():
    "Breaks on some pictures, by their shape."
    def change(tensor, image):
        if image.width == 7:
            raise ValueError("seven\\nlines")
        odd = {{8: tensor[:, 1:], 9: tensor / 0, 10: None, 11: tensor.double(), 13: tensor.int()}}
        return odd.get(image.width, tensor)
    return Odd(change)

def keeps_alpha():
    def change(image):
        below = np.full((*image.size[::-1], 3), 64.0)
        if image.mode == "RGBA":
            pixels = np.asarray(image, float)
            below = below + (pixels[..., :3] - below) * pixels[..., 3:] / 255
        return torch.from_numpy(below[:4, :4]).permute(2, 0, 1) / 255
    return change

def destroys():
    def change(image):
        image.paste((0, 0, 0), (0, 0, *image.size))
        return torch.zeros(3, 4, 4)
    return change
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_loader.py").write_text(LOADER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_loader", raising=False)
    return tmp_path


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def spec(folder: Path, arch: str = "module:own_loader:pair", **changes: Any) -> EncoderSpec:
    name = changes.pop("transform", "module:own_loader:pair")
    return EncoderSpec(arch, DIM, learn_transform(name, folder), folder=folder, **changes)


@pytest.mark.parametrize("name", ["own_loader:first", "own_loader:second", "own_loader:pair", "module:own_loader:pair"])
def test_the_input_is_what_the_transform_gives(folder: Path, name: str) -> None:
    preprocessing = learn_transform(name, folder)
    assert preprocessing.size == (HEIGHT, WIDTH)
    import own_loader  # type: ignore[import-not-found]

    transform = own_loader.second() if name.endswith("second") else own_loader.first()
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L", "RGBA", "LA"):
        file = io.BytesIO()
        picture(mode=mode).save(file, "PNG", exif=exif.tobytes())
        (folder / "x").write_bytes(file.getvalue())
        found = preprocessing.prepare(ImageSource(str(folder)).load("x"))
        assert found.dtype == np.float32
        assert np.array_equal(found, transform(Image.open(file).convert("RGB")).numpy()), mode


def test_a_transform_may_convert_the_picture_itself(folder: Path) -> None:
    preprocessing = learn_transform("own_loader:keeps_alpha", folder, convert="none")
    pixels = picture(mode="RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", pixels.size, (64, 64, 64)), pixels).convert("RGB")
    apart = preprocessing.prepare(pixels) * 255 - np.asarray(expected, float)[:4, :4].transpose(2, 0, 1)
    assert np.abs(apart).max() <= 1


def test_declared_conversions_come_before_the_transform(folder: Path) -> None:
    image = picture(mode="RGBA")
    black = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    preprocessing = learn_transform("own_loader:first", folder, alpha="black")
    apart = preprocessing.prepare(image) - learn_transform("own_loader:first", folder).prepare(black)
    assert np.abs(apart).max() < 0.05
    assert learn_transform("own_loader:first", folder, exif="apply").exif == "apply"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chance", "gives two tensors for one picture"),
        ("grows", r"gives \(3, 12, 20\) for one picture and \(3, 11, 20\) for another"),
        ("array", "gives a ndarray, not a float tensor"),
        ("batch", r"gives a tensor \(1, 3, 12, 20\)"),
        ("grey", r"gives a tensor \(1, 12, 20\)"),
        ("integers", "gives a tensor of torch.uint8"),
        ("nan", "not finite"),
        ("fails", "fails: ZeroDivisionError"),
        ("leaves", "fails: SystemExit: no"),
        ("none", "gives a NoneType"),
        ("huge", r"gives a tensor \(3, 1, 5000\)"),
        ("empty", r"gives a tensor \(3, 0, 20\)"),
        ("number", "returns a int: it must return a callable"),
        ("turned_round", "returns a tuple: it must return a callable"),
        ("triple", "returns a tuple: it must return a callable"),
        ("nowhere", "is not in .*own_loader.py: name a function"),
    ],
)
def test_what_is_no_transform_is_refused_at_once(folder: Path, name: str, said: str) -> None:
    with pytest.raises(EncoderProblem, match=said) as caught:
        learn_transform(f"own_loader:{name}", folder)
    assert "\n" not in str(caught.value)


def test_a_module_that_brings_no_transform_is_told_what_is_missing(folder: Path) -> None:
    with pytest.raises(EncoderProblem, match="returns a Sequential without a transform: give image_size"):
        learn_transform("module:own_loader:model", folder)


def test_a_size_that_the_transform_does_not_make_is_refused(folder: Path) -> None:
    assert learn_transform("own_loader:first", folder, image_size=(HEIGHT, WIDTH)).size == (HEIGHT, WIDTH)
    with pytest.raises(EncoderProblem, match="gives 12 x 20 pixels, but image_size says 12: remove image_size"):
        learn_transform("own_loader:first", folder, image_size=12)


@pytest.mark.parametrize(
    "fields",
    [{"resize": "crop"}, {"mean": (0.5,) * 3}, {"std": (1, 1, 1.5)}, {"antialias": False}, {"channels": "bgr"}],
)
def test_what_the_transform_does_cannot_be_declared_beside_it(folder: Path, fields: dict[str, Any]) -> None:
    preprocessing = learn_transform("own_loader:first", folder)
    with pytest.raises(EncoderProblem, match=f"{next(iter(fields))} is a matter of the transform"):
        replace(preprocessing, **fields)
    assert replace(preprocessing, exif="apply").transform == "own_loader:first"


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (7, "fails: ValueError: seven lines"),
        (8, r"not \(3, 12, 20\)"),
        (9, "not finite"),
        (10, "NoneType"),
        (13, "int32"),
    ],
)
def test_a_picture_that_it_fails_on_is_a_problem_of_its_own(folder: Path, width: int, said: str) -> None:
    preprocessing = learn_transform("own_loader:picky", folder)
    file = folder / "odd.png"
    picture(width).save(file)
    with pytest.raises(ImageProblem, match=rf"image 'odd.png' .*transform 'own_loader:picky' .*{said}") as caught:
        preprocessing.prepare(ImageSource(str(folder)).load("odd.png"))
    assert "\n" not in str(caught.value)
    assert preprocessing.prepare(picture(11)).dtype == np.float32


def test_a_transform_that_changes_its_picture_changes_nobody_elses(folder: Path) -> None:
    image = picture()
    before = image.tobytes()
    learn_transform("own_loader:destroys", folder).prepare(image)
    assert image.tobytes() == before


def test_a_pair_gives_module_and_transform_and_is_called_once_for_both(folder: Path) -> None:
    encoder = load_encoder(spec(folder))
    import own_loader

    assert own_loader.made == ["pair"]
    assert encoder.manifest.preprocessing.transform == "module:own_loader:pair"
    images = [picture(), picture(33)]
    with ThreadPoolExecutor(4) as pool:
        batch = np.stack(list(pool.map(encoder.prepare, images)))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(
            own_loader.model()(torch.stack([own_loader.first()(image) for image in images]))
        )
    assert np.abs(encoder.encode(batch) - expected.numpy()).max() < 1e-6
    assert own_loader.made == ["pair"]
    assert load_encoder(spec(folder)).id == encoder.id
    assert own_loader.made == ["pair", "pair"], "a new module for each encoder"


def test_a_pair_whose_transform_is_not_used_is_refused(folder: Path) -> None:
    declared = EncoderSpec("module:own_loader:pair", DIM, Preprocessing((HEIGHT, WIDTH)), folder=folder)
    with pytest.raises(EncoderProblem, match=r"returns a module and a transform, .* remove image_size"):
        load_encoder(declared)


def test_an_encoder_with_a_transform_comes_back_in_a_fresh_process(folder: Path) -> None:
    import subprocess

    declared = spec(folder, arch="module:own_loader:model", transform="own_loader:first")
    saved = save_encoder(build_model(declared), declared, folder / "e.safetensors")
    assert saved.preprocessing.transform == "own_loader:first"
    code = (
        "import sys; from pathlib import Path\n"
        "from migrator.trainer.encoders.loading import load_encoder\n"
        "from migrator.trainer.encoders.spec import EncoderSpec\n"
        "from migrator.trainer.images.preprocessing import Preprocessing\n"
        f"p = Preprocessing({(HEIGHT, WIDTH)}, transform='own_loader:first', exif='ignore', convert='pil')\n"
        f"f = Path(sys.argv[1]); s = EncoderSpec('module:own_loader:model', {DIM}, p, f / 'e.safetensors', folder=f)\n"
        "print(load_encoder(s).id)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == saved.id


def test_a_changed_transform_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = spec(folder, arch="module:own_loader:model", transform="own_loader:first")
    save_encoder(build_model(declared), declared, folder / "e.safetensors")
    key = pixel_key(declared.preprocessing)
    (folder / "own_loader.py").write_text(LOADER.replace("(0.5,) * 3", "(0.3, 0.5, 0.7)"))
    monkeypatch.delitem(sys.modules, "own_loader")
    sys.path_importer_cache.clear()
    again = spec(folder, arch="module:own_loader:model", transform="own_loader:first")
    assert again.preprocessing == declared.preprocessing
    with pytest.raises(EncoderMismatch, match="output for the fingerprint image is not"):
        load_encoder(replace(again, weights=folder / "e.safetensors"))
    assert pixel_key(again.preprocessing) != key, "prepared images of the other one are not used"


def test_prepared_images_keep_what_the_transform_gave(folder: Path) -> None:
    preprocessing = learn_transform("own_loader:picky", folder)
    names = [f"{width}.png" for width in (7, 8, 20, 21, 22)]
    for name in names:
        picture(int(name[:-4])).save(folder / name)
    source = ImageSource(str(folder))
    with ImageCache(folder / "cache", [preprocessing, Preprocessing((8, 6))], limit=2**24) as cache:
        (results,) = cache.add(names, source, workers=2)
        assert [isinstance(result, Excluded) for result in results] == [True, True, False, False, False]
        digests = [result for result in results if isinstance(result, bytes)]
        floats = cache.open(preprocessing, digests).take(np.arange(3))
        pixels = cache.open(Preprocessing((8, 6)), digests).take(np.arange(3))
    assert (floats.dtype, pixels.dtype) == (np.dtype(np.float32), np.dtype(np.uint8))
    assert np.array_equal(floats, np.stack([preprocessing.prepare(source.load(name)) for name in names[2:]]))
    assert np.array_equal(pixels, np.stack([Preprocessing((8, 6)).prepare(source.load(name)) for name in names[2:]]))
