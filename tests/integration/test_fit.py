"""Training on real images, small: the digits of scikit-learn at 16 pixels with timm's smallest ResNet."""

import csv
import io
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from migrator.trainer.data.items import TrainingItems, training_items
from migrator.trainer.encoders.encoder import Encoder
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import TrainingFailed, TrainingInterrupted, TrainingProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.maps import POST_HOC
from migrator.trainer.old_space import stored_vectors
from migrator.trainer.training import run_folder
from migrator.trainer.training.classifier import read_classifier
from migrator.trainer.training.fit import fit
from migrator.trainer.training.loop import learning_rate
from migrator.trainer.training.progress import Progress
from migrator.trainer.training.result import FitResult
from migrator.trainer.training.settings import FitSettings
from migrator.trainer.training.setup import build_optimizer
from migrator.trainer.training.validation import mean_average_precision

SPEC = EncoderSpec("test_resnet", 16, Preprocessing(image_size=16))
TRAINED_ON = 600
FAST = FitSettings(epochs=2, batch_size=50, device="cpu", image_threads=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder with 0.png..899.png and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for number, image in enumerate(data.images[:900]):
        PIL.Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{number}.png")
    return folder, data.target[:900]


@pytest.fixture(scope="module")
def images(digits: tuple[Path, np.ndarray]) -> ImageSource:
    return ImageSource(str(digits[0]))


def items_of(digits: tuple[Path, np.ndarray], rows: range) -> TrainingItems:
    return training_items([f"{row}.png" for row in rows], [str(digits[1][row]) for row in rows], source="digits")


@pytest.fixture(scope="module")
def items(digits: tuple[Path, np.ndarray]) -> TrainingItems:
    return items_of(digits, range(TRAINED_ON))


@pytest.fixture(scope="module")
def few(digits: tuple[Path, np.ndarray]) -> TrainingItems:
    return items_of(digits, range(200))


@pytest.fixture(scope="module")
def old(digits: tuple[Path, np.ndarray], images: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Trained on 200 of the images."""
    settings = replace(FAST, method="independent", epochs=5, batch_size=10, lr=0.005, validation=0, seed=7)
    result = fit(items_of(digits, range(200)), images, None, SPEC, settings, tmp_path_factory.mktemp("old") / "run")
    return load_encoder(replace(SPEC, weights=result.weights), expected=result.manifest, device="cpu")


@pytest.fixture(scope="module")
def longer(few: TrainingItems, images: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an independent encoder of 24 dimensions, for maps."""
    settings = replace(FAST, method="independent", epochs=6, batch_size=20, lr=0.005, seed=3)
    out = tmp_path_factory.mktemp("longer")
    return fit(few, images, None, replace(SPEC, dim=24), settings, out).weights


def weights_of(result: FitResult) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(result.weights).items()}


def test_advbct_gives_a_better_encoder_whose_queries_work_in_the_old_gallery(
    digits: tuple[Path, np.ndarray], items: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    reports: list[Progress] = []
    settings = replace(FAST, epochs=6, batch_size=20, lr=0.005)
    result = fit(items, images, old, SPEC, settings, tmp_path / "new", report=reports.append)
    new = load_encoder(replace(SPEC, weights=result.weights), expected=result.manifest, device="cpu")

    # Queries that neither encoder was trained on.
    pixels = np.stack([new.prepare(images.load(f"{row}.png")) for row in range(900)])
    labels = digits[1].astype(np.int64)
    queries, gallery = slice(TRAINED_ON, 750), np.r_[0:300, 750:900]
    vectors = {name: np.concatenate([e.encode(p) for p in np.split(pixels, 9)]) for name, e in [("o", old), ("n", new)]}
    score = {
        q + g: mean_average_precision(vectors[q][queries], vectors[g][gallery], labels[queries], labels[gallery])
        for q in "on"
        for g in "on"
    }
    assert score["no"] > score["oo"]
    assert score["nn"] > score["oo"]

    # What the run reported of itself.
    assert set(result.validation) == {"self", "cross", "old", "reverse", "procrustes"}
    assert result.validation["cross"] > result.validation["procrustes"]
    assert result.validation["cross"] > result.validation["old"]
    assert len(result.history) == 6
    with (tmp_path / "new" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["cross"]) for row in rows] == [row["cross"] for row in result.history]
    assert result.history[-1]["classification"] < result.history[0]["classification"]
    assert {report.stage for report in reports} == {"images", "old vectors", "train"}
    last = reports[-1]
    assert (last.epoch, last.step) == (last.epochs, last.steps)
    assert last.validation["cross"] == result.history[-1]["cross"]
    assert all(report.images_per_second > 0 for report in reports)

    # The folder: the last two checkpoints, the best epoch's weights, the encoder and what belongs to it.
    kept = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"checkpoint-00005.pt", "checkpoint-00006.pt", "best.pt", "encoder.safetensors", "encoder.json"} <= kept
    assert "checkpoint-00004.pt" not in kept
    best = max(result.history, key=lambda row: (row["p1"], row["epoch"]))
    assert result.best_epoch == best["epoch"]
    assert result.validation["cross"] == pytest.approx(best["cross"])


def test_an_independent_encoder_cannot_search_the_old_gallery(
    items: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    result = fit(items, images, old, SPEC, replace(FAST, method="independent", epochs=3), tmp_path)
    assert result.validation["cross"] < 0.5 * result.validation["old"]


class Stop(Exception):
    pass


def stop_after(epoch: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.stage == "train" and progress.epoch > epoch:
            raise Stop

    return report


def test_resume_gives_the_uninterrupted_result_and_a_finished_run_is_left_alone(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    settings = replace(FAST, epochs=4)
    whole = fit(few, images, old, SPEC, settings, tmp_path / "whole")
    for epoch in (0, 1, 3):
        with pytest.raises(Stop):
            fit(few, images, old, SPEC, settings, tmp_path / "parts", report=stop_after(epoch))
    parts = fit(few, images, old, SPEC, settings, tmp_path / "parts")
    assert weights_of(parts) == weights_of(whole)
    assert parts.manifest == whole.manifest
    assert parts.validation == whole.validation
    assert [row["classification"] for row in parts.history] == [row["classification"] for row in whole.history]

    def not_again(progress: Progress) -> None:
        raise AssertionError("trained again")

    assert fit(few, images, old, SPEC, settings, tmp_path / "parts", report=not_again) == parts


def test_a_run_is_continued_that_called_excluded_images_left_out(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    settings = replace(FAST, method="independent")
    whole = fit(few, images, None, SPEC, settings, tmp_path / "whole")
    out = tmp_path / "earlier"
    with pytest.raises(Stop):
        fit(few, images, None, SPEC, settings, out, report=stop_after(1))
    for name, now, then in (("run", "train.max_excluded", "train.most_left_out"), ("inputs", "excluded", "left_out")):
        text = (out / f"{name}.json").read_text()
        assert f'"{now}"' in text
        (out / f"{name}.json").write_text(text.replace(f'"{now}"', f'"{then}"'))
    assert weights_of(fit(few, images, None, SPEC, settings, out)) == weights_of(whole)
    finished = (out / "result.json").read_text()
    (out / "result.json").write_text(finished.replace('"excluded"', '"left_out"'))
    assert fit(few, images, None, SPEC, settings, out).excluded == []


def test_stop_writes_a_checkpoint_within_the_epoch_and_finish_takes_the_best_whole_one(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    settings = replace(FAST, epochs=3)
    whole = fit(few, images, old, SPEC, settings, tmp_path / "whole")
    with pytest.raises(TrainingProblem, match="no trained epoch yet"):
        fit(few, images, old, SPEC, settings, tmp_path / "parts", finish=True)
    stop = threading.Event()

    def at_the_end_of_epoch_two(progress: Progress) -> None:
        if progress.epoch == 2 and progress.validation:
            stop.set()

    with pytest.raises(TrainingInterrupted, match="in epoch 3 of 3"):
        fit(few, images, old, SPEC, settings, tmp_path / "parts", stop=stop, report=at_the_end_of_epoch_two)
    with pytest.raises(TrainingInterrupted):  # still set: one step further, and a checkpoint within epoch 3
        fit(few, images, old, SPEC, settings, tmp_path / "parts", stop=AfterOneLook())
    assert [path.name for path in run_folder.checkpoints(tmp_path / "parts")][-1] == "checkpoint-00002-0000001.pt"
    shutil.copytree(tmp_path / "parts", tmp_path / "early")
    early = fit(few, images, old, SPEC, settings, tmp_path / "early", finish=True)
    p1 = [row["p1"] for row in whole.history]
    assert early.best_epoch == 1 + int(np.argmax(p1[:2]))
    assert early.history == [{**row, "images_per_second": ANY} for row in whole.history[:2]]
    assert {"self", "cross", "old", "reverse"} <= early.validation.keys()
    assert early.validation["self"] == pytest.approx(whole.history[early.best_epoch - 1]["self"])
    assert (
        fit(few, images, old, SPEC, settings, tmp_path / "early").manifest == early.manifest
    )  # finished, and left alone
    assert weights_of(fit(few, images, old, SPEC, settings, tmp_path / "parts")) == weights_of(whole)


class AfterOneLook(threading.Event):
    """Set from the second time on that anybody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks > 1


def damage_by_cutting(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_by_a_flipped_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 500 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_a_flipped_bit])
def test_a_damaged_checkpoint_is_skipped(
    few: TrainingItems, images: ImageSource, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    settings = replace(FAST, method="independent", epochs=3)
    whole = fit(few, images, None, SPEC, settings, tmp_path / "whole")
    with pytest.raises(Stop):
        fit(few, images, None, SPEC, settings, tmp_path / "parts", report=stop_after(2))
    damage(tmp_path / "parts" / "checkpoint-00002.pt")
    epochs = []
    parts = fit(
        few,
        images,
        None,
        SPEC,
        settings,
        tmp_path / "parts",
        report=lambda progress: epochs.append(progress.epoch),
    )
    assert min(epochs) == 2  # from checkpoint 1
    assert weights_of(parts) == weights_of(whole)


def test_a_run_folder_is_replaced_only_on_request(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    settings = replace(FAST, method="independent", epochs=2)
    with pytest.raises(Stop):
        fit(few, images, None, SPEC, settings, tmp_path, report=stop_after(1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingProblem, match=r"an unfinished run with other inputs .* or replace it with --restart"):
        fit(few, images, None, SPEC, replace(settings, seed=5), tmp_path)
    first = fit(few, images, None, SPEC, replace(settings, seed=5), tmp_path, restart=True)
    with pytest.raises(TrainingProblem, match="a finished run"):
        fit(few, images, None, SPEC, settings, tmp_path)
    before = weights_of(first)
    second = fit(few, images, None, SPEC, replace(settings, seed=6), tmp_path, restart=True)
    assert weights_of(second) != before
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_refused_setting_can_be_corrected_without_more_words(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    settings = replace(FAST, method="independent", epochs=1)
    with pytest.raises(TrainingProblem, match="fewer than a batch"):
        fit(few, images, None, SPEC, replace(settings, batch_size=190), tmp_path)
    fit(few, images, None, SPEC, settings, tmp_path)


def test_resume_of_another_run_says_what_differs(
    few: TrainingItems, items: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    settings = replace(FAST, epochs=1)
    fit(few, images, old, SPEC, settings, tmp_path)
    with pytest.raises(TrainingProblem, match=r"\(train\.epochs was 1 and is 2; train\.lr was 0\.002 and is 0\.2\)"):
        fit(few, images, old, SPEC, replace(settings, epochs=2, lr=0.2), tmp_path)
    with pytest.raises(TrainingProblem, match=r"\(training items was \w+ and is \w+\)"):
        fit(items, images, old, SPEC, settings, tmp_path)
    with pytest.raises(TrainingProblem, match=rf"old encoder was {old.id} and is None; .*train\.method was advbct"):
        fit(few, images, None, SPEC, replace(settings, method="independent"), tmp_path)
    with pytest.raises(TrainingProblem, match=r"new_encoder\.image_size was 16 and is 24"):
        fit(few, images, old, replace(SPEC, preprocessing=Preprocessing(image_size=24)), settings, tmp_path)
    # What does not decide the outcome may change.
    fit(few, images, old, SPEC, replace(settings, image_threads=1, keep_checkpoints=1), tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingProblem, match=r"run\.json is damaged"):
        fit(few, images, old, SPEC, settings, tmp_path)


def test_a_second_process_in_the_folder_is_refused(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    settings = replace(FAST, method="independent", epochs=1)

    def meanwhile(progress: Progress) -> None:
        with pytest.raises(TrainingProblem, match="another process is training"):
            fit(few, images, None, SPEC, settings, tmp_path)

    fit(few, images, None, SPEC, settings, tmp_path, report=meanwhile)


def test_a_diverging_run_stops_and_names_the_step(
    few: TrainingItems, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(FAST, method="independent", epochs=3, lr=1e30)
    with pytest.raises(TrainingFailed, match=r"step \d of epoch 1 \(there is no checkpoint yet\)"):
        fit(few, images, None, SPEC, settings, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_images_that_cannot_be_read_are_left_out_up_to_a_share(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    assert few.labels is not None
    some_gone = training_items([*few.paths, "absent.png"], [*few.labels, "1"], source="list")
    settings = replace(FAST, method="independent", epochs=1)
    result = fit(some_gone, images, None, SPEC, settings, tmp_path / "some")
    assert [entry.path for entry in result.excluded] == ["absent.png"]
    with pytest.raises(TrainingProblem, match=r"1 of 201 training images cannot be used .*absent"):
        fit(some_gone, images, None, SPEC, replace(settings, max_excluded=0.001), tmp_path / "none")
    all_gone = training_items(["x.png", "y.png"], ["1", "2"], source="list")
    with pytest.raises(TrainingProblem, match="2 of 2 training images cannot be used"):
        fit(all_gone, images, None, SPEC, replace(settings, max_excluded=1), tmp_path / "all")


def test_unusable_input_is_refused(few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path) -> None:
    with pytest.raises(TrainingProblem, match=r"gives 16-d vectors .* 32-d: set new_encoder\.dim to 16"):
        fit(few, images, old, replace(SPEC, dim=32), FAST, tmp_path / "a")
    with pytest.raises(TrainingProblem, match="needs the old encoder"):
        fit(few, images, None, SPEC, FAST, tmp_path / "b")
    with pytest.raises(TrainingProblem, match=r"\d+ images are left .* held out.*fewer than a batch of 190"):
        fit(few, images, old, SPEC, replace(FAST, batch_size=190), tmp_path / "c")
    with pytest.raises(TrainingProblem, match=r"new_encoder\.weights"):
        fit(few, images, old, replace(SPEC, weights=tmp_path / "x.pt"), FAST, tmp_path / "d")
    one_class = training_items([*few.paths[:99], "absent.png"], ["1"] * 99 + ["2"], source="list")
    with pytest.raises(TrainingProblem, match="all of one class"):
        fit(one_class, images, old, SPEC, FAST, tmp_path / "e")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingProblem, match="cannot be written"):
        fit(few, images, old, SPEC, FAST, tmp_path / "file" / "run")


def test_settings_problems_are_told_together() -> None:
    with pytest.raises(TrainingProblem, match=r"validation must be from 0 to 1; epochs must be .*; lr must .*method"):
        FitSettings(validation=-1, epochs=0, lr=float("nan"), method="triplet")
    for bad in ({"batch_size": 1}, {"validation": 0.95}, {"seed": -1}, {"radius_limit": 0}):
        with pytest.raises(TrainingProblem):
            FitSettings(**bad)


def test_a_full_disk_is_a_problem_with_a_name_and_room_is_all_it_takes(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    settings = replace(FAST, method="independent", epochs=2)
    whole = fit(few, images, None, SPEC, settings, tmp_path / "whole")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-00002.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainingProblem, match=r"No space left on device: make room .* run the same command again"):
        fit(few, images, None, SPEC, settings, run)
    assert not list(run.glob("*.tmp"))  # half a file would keep the room
    assert weights_of(fit(few, images, None, SPEC, settings, run)) == weights_of(whole)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_checkpoint_within_an_epoch_is_gone_on_from_to_the_bit(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr("migrator.trainer.training.loop.REPORT_EVERY", 2)
    settings = replace(FAST, epochs=2, batch_size=30, checkpoint_minutes=1e-9, flip=True)  # one at every step
    whole = fit(few, images, old, SPEC, settings, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.stage == "train" and progress.epoch == 2 and progress.step >= step:
            raise Stop

    with pytest.raises(Stop):
        fit(few, images, old, SPEC, settings, tmp_path / "parts", report=stop)
    kept = sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*.pt"))
    assert len(kept) == 2
    if step > 1:
        assert f"checkpoint-00001-{step - 1:07d}.pt" in kept
    parts = fit(few, images, old, SPEC, settings, tmp_path / "parts")
    assert weights_of(parts) == weights_of(whole)
    without_rate = [{k: v for k, v in row.items() if k != "images_per_second"} for row in parts.history]
    assert without_rate == [{k: v for k, v in row.items() if k != "images_per_second"} for row in whole.history]


def test_the_encoder_is_the_best_epochs(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.3, 0.6, 0.5])
    monkeypatch.setattr("migrator.trainer.training.validation.score", lambda measured, bound: next(scores))
    settings = replace(FAST, epochs=3)
    best = fit(few, images, old, SPEC, settings, tmp_path / "best")
    assert best.best_epoch == 2
    kept = torch.load(tmp_path / "best" / "checkpoint-00002.pt", weights_only=True)["learner"]
    for name, tensor in load_file(best.weights).items():
        assert torch.equal(tensor, kept[f"encoder.{name}"]), name


def test_accumulated_gradients_are_those_of_the_whole_batch(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    # Without batch norms, whose statistics are those of a micro-batch, nothing may differ but rounding.
    spec = EncoderSpec("test_vit", 16, Preprocessing(image_size=160))
    settings = replace(FAST, method="independent", epochs=1, batch_size=40, lr=1e-5, validation=0)
    items = TrainingItems(few.paths[:40], few.labels[:40] if few.labels else None)
    whole, parts = (
        fit(items, images, None, spec, replace(settings, accumulate=n), tmp_path / str(n)).history[0]["classification"]
        for n in (1, 4)
    )
    assert parts == pytest.approx(whole, rel=0.05)


def test_classes_can_be_drawn_alike(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    rare = TrainingItems(few.paths, tuple("rare" if n < 5 else "common" for n in range(len(few))))
    counted: list[np.ndarray] = []

    def labels_of(objective: torch.nn.Module, inputs: Any, output: Any) -> None:
        counted.append(inputs[1].numpy())

    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: labels_of(module, inputs, output) if type(module).__name__ == "ArcFace" else None
    )
    try:
        fit(rare, images, None, SPEC, replace(FAST, method="independent", epochs=1, class_balanced=True), tmp_path)
    finally:
        handle.remove()
    drawn = np.concatenate(counted)
    assert 0.3 < (drawn == 1).mean() < 0.7  # 5 of 200 images otherwise


def test_without_labels_classes_are_made_from_the_old_vectors_or_none_are_needed(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    unlabelled = TrainingItems(few.paths, None)
    with pytest.raises(TrainingProblem, match=r"method advbct needs labels .* set train\.pseudo_classes"):
        fit(unlabelled, images, old, SPEC, FAST, tmp_path / "none")
    pseudo = fit(unlabelled, images, old, SPEC, replace(FAST, pseudo_classes=12), tmp_path / "pseudo")
    assert "classification" in pseudo.history[0]
    contrast = fit(unlabelled, images, old, SPEC, replace(FAST, method="hot_refresh"), tmp_path / "hot")
    assert "classification" not in contrast.history[0]


@pytest.mark.parametrize("method", ["bct", "lce", "hot_refresh"])
def test_every_rival_trains_an_encoder_that_searches_the_old_gallery(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path, method: str
) -> None:
    result = fit(few, images, old, SPEC, replace(FAST, method=method, epochs=12, batch_size=20, lr=0.005), tmp_path)
    assert result.validation["cross"] > 0.3  # chance is 0.1


def test_bct_asks_the_old_classifier(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    before = fit(few, images, None, SPEC, replace(FAST, method="independent", validation=0.0), tmp_path / "old")
    old = load_encoder(replace(SPEC, weights=before.weights), device="cpu")
    classifier = tmp_path / "old" / "classifier.safetensors"
    settings = replace(FAST, method="bct", epochs=1, old_classifier=classifier)
    through_it = fit(few, images, old, SPEC, settings, tmp_path / "classifier")
    through_centres = fit(few, images, old, SPEC, replace(settings, old_classifier=None), tmp_path / "centres")
    assert through_it.history[0]["influence"] != through_centres.history[0]["influence"]
    weight = load_file(classifier)["weight"]
    known = read_classifier(classifier, ["7", "nobody"], 16)
    np.testing.assert_array_equal(known[0], weight[7].numpy())
    assert np.isnan(known[1]).all()
    with pytest.raises(TrainingProblem, match="name the one that belongs to the old encoder"):
        read_classifier(classifier, ["7"], 32)
    with pytest.raises(TrainingProblem, match="knows none of the 1 classes"):
        read_classifier(classifier, ["nobody"], 16)
    for name in ("encoder.safetensors", "absent.safetensors"):
        with pytest.raises(TrainingProblem, match="cannot be read"):
            read_classifier(tmp_path / "old" / name, ["7"], 16)


@pytest.mark.parametrize("method", POST_HOC)
def test_a_map_makes_a_finished_encoder_search_the_old_gallery(
    few: TrainingItems, images: ImageSource, old: Encoder, longer: Path, tmp_path: Path, method: str
) -> None:
    base = replace(SPEC, weights=longer)
    result = fit(few, images, old, base, replace(FAST, method=method), tmp_path / "map")
    assert result.validation["cross"] > 0.3  # chance is 0.1
    assert result.best_epoch == 0
    mapped = load_encoder(replace(SPEC, weights=result.weights), expected=result.manifest, device="cpu")
    assert mapped.dim == old.dim
    again = fit(few, images, old, base, replace(FAST, method=method), tmp_path / "map")
    assert again == result
    with pytest.raises(TrainingProblem, match=f"method {method} maps the vectors of an encoder that exists"):
        fit(few, images, old, SPEC, replace(FAST, method=method), tmp_path / "nothing")


def test_stored_vectors_stand_in_for_an_old_encoder(
    few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    vectors = old.encode(np.stack([old.prepare(images.load(path)) for path in few.paths]))
    settings = replace(FAST, flip=False)
    by_vectors = fit(few, images, stored_vectors(3 * vectors), SPEC, settings, tmp_path / "vectors")
    by_encoder = fit(few, images, old, SPEC, settings, tmp_path / "encoder")
    assert by_vectors.validation["old"] == pytest.approx(by_encoder.validation["old"], abs=1e-3)
    assert by_vectors.history[0]["boundary"] == pytest.approx(by_encoder.history[0]["boundary"], rel=1e-3)
    with pytest.raises(TrainingProblem, match="200 training images but 199 stored vectors"):
        fit(few, images, stored_vectors(vectors[:199]), SPEC, settings, tmp_path / "short")


def test_trackers_hear_of_losses_and_one_that_is_not_there_is_named(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    settings = replace(FAST, method="independent", epochs=1)
    with pytest.raises(TrainingProblem, match="tracker nobody is not there"):
        fit(few, images, None, SPEC, replace(settings, trackers=("nobody",)), tmp_path / "none")
    fit(few, images, None, SPEC, replace(settings, trackers=("tensorboard",)), tmp_path / "run")
    events = list((tmp_path / "run" / "migrator").rglob("events.out.tfevents.*"))
    assert sum(b"classification" in path.read_bytes() for path in events) == 1


def test_a_batch_that_cannot_be_shared_is_refused(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(TrainingProblem, match=r"set train\.batch_size to a multiple of 3, at least 6"):
        fit(few, images, None, SPEC, replace(FAST, method="independent", accumulate=3), tmp_path)


def test_bf16_and_flip_train_too(few: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path) -> None:
    # 32 pixels: torch 2.13 gives NaN gradients for a bfloat16 convolution over 2 x 2 pixels on some CPUs.
    spec = replace(SPEC, preprocessing=Preprocessing(image_size=32))
    result = fit(few, images, old, spec, replace(FAST, epochs=1, bf16=True, flip=True), tmp_path)
    assert all(np.isfinite(list(row.values())).all() for row in result.history)


def test_reference_is_the_published_recipe() -> None:
    settings = FitSettings(reference=True, lr=3.0, radius_limit=0.2).resolved()
    assert (settings.radius_limit, settings.radius_quantile, settings.boundary_weight) == (1.0, 1.0, 1.0)
    rates = [learning_rate(settings, epoch / 30) for epoch in range(30)]
    np.testing.assert_allclose(rates, [0.1] * 5 + [0.01] * 5 + [0.001] * 10 + [0.0001] * 10)


@pytest.mark.parametrize("reference", [False, True])
def test_weight_decay_is_for_matrices_and_in_the_published_recipe_for_everything(reference: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    model.register_parameter("w", torch.nn.Parameter(torch.zeros(5)))
    decayed, exempt = build_optimizer(model, FitSettings(reference=reference, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    # The order, too, is that of the checkpoints.
    everything = list(model.parameters())
    for group, wanted in (
        (decayed, [p for p in everything if p.ndim >= 2 or reference]),
        (exempt, [p for p in everything if p.ndim < 2 and not reference]),
    ):
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted]


def test_learning_rate_warms_up_and_falls_to_nought() -> None:
    settings = FitSettings(lr=0.1)
    rates = [learning_rate(settings, p) for p in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < 0.02
    assert max(rates) > 0.09
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_training_leaves_the_callers_random_numbers_alone(
    few: TrainingItems, images: ImageSource, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(few, images, None, SPEC, replace(FAST, method="independent", epochs=1), tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_checkpoints_hold_no_code(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    fit(few, images, None, SPEC, replace(FAST, method="independent", epochs=1), tmp_path)
    state = torch.load(io.BytesIO((tmp_path / "checkpoint-00001.pt").read_bytes()), weights_only=True)
    assert set(state) == {"learner", "optimizer", "history"}
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"]["train.method"] == "independent"
