"""The application's side: its encoder, the vectors of the command line, exports, and the documented search service."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import cv2
import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from migrator import ServedEncoder, load_encoder
from migrator.cli import run
from migrator.errors import MigratorError, PreconditionFailed
from migrator.project import Project
from migrator.trainer.errors import EncoderMismatch, ImageProblem
from tests.integration.test_walk import to_stage
from tests.unit.test_docs import code_blocks, section
from tests.world import NAME, SIZE, World, embed_images

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "search-service.md"
Migrator = Callable[..., int]
NAMES = [f"{number:05d}.png" for number in range(6)]


@pytest.fixture
def served(world: World) -> ServedEncoder:
    return load_encoder(world.config, NAME)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum(axis=1).min())


# -- load_encoder -------------------------------------------------------------------------------------------------


def test_what_a_backfill_has_written_is_what_the_application_gets(world: World, migrator: Migrator) -> None:
    to_stage(migrator, "cutover")
    stored = faiss.read_index(str(world.gallery / "index.faiss")).reconstruct_n(0, len(NAMES))
    encoder = load_encoder(world.config, NAME, which="new")
    found = encoder.encode([world.images / name for name in NAMES])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, stored, atol=1e-6)
    with Project.open(world.config) as project:
        old, new = project.encoder_ids()
    assert encoder.id == load_encoder(world.config, which=new).id == new
    assert load_encoder(world.config, which="old").id == load_encoder(world.config, which=old).id == old
    with pytest.raises(PreconditionFailed, match=rf"no encoder enc-0: it has {old} \(old\), {new} \(new\)"):
        load_encoder(world.config, which="enc-0")
    torch.manual_seed(99)
    (world.folder / "new.safetensors").write_bytes((world.folder / "old.safetensors").read_bytes())
    with pytest.raises(EncoderMismatch):
        load_encoder(world.config)


def test_before_a_plan_the_declared_encoders_are_given(world: World) -> None:
    assert load_encoder(world.config).id == load_encoder(str(world.config), NAME, which="new").id
    with pytest.raises(PreconditionFailed, match="none in the ledger yet"):
        load_encoder(world.config, which="enc-0")
    with pytest.raises(MigratorError):
        load_encoder(world.config, "another")
    world.configure(old_encoder="stored")
    with pytest.raises(PreconditionFailed, match="there is no model"):
        load_encoder(world.config, which="old")


def turned(path: Path) -> Path:
    """A photo as a camera held upright writes it."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


def transparent(path: Path) -> Path:
    pixels = np.random.default_rng(2).integers(0, 256, (30, 30, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(path)
    return path


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_files_bytes_and_pictures_are_prepared_to_the_bit_as_in_the_backfill(
    world: World, served: ServedEncoder, tmp_path: Path
) -> None:
    files = [world.images / NAMES[0], turned(tmp_path / "turned.jpg"), transparent(tmp_path / "transparent.png")]
    Image.open(files[0]).convert("P").save(tmp_path / "palette.png")
    Image.open(files[0]).convert("I;16").save(tmp_path / "grey.png")
    for file in [*files, tmp_path / "palette.png", tmp_path / "grey.png"]:
        from migrator.trainer.images.source import ImageSource

        backfill = served._encoder.prepare(ImageSource(str(file.parent)).load(file.name))
        for given in (file, str(file), file.read_bytes(), memoryview(file.read_bytes()), Image.open(file)):
            assert (served.prepare(given) == backfill).all(), (file, type(given))
        same = [served.encode(given) for given in (file, file.read_bytes(), Image.open(file))]
        assert all((vector == same[0]).all() for vector in same)
        np.testing.assert_allclose(np.linalg.norm(same[0], axis=1), 1, atol=1e-6)


def test_arrays_are_rgb_as_it_is_to_be_seen(world: World, served: ServedEncoder) -> None:
    files = [world.images / name for name in NAMES]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    expected = served.encode(files)
    for given in (pixels, list(pixels), pixels / 255, (pixels / 255).astype(np.float32), iter(files)):
        assert (served(given) == expected).all()
    assert (served.encode(pixels[0]) == served.encode([pixels[0]])).all()
    assert served.encode([]).shape == (0, served.dim)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("nowhere.jpg", "image 1: image 'nowhere.jpg' is not there"),
        (b"no image", "image 1: image 'of bytes' cannot be decoded"),
        (np.zeros((4, 4), np.uint8), r"image 1: an array of shape \(4, 4\) is no image"),
        (np.zeros((4, 4, 4), np.uint8), r"image 1: an array of shape \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.int64), "image 1: an array of int64 is no image"),
        (np.full((4, 4, 3), 200.0), "runs from 200 to 200, not from 0 to 1: divide it by 255"),
        (np.full((4, 4, 3), np.nan), "runs from nan to nan"),
        (7, "a int is no image"),
    ],
)
def test_what_is_no_image_is_named_by_its_place(world: World, served: ServedEncoder, image: Any, said: str) -> None:
    with pytest.raises(ImageProblem, match=said) as caught:
        served.encode([world.images / NAMES[0], image])
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_an_application_that_loads_an_image_in_another_way_gets_other_vectors(
    world: World, served: ServedEncoder, tmp_path: Path
) -> None:
    """What docs/how-to/search-service.md warns of, and that the ways out help."""
    photo, sticker = turned(tmp_path / "turned.jpg"), transparent(tmp_path / "transparent.png")
    small = Image.open(world.images / NAMES[0])
    small.thumbnail((12, 12))
    bgr = cv2.imread(str(world.images / NAMES[0]))
    assert bgr is not None
    other_ways: dict[str, tuple[Any, Path]] = {
        "BGR": (bgr, world.images / NAMES[0]),
        "not turned": (np.asarray(Image.open(photo)), photo),
        "colours below transparency": (Image.open(sticker).convert("RGB"), sticker),
        "a thumbnail": (small, world.images / NAMES[0]),
    }
    for way, (loaded, file) in other_ways.items():
        assert cosine(served.encode(loaded), served.encode(file)) < 0.9999, way
    assert (served.encode(bgr[:, :, ::-1]) == served.encode(world.images / NAMES[0])).all()


def test_import_migrator_loads_nothing_heavy() -> None:
    code = (
        "import sys, migrator; print(sorted({'torch', 'numpy', 'sqlalchemy', 'PIL', 'yaml'} & set(sys.modules)),"
        "'load_encoder' in dir(migrator), hasattr(migrator, 'nonsense'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True False\n"


# -- migrator embed -----------------------------------------------------------------------------------------------


def test_embed_writes_what_the_encoder_makes(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = embed_images(world, "new", sorted(path.name for path in world.images.iterdir()))
    npy, parquet = world.folder / "all.npy", world.folder / "all.parquet"
    assert migrator("embed", str(world.images), "--output", str(npy)) == 0
    np.testing.assert_allclose(np.load(npy), expected, atol=1e-6)
    paths = npy.with_suffix(".txt").read_text().splitlines()
    assert paths == sorted(str(path) for path in world.images.iterdir())
    assert migrator("embed", str(world.images), "--output", str(parquet), "--encoder", "old") == 0
    table = pq.read_table(parquet)
    assert table["path"].to_pylist() == paths
    np.testing.assert_allclose(
        table["vector"].to_pylist(), embed_images(world, "old", [Path(path).name for path in paths]), atol=1e-6
    )
    old = load_encoder(world.config, which="old")
    assert table.schema.metadata[b"encoder"] == old.id.encode()
    capsys.readouterr()
    assert migrator("embed", *[str(world.images / name) for name in NAMES]) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["path"] for line in lines] == [str(world.images / name) for name in NAMES]
    np.testing.assert_allclose([line["vector"] for line in lines], expected[: len(NAMES)], atol=1e-6)
    assert "6 of 6 images embedded by" in printed.err


def test_embed_names_what_it_cannot_read_and_goes_on(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = world.images / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n cut")
    output = world.folder / "some.npy"
    listed = [str(world.images / NAMES[0]), str(broken), "nowhere.png", "", str(world.images / NAMES[1])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(listed) + "\n"))
    assert migrator("embed", "--output", str(output)) == 3
    said = capsys.readouterr().err
    assert f"embed: image '{broken}' cannot be decoded" in said
    assert "embed: image 'nowhere.png' is not there" in said
    assert "2 of 4 images embedded" in said
    assert output.with_suffix(".txt").read_text().splitlines() == [listed[0], listed[-1]]
    np.testing.assert_allclose(np.load(output), embed_images(world, "new", NAMES[:2]), atol=1e-6)
    for name in ("none.npy", "none.parquet"):
        assert migrator("embed", str(broken), "--output", str(world.folder / name)) == 3
    assert list(world.folder.glob("none*")) == []


def test_embed_ends_quietly_when_its_reader_has_enough(world: World) -> None:
    call = [sys.executable, "-m", "migrator", "embed", "images", "--config", str(world.config)]
    with subprocess.Popen(call, cwd=world.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["images", "--output", "x.csv"], "--output x.csv must end with .npy or .parquet"),
        (["images", "--output", "nowhere/x.npy"], "there is no folder 'nowhere'"),
        (["empty"], "folder 'empty' holds no images"),
        ([], "no images are given"),
    ],
)
def test_embed_refuses_in_one_line_before_it_loads_anything(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    Path("empty").mkdir()
    Path("new.safetensors").unlink()
    assert run(["embed", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# -- migrator export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pt2", "onnx", "safetensors"])
def test_an_export_gives_the_same_vectors_under_its_own_declaration(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """For any number of images, by migrator's own reading of it, and by the runtime alone."""
    if form == "onnx":
        pytest.importorskip("onnxscript")
    changes = {"resize": "crop", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "antialias": False}
    for key, value in changes.items():
        world.configure(**{f"new_encoder__{key}": value})
    for manifest in world.folder.glob("*.json"):
        manifest.unlink()
    output = world.folder / f"out.{form}"
    assert migrator("export", "--format", form, "--output", str(output), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cosine"] > 0.99999
    assert document["difference"] < 1e-5
    own = load_encoder(world.config, which="new")
    pictures = [world.images / name for name in NAMES]
    expected = own.encode(pictures)
    whole = yaml.safe_load(world.config.read_text())
    whole["migrations"][NAME]["new_encoder"] = document["declaration"]
    whole["ledger"] = "sqlite:///other.db"
    (world.folder / "exported.yaml").write_text(yaml.safe_dump(whole))
    again = load_encoder(world.folder / "exported.yaml", which="new")
    assert again.id == document["exported"]
    assert (again.id == own.id) is (form == "safetensors")
    assert again.preprocessing == own.preprocessing
    np.testing.assert_allclose(again.encode(pictures), expected, atol=1e-5)
    if form == "safetensors":
        return
    inputs = np.stack([own.prepare(picture) for picture in pictures]).astype(np.float32) / 255
    mean, std = (np.array(changes[key], np.float32)[:, None, None] for key in ("mean", "std"))
    for n in (1, 5):
        given = ((inputs[:n] - mean) / std).astype(np.float32)
        if form == "pt2":
            found = torch.export.load(output).module()(torch.from_numpy(given)).numpy()
        else:
            import onnxruntime

            found = onnxruntime.InferenceSession(output).run(None, {"images": given})[0]
        np.testing.assert_allclose(found, expected[:n], atol=1e-5)


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.folder / "odd.py").write_text(
        "import torch\n"
        "class Branches(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, 24)\n"
        "    def forward(self, images):\n"
        "        means = images.mean((2, 3))\n"
        "        return self.layer(means) if means.sum().item() > 0 else self.layer(means) + 1\n"
        "def branches():\n"
        "    torch.manual_seed(0)\n"
        "    return Branches()\n"
    )

    def refused(code: int, *words: str) -> str:
        before = sorted(world.folder.iterdir())
        capsys.readouterr()
        assert migrator("export", *words) == code
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert sorted(world.folder.iterdir()) == before
        return printed.err

    out = str(world.folder / "out.pt2")
    assert migrator("export", "--format", "pt2", "--output", out) == 0
    assert "is there already" in refused(2, "--format", "pt2", "--output", out)
    assert "is there already" in refused(
        2, "--format", "safetensors", "--output", str(world.folder / "out.safetensors")
    )
    assert "does not end in .onnx" in refused(2, "--format", "onnx", "--output", str(world.folder / "other.pt2"))
    assert "there is no folder" in refused(2, "--format", "pt2", "--output", str(world.folder / "no" / "x.pt2"))
    monkeypatch.setattr("migrator.trainer.encoders.export.MAX_ONNX_BYTES", 1000)
    if importlib.util.find_spec("onnxscript"):
        assert "use pt2" in refused(2, "--format", "onnx", "--output", str(world.folder / "big.onnx"))
    world.configure(new_encoder={"weights": "out.pt2", "dim": 24, "image_size": SIZE})
    for form in ("pt2", "onnx", "safetensors"):
        said = refused(2, "--format", form, "--output", str(world.folder / f"again.{form}"))
        assert "is the exported program" in said
        assert "copy that file" in said
    world.configure(new_encoder={"module": "odd:branches", "dim": 24, "image_size": SIZE})
    said = refused(2, "--format", "pt2", "--output", str(world.folder / "odd.pt2"))
    assert "factory 'odd:branches' cannot be exported as pt2 for any number of pictures" in said
    monkeypatch.setattr("migrator.trainer.encoders.export.MAX_DIFFERENCE", -1.0)
    world.configure(new_encoder={"arch": "test_resnet", "weights": "new.safetensors", "dim": 24, "image_size": SIZE})
    said = refused(3, "--format", "safetensors", "--output", str(world.folder / "worse.safetensors"))
    assert "the export gives other vectors" in said


# -- the documented search service --------------------------------------------------------------------------------


@contextmanager
def service(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes, str], Any]]:
    """The code of the documentation as it stands, but for the migration's name, on a free port."""
    monkeypatch.chdir(folder)
    (code,) = [
        block for block in code_blocks(section(PAGE.read_text(), "A search service"), "python") if "HTTPServer" in block
    ]
    scope: dict[str, Any] = {"__name__": "search"}
    exec(compile(code.replace("products-v2", NAME), "search.py", "exec"), scope)
    module = SimpleNamespace(**scope)
    quiet = type("Quiet", (module.Search,), {"log_message": lambda *_: None})
    server = HTTPServer(("127.0.0.1", 0), quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def search(image: bytes, user: str) -> Any:
        request = Request(f"http://127.0.0.1:{server.server_port}/", data=image, headers={"X-User": user})
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)

    try:
        yield search
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()
        module.route.close()


def test_the_search_service_of_the_documentation(
    world: World, migrator: Migrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.configure(rollout__canary=[50, 100])
    to_prepare = [["plan"], ["verify"], ["rollout", "--stage", "prepare"], ["rollout", "--stage", "canary"]]
    for words in to_prepare:
        assert migrator(*words) == 0
    stored = world.vectors()
    with service(world.folder, monkeypatch) as search:
        used = set()
        for user in (f"user-{number}" for number in range(20)):
            found = search((world.images / NAMES[3]).read_bytes(), user)
            assert found["epoch"] == 2
            which = "old" if found["hits"][0]["score"] > 0.9999 else "new"
            used.add(which)
            exact = stored @ embed_images(world, which, [NAMES[3]])[0]
            assert [hit["id"] for hit in found["hits"]] == np.argsort(-exact)[:10].tolist()
        assert used == {"old", "new"}
        assert migrator("rollback") == 0
        back = search((world.images / NAMES[3]).read_bytes(), "user-0")
        assert (back["epoch"], back["hits"][0]["id"]) == (3, 3)
        assert back["hits"][0]["score"] > 0.9999
