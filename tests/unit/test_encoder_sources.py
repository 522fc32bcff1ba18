"""Encoders that are not timm's: factories, exported programs, ONNX models, maps behind them, timm's preprocessing."""

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from migrator.trainer.encoders.building import build_model, untrained_encoder
from migrator.trainer.encoders.encoder import Encoder
from migrator.trainer.encoders.loading import load_base, load_encoder
from migrator.trainer.encoders.manifest import read_manifest
from migrator.trainer.encoders.saving import save_encoder, save_mapped_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.encoders.timm_models import timm_preprocessing
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.maps import Map, fit_map
from migrator.trainer.torchvision_cpu import import_timm

SIZE, WIDTH = 16, 6
PREPROCESSING = Preprocessing(SIZE)
FACTORIES = f"""\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, stride=4)  # names that our own encoders use too
        self.projection = nn.Linear(8, {WIDTH})

    def forward(self, images):
        return self.projection(torch.relu(self.backbone(images)).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net()

def random():
    return Net()

def loud():
    print("loading weights")
    return build()

def fails():
    raise OSError(2, "weights.bin is\\nnot here")

def leaves():
    raise SystemExit("usage: train.py")

def wants(argument):
    return argument

def gives_nothing():
    pass

number = 3

class Wrong(Net):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, images):
        return self.result(super().forward(images))

def maps(): return Wrong(lambda x: x[:, :, None])
def squeezed(): return Wrong(lambda x: x.squeeze())
def pair(): return Wrong(lambda x: (x, x))
def nan(): return Wrong(lambda x: x / 0 * 0)
def mean(): return Wrong(lambda x: x.mean(0, keepdim=True))
def needs_64(): return Wrong(lambda x: x.reshape(64, 64))
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


def pictures(n: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)


def network() -> nn.Module:
    """A small network, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, WIDTH)
        return nn.Sequential(*layers).eval()


def expected(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    with torch.no_grad():
        return F.normalize(model((torch.tensor(batch) / 255 - mean) / std)).numpy()


def factory(name: str, folder: Path, dim: int = WIDTH, **changes: Any) -> EncoderSpec:
    return EncoderSpec(f"module:factories:{name}", dim, PREPROCESSING, folder=folder, **changes)


def one_line(error: pytest.ExceptionInfo[EncoderProblem]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# --- factories


def test_a_factory_gives_the_encoder_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = load_encoder(factory("loud", folder))
    sys.path.insert(0, str(folder))
    import factories  # type: ignore[import-not-found]

    assert np.abs(encoder.encode(pictures()) - expected(factories.build(), pictures())).max() < 1e-5
    assert encoder.manifest.arch == "module:factories:loud"
    assert encoder.id == load_encoder(factory("loud", folder)).id
    printed = capsys.readouterr()
    assert printed.out == ""  # where a command's results go
    assert "loading weights" in printed.err


def test_a_factory_of_random_weights_is_not_the_same_encoder_twice(folder: Path) -> None:
    manifest = load_encoder(factory("random", folder)).manifest
    with pytest.raises(
        EncoderMismatch, match="weights in factory 'factories:random' are not those of its manifest"
    ) as it:
        load_encoder(factory("random", folder), expected=manifest)
    one_line(it)


def test_weights_are_loaded_into_the_module_of_a_factory(folder: Path) -> None:
    made = load_encoder(factory("random", folder))
    state = made.model.state_dict()
    plain = {name.removeprefix("backbone."): tensor.contiguous() for name, tensor in state.items()}
    assert {name.split(".")[0] for name in plain} == {"backbone", "projection"}  # as in our files, and yet its own
    for suffix in (".safetensors", ".pt"):
        path = folder / f"plain{suffix}"
        save_file(plain, path) if suffix == ".safetensors" else torch.save({"state_dict": plain}, path)
        assert load_encoder(factory("random", folder, weights=path)).id == made.id
    torch.save({"backbone.weight": plain["backbone.weight"]}, folder / "part.pt")
    with pytest.raises(EncoderProblem, match=r"do not fit factory 'factories:random': .* missing"):
        load_encoder(factory("random", folder, weights=folder / "part.pt"))


def test_an_encoder_trained_from_a_factory_comes_back(folder: Path) -> None:
    spec = factory("random", folder, dim=4)
    model = build_model(spec)
    assert model.training
    manifest = save_encoder(model, spec, folder / "encoder.safetensors")
    encoder = load_encoder(dataclasses.replace(spec, weights=folder / "encoder.safetensors"))
    assert encoder.manifest == manifest
    assert (manifest.head, manifest.dim, manifest.map) == ("projection", 4, None)
    assert np.abs(encoder.encode(pictures()) - expected(model.eval(), pictures())).max() < 1e-5
    names = {name.rsplit(".", 1)[0] for name in load_file(folder / "encoder.safetensors")}
    assert names == {"backbone.backbone", "backbone.projection", "projection", "norm"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("factories:fails", "factory 'factories:fails' failed: FileNotFoundError: .*weights.bin is not here"),
        ("factories:leaves", "factory 'factories:leaves' failed: SystemExit: usage"),
        ("factories:wants", "failed: TypeError: .*argument"),
        ("factories:gives_nothing", "returns a NoneType: it must return a torch.nn.Module"),
        ("factories:nowhere", "is not in .*factories.py: name a function"),
        ("factories:number", "is a int in .*factories.py"),
        ("factoriez:build", "there is no module 'factoriez' in .* or among the installed packages"),
        ("factories.sub:build", "there is no module 'factories.sub'|cannot be imported"),
        ("broken:build", "'broken:build' cannot be imported: SyntaxError"),
        ("needs:build", "'needs:build' cannot be imported: No module named 'nobody_has_this'"),
        ("quits:build", "'quits:build' cannot be imported: SystemExit"),
        ("factories:maps", r"gives features of shape \(1, 6, 1\) for a picture, not \(1, d\)"),
        ("factories:squeezed", r"gives features of shape \(6,\)"),
        ("factories:pair", "gives a tuple, not one tensor"),
        ("factories:nan", "no usable vector"),
        ("factories:needs_64", "cannot take pictures of 16 x 16 pixels"),
    ],
)
def test_factories_that_give_no_encoder_are_told_in_one_line(folder: Path, name: str, said: str) -> None:
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "needs.py").write_text("import nobody_has_this\n")
    (folder / "quits.py").write_text("import sys; sys.exit('no GPU')\n")
    with pytest.raises(EncoderProblem, match=said) as caught:
        load_encoder(EncoderSpec(f"module:{name}", WIDTH, PREPROCESSING, folder=folder))
    one_line(caught)


def test_a_module_that_mixes_up_its_rows_is_refused(folder: Path) -> None:
    encoder = load_encoder(factory("mean", folder))
    with pytest.raises(EncoderProblem, match=r"gives \(1, 6\) for 5 images, not 6 numbers each"):
        encoder.encode(pictures())


def test_an_interrupt_passes_through_a_factory(folder: Path) -> None:
    (folder / "slow.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_encoder(EncoderSpec("module:slow:build", WIDTH, PREPROCESSING, folder=folder))


def test_a_factory_may_import_torchvision_beside_any_torch(tmp_path: Path) -> None:
    """In a process of its own: here torchvision is imported already."""
    (tmp_path / "mine.py").write_text(
        "import torchvision.models, torchvision.ops, torchvision.transforms.v2\nimport timm\nfrom torch import nn\n"
        "def build(): return nn.Sequential(nn.AvgPool2d(16), nn.Flatten())\n"
    )
    code = (
        "from pathlib import Path\n"
        "from migrator.trainer.encoders.loading import load_encoder\n"
        "from migrator.trainer.encoders.spec import EncoderSpec\n"
        "from migrator.trainer.images.preprocessing import Preprocessing\n"
        "spec = EncoderSpec('module:mine:build', 3, Preprocessing(16), folder=Path('.'))\n"
        "print(load_encoder(spec).manifest.arch)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout, done.returncode) == ("module:mine:build\n", 0), done.stderr


# --- exported programs and ONNX models


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(*fields: tuple[int, Any]) -> bytes:
    """A protobuf message from (field number, value): what ONNX files are made of."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def onnx_file(
    path: Path,
    *,
    batch: int | None = None,
    kind: int = 1,
    pooled: bool = True,
    elsewhere: bool = False,
    size: tuple[int, int] = (SIZE, SIZE),
) -> np.ndarray:
    """Writes mean over the picture, times a matrix (3, WIDTH), as an ONNX model; gives the matrix."""
    matrix = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)

    def value(name: str, *shape: int | str) -> bytes:
        dims = [(1, message((1, n) if isinstance(n, int) else (2, n))) for n in shape]
        return message((1, name), (2, message((1, message((1, kind), (2, message(*dims)))))))

    tensor = [(1, 3), (1, WIDTH), (2, kind), (8, "matrix")]
    if elsewhere:
        path.with_suffix(".data").write_bytes(matrix.tobytes())
        tensor += [(13, message((1, "location"), (2, path.with_suffix(".data").name))), (14, 1)]
    else:
        tensor += [(9, matrix.tobytes())]
    nodes = [
        message((1, "images"), (2, "pooled"), (4, "GlobalAveragePool")),
        message((1, "pooled"), (2, "flat"), (4, "Flatten")),
        message((1, "flat"), (1, "matrix"), (2, "vectors"), (4, "MatMul")),
    ]
    output = value("vectors", "n", WIDTH) if pooled else value("pooled", "n", 3, 1, 1)
    graph = message(
        *((1, node) for node in nodes),
        (2, "g"),
        (5, message(*tensor)),
        (11, value("images", batch or "n", 3, *size)),
        (12, output),
    )
    path.write_bytes(message((1, 8), (8, message((2, 17))), (7, graph)))
    return matrix


def pt2_file(path: Path, model: nn.Module | None = None, *, least: int | None = 1, most: int = 64) -> nn.Module:
    """Exports a network for 2 pictures, or with `least` for any number from it to `most`."""
    model = model or network()
    shapes = None if least is None else ({0: torch.export.Dim("n", min=least, max=most)},)
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, SIZE, SIZE),), dynamic_shapes=shapes), path)
    return model


def program(path: Path, dim: int = WIDTH, **changes: Any) -> EncoderSpec:
    return EncoderSpec(f"file:{path.suffix[1:]}", dim, PREPROCESSING, path, **changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "network.pt2"
    pt2_file(path)
    return path


@pytest.mark.parametrize("limits", [{"least": 1}, {"least": 2, "most": 3}, {"least": None}])
def test_an_exported_program_gives_the_vectors_of_its_model(tmp_path: Path, limits: dict[str, Any]) -> None:
    model = pt2_file(tmp_path / "network.pt2", **limits)
    encoder = load_encoder(program(tmp_path / "network.pt2"))
    for n in (1, 2, 5, 8):
        assert np.abs(encoder.encode(pictures(n)) - expected(model, pictures(n))).max() < 1e-5
    assert (encoder.manifest.arch, encoder.manifest.head) == ("file:pt2", "none")


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_an_onnx_model_gives_its_vectors(tmp_path: Path, batch: int | None) -> None:
    pytest.importorskip("onnxruntime")
    matrix = torch.tensor(onnx_file(tmp_path / "network.onnx", batch=batch))
    encoder = load_encoder(program(tmp_path / "network.onnx"))
    vectors = encoder.encode(pictures())
    assert np.abs(vectors - expected(lambda x: x.mean((2, 3)) @ matrix, pictures())).max() < 1e-5  # type: ignore[arg-type]
    assert vectors.dtype == np.float32
    assert encoder.manifest.arch == "file:onnx"


def test_the_id_of_a_program_is_over_its_bytes(exported: Path, tmp_path: Path) -> None:
    import hashlib

    manifest = load_encoder(program(exported)).manifest
    assert manifest.weights_sha256 == hashlib.sha256(exported.read_bytes()).hexdigest()
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-6  # type: ignore[index]
    pt2_file(tmp_path / "other.pt2", other)
    with pytest.raises(EncoderMismatch, match="are not those of its manifest"):
        load_encoder(program(tmp_path / "other.pt2"), expected=manifest)
    (tmp_path / "other.json").write_text(manifest.to_json())
    with pytest.raises(EncoderMismatch, match="are not those of its manifest"):
        load_encoder(program(tmp_path / "other.pt2"))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_damaged_programs_are_refused(
    exported: Path, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"network{suffix}"
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        onnx_file(path)
    else:
        shutil.copy(exported, path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    broken = [data[: int(len(data) * share)] for share in (0, 0.01, 0.5, 0.97)] + [b"hello", b"PK\x03\x04" + data]
    if suffix == ".pt2":
        broken.append(bytes(flipped))
    for number, content in enumerate(broken):
        path.write_bytes(content)
        with pytest.raises(EncoderProblem, match=f"network{suffix}' cannot be loaded, it may be damaged") as caught:
            load_encoder(program(path))
        one_line(caught)
        assert not caplog.records, number
    path.unlink()
    with pytest.raises(EncoderProblem, match="is not there"):
        load_encoder(program(path))
    path.mkdir()
    with pytest.raises(EncoderProblem, match="cannot be read"):
        load_encoder(program(path))


class Gives(nn.Module):
    """What a network gives, passed through a function."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.network = network()
        self.result = result

    def forward(self, images: torch.Tensor) -> Any:
        return self.result(self.network(images))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda x: x[:, :, None], r"gives \(1, 6, 1\) for 1 pictures"),
        (lambda x: x.mean(0, keepdim=True).expand(3, -1), r"gives \(3, 6\) for 1 pictures"),
        (lambda x: (x, x), r"gives \(1, 6\), \(1, 6\) for"),
        (lambda x: {"pooled": x.mean((0, 1)), "all": x.T}, "export it so that one output is"),
        (lambda x: x / 0 * 0, "no usable vector"),
        (lambda x: x * 0, "no usable vector"),
        (lambda x: x - x.mean(0) + 0.001 * x, "another vector when it comes with others: .* model.eval"),
    ],
)
def test_programs_of_another_output_are_refused(tmp_path: Path, result: Any, said: str) -> None:
    pt2_file(tmp_path / "wrong.pt2", Gives(result))
    with pytest.raises(EncoderProblem, match=said) as caught:
        load_encoder(program(tmp_path / "wrong.pt2"))
    one_line(caught)


def test_the_one_output_of_a_row_a_picture_is_taken(tmp_path: Path) -> None:
    model = pt2_file(tmp_path / "several.pt2", Gives(lambda x: {"tokens": x[:, :, None], "vector": x, "sum": x.sum(1)}))
    wanted = expected(model.network, pictures())  # type: ignore[arg-type]
    assert np.abs(load_encoder(program(tmp_path / "several.pt2")).encode(pictures()) - wanted).max() < 1e-5


def test_programs_of_another_input_are_refused(exported: Path, tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a + b).mean((2, 3))

    class Long(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3))

    one = torch.zeros(1, 3, SIZE, SIZE)
    torch.export.save(torch.export.export(Pair(), (one, one)), tmp_path / "pair.pt2")
    torch.export.save(torch.export.export(Long(), (one.long(),)), tmp_path / "long.pt2")
    for spec, said in (
        (
            dataclasses.replace(program(exported), preprocessing=Preprocessing(20)),
            r"\(n, 3, 16, 16\), not \(n, 3, 20, 20\)",
        ),
        (program(exported, dim=7), "the exported program gives 6-d features .* set dim to 6"),
        (program(tmp_path / "pair.pt2"), "takes 2 inputs"),
        (program(tmp_path / "long.pt2"), "takes neither floating-point numbers nor bytes"),
    ):
        with pytest.raises(EncoderProblem, match=said) as caught:
            load_encoder(spec)
        one_line(caught)


def test_a_program_with_foreign_operators_names_them(tmp_path: Path) -> None:
    library = torch.library.Library("nobodys", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("nobodys::twice", torch.empty_like, lib=library)
    pt2_file(tmp_path / "foreign.pt2", Gives(torch.ops.nobodys.twice))
    library._destroy()  # as in a process that has never seen that package
    with pytest.raises(EncoderProblem, match=r"uses the operators nobodys\.twice, which are not installed") as caught:
        load_encoder(program(tmp_path / "foreign.pt2"))
    one_line(caught)


def test_onnx_models_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    for wrong, said in (
        ({"pooled": False}, r"gives \(1, 3, 1, 1\) for 1 pictures"),
        ({"kind": 7}, "cannot be loaded|takes neither floating-point"),
        ({"elsewhere": True}, r"save it in one file \(external_data=False\)"),
    ):
        onnx_file(path, **wrong)
        monkeypatch.chdir(tmp_path)  # where onnxruntime would look for the other file
        with pytest.raises(EncoderProblem, match=said) as caught:
            load_encoder(program(path))
        one_line(caught)


def channels_last_file(path: Path, *shape: int | str, kind: int = 1) -> None:
    """Writes the mean over the two sides of a picture that comes channels last, as an ONNX model of this input."""

    def value(name: str, kind: int, *shape: int | str) -> bytes:
        dims = [(1, message((1, n) if isinstance(n, int) else (2, n))) for n in shape]
        return message((1, name), (2, message((1, message((1, kind), (2, message(*dims)))))))

    cast = message((1, "images"), (2, "floats"), (4, "Cast"), (5, message((1, "to"), (3, 1), (20, 2))))
    axes = message((1, "axes"), (8, 1), (8, 2), (20, 7)), message((1, "keepdims"), (3, 0), (20, 2))
    mean = message((1, "floats"), (2, "means"), (4, "ReduceMean"), *((5, attribute) for attribute in axes))
    same = message((1, "means"), (1, "identity"), (2, "vectors"), (4, "MatMul"))
    c = shape[-1] if isinstance(shape[-1], int) else 3
    identity = message((1, c), (1, c), (2, 1), (8, "identity"), (9, np.eye(c, dtype=np.float32).tobytes()))
    inputs, outputs = value("images", kind, "n", *shape), value("vectors", 1, "n", c)
    graph = message((1, cast), (1, mean), (1, same), (2, "g"), (5, identity), (11, inputs), (12, outputs))
    path.write_bytes(message((1, 8), (8, message((2, 17))), (7, graph)))


@pytest.mark.parametrize("shape", [(SIZE, SIZE, 3), ("h", "w", 3), (SIZE, "w", 3)])
def test_an_onnx_model_with_channels_last_gets_them_so(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    pytest.importorskip("onnxruntime")
    channels_last_file(tmp_path / "last.onnx", *shape)
    encoder = load_encoder(program(tmp_path / "last.onnx", dim=3))
    assert np.abs(encoder.encode(pictures()) - expected(lambda x: x.mean((2, 3)), pictures())).max() < 1e-5  # type: ignore[arg-type]


def test_programs_of_bytes_get_bytes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    class Bytes(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3))

    channels_last_file(tmp_path / "bytes.onnx", SIZE, SIZE, 3, kind=2)
    example = (torch.zeros(1, 3, SIZE, SIZE).byte(),)
    torch.export.save(torch.export.export(Bytes(), example), tmp_path / "bytes.pt2")
    wanted = F.normalize(torch.tensor(pictures()).float().mean((2, 3))).numpy()
    for name in ("bytes.onnx", "bytes.pt2"):
        with pytest.raises(EncoderProblem, match=r"takes bytes from 0 to 255: set mean to .* and std to") as caught:
            load_encoder(program(tmp_path / name, dim=3))
        values = [float(number) for number in re.findall(r"0\.\d+", one_line(caught))]  # the advice, as it is given
        whole = Preprocessing(SIZE, mean=(0, 0, 0), std=tuple(values))
        encoder = load_encoder(dataclasses.replace(program(tmp_path / name, dim=3), preprocessing=whole))
        assert np.abs(encoder.encode(pictures()) - wanted).max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((20, 20, 3), r"shape \(n, 20, 20, 3\), not \(n, 3, 16, 16\) or \(n, 16, 16, 3\): set image_size to its own"),
        ((SIZE, SIZE, 1), "three channels here"),
        ((SIZE, SIZE, 3, 1), "export it for a batch of RGB pictures"),
        (("c", "h", "w"), r"if it takes channels last, export it with the input's shape \(n, H, W, 3\)"),
    ],
)
def test_onnx_inputs_that_do_not_fit_say_what_to_do(tmp_path: Path, shape: tuple[int | str, ...], said: str) -> None:
    pytest.importorskip("onnxruntime")
    channels_last_file(tmp_path / "last.onnx", *shape)
    with pytest.raises(EncoderProblem, match=said) as caught:
        load_encoder(program(tmp_path / "last.onnx", dim=3))
    one_line(caught)


def test_without_onnxruntime_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_file(tmp_path / "network.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EncoderProblem, match=r"needs onnxruntime: pip install 'advbct-migrator\[onnx\]'"):
        load_encoder(program(tmp_path / "network.onnx"))


def test_programs_are_not_trained_but_their_speed_can_be_measured(exported: Path) -> None:
    with pytest.raises(EncoderProblem, match="can be run but not trained: give arch or module, or train a map") as it:
        build_model(program(exported))
    one_line(it)
    assert untrained_encoder(program(exported, dim=9)).encode(pictures()).shape == (5, 9)


def test_a_program_and_its_declaration_must_fit(exported: Path, folder: Path) -> None:
    for spec, said in (
        (EncoderSpec("file:pt2", WIDTH, PREPROCESSING), "has no file: set weights to a .pt2 file"),
        (EncoderSpec("file:onnx", WIDTH, PREPROCESSING, exported), "has no file: set weights to a .onnx file"),
        (EncoderSpec("test_resnet", WIDTH, PREPROCESSING, exported), "must be a state dict .* remove arch and module"),
        (factory("build", folder, weights=exported), "must be a state dict .* remove arch and module"),
    ):
        with pytest.raises(EncoderProblem, match=said) as caught:
            load_encoder(spec)
        one_line(caught)


# --- maps behind encoders


def bases(folder: Path, exported: Path) -> dict[str, EncoderSpec]:
    torch.manual_seed(0)
    save_file(import_timm().create_model("test_resnet", num_classes=0).state_dict(), folder / "timm.safetensors")
    ours = EncoderSpec("test_resnet", 7, PREPROCESSING)
    save_encoder(build_model(ours), ours, folder / "ours.safetensors")
    onnx_file(folder / "network.onnx")
    return {
        "timm": EncoderSpec("test_resnet", 4, PREPROCESSING, folder / "timm.safetensors"),
        "ours": dataclasses.replace(ours, dim=4, weights=folder / "ours.safetensors"),
        "factory": factory("build", folder, dim=4),
        "pt2": program(exported, dim=4),
        "onnx": program(folder / "network.onnx", dim=4),
    }


def old_vectors(n: int) -> np.ndarray:
    vectors = np.random.default_rng(9).normal(size=(n, 4))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("source", ["timm", "ours", "factory", "pt2", "onnx"])
def test_an_encoder_with_a_map_comes_back_from_its_file(folder: Path, exported: Path, source: str) -> None:
    if source == "onnx":
        pytest.importorskip("onnxruntime")
    spec = bases(folder, exported)[source]
    base = load_base(spec)
    fitted = fit_map("ridge", base.encode(pictures(20)), old_vectors(20), seed=0)
    path = folder / "artifacts" / "encoder.safetensors"
    manifest = save_mapped_encoder(base, spec, fitted, 4, path)
    assert (manifest.arch, manifest.dim, manifest.map) == (spec.arch, 4, "ridge")
    if spec.weights is not None:
        spec.weights.rename(folder / "elsewhere")  # the encoder stands on its own
    try:
        encoder = load_encoder(dataclasses.replace(spec, weights=path), expected=manifest)
    finally:
        if spec.weights is not None:
            (folder / "elsewhere").rename(spec.weights)
    with torch.no_grad():
        wanted = F.normalize(fitted(torch.tensor(base.encode(pictures(6, seed=1)))))
    assert np.abs(encoder.encode(pictures(6, seed=1)) - wanted.numpy()).max() < 1e-6
    assert read_manifest(path) == manifest
    assert encoder.id != base.id
    with pytest.raises(EncoderProblem, match="hold a map already"):
        load_base(dataclasses.replace(spec, weights=path))


@pytest.mark.parametrize("kind", ["procrustes", "ridge", "residual_mlp"])
def test_every_kind_of_map_comes_back(folder: Path, kind: str) -> None:
    spec = factory("build", folder, dim=4)
    base = load_base(spec)
    fitted = Map(kind, WIDTH, 4)
    manifest = save_mapped_encoder(base, spec, fitted, 4, folder / "encoder.safetensors")
    encoder = load_encoder(dataclasses.replace(spec, weights=folder / "encoder.safetensors"))
    assert (encoder.manifest, manifest.map) == (manifest, kind)
    with torch.no_grad():
        wanted = F.normalize(fitted(torch.tensor(base.encode(pictures()))))
    assert np.abs(encoder.encode(pictures()) - wanted.numpy()).max() < 1e-6


def mapped(folder: Path, exported: Path) -> tuple[Encoder, EncoderSpec, Path]:
    spec, path = program(exported, dim=4), folder / "encoder.safetensors"
    base = load_base(spec)
    save_mapped_encoder(base, spec, fit_map("procrustes", base.encode(pictures(20)), old_vectors(20), seed=0), 4, path)
    return base, dataclasses.replace(spec, weights=path), path


def test_a_changed_program_below_a_map_is_refused(folder: Path, exported: Path) -> None:
    _, spec, path = mapped(folder, exported)
    assert sorted(file.name for file in folder.glob("encoder.*")) == [
        "encoder.json",
        "encoder.pt2",
        "encoder.safetensors",
    ]
    other: Any = network()
    with torch.no_grad():
        other[0].weight *= 2
    pt2_file(path.with_suffix(".pt2"), other)
    with pytest.raises(EncoderMismatch, match="are not those of its manifest"):
        load_encoder(spec)
    path.with_suffix(".pt2").unlink()
    with pytest.raises(EncoderProblem, match=r"encoder.pt2' is not there"):
        load_encoder(spec)


def test_a_changed_map_is_refused(folder: Path, exported: Path) -> None:
    _, spec, path = mapped(folder, exported)
    state = load_file(path)
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, path)
    with pytest.raises(EncoderMismatch, match="are not those of its manifest"):
        load_encoder(spec)
    path.with_suffix(".json").unlink()
    for wrong, said in (
        ({"map.linear.weight": torch.ones(4, 9)}, "gives 6-d features"),
        ({"map.linear.weight": torch.full((4, WIDTH), torch.nan)}, "not finite, in map.linear.weight"),
        ({"map.linear.weight": torch.ones(4)}, "do not hold a map"),
        ({**state, "map.other": torch.ones(1)}, "1 unknown .other."),
        ({"map.linear.weight": torch.ones(5, WIDTH)}, "give 5-d vectors: set dim to that, not 4"),
        ({"other": torch.ones(1)}, "hold no map to follow the exported program"),
    ):
        save_file(wrong, path)
        with pytest.raises(EncoderProblem, match=said) as caught:
            load_encoder(spec)
        one_line(caught)


def test_a_map_that_leads_elsewhere_is_not_saved(folder: Path, exported: Path) -> None:
    base, spec, _ = mapped(folder, exported)
    for fitted in (Map("ridge", WIDTH, 5), Map("ridge", 5, 4)):
        with pytest.raises(EncoderProblem, match="does not lead from"):
            save_mapped_encoder(base, spec, fitted, 4, folder / "never" / "encoder.safetensors")
    assert not (folder / "never").exists()


def test_a_base_has_the_length_that_its_weights_give(folder: Path, exported: Path) -> None:
    found = {source: load_base(spec).dim for source, spec in bases(folder, exported).items() if source != "onnx"}
    assert found == {"timm": 96, "ours": 7, "factory": WIDTH, "pt2": WIDTH}
    with pytest.raises(EncoderProblem, match="has no weights"):
        load_base(EncoderSpec("test_resnet", 4, PREPROCESSING))


# --- preprocessing


def test_preprocessing_of_timm_and_what_goes_before_it() -> None:
    plain = timm_preprocessing("vit_base_patch16_clip_224")
    cfg = import_timm().get_pretrained_cfg("vit_base_patch16_clip_224")
    assert plain == Preprocessing(224, "crop", "bicubic", cfg.mean, cfg.std, cfg.crop_pct or 0.875)
    assert plain.mean != Preprocessing(224).mean
    given = {
        "image_size": 64,
        "mean": (0.5, 0.5, 0.5),
        "resize": "squash",
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    assert timm_preprocessing("vit_base_patch16_clip_224", **given) == Preprocessing(
        64, "squash", "bilinear", (0.5,) * 3, plain.std, 1.0
    )
    with pytest.raises(EncoderProblem, match="knows no architecture 'resnet81'"):
        timm_preprocessing("resnet81")


@pytest.mark.parametrize("crop_pct", [0.05, 2.1, float("nan"), "0.9", True])
def test_a_crop_out_of_range_is_refused(crop_pct: Any) -> None:
    with pytest.raises(EncoderProblem, match="crop_pct"):
        Preprocessing(SIZE, crop_pct=crop_pct)


def test_mean_and_std_reach_the_scale_of_other_toolkits() -> None:
    """(x - 127) / 128, as TensorFlow's EfficientNet-Lite takes it, in our terms."""
    preprocessing = Preprocessing(SIZE, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)

    class Seen(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    from migrator.trainer.encoders.manifest import Manifest
    from migrator.trainer.encoders.networks import EmbeddingNet

    width = 3 * SIZE * SIZE
    model = EmbeddingNet(Seen(), width=width, dim=width, head="none")
    manifest = Manifest.make(
        arch="x",
        dim=width,
        head="none",
        preprocessing=preprocessing,
        weights_sha256="",
        fingerprint=np.eye(1, width)[0],
    )
    wanted = ((pictures().astype(float) - 127) / 128).reshape(5, -1)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.abs(Encoder(model, manifest, torch.device("cpu")).encode(pictures()) - wanted).max() < 1e-6
