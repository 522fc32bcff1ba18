"""Encoders: weights of every origin, manifests, and the promise that an encoder is what it was."""

import copy
import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.encoder import Encoder
from migrator.trainer.encoders.loading import load_base, load_encoder
from migrator.trainer.encoders.manifest import Manifest, read_manifest
from migrator.trainer.encoders.networks import EmbeddingNet
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.torchvision_cpu import import_timm

ARCH, SIZE = "test_resnet", 32  # timm's smallest
PREPROCESSING = Preprocessing(SIZE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(dim: int = 8, weights: Path | None = None, **changes: Any) -> EncoderSpec:
    return EncoderSpec(ARCH, dim, PREPROCESSING, weights, **changes)


def net(dim: int = 8, seed: int = 0) -> EmbeddingNet:
    torch.manual_seed(seed)
    model = build_model(spec(dim))
    norm: Any = model.norm
    with torch.no_grad():  # statistics as after a training, so that the norm matters
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return model


def plain(classes: int = 0, seed: int = 0) -> Any:
    """A model as timm makes it."""
    torch.manual_seed(seed)
    return import_timm().create_model(ARCH, num_classes=classes).eval()


def pictures(n: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)


def one_line(error: pytest.ExceptionInfo[EncoderProblem]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_encoder(net(), spec(), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


# --- preprocessing


def test_prepare_squashes_or_crops() -> None:
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, 40:80] = (10, 200, 90)
    picture = Image.fromarray(stripes)
    cropped = Preprocessing(SIZE, resize="crop").prepare(picture)
    assert cropped.shape == (3, SIZE, SIZE)
    assert cropped.dtype == np.uint8
    assert (cropped[:, :, 1:-1] == np.array([10, 200, 90], np.uint8)[:, None, None]).all()
    squashed = PREPROCESSING.prepare(picture)
    assert (squashed[:, :, 0] == 0).all()
    assert list(squashed[:, 16, 16]) == [10, 200, 90]


def test_prepare_keeps_a_picture_of_the_right_size() -> None:
    pixels = pictures(1)[0]
    picture = Image.fromarray(pixels.transpose(1, 2, 0))
    for preprocessing in (PREPROCESSING, Preprocessing(SIZE, resize="crop", interpolation="bicubic")):
        prepared = preprocessing.prepare(picture)
        assert np.array_equal(prepared, pixels)
        assert prepared.flags.c_contiguous


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 70),
    resize=st.sampled_from(["squash", "crop"]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_prepare_takes_every_size(width: int, height: int, size: int, resize: Any, interpolation: Any) -> None:
    picture = Image.new("RGB", (width, height), (1, 2, 3))
    prepared = Preprocessing(size, resize, interpolation).prepare(picture)
    assert np.array_equal(prepared, np.broadcast_to(np.array([1, 2, 3])[:, None, None], (3, size, size)))


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 0},
        {"image_size": 5000},
        {"image_size": 32.0},
        {"image_size": True},
        {"resize": "stretch"},
        {"interpolation": "linear"},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"mean": 0.5},
        {"std": (1, 1, 0)},
        {"std": (1, "x", 1)},
    ],
)
def test_preprocessing_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(EncoderProblem, match=next(iter(values))):
        Preprocessing(**{"image_size": SIZE, **values})


def test_preprocessing_is_the_same_however_its_numbers_are_written() -> None:
    assert Preprocessing(SIZE, mean=[0, 0, 0], std=[1, 1, 1]) == Preprocessing(SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)  # type: ignore[arg-type]


# --- encoding


def test_vectors_follow_from_the_model_by_the_formula(saved: Path) -> None:
    encoder = load_encoder(spec(weights=saved), device="cpu")
    batch = pictures()
    scaled = torch.tensor(batch).double() / 255
    mean, std = (torch.tensor(x).double().view(1, 3, 1, 1) for x in (PREPROCESSING.mean, PREPROCESSING.std))
    with torch.no_grad():
        model: Any = copy.deepcopy(encoder.model).double()
        pooled = model.backbone((scaled - mean) / std)
        projected = pooled @ model.projection.weight.T
        f = (projected - model.norm.running_mean) / torch.sqrt(model.norm.running_var + model.norm.eps)
        expected = f / f.norm(dim=1, keepdim=True)
    vectors = encoder.encode(batch)
    assert vectors.dtype == np.float32
    assert vectors.shape == (6, 8)
    assert np.abs(vectors - expected.numpy()).max() < 1e-4
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6


def test_the_same_batch_gives_the_same_bits(saved: Path) -> None:
    first, second = (load_encoder(spec(weights=saved), device="cpu") for _ in range(2))
    batch = pictures(33)
    assert np.array_equal(first.encode(batch), first.encode(batch))
    assert np.array_equal(first.encode(batch), second.encode(batch))


def test_a_vector_does_not_depend_on_its_batch(saved: Path) -> None:
    encoder = load_encoder(spec(weights=saved))
    batch = pictures(17)
    whole = encoder.encode(batch)
    alone = np.concatenate([encoder.encode(row[np.newaxis]) for row in batch])
    assert np.abs(whole - alone).max() < 1e-5
    assert np.abs(whole[::-1] - encoder.encode(batch[::-1])).max() < 1e-5


def test_read_only_strided_and_empty_batches(saved: Path) -> None:
    encoder = load_encoder(spec(weights=saved))
    batch = pictures()
    expected = encoder.encode(batch)
    batch.setflags(write=False)
    assert np.array_equal(encoder.encode(batch), expected)
    assert np.abs(encoder.encode(batch[::2]) - expected[::2]).max() < 1e-5
    assert encoder.encode(batch[:0]).shape == (0, 8)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((2, 3, SIZE, SIZE), np.float32),
        np.zeros((2, 4, SIZE, SIZE), np.uint8),
        np.zeros((2, 3, 16, 16), np.uint8),
        np.zeros((3, SIZE, SIZE), np.uint8),
    ],
)
def test_a_batch_of_another_shape_is_refused(saved: Path, batch: np.ndarray) -> None:
    with pytest.raises(EncoderProblem, match=r"takes uint8 \(n, 3, 32, 32\)"):
        load_encoder(spec(weights=saved)).encode(batch)


def test_rows_without_a_usable_vector_are_named(tmp_path: Path) -> None:
    class Brightness(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    preprocessing = Preprocessing(SIZE, mean=(0, 0, 0), std=(1, 1, 1))
    model = EmbeddingNet(Brightness(), width=3, dim=3, head="none")
    manifest = Manifest.make(
        arch=ARCH, dim=3, head="none", preprocessing=preprocessing, weights_sha256="", fingerprint=np.array([1.0, 0, 0])
    )
    batch = pictures()
    batch[[1, 4]] = 0
    with pytest.raises(EncoderProblem, match="2 of 6 images, the first in row 1") as caught:
        Encoder(model, manifest, torch.device("cpu")).encode(batch)
    assert caught.value.rows == (1, 4)


# --- weights of every origin


def test_a_saved_encoder_comes_back_bit_for_bit(saved: Path) -> None:
    model = net()
    encoder = load_encoder(spec(weights=saved))
    state = encoder.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name.split(".")[0] for name in load_file(saved)} == {"backbone", "projection", "norm"}
    assert encoder.dim == 8
    assert encoder.manifest == read_manifest(saved)
    assert encoder.manifest.head == "projection"
    assert encoder.id.startswith("enc-")
    assert len(encoder.id) == 20


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_encoder(model, spec(), tmp_path / "a.safetensors")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_the_same_weights_have_the_same_id_in_every_file_format(
    saved: Path, tmp_path: Path, suffix: str, wrap: Callable[[Any], Any]
) -> None:
    torch.save(wrap(load_file(saved)), tmp_path / f"other{suffix}")
    other = load_encoder(spec(weights=tmp_path / f"other{suffix}"))
    assert other.id == load_encoder(spec(weights=saved)).id


def test_a_distributed_checkpoint_is_read(saved: Path, tmp_path: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in load_file(saved).items()}, tmp_path / "ddp.pt")
    assert load_encoder(spec(weights=tmp_path / "ddp.pt")).manifest == read_manifest(saved)


def test_a_plain_timm_model_gives_its_pooled_features(tmp_path: Path) -> None:
    for classes in (0, 10):  # a classifier of another width is left aside
        model = plain(classes)
        save_file(model.state_dict(), tmp_path / "plain.safetensors")
        width = model.num_features
        encoder = load_encoder(spec(width, tmp_path / "plain.safetensors"))
        assert encoder.manifest.head == "none"
        mean, std = (np.array(x).reshape(1, 3, 1, 1) for x in (PREPROCESSING.mean, PREPROCESSING.std))
        with torch.no_grad():
            x = torch.tensor((pictures() / 255 - mean) / std, dtype=torch.float32)
            features = torch.nn.functional.normalize(model.forward_head(model.forward_features(x), pre_logits=True))
        assert np.abs(encoder.encode(pictures()) - features.numpy()).max() < 1e-4


def test_a_plain_timm_classifier_of_the_right_width_is_the_embedding(tmp_path: Path) -> None:
    model = plain(12)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    encoder = load_encoder(spec(12, tmp_path / "plain.pt"))
    assert encoder.manifest.head == "classifier"
    mean, std = (np.array(x).reshape(1, 3, 1, 1) for x in (PREPROCESSING.mean, PREPROCESSING.std))
    with torch.no_grad():
        logits = torch.nn.functional.normalize(
            model(torch.tensor((pictures() / 255 - mean) / std, dtype=torch.float32))
        )
    assert np.abs(encoder.encode(pictures()) - logits.numpy()).max() < 1e-4
    save_encoder(encoder.model, spec(12), tmp_path / "again.safetensors")
    assert load_encoder(spec(12, tmp_path / "again.safetensors")).id == encoder.id


def features(model: Any, batch: np.ndarray, classes: int = 0) -> np.ndarray:
    """What timm's own model gives for pictures once its classifier is taken away, or with it; of unit length."""
    if not classes:
        model.reset_classifier(0)
    size = batch.shape[-1]
    mean, std = (np.array(x).reshape(1, 3, 1, 1) for x in (PREPROCESSING.mean, PREPROCESSING.std))
    x = torch.tensor((batch / 255 - mean) / std, dtype=torch.float32).reshape(-1, 3, size, size)
    with torch.no_grad():
        return torch.nn.functional.normalize(model.eval()(x)).numpy()


@pytest.mark.parametrize("arch", ["test_resnet", "resnet18"])
def test_where_classifier_and_features_are_of_one_length_head_chooses(tmp_path: Path, arch: str) -> None:
    torch.manual_seed(0)
    width = import_timm().create_model(arch, num_classes=0).num_features
    model = import_timm().create_model(arch, num_classes=width).eval()
    declared = EncoderSpec(arch, width, PREPROCESSING, tmp_path / "as_wide.pt")
    torch.save(model.state_dict(), tmp_path / "as_wide.pt")
    logits = features(model, pictures(), width)
    pooled = features(model, pictures())
    for head, wanted in ((None, logits), ("classifier", logits), ("none", pooled)):
        encoder = load_encoder(dataclasses.replace(declared, head=head))  # type: ignore[arg-type]
        assert encoder.manifest.head == (head or "classifier")
        assert np.abs(encoder.encode(pictures()) - wanted).max() < 1e-4
        save_encoder(encoder.model, declared, tmp_path / "again.safetensors")
        again = dataclasses.replace(declared, weights=tmp_path / "again.safetensors", head=head)  # type: ignore[arg-type]
        assert load_encoder(again).id == encoder.id
        assert load_encoder(dataclasses.replace(again, head=None)).id == encoder.id  # the manifest says it
    with pytest.raises(
        EncoderMismatch, match=r"declared as head classifier, but its manifest says none: set head to none"
    ):
        load_encoder(dataclasses.replace(declared, head="classifier"), expected=encoder.manifest)
    torch.save(model.state_dict(), tmp_path / "bare.pt")  # its classifier was taken away above
    with pytest.raises(EncoderProblem, match="hold no classifier: set head to none for the pooled features") as caught:
        load_encoder(dataclasses.replace(declared, weights=tmp_path / "bare.pt", head="classifier"))
    one_line(caught)


def test_a_classifier_of_another_length_is_told_with_the_length(tmp_path: Path) -> None:
    torch.save(plain(10).state_dict(), tmp_path / "ten.pt")
    with pytest.raises(EncoderProblem, match="has 10 outputs: set dim to 10, or head to none") as caught:
        load_encoder(spec(12, tmp_path / "ten.pt", head="classifier"))
    one_line(caught)
    assert load_encoder(spec(10, tmp_path / "ten.pt", head="classifier")).manifest.head == "classifier"
    width = plain().num_features
    assert load_encoder(spec(width, tmp_path / "ten.pt", head="none")).manifest.head == "none"
    base = load_base(spec(99, tmp_path / "ten.pt", head="classifier"))
    assert (base.dim, base.manifest.head) == (10, "classifier")


def test_head_is_refused_where_there_is_nothing_to_choose(saved: Path) -> None:
    with pytest.raises(EncoderProblem, match=r"is for the state dict of a timm model, which .* is not: remove head"):
        load_encoder(spec(weights=saved, head="none"))


def test_half_precision_and_old_files_without_batch_counters_are_read(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in net().state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pt")
    encoder = load_encoder(spec(weights=tmp_path / "half.pt"))
    assert encoder.encode(pictures()).dtype == np.float32


@pytest.mark.parametrize(
    ("arch", "size"), [("resnet10t", 32), ("resnet18", 32), ("resnet18", 28), ("vit_tiny_patch16_224", 32)]
)
def test_common_architectures_take_small_pictures(tmp_path: Path, arch: str, size: int) -> None:
    declared = EncoderSpec(arch, 16, Preprocessing(size))
    path = tmp_path / "encoder.safetensors"
    manifest = save_encoder(build_model(declared), declared, path)
    encoder = load_encoder(dataclasses.replace(declared, weights=path))
    vectors = encoder.encode(np.stack([encoder.prepare(Image.new("RGB", (8, 8), (9, 99, c))) for c in (0, 200)]))
    assert encoder.manifest == manifest
    assert vectors.shape == (2, 16)
    assert not np.allclose(vectors[0], vectors[1])


# --- the id


def test_the_id_says_weights_preprocessing_arch_and_head(saved: Path, tmp_path: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest is not None
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest) if field.name != "id"}
    assert Manifest.make(**fields) == manifest
    assert Manifest.make(**{**fields, "fingerprint": (-1e-9, 1.0)}) == Manifest.make(
        **{**fields, "fingerprint": (1e-9, 1.0)}
    )
    changes: list[dict[str, Any]] = [
        {"arch": "resnet18"},
        {"head": "none"},
        {"preprocessing": Preprocessing(SIZE, resize="crop")},
        {"preprocessing": Preprocessing(SIZE, mean=(0.5, 0.5, 0.5))},
        {"weights_sha256": "0" * 64},
        {"fingerprint": tuple(reversed(manifest.fingerprint))},
    ]
    ids = {Manifest.make(**{**fields, **change}).id for change in changes} | {manifest.id}
    assert len(ids) == len(changes) + 1


def test_a_single_changed_bit_of_the_weights_changes_the_id(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved)
    state["projection.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(state, tmp_path / "other.safetensors")
    assert load_encoder(spec(weights=tmp_path / "other.safetensors")).id != load_encoder(spec(weights=saved)).id


def test_the_weights_hash_is_over_names_types_shapes_and_bytes(saved: Path) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(saved).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    manifest = read_manifest(saved)
    assert manifest is not None
    assert manifest.weights_sha256 == digest.hexdigest()


def test_a_fresh_process_with_other_threads_imports_timm_cleanly_and_agrees_on_the_id(saved: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(2)\n"
        "from pathlib import Path\n"
        "from migrator.trainer.encoders.loading import load_encoder\n"
        "from migrator.trainer.encoders.spec import EncoderSpec\n"
        "from migrator.trainer.images.preprocessing import Preprocessing\n"
        "from migrator.trainer.torchvision_cpu import import_timm\n"
        "assert import_timm() is import_timm()\n"
        "import torchvision.transforms\n"
        f"print(load_encoder(EncoderSpec({ARCH!r}, 8, Preprocessing({SIZE}), Path(sys.argv[1]))).id)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(saved)], capture_output=True, text=True, check=True, timeout=120
    )
    manifest = read_manifest(saved)
    assert manifest is not None
    assert result.stdout.strip() == manifest.id


# --- the encoder is what it was


def test_changed_weights_under_the_same_name_are_refused(saved: Path) -> None:
    manifest = read_manifest(saved)
    save_file(net(seed=1).state_dict(), saved)
    for expected in (None, manifest):
        with pytest.raises(EncoderMismatch, match="the weights in") as caught:
            load_encoder(spec(weights=saved), expected=expected)
        one_line(caught)


def test_expected_goes_before_the_manifest_beside_the_weights(saved: Path, tmp_path: Path) -> None:
    manifest = read_manifest(saved)
    save_encoder(net(seed=1), spec(), saved)
    assert load_encoder(spec(weights=saved)).manifest == read_manifest(saved)
    with pytest.raises(EncoderMismatch, match="the weights in"):
        load_encoder(spec(weights=saved), expected=manifest)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"preprocessing": Preprocessing(64)}, "preprocessing.*image_size 64 instead of 32"),
        ({"preprocessing": Preprocessing(SIZE, resize="crop")}, "preprocessing.*resize 'crop' instead of 'squash'"),
        ({"preprocessing": Preprocessing(SIZE, std=(1, 1, 1))}, "preprocessing.*std"),
        ({"arch": "resnet18"}, "architecture is declared as 'resnet18'"),
        ({"dim": 9}, "dim is declared as 9"),
    ],
)
def test_a_changed_declaration_is_refused(saved: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(EncoderMismatch, match=named) as caught:
        load_encoder(dataclasses.replace(spec(weights=saved), **change))
    one_line(caught)


def test_a_changed_output_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = EmbeddingNet.forward
    noise = torch.linspace(-1, 1, 8)

    def disturbed(share: float) -> Callable[[EmbeddingNet, torch.Tensor], torch.Tensor]:
        def run(self: EmbeddingNet, images: torch.Tensor) -> torch.Tensor:
            f = forward(self, images)
            return f + share * f.norm() * noise / noise.norm()

        return run

    monkeypatch.setattr(EmbeddingNet, "forward", disturbed(1e-3))
    load_encoder(spec(weights=saved))  # as another machine might round
    monkeypatch.setattr(EmbeddingNet, "forward", disturbed(0.05))
    with pytest.raises(EncoderMismatch, match="output for the fingerprint image") as caught:
        load_encoder(spec(weights=saved))
    one_line(caught)


def test_without_a_manifest_one_is_made_and_serves_as_expected(saved: Path) -> None:
    manifest = read_manifest(saved)
    saved.with_suffix(".json").unlink()
    assert read_manifest(saved) is None
    made = load_encoder(spec(weights=saved)).manifest
    assert made == manifest
    assert load_encoder(spec(weights=saved), expected=made).id == made.id


# --- manifests


def test_a_manifest_survives_json(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest is not None
    assert Manifest.from_json(manifest.to_json()) == manifest
    document = json.loads(manifest.to_json())
    assert document["format"] == 2
    assert len(document["fingerprint"]) == 8


def test_a_manifest_of_the_first_format_is_read_and_keeps_its_id(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest is not None
    document = json.loads(saved.with_suffix(".json").read_text())
    first = {**document, "format": 1, "probe": document["fingerprint"]}
    del first["fingerprint"]
    saved.with_suffix(".json").write_text(json.dumps(first))
    assert read_manifest(saved) == manifest
    assert load_encoder(spec(weights=saved)).id == manifest.id


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "resnet18"},
        {"fingerprint": [1.0] * 8},
        {"fingerprint": [float("nan")] * 8},
        {"fingerprint": []},
        {"dim": 7},
        {"dim": float("inf")},
        {"id": "enc-0000000000000000"},
        {"id": None},
        {"head": "other"},
        {"head": ["none"]},
        {"format": 1},
        {"format": 3},
        {"preprocessing": {"image_size": 32, "colour": 1}},
        {"preprocessing": {"image_size": -1}},
        {"preprocessing": []},
    ],
)
def test_an_edited_manifest_is_refused(saved: Path, change: dict[str, Any]) -> None:
    place = saved.with_suffix(".json")
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(EncoderProblem, match=r"manifest '.*encoder.json'") as caught:
        read_manifest(saved)
    one_line(caught)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}'])
def test_what_is_not_a_manifest_is_refused(saved: Path, text: bytes) -> None:
    saved.with_suffix(".json").write_bytes(text)
    with pytest.raises(EncoderProblem, match="manifest '"):
        load_encoder(spec(weights=saved))


# --- what cannot be loaded


def test_an_unknown_architecture_is_answered_with_its_neighbours() -> None:
    with pytest.raises(EncoderProblem, match=r"knows no architecture 'resnet81': did you mean .*resnet18"):
        build_model(EncoderSpec("resnet81", 8, PREPROCESSING))
    for arch in ("", "hf-hub:somebody/model", "local-dir:/tmp", "../x", "\n"):
        with pytest.raises(EncoderProblem, match="knows no architecture") as caught:
            build_model(EncoderSpec(arch, 8, PREPROCESSING))
        one_line(caught)


@pytest.mark.parametrize("dim", [0, -1, 10**12])
def test_a_dim_out_of_range_is_refused(dim: int) -> None:
    with pytest.raises(EncoderProblem, match="dim"):
        build_model(spec(dim))


def test_pictures_that_an_architecture_cannot_take_are_refused() -> None:
    for arch in ("test_vit", "inception_v3"):
        with pytest.raises(EncoderProblem, match=f"'{arch}' cannot take pictures of 20 x 20 pixels") as caught:
            build_model(EncoderSpec(arch, 8, Preprocessing(20)))
        one_line(caught)


def test_an_encoder_needs_weights() -> None:
    with pytest.raises(EncoderProblem, match="has no weights: set weights"):
        load_encoder(spec())


def test_weights_of_another_shape_are_named(saved: Path, tmp_path: Path) -> None:
    saved.with_suffix(".json").unlink()
    with pytest.raises(EncoderProblem, match="give 8-d vectors"):
        load_encoder(spec(16, saved))
    state = load_file(saved)
    del state["norm.weight"], state["backbone.conv1.0.weight"]
    state["extra\nkey"] = torch.ones(1)
    state["projection.weight"] = torch.ones(8, 3)
    state["norm.bias"] = torch.ones(8, dtype=torch.int64)
    save_file(state, saved)
    with pytest.raises(EncoderProblem) as caught:
        load_encoder(spec(weights=saved))
    message = one_line(caught)
    for part in (
        "2 missing",
        "backbone.conv1.0.weight",
        "1 unknown (extra key)",
        "2 of another shape",
        "(8, 3) instead of",
    ):
        assert part in message
    save_file(plain().state_dict(), saved)
    with pytest.raises(EncoderProblem, match=r"gives .*-d features .* set dim to"):
        load_encoder(spec(7, saved))
    save_file({"a": torch.ones(1)}, saved)
    with pytest.raises(EncoderProblem):
        load_encoder(spec(weights=saved))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(saved: Path, tmp_path: Path, value: float) -> None:
    state = load_file(saved)
    state["backbone.conv1.0.weight"][0, 0, 0, 0] = value
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(EncoderProblem, match=r"not finite, in backbone\.conv1\.0\.weight"):
        load_encoder(spec(weights=tmp_path / "bad.safetensors"))
    model = net()
    model.load_state_dict(state)
    with pytest.raises(EncoderProblem, match="not finite"):
        save_encoder(model, spec(), tmp_path / "never.safetensors")
    assert not list(tmp_path.glob("never*"))


class Exploit:
    def __reduce__(self) -> Any:
        return (print, ("code from the weights file was run",))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Exploit()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Exploit()))
    torch.save(net(), tmp_path / "c.pt")
    for name in ("a.pt", "b.pt", "c.pt"):
        with pytest.raises(EncoderProblem, match="Python objects") as caught:
            load_encoder(spec(weights=tmp_path / name))
        one_line(caught)
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1], {"a": 1}, {}, torch.ones(2), "text"])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(EncoderProblem, match="not a state dict"):
        load_encoder(spec(weights=tmp_path / "a.pt"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_missing_and_foreign_files_are_refused(saved: Path, tmp_path: Path, suffix: str) -> None:
    torch.save(load_file(saved), tmp_path / "whole.pt")
    data = (saved if suffix == ".safetensors" else tmp_path / "whole.pt").read_bytes()
    path = tmp_path / f"cut{suffix}"
    for share in (0, 0.001, 0.5, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(EncoderProblem) as caught:
            load_encoder(spec(weights=path))
        assert "cut" in one_line(caught)
    path.unlink()
    with pytest.raises(EncoderProblem, match="is not there"):
        load_encoder(spec(weights=path))
    path.mkdir()
    with pytest.raises(EncoderProblem, match="is a folder: name a file in it"):
        load_encoder(spec(weights=path))
    with pytest.raises(EncoderProblem, match="must be a state dict"):
        load_encoder(spec(weights=tmp_path / "weights.onnx"))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(saved: Path, device: str) -> None:
    with pytest.raises(EncoderProblem, match="device"):
        load_encoder(spec(weights=saved), device=device)


# --- saving


def test_an_interrupted_save_leaves_the_old_weights_or_ones_that_are_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    replace = Path.replace
    for survived in (0, 1):
        done: list[Path] = []

        def die(self: Path, target: Path, done: list[Path] = done, survived: int = survived) -> Path:
            if len(done) == survived:
                raise KeyboardInterrupt
            done.append(target)
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                save_encoder(net(seed=1), spec(), saved)
        if survived == 0:
            assert (saved.read_bytes(), saved.with_suffix(".json").read_bytes()) == before
        else:
            with pytest.raises(EncoderMismatch, match="the weights in"):
                load_encoder(spec(weights=saved))
    manifest = save_encoder(net(seed=1), spec(), saved)
    assert load_encoder(spec(weights=saved)).manifest == manifest
    assert sorted(path.name for path in saved.parent.iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file" / "a.safetensors", "cannot be written"),
        (Path("/dev/full/a.safetensors"), "cannot be written"),
        (tmp_path / "a.json", "suffix"),
    ):
        with pytest.raises(EncoderProblem, match=reason) as caught:
            save_encoder(net(), spec(), path)
        one_line(caught)


def test_weights_shared_between_layers_are_saved(tmp_path: Path) -> None:
    model = net()
    model.norm.bias = model.norm.weight
    manifest = save_encoder(model, spec(), tmp_path / "a.safetensors")
    assert load_encoder(spec(weights=tmp_path / "a.safetensors")).manifest == manifest
