"""One training as a folder: what it is made of is its name, what came of it lies in it, and it is never done twice.

A folder's name is a hash of everything that decides the outcome but the code: data, split, encoder, all settings, and
the runs that it builds on. After a change of the code, `--again` does the selected runs again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.datasets import DATA, Images, load
from bench.splits import Size, Split, seen_by_old, split

RUNS = DATA / "runs"
METRICS = ("map@100", "recall@1")
POST_HOC = ("procrustes", "ridge", "residual_mlp")
NEUTRAL = {"device", "image_threads", "keep_checkpoints", "checkpoint_minutes", "cache", "cache_gib", "trackers"}
"""Settings that do not change what is trained."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """An encoder to be made and tested. `builds_on` are the old run, and for a map the run whose vectors it turns."""

    dataset: str
    digest: str
    size: Size
    seed: int
    method: str
    seen: str = "all"
    """`all` the training images, or the protocol by which an old encoder saw a part of them."""
    arch: str
    image_size: int
    dim: int
    settings: tuple[tuple[str, Any], ...]
    """Of `FitSettings`, without those that are neutral."""
    builds_on: tuple[Run, ...] = ()

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        return RUNS / self.key

    @property
    def name(self) -> str:
        """For a line of progress: what it is, and the settings that are not the trainer's defaults."""
        seen = "" if self.seen == "all" else f" on {self.seen}"
        over = f" over {self.builds_on[0].seen}" if self.builds_on else ""
        usual = dict(fit_settings(self.method, self.seed)) if self.settings else {}
        changed = [
            f" {name}={value}" for name, value in self.settings if name not in ("epochs", "lr") and value != usual[name]
        ]
        return f"{self.dataset} seed {self.seed} {self.method}{''.join(changed)}{seen}{over} {self.arch}"

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def is_base(self) -> bool:
        """Whether other runs may build on it."""
        return not self.builds_on

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return found

    def per_query(self) -> dict[str, NDArray[np.float64]]:
        """By test and metric, such as `cross/map@100`: a value for each question, (q,)."""
        with np.load(self.folder / "per_query.npz") as arrays:
            return dict(arrays)


def fit_settings(method: str, seed: int, **chosen: Any) -> tuple[tuple[str, Any], ...]:
    """All settings of a training, those that are not `chosen` by their defaults."""
    from migrator.trainer.training.settings import FitSettings

    # All data is trained on: the tests are of other images.
    chosen = {"validation": 0.0, "seed": seed, **chosen}
    whole = asdict(FitSettings(method=method, **chosen))
    return tuple((name, plain(value)) for name, value in sorted(whole.items()) if name not in NEUTRAL)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


# --- doing it -------------------------------------------------------------------------------------------------------


@cache
def images_of(dataset: str) -> Images:
    return load(dataset)


def split_of(run: Run) -> Split:
    return split(images_of(run.dataset), run.size, run.seed)


def do(run: Run, device: str) -> float:
    """Trains or fits, tests, and writes the folder. Returns seconds."""
    from migrator.trainer.errors import TrainerError

    began = time.monotonic()
    RUNS.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{run.key}-", dir=RUNS))
    result: dict[str, Any] = {"run": asdict(run)}
    try:
        try:
            vectors = mapped(run) if run.method in POST_HOC else trained(run, unfinished, device, result)
            measure(run, unfinished, vectors, result)
        except TrainerError as problem:
            result["failed"] = str(problem)
        result["seconds"] = time.monotonic() - began
        (unfinished / "result.json").write_text(json.dumps(result, indent=1))
        shutil.rmtree(run.folder, ignore_errors=True)
        unfinished.rename(run.folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return time.monotonic() - began


def trained(run: Run, folder: Path, device: str, result: dict[str, Any]) -> NDArray[np.float32]:
    """Trains by `fit`. The vectors of the test rows; a run that others build on also leaves its encoder."""
    from migrator.trainer.data.items import TrainingItems
    from migrator.trainer.encoders.loading import load_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.images.source import ImageSource
    from migrator.trainer.training.fit import fit
    from migrator.trainer.training.settings import FitSettings

    images = images_of(run.dataset)
    whole = split_of(run)
    rows = seen_by_old(images, whole.train, run.seen, run.seed)
    items = TrainingItems(tuple(images.paths[row] for row in rows), tuple(images.labels[rows].tolist()))
    spec = EncoderSpec(run.arch, run.dim, Preprocessing(run.image_size))
    chosen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in run.settings}
    if run.method == "bct" and (classifier := run.builds_on[0].folder / "classifier.safetensors").exists():
        chosen["old_classifier"] = classifier
    settings = FitSettings(**chosen, **neutral(device))
    source = ImageSource(str(images.root))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory_folder()) as name:  # its checkpoints are not what is measured
        fitted = fit(items, source, old_side(run, rows), spec, settings, Path(name))
        result["fit_seconds"] = time.monotonic() - began
        result["history"] = fitted.history
        encoder = load_encoder(EncoderSpec(spec.arch, spec.dim, spec.preprocessing, weights=fitted.weights))
        vectors = encoded(encoder, images, whole.test_rows)
        if run.is_base:
            np.save(folder / "train.npy", encoded(encoder, images, whole.train))
            np.save(folder / "test.npy", vectors)
            for file in Path(name).glob("*.safetensors"):  # the encoder, and the classifier that `bct` asks through
                shutil.copy(file, folder)
    return vectors


def neutral(device: str) -> dict[str, Any]:
    """Settings that do not change what is trained. Prepared images are shared between runs."""
    return {"device": device, "image_threads": 1, "keep_checkpoints": 1, "cache": DATA / "prepared"}


def memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def old_side(run: Run, rows: NDArray[np.int64]) -> Any:
    """The old vectors of the training images, as they lie in a collection; None for a run that has no old side."""
    from migrator.trainer.old_space import stored_vectors

    if not run.builds_on:
        return None
    old = run.builds_on[0]
    every = split_of(old).train
    return stored_vectors(np.load(old.folder / "train.npy")[np.searchsorted(every, rows)])


def encoded(encoder: Any, images: Images, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    pixels = pixels_of(images.name, encoder.manifest.preprocessing.image_size)
    batches = np.array_split(rows, -(-len(rows) // 256))
    return np.concatenate([encoder.encode(pixels[batch]) for batch in batches])


@cache
def pixels_of(dataset: str, image_size: int) -> NDArray[np.uint8]:
    """Every image of a data set as an encoder takes it, (n, 3, S, S): made once, then a file for all runs."""
    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.images.source import ImageSource

    images = images_of(dataset)
    file = images.root / f"{images.digest[:16]}-{image_size}px.npy"
    if not file.exists():
        source, prepare = ImageSource(str(images.root)), Preprocessing(image_size).prepare
        pixels = np.stack([prepare(source.load(path)) for path in images.paths])
        with tempfile.NamedTemporaryFile(dir=images.root, suffix=".npy", delete=False) as stream:
            np.save(stream, pixels)
        Path(stream.name).rename(file)
    array: NDArray[np.uint8] = np.load(file, mmap_mode="r")
    return array


def mapped(run: Run) -> NDArray[np.float32]:
    """The test vectors of an independent encoder, turned into the old space by a map fitted on the training images."""
    import torch

    from migrator.trainer.maps import fit_map

    old, new = run.builds_on
    fitted = fit_map(run.method, np.load(new.folder / "train.npy"), np.load(old.folder / "train.npy"), seed=run.seed)
    with torch.inference_mode():
        vectors: NDArray[np.float32] = fitted(torch.from_numpy(np.load(new.folder / "test.npy"))).numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(run: Run, folder: Path, vectors: NDArray[np.float32], result: dict[str, Any]) -> None:
    """Every metric of each question: self-test, and against the old encoder cross-test, reverse test and flips.

    A flip is a query whose first answer was right with old query and old gallery and is wrong in the cross-test.
    """
    images, whole = images_of(run.dataset), split_of(run)
    sides = {"self": (vectors, vectors)}
    if run.builds_on:
        old = np.load(run.builds_on[0].folder / "test.npy")
        sides |= {"cross": (vectors, old), "reverse": (old, vectors), "old": (old, old)}
    found = {
        f"{side}/{metric}": per_query(images, whole, asking, stored, metric)
        for side, (asking, stored) in sides.items()
        for metric in METRICS
    }
    if run.builds_on:
        lost = found["old/recall@1"] > found["cross/recall@1"]
        found["flips"] = np.where(np.isnan(found["old/recall@1"]), np.nan, lost)
    found = {name: per_question(images, whole, values) for name, values in found.items()}
    np.savez(folder / "per_query.npz", **found)  # type: ignore[arg-type]
    result["means"] = {name: float(values.mean()) for name, values in found.items()}


def per_query(
    images: Images, whole: Split, asking: NDArray[np.float32], stored: NDArray[np.float32], metric: str
) -> NDArray[np.float64]:
    """A value for each query of each test, one test after the other; NaN where nothing is relevant."""
    from migrator.evaluation.exact_search import rank
    from migrator.evaluation.metrics import parse_metric, relevance

    wanted = parse_metric(metric)
    values = []
    for test in whole.tests:
        queries, gallery = (np.searchsorted(whole.test_rows, rows) for rows in (test.queries, test.gallery))
        nearest = rank(asking[queries], stored[gallery], wanted.k)
        values.append(wanted.per_query(relevance(images.labels[test.queries], images.labels[test.gallery], nearest)))
    return np.concatenate(values)


def per_question(images: Images, whole: Split, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where several artists ask for the same class it is one question, and its value their mean."""
    rows = np.concatenate([test.queries for test in whole.tests])
    _, question = np.unique(images.labels[rows] if len(whole.tests) > 1 else rows, return_inverse=True)
    answered = ~np.isnan(values)
    counted = np.bincount(question, answered)
    sums = np.bincount(question, np.where(answered, values, 0))
    return sums[counted > 0] / counted[counted > 0]


# --- doing many -----------------------------------------------------------------------------------------------------


def start_worker(jobs: int) -> None:
    import torch

    if jobs > 1:
        torch.set_num_threads(1)


SPEED = {"test_resnet": 4800, "test_byobnet": 4800, "resnet10t": 1000, "resnet18": 600, "resnet50": 150}
"""Images a second of one thread, forward and backward, for the estimate of the time left."""


def cost(run: Run) -> float:
    """About as many seconds as it takes here."""
    if run.method in POST_HOC:
        return 5
    images = (run.size.train or len(images_of(run.dataset).paths)) * (0.3 if run.seen.startswith("extended") else 1)
    return 2 + images * dict(run.settings)["epochs"] / SPEED.get(run.arch, 500)


def with_bases(runs: Iterable[Run]) -> list[Run]:
    """Every run once, those that others build on before them."""
    ordered: dict[Run, None] = {}

    def add(run: Run) -> None:
        for base in run.builds_on:
            add(base)
        ordered[run] = None

    for run in runs:
        add(run)
    return list(ordered)


def do_all(runs: list[Run], again: list[Run], *, jobs: int, device: str) -> list[Run]:
    """Does what is not done, `jobs` side by side, and those `again`. Returns the runs that failed."""
    ordered = with_bases(runs)
    for run in again:
        shutil.rmtree(run.folder, ignore_errors=True)
    missing = [run for run in ordered if not run.done]
    print(f"{len(ordered)} runs, {len(ordered) - len(missing)} of them done before", flush=True)
    began, spent, left = time.monotonic(), 0.0, sum(map(cost, missing))
    waiting, active, finished = list(missing), dict[Future[float], Run](), 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker, (jobs,)) as pool:
        while waiting or active:
            for run in [run for run in waiting if all(base.done for base in run.builds_on)][: jobs - len(active)]:
                waiting.remove(run)
                active[pool.submit(do, run, device)] = run
            for future in wait(active, return_when=FIRST_COMPLETED).done:
                run = active.pop(future)
                seconds = future.result()
                finished += 1
                spent += cost(run)
                left -= cost(run)
                result = run.result()
                found = result.get("failed") or " ".join(
                    f"{name.split('/')[0]} {value:.4f}" for name, value in result["means"].items() if "map" in name
                )
                eta = (time.monotonic() - began) / spent * left / 60
                print(
                    f"[{finished}/{len(missing)}] {run.name}: {seconds:.0f} s, {found}; {eta:.0f} min left", flush=True
                )
    return [run for run in ordered if "failed" in run.result()]
