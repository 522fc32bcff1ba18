"""What a training reads: prepared once, taken up again after an interruption, refused where it does not fit."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from migrator.trainer.data.items import TrainingItems, training_items
from migrator.trainer.encoders.building import untrained_encoder
from migrator.trainer.encoders.encoder import Encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import EncoderProblem, TrainingProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.old_space import StoredVectors, stored_vectors
from migrator.trainer.training.inputs import Inputs, load_inputs
from migrator.trainer.training.progress import Progress
from migrator.trainer.training.settings import FitSettings

SIZE = Preprocessing(image_size=16)
SPEC = EncoderSpec("test_resnet", 16, SIZE)
COUNT = 40


class Source(ImageSource):
    """Counts what is read and decoded."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.reads: list[str] = []
        self.decoded: list[str] = []

    def read(self, path: str) -> bytes:
        self.reads.append(path)
        return super().read(path)

    def decode(self, data: bytes, path: str) -> PIL.Image.Image:
        self.decoded.append(path)
        return super().decode(data, path)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def old() -> Encoder:
    torch.manual_seed(0)
    return untrained_encoder(SPEC, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images; 3.png is broken."""
    noise = np.random.default_rng(0)
    for number in range(COUNT):
        PIL.Image.fromarray(noise.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "run").mkdir()
    return tmp_path


ITEMS = training_items([f"{n}.png" for n in range(COUNT)], [f"class {n % 4}" for n in range(COUNT)], source="test")
USABLE = [number for number in range(COUNT) if number != 3]


def load(
    folder: Path,
    old: Encoder | StoredVectors | None = None,
    *,
    items: TrainingItems = ITEMS,
    preprocessing: Preprocessing = SIZE,
    source: Source | None = None,
    **changed: Any,
) -> Inputs:
    report = changed.pop("report", lambda _: None)
    settings = FitSettings(
        **{
            "validation": 0.2,
            "batch_size": 8,
            "image_threads": 2,
            "cache": folder / "cache",
            "cache_gib": 1.0,
            **changed,
        }
    )
    return load_inputs(items, source or Source(folder), old, preprocessing, settings, folder / "run", report)


def amount(report: Progress) -> tuple[str, int, int]:
    return report.stage, report.step, report.steps


def prepared(folder: Path, preprocessing: Preprocessing = SIZE) -> np.ndarray:
    return np.stack([preprocessing.prepare(ImageSource(str(folder)).load(f"{n}.png")) for n in USABLE])


def refused(folder: Path, *words: Any, **options: Any) -> str:
    with pytest.raises(TrainingProblem) as caught:
        load(folder, *words, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_are_the_usable_images(folder: Path, old: Encoder) -> None:
    reports: list[Progress] = []
    inputs = load(folder, old, report=reports.append)
    np.testing.assert_array_equal(inputs.pixels.take(np.arange(39)), prepared(folder))
    assert inputs.class_names == ["class 0", "class 1", "class 2", "class 3"]
    assert inputs.classes == 4
    assert inputs.labels.tolist() == [number % 4 for number in USABLE]
    assert [entry.path for entry in inputs.excluded] == ["3.png"]
    assert inputs.old is not None
    np.testing.assert_allclose(inputs.old, old.encode(prepared(folder)), atol=1e-6)
    assert inputs.old_flipped is None
    held_out = sorted({*range(39)} - {*inputs.train.tolist()})
    assert inputs.queries.tolist() == held_out
    assert len(held_out) in range(4, 12)
    np.testing.assert_array_equal(inputs.gallery, inputs.train)
    assert amount(reports[0]) == ("images", 40, 40)
    assert [amount(report) for report in reports[1:]] == [("old vectors", n, 39) for n in (8, 16, 24, 32, 39)]
    assert all(report.images_per_second > 0 for report in reports)


def test_the_mirrored_view_is_encoded_from_mirrored_pixels(folder: Path, old: Encoder) -> None:
    reports: list[Progress] = []
    inputs = load(folder, old, flip=True, report=reports.append)
    assert inputs.old is not None
    assert inputs.old_flipped is not None
    np.testing.assert_allclose(inputs.old, old.encode(prepared(folder)), atol=1e-6)
    np.testing.assert_allclose(inputs.old_flipped, old.encode(prepared(folder)[..., ::-1]), atol=1e-6)
    assert amount(reports[-1]) == ("old vectors", 78, 78)


def test_another_preprocessing_of_the_old_encoder_costs_no_second_decoding(folder: Path) -> None:
    small = Preprocessing(image_size=12, resize="crop")
    torch.manual_seed(0)
    other = untrained_encoder(replace(SPEC, preprocessing=small), device="cpu")
    source = Source(folder)
    inputs = load(folder, other, source=source)
    assert sorted(source.decoded) == sorted(ITEMS.paths)
    assert inputs.old is not None
    np.testing.assert_allclose(inputs.old, other.encode(prepared(folder, small)), atol=1e-6)
    np.testing.assert_array_equal(inputs.pixels.take(np.arange(39)), prepared(folder))
    # Their pixels may go once the vectors are there.
    for shelf in (folder / "cache").glob("*/preprocessing.json"):
        if '"image_size": 12' in shelf.read_text():
            shutil.rmtree(shelf.parent)
    again = Source(folder)
    load(folder, other, source=again)
    assert again.reads == []


def test_stored_vectors_are_taken_for_the_usable_images(folder: Path) -> None:
    stored = stored_vectors(np.random.default_rng(0).normal(size=(COUNT, 5)).astype(np.float32))
    inputs = load(folder, stored, flip=True)
    np.testing.assert_array_equal(inputs.old, stored.vectors[USABLE])
    assert inputs.old_flipped is None
    short = StoredVectors("stored-x", stored.vectors[:-1])
    assert "39 old vectors do not match 40 training images" in refused(folder, short)


def test_without_labels_the_old_vectors_make_classes(folder: Path) -> None:
    unlabelled = TrainingItems(ITEMS.paths, None)
    directions = np.eye(3, 6, dtype=np.float32)[np.arange(COUNT) % 3]
    stored = stored_vectors(directions + np.random.default_rng(0).normal(0, 0.01, (COUNT, 6)).astype(np.float32))
    inputs = load(folder, stored, items=unlabelled, pseudo_classes=3)
    assert inputs.classes == len(inputs.class_names) == 3
    truth = np.array(USABLE) % 3
    assert len(set(zip(truth.tolist(), inputs.labels.tolist(), strict=True))) == 3  # the same groups
    # A run that goes on has the same classes, whatever k-means would say by then.
    again = load(folder, stored_vectors(-stored.vectors), items=unlabelled, pseudo_classes=3)
    np.testing.assert_array_equal(again.labels, inputs.labels)


def test_without_labels_and_old_vectors_there_is_nothing_to_learn_from(folder: Path) -> None:
    assert "no labels" in refused(folder, items=TrainingItems(ITEMS.paths, None))


# --- going on


def test_a_run_that_goes_on_reads_no_image(folder: Path, old: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder, old, flip=True)
    source = Source(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", None)  # nor is anything encoded
        again = load(folder, old, flip=True, source=source)
    assert source.reads == []
    rows = np.arange(39)
    np.testing.assert_array_equal(again.pixels.take(rows), first.pixels.take(rows))
    for mine, other in zip(vars(first).values(), vars(again).values(), strict=True):
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, other)
    assert again.excluded == first.excluded


def test_another_run_decodes_nothing_again(folder: Path) -> None:
    load(folder)
    shutil.rmtree(folder / "run")
    (folder / "run").mkdir()
    source = Source(folder)
    load(folder, source=source, items=training_items(ITEMS.paths[::-1], [str(n % 2) for n in range(COUNT)], source="x"))
    assert len(source.reads) == COUNT
    assert source.decoded == ["3.png"]


def test_images_that_the_cache_has_lost_are_read_again(folder: Path) -> None:
    load(folder)
    (shard,) = (folder / "cache").glob("*/[0-9]*.u8")
    with shard.open("r+b") as file:
        file.truncate(30 * 3 * 16 * 16)
    source = Source(folder)
    inputs = load(folder, source=source)
    assert source.reads == [f"{number}.png" for number in range(31, 40)]
    np.testing.assert_array_equal(inputs.pixels.take(np.arange(39)), prepared(folder))


@pytest.mark.parametrize("change", ["other content", "gone"])
def test_an_image_that_changed_is_refused(folder: Path, change: str) -> None:
    load(folder)
    shutil.rmtree(folder / "cache")
    if change == "gone":
        (folder / "17.png").unlink()
    else:
        shutil.copy(folder / "18.png", folder / "17.png")
    message = refused(folder)
    assert "image '17.png'" in message
    assert ("cannot be used any more" if change == "gone" else "changed since this run read it") in message
    assert "--restart" in message


def test_old_vectors_go_on_behind_the_last_whole_batch(
    folder: Path, old: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, folder.parent / "whole")
    whole = load(folder.parent / "whole", old, flip=True)
    shutil.rmtree(folder.parent / "whole")
    encode, sizes = Encoder.encode, []

    def killed(self: Encoder, batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        if len(sizes) == stop:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "encode", killed)
    for stop, calls in ((4, 4), (7, 7), (0, 1)):  # in the first view after three batches, in the second after four
        sizes.clear()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                load(folder, old, flip=True)
            (part,) = (folder / "run").glob("*.part")
            with part.open("ab") as file:
                file.write(b"half a row")
        else:
            inputs = load(folder, old, flip=True)
        assert len(sizes) == calls
    assert whole.old is not None
    assert whole.old_flipped is not None
    assert np.asarray(inputs.old).tobytes() == whole.old.tobytes()
    assert np.asarray(inputs.old_flipped).tobytes() == whole.old_flipped.tobytes()
    assert not list((folder / "run").glob("*.part"))


def test_old_vectors_of_another_encoder_are_not_continued(
    folder: Path, old: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    other = untrained_encoder(SPEC, device="cpu")
    encode, calls = Encoder.encode, []

    def killed(self: Encoder, batch: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            load(folder, old)
    inputs = load(folder, other)
    assert inputs.old is not None
    np.testing.assert_allclose(inputs.old, other.encode(prepared(folder)), atol=1e-6)
    assert [path.name for path in (folder / "run").iterdir()].count("old_vectors.npy") == 1
    assert not list((folder / "run").glob("*.part"))


@pytest.mark.parametrize("harm", [b"", b"\x93NUMPY"])
def test_damaged_old_vectors_are_made_again(folder: Path, old: Encoder, harm: bytes) -> None:
    first = load(folder, old)
    assert first.old is not None
    expected = np.array(first.old)
    (folder / "run" / "old_vectors.npy").unlink()
    (folder / "run" / "old_vectors.npy").write_bytes(harm)
    np.testing.assert_array_equal(load(folder, old).old, expected)


# --- refused


def test_too_many_unusable_images(folder: Path) -> None:
    message = refused(folder, max_excluded=0.02)
    assert "1 of 40 training images cannot be used (first: image '3.png'" in message
    assert "up to 2% may be excluded" in message
    assert not (folder / "run" / "inputs.json").exists()


def test_reading_ends_where_too_many_are_unusable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrator.trainer.data.cache.CHUNK_IMAGES", 4)
    source = Source(folder)
    refused(folder, max_excluded=0, source=source)
    assert len(source.reads) <= 12


def test_more_images_than_the_limit(folder: Path) -> None:
    assert "40 prepared images take" in refused(folder, cache_gib=1e-6)


def test_too_few_images_for_a_batch(folder: Path) -> None:
    message = refused(folder, batch_size=39)
    assert "fewer than a batch of 39" in message
    assert "1 left out" in message


def test_images_of_one_class(folder: Path) -> None:
    items = training_items(["3.png", "1.png", "2.png"], ["a", "b", "b"], source="x")
    assert "all of one class" in refused(folder, items=items, batch_size=2, max_excluded=0.5)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "rows": []}', '{"format": 2, "rows": [], "sha256": ["zz"]}'])
def test_damaged_notes_of_a_run(folder: Path, text: str) -> None:
    (folder / "run" / "inputs.json").write_text(text)
    assert "inputs.json is damaged or of another version" in refused(folder)


def test_an_old_encoder_that_gives_nothing_for_an_image(
    folder: Path, old: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Encoder, batch: np.ndarray) -> np.ndarray:
        raise EncoderProblem("no usable vector", rows=(4, 5))

    monkeypatch.setattr(Encoder, "encode", fails)
    message = refused(folder, old)
    assert f"old encoder {old.id} gives no usable vector" in message
    assert "2 of 8 images, the first '5.png'" in message
