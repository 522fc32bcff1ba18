"""Weights files as training scripts leave them, read by timm's and torch's own means for comparison."""

import argparse
import collections
import copy
import dataclasses
import pathlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.torchvision_cpu import import_timm

ARCH, SIZE = "test_resnet", 32
PREPROCESSING = Preprocessing(SIZE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(classes: int = 10, seed: int = 0, arch: str = ARCH) -> Any:
    """timm's model as someone may have trained it, with statistics that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = import_timm().create_model(arch, num_classes=classes).eval()
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.uniform_(-0.1, 0.1)
        return model


def spec(weights: Path, **changes: Any) -> EncoderSpec:
    return dataclasses.replace(EncoderSpec(ARCH, network(0).num_features, PREPROCESSING, weights), **changes)


def pictures(size: int = SIZE, n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def pooled(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    """Unit vectors of a model without its classifier, as timm takes it away."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    bare: Any = copy.deepcopy(model).eval()
    if bare.num_classes:
        bare.reset_classifier(0)
    with torch.no_grad():
        return F.normalize(bare((torch.tensor(batch) / 255 - mean) / std)).numpy()


def refused(spec: EncoderSpec, *said: str) -> str:
    with pytest.raises(EncoderProblem) as caught:
        load_encoder(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    assert "damaged" not in message
    for part in said:
        assert part in message
    return message


# --- wrappers


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def averaged(model: nn.Module) -> dict[str, Any]:
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def compiled_within(state: dict[str, Any]) -> dict[str, Any]:
    """As where `torch.compile` was applied to a stage, not to the whole."""
    return {name.replace("layer1.", "layer1._orig_mod."): tensor for name, tensor in state.items()}


WRAPPED: dict[str, tuple[Callable[[nn.Module], Any], str | None]] = {
    "plain": (lambda m: m.state_dict(), None),
    "compiled": (lambda m: torch.compile(m).state_dict(), None),  # type: ignore[attr-defined]
    "DDP of a compiled model": (lambda m: prefixed(m.state_dict(), "module._orig_mod."), "module"),
    "compiled DDP": (lambda m: prefixed(m.state_dict(), "_orig_mod.module."), "module"),
    "a stage compiled": (lambda m: compiled_within(m.state_dict()), None),
    "DataParallel": (lambda m: nn.DataParallel(m).state_dict(), "module"),
    "AveragedModel": (averaged, "module, without 1 tensor (n_averaged) beside it"),
    "Lightning": (
        lambda m: {
            "epoch": 3,
            "global_step": 900,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {**prefixed(m.state_dict(), "model."), "criterion.weight": torch.ones(10)},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "hyper_parameters": argparse.Namespace(lr=0.1, root=pathlib.PurePosixPath("/data")),
        },
        "state_dict.model, without 1 tensor (criterion.weight) beside it",
    ),
    "timm's train.py": (
        lambda m: {"epoch": 1, "arch": ARCH, "state_dict": m.state_dict(), "args": argparse.Namespace(), "metric": 0.5},
        "state_dict",
    ),
    "the references of torchvision": (
        lambda m: {"model": m.state_dict(), "lr_scheduler": {"last_epoch": 3}, "args": argparse.Namespace()},
        "model",
    ),
    "moving average that is the same": (lambda m: {"model": m.state_dict(), "model_ema": m.state_dict()}, "model"),
    "model_state_dict": (lambda m: {"model_state_dict": m.state_dict(), "loss": torch.tensor(0.1)}, "model_state_dict"),
    "net": (lambda m: {"net": nn.DataParallel(m).state_dict(), "acc": np.float64(93.1), "epoch": 7}, "net.module"),
    "DINO": (
        lambda m: {
            "teacher": {
                **prefixed(m.state_dict(), "backbone."),
                "head.mlp.0.weight": torch.ones(8, 8),
                "head.last_layer.weight_v": torch.ones(8, 8),
            },
            "args": argparse.Namespace(arch=ARCH),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        "teacher.backbone, without 2 tensors (head.mlp.0.weight, head.last_layer.weight_v) beside it",
    ),
    "DeepSpeed": (lambda m: {"module": m.state_dict(), "ds_config": {"zero": collections.deque([1])}}, "module"),
    "transformers around timm": (lambda m: prefixed(m.state_dict(), "timm_model."), "timm_model"),
    "open_clip around timm": (lambda m: prefixed(m.state_dict(), "visual.trunk."), "visual.trunk"),
    "a name of somebody's own": (lambda m: {"weights": prefixed(m.state_dict(), "my.left.")}, "weights.my.left"),
    "counters of thop": (lambda m: {**m.state_dict(), "total_ops": torch.ones(1), "fc.total_ops": torch.ones(1)}, None),
    "half precision": (lambda m: {"state_dict": m.half().state_dict()}, "state_dict"),
    "bfloat16": (lambda m: {"state_dict": m.bfloat16().state_dict()}, "state_dict"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own, when it compiles
@pytest.mark.parametrize("name", WRAPPED)
def test_the_network_is_found_in_what_wraps_it(tmp_path: Path, name: str) -> None:
    wrap, taken = WRAPPED[name]
    suffix = {"Lightning": ".ckpt", "timm's train.py": ".pth.tar", "DeepSpeed": ".bin", "DINO": ".pth"}.get(name, ".pt")
    torch.save(wrap(network()), tmp_path / f"weights{suffix}")
    encoder = load_encoder(spec(tmp_path / f"weights{suffix}"))
    loose = "half" in name or "bfloat" in name
    assert np.abs(encoder.encode(pictures()) - pooled(network(), pictures())).max() < (0.02 if loose else 1e-5)
    assert encoder.taken == taken
    if not loose:  # the same numbers are the same encoder, whatever is around them
        torch.save(network().state_dict(), tmp_path / "plain.pt")
        assert encoder.id == load_encoder(spec(tmp_path / "plain.pt")).id
    if taken is not None:
        place = taken.partition(",")[0]
        named = load_encoder(spec(tmp_path / f"weights{suffix}", checkpoint_key=place))
        assert named.id == encoder.id


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_old_and_new_torch_and_safetensors_under_any_name(tmp_path: Path, legacy: bool) -> None:
    content = {"state_dict": network().state_dict(), "args": argparse.Namespace(lr=1), "best": np.float32(0.5)}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=not legacy)
    save_file(network().state_dict(), tmp_path / "model.bin")
    wanted = pooled(network(), pictures())
    for name in ("a.pth.tar", "model.bin"):
        assert np.abs(load_encoder(spec(tmp_path / name)).encode(pictures()) - wanted).max() < 1e-5


def test_migrators_own_weights_within_data_parallel(tmp_path: Path) -> None:
    declared = EncoderSpec(ARCH, 8, PREPROCESSING)
    manifest = save_encoder(build_model(declared), declared, tmp_path / "own.safetensors")
    own = load_encoder(dataclasses.replace(declared, weights=tmp_path / "own.safetensors"))
    torch.save({"state_dict": prefixed(own.model.state_dict(), "module.")}, tmp_path / "wrapped.pt")
    again = load_encoder(dataclasses.replace(declared, weights=tmp_path / "wrapped.pt"))
    assert (again.id, again.manifest.head) == (manifest.id, "projection")


def test_weights_of_the_model_that_a_factory_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a factory is written that adds a norm to timm's model, and wants the weights of that model."""
    (tmp_path / "wraps.py").write_text(
        "import timm, torch\n"
        "class Wraps(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.tower = timm.create_model({ARCH!r}, num_classes=0)\n"
        "    def forward(self, images): return torch.nn.functional.normalize(self.tower(images))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    declared = dataclasses.replace(spec(tmp_path / "a.pt"), arch="module:wraps:Wraps", folder=tmp_path)
    for state in (network(0).state_dict(), {"model": prefixed(network(0).state_dict(), "module.")}):
        torch.save(state, tmp_path / "a.pt")
        assert np.abs(load_encoder(declared).encode(pictures()) - pooled(network(0), pictures())).max() < 1e-5


# --- several networks in one file


SEVERAL: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str, str]] = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict", "state_dict_ema"),
    "torchvision": (lambda a, b: {"model": a, "model_ema": {**prefixed(b, "module."), "n_averaged": torch.tensor(5)}},
                    "model", "model_ema.module"),
    "DINO": (lambda a, b: {"student": prefixed(a, "module.backbone."), "teacher": prefixed(b, "backbone.")},
             "student.module.backbone", "teacher.backbone"),
    "MoCo": (lambda a, b: {"state_dict": {**prefixed(a, "module.encoder_q."), **prefixed(b, "module.encoder_k."),
                                          "module.queue": torch.ones(2, 2), "module.queue_ptr": torch.zeros(1)}},
             "state_dict.module.encoder_q", "state_dict.module.encoder_k"),
    "ema_pytorch": (lambda a, b: {**prefixed(a, "online_model."), **prefixed(b, "ema_model."),
                                  "initted": torch.tensor(True), "step": torch.tensor(1)},
                    "online_model", "ema_model"),
    "beside itself": (lambda a, b: {**a, "ema": b}, "", "ema"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_networks_one_must_be_named(tmp_path: Path, name: str) -> None:
    together, first, second = SEVERAL[name]
    path = tmp_path / "both.pt"
    torch.save(together(network(seed=0).state_dict(), network(seed=1).state_dict()), path)
    refused(spec(path), "different weights of architecture 'test_resnet' in 2 places: set checkpoint_key to", second)
    for seed, place in ((0, first), (1, second)):
        for key in {place, place.partition(".")[0] if name != "MoCo" else place} - {""}:
            encoder = load_encoder(spec(path, checkpoint_key=key))
            assert np.abs(encoder.encode(pictures()) - pooled(network(seed=seed), pictures())).max() < 1e-5
            assert str(encoder.taken).startswith(place)


def test_of_several_networks_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    torch.save({"teacher": network(arch="test_vit").state_dict(), "student": network().state_dict()}, tmp_path / "a.pt")
    assert load_encoder(spec(tmp_path / "a.pt")).taken == "student"


def test_a_key_that_names_nothing_is_told_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": network().state_dict(), "epoch": 1, "other": {"x": torch.ones(1)}}, path)
    refused(spec(path, checkpoint_key="model"), "checkpoint_key 'model' names no weights", "set it to state_dict")
    refused(spec(path, checkpoint_key="other"), "checkpoint_key 'other' names no weights", "set it to state_dict")
    torch.save({"one": {"x": torch.ones(1)}, "epoch": 1}, path)
    refused(spec(path, checkpoint_key="two"), "checkpoint_key 'two' is not in", "holds one with 1 tensor (x), epoch")
    torch.save(network().state_dict(), path)
    refused(spec(path, checkpoint_key="model"), "remove it, the file is their state dict")


def test_what_lies_beside_a_network_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    """A layer behind the backbone may be what made the vectors."""
    path = tmp_path / "a.pt"
    torch.save({**prefixed(network().state_dict(), "backbone."), "neck.weight": torch.ones(8, 8)}, path)
    refused(spec(path), "in backbone, and 1 tensor (neck.weight) beside them: set checkpoint_key to backbone", "module")
    encoder = load_encoder(spec(path, checkpoint_key="backbone"))
    assert np.abs(encoder.encode(pictures()) - pooled(network(), pictures())).max() < 1e-5


def test_a_classifier_that_someone_replaced_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    model: Any = network()
    width = model.num_features
    model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told = "hold fc.0.weight, fc.0.bias, fc.2.weight in place of the classifier of architecture 'test_resnet'"
    refused(spec(tmp_path / "a.pt"), told, "set head to none")
    encoder = load_encoder(spec(tmp_path / "a.pt", head="none"))
    assert np.abs(encoder.encode(pictures()) - pooled(network(), pictures())).max() < 1e-5


def test_weights_of_something_else_are_told_with_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    vit = prefixed(network(arch="test_vit").state_dict(), "model.")
    torch.save({"state_dict": vit, "epoch": 3}, path)
    refused(spec(path), "do not fit architecture 'test_resnet'", "missing", "unknown", "name the architecture")
    torch.save({"state_dict": vit, "ema": vit, "epoch": 3}, path)
    refused(spec(path), "(conv1.0.weight", "the file holds state_dict with ", ", epoch: set checkpoint_key to")
    for names, library in (
        (["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "transformers"),
        (["vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight"], "transformers"),
        (["encoder.layers.encoder_layer_0.ln_1.weight"], "torchvision"),
        (["features.0.0.weight"], "torchvision"),
        (["visual.transformer.resblocks.0.ln_1.weight"], "CLIP"),
    ):
        torch.save({name: torch.ones(4) for name in names}, path)
        refused(spec(path), f"its names look like those of {library}: give a module")


def test_weights_for_another_image_size_say_so(tmp_path: Path) -> None:
    torch.save(network(arch="test_vit").state_dict(), tmp_path / "a.pt")  # for 160 pixels
    declared = EncoderSpec("test_vit", 64, Preprocessing(96), tmp_path / "a.pt")
    refused(declared, "pos_embed (1, 101, 64) instead of (1, 37, 64)", "for another image_size")


# --- names of an older timm, and of the authors of an architecture


def in_clips_names(model: nn.Module) -> dict[str, Any]:
    """The state dict of timm's model as OpenAI's CLIP names it, a text tower beside it."""
    names = {
        "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.",
        "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "norm1": "ln_1", "norm2": "ln_2",
    }  # fmt: skip
    state = dict(model.state_dict())
    found = {"visual.proj": state.pop("head.weight").T.contiguous(), "logit_scale": torch.tensor(1.0)}
    found["visual.class_embedding"] = state.pop("cls_token")[0, 0]
    found["visual.positional_embedding"] = state.pop("pos_embed")[0]
    found["token_embedding.weight"] = torch.ones(8, 8)
    del state["head.bias"]
    for name, tensor in state.items():
        renamed = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        for timms, clips in names.items():
            renamed = renamed.replace(timms, clips)
        found[f"visual.{renamed}"] = tensor
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_visual_tower_of_clip_is_loaded_into_timms_model_of_it(tmp_path: Path, prefix: str) -> None:
    arch, size, dim = "vit_xsmall_patch16_clip_224", 224, 24
    model: Any = network(dim, arch=arch)
    with torch.no_grad():
        model.head.bias.zero_()  # CLIP's projection has none
    torch.save({"state_dict": prefixed(in_clips_names(model), prefix)}, tmp_path / "clip.pt")
    encoder = load_encoder(EncoderSpec(arch, dim, Preprocessing(size), tmp_path / "clip.pt"))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    with torch.no_grad():
        wanted = F.normalize(model((torch.tensor(pictures(size, 1)) / 255 - mean) / std)).numpy()
    assert np.abs(encoder.encode(pictures(size, 1)) - wanted).max() < 1e-5
    assert encoder.manifest.head == "classifier"
    assert encoder.taken == "state_dict, with names changed as timm does for this architecture"


def test_names_of_convnexts_authors_and_buffers_of_an_older_timm_are_known(tmp_path: Path) -> None:
    model = network(arch="test_convnext")
    renamed = {}
    for name, tensor in model.state_dict().items():
        found = re.sub(r"stem\.(\d)", r"downsample_layers.0.\1", name)
        found = re.sub(r"stages\.(\d+)\.downsample\.(\d+)", r"downsample_layers.\1.\2", found)
        found = re.sub(r"stages\.(\d+)\.blocks\.(\d+)", r"stages.\1.\2", found)
        for timms, authors in (("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("head.norm", "norm"), ("head.fc", "head")):
            found = found.replace(timms, authors)
        renamed[found] = tensor
    torch.save({"model": renamed}, tmp_path / "convnext.pth")
    wanted = pooled(model, pictures(64))
    declared = EncoderSpec("test_convnext", wanted.shape[1], Preprocessing(64), tmp_path / "convnext.pth")
    assert np.abs(load_encoder(declared).encode(pictures(64)) - wanted).max() < 1e-5
    arch, size = "swin_tiny_patch4_window7_224", 224
    swin = network(0, arch=arch)
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    for name in swin.state_dict():
        if name.endswith("relative_position_bias_table"):
            buffers[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({**swin.state_dict(), **buffers}, tmp_path / "swin.pt")
    encoder = load_encoder(EncoderSpec(arch, swin.num_features, Preprocessing(size), tmp_path / "swin.pt"))
    assert encoder.taken == "with names changed as timm does for this architecture"


# --- files that are not state dicts


class Setting:
    """Of a class that the reader knows nothing about."""

    def __init__(self) -> None:
        self.values = {"lr": [0.1], "milestones": (1, 2)}


class Settings(dict[str, Any]):
    pass


class AttrDict(dict[str, Any]):
    pass


def runs_code() -> Any:
    class Runs:
        def __reduce__(self) -> Any:
            return print, ("code from the weights file was run",)

    return Runs()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        lambda: {"a": Setting()},
        lambda: {"a": AttrDict(lr=1, more=AttrDict(x=2))},
        lambda: {"a": Settings(lr=1)},
        lambda: {"a": np.float64(1), "b": np.arange(3), "c": np.dtype("f4")},
        lambda: {"a": collections.defaultdict(list, {"x": [1]}), "b": collections.deque([1, 2])},
        lambda: {"a": pathlib.PurePosixPath("/data"), "b": torch.nn.functional.relu, "c": slice(1, 2)},
        lambda: {"a": runs_code(), Setting(): 1},
    ],
)
def test_other_objects_in_a_checkpoint_are_not_made(
    tmp_path: Path, other: Callable[[], Any], legacy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": network().state_dict(), **other()}, path, _use_new_zipfile_serialization=not legacy)
    allowed = set(torch.serialization.get_safe_globals())
    with pytest.MonkeyPatch.context() as patch:  # nor is the module of a class imported or searched
        patch.setattr(sys.modules[__name__], "Setting", None)
        encoder = load_encoder(spec(path))
    assert encoder.taken == "state_dict"
    assert "was run" not in capsys.readouterr().out
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_whole_models_are_answered_with_a_recipe_that_works(tmp_path: Path) -> None:
    for content, entry in ((network(), ""), ({"model": network(), "epoch": 1}, "['model']")):
        torch.save(content, tmp_path / "whole.pt")
        message = refused(
            spec(tmp_path / "whole.pt"), "holds a whole model as Python objects (timm.models.resnet.ResNet"
        )
        recipe = message.partition("is installed, ")[2]
        assert recipe == f"torch.save(torch.load(FILE, weights_only=False){entry}.state_dict(), 'weights.pt')"
        recipe = recipe.replace("'weights.pt'", repr(str(tmp_path / "weights.pt")))
        exec(recipe, {"torch": torch, "FILE": tmp_path / "whole.pt"})
        encoder = load_encoder(spec(tmp_path / "weights.pt"))
        assert np.abs(encoder.encode(pictures()) - pooled(network(), pictures())).max() < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_answered_with_recipes_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.save(torch.jit.trace(network(0), torch.zeros(1, 3, SIZE, SIZE)), tmp_path / "script.pt")
    message = refused(spec(tmp_path / "script.pt"), "is a TorchScript program")
    recipe = message.partition("its weights with ")[2].partition(", or give")[0]
    recipe = recipe.replace("'weights.pt'", repr(str(tmp_path / "weights.pt")))
    exec(recipe, {"torch": torch, "FILE": str(tmp_path / "script.pt")})
    factory = f"import torch\ndef build(): return torch.jit.load({str(tmp_path / 'script.pt')!r})\n"
    (tmp_path / "scripted.py").write_text(factory)
    monkeypatch.setattr(sys, "path", list(sys.path))
    as_module = dataclasses.replace(spec(tmp_path / "x"), arch="module:scripted:build", weights=None, folder=tmp_path)
    for declared in (spec(tmp_path / "weights.pt"), as_module):
        assert np.abs(load_encoder(declared).encode(pictures()) - pooled(network(0), pictures())).max() < 1e-5


def test_files_that_hold_no_weights_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    program = torch.export.export(network(0), (torch.zeros(1, 3, SIZE, SIZE),))
    torch.export.save(program, tmp_path / "program.pt2")
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    index = b'{"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page"),
        (b"\x1f\x8b\x08" + bytes(99), "is compressed with gzip"),
        (b"\x89HDF\r\n" + bytes(99), "is an HDF5 file"),
        (bytes(257) + b"ustar" + bytes(300), "is a tar archive"),
        (pickle.dumps({"a": 1}), "is a pickle of Python objects"),
        (index, "is the index of 2 files: put them together"),
        (b'{"architectures": []}', "is a JSON file"),
        ((tmp_path / "program.pt2").read_bytes(), "is a program of torch.export: rename it to .pt2"),
        ((tmp_path / "arrays.npz").read_bytes(), "is a NumPy archive"),
    ):
        path.write_bytes(content)
        refused(spec(path), said)


def test_a_sharded_checkpoint_is_put_together_by_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = network().state_dict()
    names = sorted(state)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, file in enumerate(files):
        save_file({name: state[name] for name in names[number::2]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    recipe = refused(spec(index), "is the index of 2 files").partition("safetensors.torch ")[2]
    monkeypatch.chdir(tmp_path)
    exec("from safetensors.torch import load_file, save_file\n" + recipe, {"FILES": files})
    encoder = load_encoder(spec(tmp_path / "weights.safetensors"))
    assert np.abs(encoder.encode(pictures()) - pooled(network(), pictures())).max() < 1e-5


# --- heads of timm's families


FAMILIES = [
    ("levit_128s", 224), ("shvit_s1", 64), ("pit_ti_distilled_224", 224), ("test_vit", 160), ("test_convnext", 64),
    ("test_byobnet", 64), ("test_nfnet", 64), ("test_efficientnet", 64),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "size"), FAMILIES)
def test_what_timm_drops_with_its_classifier_is_a_head(tmp_path: Path, arch: str, size: int) -> None:
    timm = import_timm()
    full = network(11, arch=arch)
    torch.save(full.state_dict(), tmp_path / "full.pt")
    bare = timm.create_model(arch, num_classes=0).eval()
    head = set(full.state_dict()) - set(bare.state_dict())
    bare.load_state_dict({name: tensor for name, tensor in full.state_dict().items() if name not in head})
    batch = pictures(size)
    wanted = pooled(bare, batch)
    declared = EncoderSpec(arch, wanted.shape[1], Preprocessing(size), tmp_path / "full.pt")
    encoder = load_encoder(declared)
    assert np.abs(encoder.encode(batch) - wanted).max() < 1e-4
    assert (encoder.manifest.head, encoder.taken) == ("none", None)
    with_classes = load_encoder(dataclasses.replace(declared, dim=11))
    timm.models.load_checkpoint(again := timm.create_model(arch, num_classes=11).eval(), str(tmp_path / "full.pt"))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    with torch.no_grad():
        logits = F.normalize(again((torch.tensor(batch) / 255 - mean) / std)).numpy()
    assert np.abs(with_classes.encode(batch) - logits).max() < 1e-4
    assert with_classes.manifest.head == "classifier"
