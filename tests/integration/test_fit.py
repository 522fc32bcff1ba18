"""Training on real images, small: the digits of scikit-learn at 16 pixels with timm's smallest ResNet."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from trainer.data import TrainingItems, training_items
from trainer.encoder import Encoder, EncoderSpec, Preprocessing, load_encoder
from trainer.errors import TrainingFailed, TrainingProblem
from trainer.fit import FitResult, FitSettings, Progress, fit, learning_rate, mean_average_precision
from trainer.images import ImageSource

SPEC = EncoderSpec("test_resnet", 16, Preprocessing(image_size=16))
TRAINED_ON = 600
FAST = FitSettings(epochs=2, batch_size=50, device="cpu", num_workers=2)


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
    return training_items([f"{row}.png" for row in rows], [digits[1][row] for row in rows], source="digits")


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
    return load_encoder(replace(SPEC, weights=result.weights), expected=result.card, device="cpu")


def weights_of(result: FitResult) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(result.weights).items()}


def test_advbct_gives_a_better_encoder_whose_queries_work_in_the_old_gallery(
    digits: tuple[Path, np.ndarray], items: TrainingItems, images: ImageSource, old: Encoder, tmp_path: Path
) -> None:
    reports: list[Progress] = []
    settings = replace(FAST, epochs=6, batch_size=20, lr=0.005)
    result = fit(items, images, old, SPEC, settings, tmp_path / "new", report=reports.append)
    new = load_encoder(replace(SPEC, weights=result.weights), expected=result.card, device="cpu")

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
    assert set(result.validation) == {"self", "cross", "old", "reverse"}
    assert result.validation["cross"] > result.validation["old"]
    assert len(result.history) == 6
    with (tmp_path / "new" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["cross"]) for row in rows] == [row["cross"] for row in result.history]
    assert result.history[-1]["classification"] < result.history[0]["classification"]
    assert {report.stage for report in reports} == {"images", "train"}
    last = reports[-1]
    assert (last.epoch, last.step) == (last.epochs, last.steps)
    assert last.validation["cross"] == result.history[-1]["cross"]
    assert all(report.images_per_second > 0 for report in reports)

    # The folder: two checkpoints and no prepared images.
    kept = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"checkpoint-00005.pt", "checkpoint-00006.pt", "encoder.safetensors", "encoder.json"} <= kept
    assert "checkpoint-00004.pt" not in kept
    assert "pixels.u8" not in kept


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
    whole = fit(few, images, old, SPEC, settings, tmp_path / "whole", resume=True)
    for epoch in (0, 1, 3):
        with pytest.raises(Stop):
            fit(few, images, old, SPEC, settings, tmp_path / "parts", resume=True, report=stop_after(epoch))
    parts = fit(few, images, old, SPEC, settings, tmp_path / "parts", resume=True)
    assert weights_of(parts) == weights_of(whole)
    assert parts.card == whole.card
    assert parts.validation == whole.validation
    assert [row["classification"] for row in parts.history] == [row["classification"] for row in whole.history]

    def not_again(progress: Progress) -> None:
        raise AssertionError("trained again")

    assert fit(few, images, old, SPEC, settings, tmp_path / "parts", resume=True, report=not_again) == parts


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
        resume=True,
        report=lambda progress: epochs.append(progress.epoch),
    )
    assert min(epochs) == 2  # from checkpoint 1
    assert weights_of(parts) == weights_of(whole)


def test_a_run_folder_is_replaced_only_on_request(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    settings = replace(FAST, method="independent", epochs=2)
    with pytest.raises(Stop):
        fit(few, images, None, SPEC, settings, tmp_path, report=stop_after(1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingProblem, match="an unfinished run: continue with --resume, or replace"):
        fit(few, images, None, SPEC, settings, tmp_path)
    first = fit(few, images, None, SPEC, replace(settings, seed=5), tmp_path, restart=True)
    with pytest.raises(TrainingProblem, match="a finished run"):
        fit(few, images, None, SPEC, replace(settings, seed=5), tmp_path)
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
    again: dict[str, Any] = {"resume": True}
    with pytest.raises(TrainingProblem, match=r"\(train\.epochs was 1 and is 2; train\.lr was 0\.002 and is 0\.2\)"):
        fit(few, images, old, SPEC, replace(settings, epochs=2, lr=0.2), tmp_path, **again)
    with pytest.raises(TrainingProblem, match=r"\(training items was \w+ and is \w+\)"):
        fit(items, images, old, SPEC, settings, tmp_path, **again)
    with pytest.raises(TrainingProblem, match=rf"old encoder was {old.id} and is None"):
        fit(few, images, None, SPEC, settings, tmp_path, **again)
    with pytest.raises(TrainingProblem, match=r"new_encoder\.image_size was 16 and is 24"):
        fit(few, images, old, replace(SPEC, preprocessing=Preprocessing(image_size=24)), settings, tmp_path, **again)
    # What does not decide the outcome may change.
    fit(few, images, old, SPEC, replace(settings, num_workers=1, keep_checkpoints=1), tmp_path, **again)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingProblem, match=r"run\.json is damaged"):
        fit(few, images, old, SPEC, settings, tmp_path, **again)


def test_a_second_process_in_the_folder_is_refused(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    settings = replace(FAST, method="independent", epochs=1)

    def meanwhile(progress: Progress) -> None:
        with pytest.raises(TrainingProblem, match="another process is training"):
            fit(few, images, None, SPEC, settings, tmp_path, resume=True)

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
    some_gone = training_items([*few.paths, "absent.png"], [*few.labels, "1"], source="list")
    settings = replace(FAST, method="independent", epochs=1)
    result = fit(some_gone, images, None, SPEC, settings, tmp_path / "some")
    assert [entry.path for entry in result.left_out] == ["absent.png"]
    with pytest.raises(TrainingProblem, match=r"1 of 201 training images cannot be used .*absent"):
        fit(some_gone, images, None, SPEC, replace(settings, most_left_out=0.001), tmp_path / "none")
    all_gone = training_items(["x.png", "y.png"], ["1", "2"], source="list")
    with pytest.raises(TrainingProblem, match="2 of 2 training images cannot be used"):
        fit(all_gone, images, None, SPEC, replace(settings, most_left_out=1), tmp_path / "all")


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
        FitSettings(validation=-1, epochs=0, lr=float("nan"), method="bct")
    for bad in ({"batch_size": 1}, {"validation": 0.95}, {"seed": -1}, {"radius_limit": 0}):
        with pytest.raises(TrainingProblem):
            FitSettings(**bad)


def test_a_full_disk_is_a_problem_with_a_name(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    settings = replace(FAST, method="independent")

    def stop(progress: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):  # leaves a folder bound to this run
        fit(few, images, None, SPEC, settings, tmp_path, report=stop)
    (tmp_path / "pixels.u8").unlink()
    (tmp_path / "pixels.u8").symlink_to("/dev/full")
    with pytest.raises(TrainingProblem, match="No space left on device"):
        fit(few, images, None, SPEC, settings, tmp_path)


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


def test_map_by_hand() -> None:
    gallery = np.array([[1, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]], np.float32)
    queries = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    labels = np.array([0, 1, 0, 1])
    # Ranks of the first query's hits: 1 and 3; of the second: 2 and 4. The third's label is not in the gallery.
    found = mean_average_precision(queries, gallery, np.array([0, 1, 2]), labels)
    assert found == pytest.approx(((1 / 1 + 2 / 3) / 2 + (1 / 2 + 2 / 4) / 2) / 2)
    at_one = mean_average_precision(queries[:2], gallery, np.array([0, 1]), labels, k=1)
    assert at_one == pytest.approx(0.5)
    assert mean_average_precision(queries, gallery, np.array([7, 8, 9]), labels) == 0


def test_map_agrees_with_scikit_learn_over_the_whole_gallery() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(n, 8)).astype(np.float32) for n in (300, 90))
    labels, gallery_labels = rng.integers(0, 5, 300), rng.integers(0, 5, 90)
    theirs = [
        average_precision_score(gallery_labels == label, gallery @ query)
        for query, label in zip(queries, labels, strict=True)
    ]
    found = mean_average_precision(queries, gallery, labels, gallery_labels)
    assert found == pytest.approx(np.mean(theirs), abs=1e-6)


def test_checkpoints_hold_no_code(few: TrainingItems, images: ImageSource, tmp_path: Path) -> None:
    fit(few, images, None, SPEC, replace(FAST, method="independent", epochs=1), tmp_path)
    state = torch.load(io.BytesIO((tmp_path / "checkpoint-00001.pt").read_bytes()), weights_only=True)
    assert set(state) == {"learner", "optimizer", "history"}
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"]["train.method"] == "independent"
