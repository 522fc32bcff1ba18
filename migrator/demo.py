"""The whole story on real images: an old encoder with its gallery is made, then upgraded with the commands users have.

The images are the 1,797 scanned digits that ship with scikit-learn. No number that the demo prints is written in it.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from migrator.demo_stores import STORES, Gallery
from migrator.errors import PreconditionFailed, UsageProblem
from migrator.project import Project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.encoders.encoder import Encoder

NAME = "digits-v2"
QUERIES, TRAINING = 300, 1000
"""Of the 1,797 images 300 are only queries; of the others, all in the gallery, 1,000 are used for training."""
OLD_SHARE = 0.3
"""Share of the training images that the old encoder saw: the extended-data protocol of the AdvBCT paper."""
RUN_ITEMS = 400
"""Items per backfill run, so that several runs are needed, as with cron."""
DIM, SIZE = 64, 32
MARKER = ".migrator-demo"

CONFIG = """\
# Made by `migrator demo`. Every command can be run again by hand in this folder.
version: 1
ledger: sqlite:///migrator.db
artifacts: ./artifacts
migrations:
  {name}:
    store: {store}
    images: {{root: ./images, uri: "{{path}}"}}
    old_encoder: {{arch: resnet10t, weights: old/encoder.safetensors, dim: {dim}, image_size: {size}}}
    new_encoder: {{arch: resnet18, dim: {dim}, image_size: {size}}}
    train: {{items: train.csv, method: advbct, epochs: 12, batch_size: 64, seed: 0}}
    verify:
      queries: queries.csv
      label: "{{digit}}"
      sample: {queries}
      gate: {{metric: map@100, confidence: 0.95, min_gain: 0.0}}
    rollout: {{strategy: in_place, canary: [1, 10, 50, 100], route_ttl: 0}}
    backfill: {{chunk_size: 100, batch_size: 50}}
"""

Say = Callable[[str], None]
Run = Callable[[Sequence[str]], int]


def make_folder(folder: Path, *, replace: bool) -> None:
    """An empty folder for the demo. An earlier demo is replaced if the caller says so; anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise UsageProblem(f"{folder} is not empty and no earlier demo: give another --dir")
        if not replace:
            raise UsageProblem(f"{folder} holds an earlier demo: add --yes to replace it, or give another --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def make_old_system(folder: Path, store: str) -> None:
    """What a user already has: images, an old encoder, a gallery in a `store` that it filled, and labelled queries."""
    labels = _save_images(folder / "images")
    order = np.random.default_rng(0).permutation(len(labels))
    queries, gallery = order[:QUERIES], np.sort(order[QUERIES:])
    training = order[QUERIES : QUERIES + TRAINING]
    _save_list(folder / "queries.csv", queries, labels)
    _save_list(folder / "train.csv", training, labels)
    _save_list(folder / "old-train.csv", training[: int(OLD_SHARE * TRAINING)], labels)
    old = _train_old(folder)
    _save_gallery(folder, store, gallery, labels, old)
    settings = STORES[store].settings
    (folder / "migrations.yaml").write_text(
        CONFIG.format(name=NAME, store=settings, dim=DIM, size=SIZE, queries=QUERIES)
    )


def _save_images(folder: Path) -> NDArray[np.int64]:
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageProblem("the demo's digits come with scikit-learn: pip install 'advbct-migrator[demo]'") from None
    digits = load_digits()
    folder.mkdir()
    for number, pixels in enumerate(digits.images):
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(folder / _file(number))
    return np.asarray(digits.target, np.int64)


def _file(number: int) -> str:
    return f"{number:04d}.png"


def _save_list(file: Path, numbers: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("path", "label"))
        table.writerows((_file(number), labels[number]) for number in numbers)


def _train_old(folder: Path) -> Encoder:
    from migrator.trainer.data.items import read_items
    from migrator.trainer.encoders.loading import load_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.images.source import ImageSource
    from migrator.trainer.training.fit import fit
    from migrator.trainer.training.settings import FitSettings

    spec = EncoderSpec(arch="resnet10t", dim=DIM, preprocessing=Preprocessing(image_size=SIZE))
    settings = FitSettings(method="independent", epochs=5, batch_size=50, seed=1)
    items = read_items(folder / "old-train.csv")
    fit(items, ImageSource(str(folder / "images")), None, spec, settings, folder / "old")
    return load_encoder(EncoderSpec(**{**spec.__dict__, "weights": folder / "old" / "encoder.safetensors"}))


def _save_gallery(
    folder: Path, store: str, gallery: NDArray[np.int64], labels: NDArray[np.int64], old: Encoder
) -> None:
    from migrator.embedding.embed import embed
    from migrator.trainer.images.source import ImageSource

    paths = [_file(number) for number in gallery]
    images = ImageSource(str(folder / "images"))
    vectors = embed(images, paths, [old], batch_size=64, threads=2, retry_for=0).vectors[0]
    digits = [str(label) for label in labels[gallery]]
    STORES[store].fill(folder, Gallery(gallery.tolist(), paths, digits, vectors))


def run_demo(folder: Path, *, stop_after: str | None, run: Run, say: Say) -> None:
    """The migration, command by command. Raises `PreconditionFailed` at the first that does not succeed.

    `stop_after` names a stage: the demo stops once it is open.
    """
    config = str(folder / "migrations.yaml")

    def command(*args: str) -> None:
        say(f"\n$ migrator {' '.join(args)}")
        # The confirmation is given here, so that what the user reads is what they would type.
        needs_yes = args[0] in ("train", "rollout", "backfill")
        code = run([args[0], "--config", config, *args[1:], *(["--yes"] if needs_yes else [])])
        if code != 0:
            raise PreconditionFailed(f"`migrator {' '.join(args)}` ended with exit code {code}: see {folder}")

    def opened(stage: str) -> bool:
        if stop_after == stage:
            say(f"\nStopped with stage {stage} open. Continue by hand: cd {folder} && migrator status")
        return stop_after == stage

    command("plan")
    command("train")
    command("verify")
    command("rollout", "--stage", "prepare")
    if opened("prepare"):
        return
    for _ in range(4):
        command("rollout", "--stage", "canary")
    command("route", "--key", "user-17")
    if opened("canary"):
        return
    command("rollout", "--stage", "backfill")
    if opened("backfill"):
        return
    while _next_command(folder) == f"migrator backfill {NAME}":
        command("backfill", "--max-items", str(RUN_ITEMS))
    command("status")
    command("rollout", "--stage", "cutover")
    if opened("cutover"):
        return
    command("rollout", "--stage", "finalize")
    command("status")
    command("report")


def _next_command(folder: Path) -> str | None:
    from migrator.lifecycle.status import status_of

    with Project.open(folder / "migrations.yaml") as project:
        return status_of(project).next_command


def results(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """The measured quality at each point of the migration, from the ledger."""
    with Project.open(folder / "migrations.yaml") as project:
        migration = project.migration()
        verification = project.ledger.latest_verification(migration.id)
        assert verification is not None
        tests = verification.results["tests"]
        mixed = [event.detail["mixed"] for event in project.ledger.events(migration.id) if event.event == "measured"]
    return [
        ("old self-test: old query, old gallery", tests["baseline"]),
        ("cross-test: new query, old gallery", tests["cross"]),
        *((f"after backfill run {number}", found) for number, found in enumerate(mixed, start=1)),
        ("new self-test: new query, new gallery", tests["self"]),
    ]


def check(folder: Path) -> list[str]:
    """Looks at the finished gallery as a stranger would, with the store's own client; returns what was checked.

    Raises `PreconditionFailed` if anything is not as it must be.
    """
    from migrator.embedding.embed import embed

    with Project.open(folder / "migrations.yaml") as project:
        migration = project.migration()
        new = project.new_encoder()
        with project.store() as store:
            stamped = store.count(stamp=new.id)
        gallery = STORES[project.settings.store.settings()["kind"]].read(folder)
        # Embedded again from the images, in other batches than the backfill's.
        fresh = embed(project.images(), gallery.paths, [new], batch_size=97, threads=2, retry_for=0).vectors[0]
        route = project.ledger.route(migration.collection)
    found = dict(results(folder))
    old, cross, new_self = (list(found.values())[row]["map@100"] for row in (0, 1, -1))
    nearest = float(np.einsum("nd,nd->n", gallery.vectors, fresh).min())
    checks = [
        (len(gallery.ids) == stamped, f"all {stamped} of {len(gallery.ids)} items carry the new stamp"),
        (nearest > 0.9999, f"every stored vector is the new encoder's for its image: minimum cosine {nearest:.6f}"),
        (cross > old, f"new queries against the old gallery beat the old system: mAP@100 {cross:.4f} > {old:.4f}"),
        (new_self > old, f"the finished gallery beats the old system: mAP@100 {new_self:.4f} > {old:.4f}"),
        (
            route is not None and route.query_encoder == new.id and route.canary_percent == 0,
            "the route names the new encoder alone",
        ),
    ]
    wrong = [what for right, what in checks if not right]
    if wrong:
        raise PreconditionFailed(f"the demo's migration is not as it must be. Untrue: {'; '.join(wrong)}")
    return [what for _, what in checks]
