"""How the configuration names an encoder, and which encoder a project then means."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from migrator.config import load_config
from migrator.errors import ConfigError
from migrator.project import Project
from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.loading import load_base
from migrator.trainer.encoders.saving import save_encoder, save_mapped_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.maps import Map

OLD = "{arch: test_resnet, weights: old.pt, dim: 8, image_size: 16}"
NEW = "{arch: test_resnet, dim: 8, image_size: 16}"
Open = Callable[..., Project]


def write(
    folder: Path, old: str = OLD, new: str = NEW, train: str | None = "{items: t.csv}", artifacts: str = "a"
) -> Path:
    path = folder / "migrations.yaml"
    path.write_text(f"""\
version: 1
artifacts: {artifacts}
migrations:
  m:
    store: {{kind: faiss, path: ./gallery}}
    images: {{root: ./images}}
    old_encoder: {old}
    new_encoder: {new}
    verify: {{label: "{{category}}"}}
""" + (f"    train: {train}\n" if train else ""))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"old": "{dim: 8, image_size: 16}"}, ":7: migrations.m.old_encoder.weights: names no model: add arch"),
        ({"old": "{weights: o.pt, dim: 8, image_size: 16}"}, "old_encoder.weights: names no model"),
        ({"old": "{arch: r, dim: 8, image_size: 16}"}, "old_encoder.weights: missing"),
        ({"old": "{arch: r, weights: o.onnx, dim: 8, image_size: 16}"}, "holds the whole model: remove arch"),
        ({"old": "{module: 'a:b', weights: o.pt2, dim: 8, image_size: 16}"}, "holds the whole model: remove module"),
        ({"new": "{arch: r, module: 'a:b', dim: 8, image_size: 16}"}, ":8: migrations.m.new_encoder.module: excludes"),
        ({"new": "{module: a.b, dim: 8, image_size: 16}"}, "new_encoder.module: must be package.module:factory"),
        ({"new": "{module: 'a b:c', dim: 8, image_size: 16}"}, "new_encoder.module: must be package.module:factory"),
        ({"new": "{module: 'a:b', dim: 8, image_size: 16, pretrained: true}"}, "pretrained: is for a timm arch"),
        ({"new": "{module: 'a:b', dim: 8, preprocessing: timm}"}, "preprocessing: timm knows only its own"),
        ({"new": "{arch: r, dim: 8}"}, "new_encoder.image_size: missing"),
        ({"new": "{arch: r, head: none, dim: 8, image_size: 16}"}, "new_encoder.head: says which layer of the weights"),
        ({"new": "{arch: r, checkpoint_key: a, dim: 8, image_size: 16}"}, "checkpoint_key: says which part of the"),
        ({"old": "{weights: o.onnx, checkpoint_key: a, dim: 8, image_size: 16}"}, "checkpoint_key: is for a file with"),
        ({"old": "{weights: o.pt2, head: none, dim: 8, image_size: 16}"}, "old_encoder.head: is for a timm arch"),
        ({"new": "{arch: r, dim: 8, image_size: 16, crop_pct: 0}"}, "crop_pct: must be greater than or equal to 0.1"),
        ({"train": "{items: t.csv, method: ridge}"}, "train: method ridge maps the vectors of a finished encoder"),
        ({"train": None}, "train: missing, and new_encoder has no weights"),
    ],
)  # fmt: skip
def test_what_names_no_encoder_is_told_with_its_key(tmp_path: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, **change))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("new", "train"),
    [
        ("{module: 'a:b', dim: 8, image_size: 16}", None),
        ("{module: 'pack.a_1:b', dim: 8, image_size: 16}", "{items: t.csv, method: procrustes}"),
        ("{weights: n.onnx, dim: 8, image_size: 16}", "{items: t.csv, method: residual_mlp}"),
        ("{arch: r, pretrained: true, dim: 8, preprocessing: timm}", "{items: t.csv, method: ridge}"),
        ("{weights: n.pt2, dim: 8, image_size: 16, crop_pct: 0.9}", None),
    ],
)
def test_encoders_that_need_no_more_are_taken(tmp_path: Path, new: str, train: str | None) -> None:
    config = load_config(write(tmp_path, new=new, train=train))
    assert "resize" not in config.redacted()["migrations"]["m"]["new_encoder"]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens a project; what `train` has left is there already if `left` says so."""

    def open_(*, left: str | None = None, **changes: str | None) -> Project:
        project = Project.open(write(tmp_path, **changes))  # type: ignore[arg-type]
        if left is not None:
            torch.set_num_threads(1)
            path = project.training_folder() / "encoder.safetensors"
            spec = EncoderSpec("test_resnet", 8, Preprocessing(16))
            save_encoder(build_model(spec), spec, path)
            if left == "mapped":
                spec = EncoderSpec("test_resnet", 8, Preprocessing(16), path)
                save_mapped_encoder(load_base(spec), spec, Map("ridge", 8, 8), 8, path)
            if "module" in (changes.get("new") or ""):  # what training behind that factory leaves
                manifest = json.loads(path.with_suffix(".json").read_text())
                path.with_suffix(".json").write_text(json.dumps({**manifest, "arch": "module:a:b"}))
        return project

    return open_


RIDGE = "{items: t.csv, method: ridge}"
FINISHED = "{arch: test_resnet, weights: n.pt, dim: 8, image_size: 16}"


@pytest.mark.parametrize(
    ("new", "train", "left", "weights"),
    [
        (NEW, "{items: t.csv}", None, "untrained"),
        (NEW, "{items: t.csv}", "trained", "training"),
        (FINISHED, None, None, "n.pt"),
        (FINISHED, None, "mapped", "n.pt"),  # what a train section that is gone has left
        (FINISHED, "{items: t.csv}", None, "n.pt"),
        (FINISHED, "{items: t.csv}", "trained", "n.pt"),  # weights were given after that training
        (FINISHED, "{items: t.csv}", "mapped", "training"),  # train --method ridge
        (FINISHED, RIDGE, None, "untrained"),
        (FINISHED, RIDGE, "mapped", "training"),
        ("{module: 'a:b', dim: 8, image_size: 16}", None, None, None),
        ("{module: 'a:b', dim: 8, image_size: 16}", "{items: t.csv}", None, "untrained"),
        ("{module: 'a:b', dim: 8, image_size: 16}", RIDGE, "mapped", "training"),
    ],
)
def test_which_weights_are_the_new_encoder(
    opened: Open, tmp_path: Path, new: str, train: str | None, left: str | None, weights: str | None
) -> None:
    with opened(new=new, train="{items: t.csv}", left=left):
        pass  # makes what is left
    project = Project.open(write(tmp_path, new=new, train=train))
    spec = project.new_spec()
    project.close()
    if weights == "untrained":
        assert spec is None
        return
    assert spec is not None
    folder = {"training": tmp_path / "a" / "m" / "training" / "encoder.safetensors", None: None}
    assert spec.weights == folder.get(weights, tmp_path / str(weights))


def test_artifacts_elsewhere_do_not_hinder_given_weights(opened: Open, tmp_path: Path) -> None:
    project = opened(new=FINISHED, artifacts="s3://bucket/artifacts")
    spec = project.new_spec()
    assert spec is not None
    assert spec.weights == tmp_path / "n.pt"
    with pytest.raises(ConfigError, match="training needs a local folder"):
        opened(artifacts="s3://bucket/artifacts").new_spec()


def test_a_project_says_where_its_encoders_come_from(opened: Open, tmp_path: Path) -> None:
    project = opened(
        old="{weights: old.onnx, dim: 8, image_size: 16, resize: crop, crop_pct: 0.9}",
        new="{module: 'a.b:c', dim: 8, image_size: 16, mean: [0, 0, 0]}",
    )
    assert project.old_spec() == EncoderSpec(
        "file:onnx", 8, Preprocessing(16, "crop", crop_pct=0.9), tmp_path / "old.onnx", folder=tmp_path
    )
    assert project.untrained_spec() == EncoderSpec(
        "module:a.b:c", 8, Preprocessing(16, mean=(0.0, 0.0, 0.0)), folder=tmp_path
    )
    assert [encoder.named for encoder in (project.settings.old_encoder, project.settings.new_encoder)] == [  # type: ignore[union-attr]
        "old.onnx",
        "a.b:c",
    ]


def test_a_program_below_a_map_keeps_its_file_before_training(opened: Open, tmp_path: Path) -> None:
    project = opened(new="{weights: n.pt2, dim: 8, image_size: 16}", train=RIDGE)
    for spec in (project.untrained_spec(), project.base_spec()):
        assert (spec.arch, spec.weights) == ("file:pt2", tmp_path / "n.pt2")


def test_preprocessing_is_timms_but_for_what_is_given(opened: Open) -> None:
    project = opened(new="{arch: vit_base_patch16_clip_224, dim: 8, preprocessing: timm, image_size: 64}")
    found = project.untrained_spec().preprocessing
    assert (found.image_size, found.resize, found.interpolation) == (64, "crop", "bicubic")
    assert found.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
