"""What is refused, with which exit code, and that nothing changes by it."""

from __future__ import annotations

import copy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.test_walk import to_stage
from tests.world import ARCH, DIM, NAME, SIZE, World, write_gallery

Migrator = Callable[..., int]


@pytest.fixture
def refused(world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with `code`, in one line, perhaps with a table, and must not change the gallery."""

    def call(code: int, verb: str, *words: str) -> str:
        before = {file: file.read_bytes() for file in world.gallery.glob("*") if file.is_file()}
        capsys.readouterr()
        assert migrator(verb, *words) == code
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if not line.startswith(("About to ", "sampling: "))]
        assert [line[:2] for line in lines[1:]] == ["  "] * (len(lines) - 1), printed.err
        assert printed.out == ""
        assert {file: file.read_bytes() for file in world.gallery.glob("*") if file.is_file()} == before
        return lines[0]

    return call


# -- guards of the stages -----------------------------------------------------------------------------------------


def test_every_stage_refuses_to_come_too_early_and_names_the_command_before_it(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    world.configure(rollout__canary=[1, 10, 50, 100])
    assert "migrator plan" in refused(3, "verify")
    assert "migrator plan" in refused(3, "rollout", "--stage", "prepare")
    assert migrator("plan") == 0
    assert "migrator verify" in refused(3, "rollout", "--stage", "prepare")
    assert "--stage prepare" in refused(3, "rollout", "--stage", "canary")
    assert migrator("verify") == 0
    assert migrator("rollout", "--stage", "prepare") == 0
    assert "--stage canary" in refused(3, "rollout", "--stage", "backfill")
    assert "--stage canary" in refused(3, "backfill")
    assert "next step is 1 %" in refused(3, "rollout", "--stage", "canary", "--percent", "50")
    assert "rollout.canary" in refused(2, "rollout", "--stage", "canary", "--percent", "42")
    for _ in range(3):
        assert migrator("rollout", "--stage", "canary") == 0
    assert "50 %" in refused(3, "backfill")
    assert "50 %" in refused(3, "rollout", "--stage", "backfill")
    assert "migrator backfill" in refused(3, "rollout", "--stage", "cutover")
    assert migrator("rollout", "--stage", "canary", "--percent", "10") == 0  # a step back is always possible
    for _ in range(2):
        assert migrator("rollout", "--stage", "canary") == 0
    assert "--stage backfill" in refused(3, "backfill")
    assert migrator("rollout", "--stage", "backfill") == 0
    assert "migrator rollback" in refused(3, "rollout", "--stage", "canary", "--percent", "50")
    assert "migrator backfill" in refused(3, "rollout", "--stage", "cutover")
    assert migrator("backfill", "--max-items", "30") == 0
    assert "migrator backfill" in refused(3, "rollout", "--stage", "cutover")
    assert "cutover" in refused(3, "rollout", "--stage", "finalize")
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert "finalize" in refused(3, "backfill")
    assert "under way" in refused(3, "plan")


def test_cutover_refuses_items_without_a_new_vector(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    to_stage(migrator, "backfill")
    assert migrator("backfill") == 0
    names = pq.read_table(world.gallery / "items.parquet").column("path").to_pylist()
    vectors = world.vectors()
    import faiss

    write_gallery(world, range(121), [*names, names[0]])
    index = faiss.IndexFlatIP(DIM)
    index.add(np.concatenate([vectors, vectors[:1]]))
    faiss.write_index(index, str(world.gallery / "index.faiss"))
    assert "1 of 121 items" in refused(3, "rollout", "--stage", "cutover")


def test_three_queries_decide_nothing(world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> None:
    world.configure(verify__sample=3)
    assert migrator("plan") == 0
    assert migrator("verify") == 3
    assert "inconclusive" in capsys.readouterr().out
    assert migrator("rollout", "--stage", "prepare") == 3


def test_an_incompatible_encoder_fails_the_gate(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every item has its own twin as the only relevant one: the old encoder finds it, an unrelated one does not.
    twins = [f"twin-{number:05d}.png" for number in range(120)]
    for number, twin in enumerate(twins):
        shutil.copy(world.images / f"{number:05d}.png", world.images / twin)
    (world.folder / "queries.csv").write_text(
        "\n".join(["path,label", *(f"{twin},item {number}" for number, twin in enumerate(twins))])
    )
    items = pq.read_table(world.gallery / "items.parquet")
    kinds = pa.array([f"item {number}" for number in range(120)])
    pq.write_table(items.set_column(2, "kind", kinds), world.gallery / "items.parquet")
    world.configure(verify__queries="queries.csv", verify__sample=120, verify__gate={"min_gain": 0.0})
    assert migrator("plan") == 0
    capsys.readouterr()
    assert migrator("verify") == 3
    assert "verdict: fail" in capsys.readouterr().out
    assert migrator("rollout", "--stage", "prepare") == 3


def test_changed_weights_under_the_same_name_are_refused(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    import torch

    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.saving import save_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing

    to_stage(migrator, "prepare")
    torch.manual_seed(99)
    spec = EncoderSpec(arch=ARCH, dim=DIM, preprocessing=Preprocessing(image_size=SIZE))
    save_encoder(build_model(spec), spec, world.folder / "new.safetensors")
    assert "weights" in refused(3, "rollout", "--stage", "canary")


def test_a_stale_plan_is_refused_and_says_what_changed(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    assert migrator("plan") == 0
    world.configure(new_encoder__image_size=24)
    assert "new_encoder.image_size: 16 -> 24" in refused(3, "verify")
    world.configure(new_encoder__image_size=16)
    assert migrator("verify") == 0
    world.configure(backfill__chunk_size=11)
    assert "backfill.chunk_size: 10 -> 11" in refused(3, "rollout", "--stage", "prepare")


def test_a_backfill_and_a_rollback_keep_to_the_collection_of_the_migration(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    to_stage(migrator, "backfill")
    assert migrator("backfill", "--max-items", "20") == 0
    half = world.vectors()
    shutil.copytree(world.gallery, world.folder / "copy", ignore=shutil.ignore_patterns(".migrator"))
    copied = (world.folder / "copy" / "index.faiss").read_bytes()
    world.configure(store__path="./copy")
    assert "store.path" in refused(3, "backfill")
    assert "copy" in refused(3, "rollback")
    world.configure(store__path="./gallery", images__uri="other/{path}")
    assert "images.uri" in refused(3, "backfill")
    world.configure(images__uri="{path}")
    assert (world.folder / "copy" / "index.faiss").read_bytes() == copied
    np.testing.assert_array_equal(world.vectors(), half)
    assert migrator("rollback") == 0


def test_a_half_migrated_collection_without_its_ledger_is_not_planned_anew(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    to_stage(migrator, "backfill")
    assert migrator("backfill", "--max-items", "20") == 0
    shutil.move(world.folder / "migrator.db", world.folder / "lost.db")
    assert "restore that ledger" in refused(3, "plan")
    (world.folder / "migrator.db").unlink()
    shutil.move(world.folder / "lost.db", world.folder / "migrator.db")
    assert migrator("backfill") == 0


def test_a_canary_goes_on_only_while_the_verification_holds(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    world.configure(rollout__canary=[1, 10, 50, 100])
    to_stage(migrator, "prepare")
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "canary") == 0
    world.configure(verify__gate={"min_gain": 0.9})
    assert migrator("verify") == 3
    assert "verification" in refused(3, "rollout", "--stage", "canary")
    assert migrator("rollout", "--stage", "canary", "--percent", "0") == 0


def test_an_old_verification_does_not_count(world: World, migrator: Migrator, refused: Callable[..., str]) -> None:
    to_stage(migrator, "planned")
    world.configure(verify__max_age="1s")
    from migrator.project import Project

    with Project.open(world.config) as project:
        import sqlalchemy as sa

        with sa.create_engine(project.config.ledger).begin() as connection:
            connection.execute(sa.text("UPDATE verifications SET created_at = '2020-01-01 00:00:00'"))
    assert "max_age" in refused(3, "rollout", "--stage", "prepare")


def test_a_plan_of_the_same_facts_keeps_the_verification_and_one_of_others_does_not(
    world: World, migrator: Migrator, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    to_stage(migrator, "planned")
    assert migrator("plan") == 0
    assert migrator("status") == 0
    assert capsys.readouterr().out.endswith(f"migrator rollout {NAME} --stage prepare\n")
    world.configure(backfill__chunk_size=20)
    assert migrator("plan") == 0
    assert "was verified under another plan" in refused(3, "rollout", "--stage", "prepare")
    assert migrator("status") == 0
    assert capsys.readouterr().out.endswith(f"migrator verify {NAME}\n")
    world.configure(backfill__chunk_size=10)  # the facts are again those of the first plan, and so is the verification
    assert migrator("plan") == 0
    assert migrator("rollout", "--stage", "prepare") == 0


def test_one_migration_is_active_per_collection(world: World, migrator: Migrator, refused: Callable[..., str]) -> None:
    import yaml

    document = yaml.safe_load(world.config.read_text())
    document["migrations"]["rival"] = copy.deepcopy(document["migrations"][NAME])
    world.config.write_text(yaml.safe_dump(document))
    for name in (NAME, "rival"):
        assert migrator("plan", name) == 0
        assert migrator("verify", name) == 0
    assert migrator("rollout", NAME, "--stage", "prepare") == 0
    assert f"{NAME} is active" in refused(3, "rollout", "rival", "--stage", "prepare")


def test_the_old_encoder_must_have_made_the_stored_vectors(
    world: World, migrator: Migrator, refused: Callable[..., str]
) -> None:
    world.configure(old_encoder__weights="new.safetensors")
    said = refused(3, "plan")
    assert "not made by this encoder: median cosine" in said
    assert "the weights or the images are other ones" in said


# -- bad input ----------------------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


BAD_GALLERIES: dict[str, Callable[[World], object]] = {
    "no folder": lambda world: shutil.move(world.gallery, world.folder / "elsewhere"),
    "no index": lambda world: (world.gallery / "index.faiss").unlink(),
    "index truncated": lambda world: _truncate(world.gallery / "index.faiss"),
    "index is text": lambda world: (world.gallery / "index.faiss").write_text("hello"),
    "no items table": lambda world: (world.gallery / "items.parquet").unlink(),
    "items truncated": lambda world: _truncate(world.gallery / "items.parquet"),
    "duplicate ids": lambda world: _replace_items(world, id=[0, *range(119)]),
    "fewer items": lambda world: pq.write_table(
        pq.read_table(world.gallery / "items.parquet").slice(1), world.gallery / "items.parquet"
    ),
    "null ids": lambda world: _replace_items(world, id=[None, *range(1, 120)]),
}


def _replace_items(world: World, **columns: list[object]) -> None:
    table = pq.read_table(world.gallery / "items.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, world.gallery / "items.parquet")


@pytest.mark.parametrize("kind", BAD_GALLERIES)
def test_a_bad_collection_is_one_line_and_exit_2(world: World, refused: Callable[..., str], kind: str) -> None:
    BAD_GALLERIES[kind](world)
    refused(2, "plan")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_vectors_that_are_no_directions(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    import faiss

    vectors = world.vectors()
    vectors[:] = bad
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    faiss.write_index(index, str(world.gallery / "index.faiss"))
    code = migrator("plan")
    assert code in (2, 3)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_empty_collection_has_nothing_to_migrate(world: World, refused: Callable[..., str]) -> None:
    import faiss

    faiss.write_index(faiss.IndexFlatIP(DIM), str(world.gallery / "index.faiss"))
    pq.write_table(pq.read_table(world.gallery / "items.parquet").slice(0, 0), world.gallery / "items.parquet")
    assert "empty" in refused(3, "plan")


def test_another_dim_than_the_collection(world: World, refused: Callable[..., str]) -> None:
    world.configure(old_encoder__dim=DIM + 1, new_encoder__dim=DIM + 1)
    assert f"{DIM}-d" in refused(2, "plan")


def test_images_that_are_not_there(world: World, refused: Callable[..., str]) -> None:
    shutil.move(world.images, world.folder / "moved")
    refused(4, "plan")
    world.images.mkdir()
    assert "images.root" in refused(3, "plan")


def test_payloads_that_lead_outside_the_root_are_item_failures(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "secret.png").write_bytes((world.images / "00000.png").read_bytes())
    names = pq.read_table(world.gallery / "items.parquet").column("path").to_pylist()
    (world.images / "link.png").symlink_to(world.folder / "secret.png")
    bad = ["../secret.png", str(world.folder / "secret.png"), "link.png", "file:///etc/hostname", "a/../../secret.png"]
    _replace_items(world, path=[*bad, *names[len(bad) :]])
    to_stage(migrator, "backfill")
    before = world.vectors()
    capsys.readouterr()
    assert migrator("backfill") == 0
    assert "5 failed" in capsys.readouterr().out
    np.testing.assert_array_equal(world.vectors()[:5], before[:5])


def test_a_ledger_that_cannot_be_used(world: World, refused: Callable[..., str]) -> None:
    (world.folder / "migrator.db").write_text("this is no database" * 100)
    refused(2, "plan")
    (world.folder / "migrator.db").unlink()
    (world.folder / "migrator.db").mkdir()
    refused(4, "plan")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("migrations: [", "not YAML"),
        ("version: 1\nmigratoins: {}\n", 'did you mean "migrations"?'),
    ],
)
def test_a_bad_configuration(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    world.config.write_text(text)
    assert migrator("plan") == 2
    assert says in capsys.readouterr().err
    world.config.unlink()
    assert migrator("plan") == 2
    assert "migrator init" in capsys.readouterr().err


def test_disk_full_while_writing_a_segment(
    world: World, migrator: Migrator, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real limit on file size stands in for a full disk: the kernel refuses the write half-way."""
    import resource

    to_stage(migrator, "backfill")
    before = world.vectors()
    script = (
        "import resource, signal, sys\n"
        "from migrator.cli import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    ledger_size = (world.folder / "migrator.db").stat().st_size
    assert ledger_size < 200_000, "the limit is meant for the store, not for the ledger"
    assert resource.RLIM_INFINITY
    world.configure(backfill__retry_for=0.0)
    import faiss

    # Make the index larger than the limit: publishing it cannot succeed.
    names = pq.read_table(world.gallery / "items.parquet").column("path").to_pylist()
    many = 2500
    write_gallery(world, range(many), [names[row % 120] for row in range(many)])
    before = world.vectors()
    assert (world.gallery / "index.faiss").stat().st_size > 200_000
    done = subprocess.run(
        [sys.executable, "-c", script, "backfill", "--config", str(world.config), "--max-items", "20", "--yes"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("migrator: ")]) == 1
    assert "Traceback" not in done.stderr
    np.testing.assert_array_equal(faiss.read_index(str(world.gallery / "index.faiss")).reconstruct_n(0, many), before)
    assert not list(world.gallery.glob("*.tmp*"))
    assert migrator("backfill", "--max-items", "20") == 0  # with space again it goes on where it was
    assert (world.vectors() != before).any()


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["path,label", *(f"{number:05d}.png,one" for number in range(120))], "two classes"),
        (["path,label", *(f"{number:05d}.png," for number in range(120))], "label missing"),
        (["path,label", *(f"{number:05d}.png,kind {number % 2}" for number in range(30))], "batch"),
        (["path,class", "00000.png,a"], "label"),
        (["path,label", *(f"gone-{number}.png,k{number % 2}" for number in range(120))], "image"),
    ],
)
def test_training_data_that_cannot_be_used(
    world: World, migrator: Migrator, refused: Callable[..., str], rows: list[str], says: str
) -> None:
    _train_instead(world, rows)
    assert migrator("plan") == 0
    assert says in refused(2, "train")


def _train_instead(world: World, rows: list[str]) -> None:
    import yaml

    (world.folder / "train.csv").write_text("\n".join(rows))
    document = yaml.safe_load(world.config.read_text())
    del document["migrations"][NAME]["new_encoder"]["weights"]
    document["migrations"][NAME]["train"] = {"items": "train.csv", "epochs": 1, "batch_size": 32}
    world.config.write_text(yaml.safe_dump(document))


def test_train_then_verify_and_a_second_train_changes_nothing(world: World, migrator: Migrator) -> None:
    _train_instead(world, ["path,label", *(f"{number:05d}.png,kind {number % 3}" for number in range(120))])
    assert migrator("verify") == 3
    assert migrator("plan") == 0
    assert migrator("verify") == 3
    assert migrator("train") == 0
    assert migrator("verify") == 0
    trained = (world.folder / "artifacts" / NAME / "training" / "encoder.safetensors").stat()
    assert migrator("train") == 0  # finished already: nothing to do
    assert migrator("train", "--resume") == 0  # what older scripts say
    assert (world.folder / "artifacts" / NAME / "training" / "encoder.safetensors").stat() == trained
    assert migrator("verify") == 0
    assert migrator("train", "--restart") == 0
    assert migrator("verify") == 0
    assert migrator("rollout", "--stage", "prepare") == 0
    assert migrator("train", "--restart") == 3


# -- two at once, and signals -------------------------------------------------------------------------------------


def _start(world: World, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "migrator", "backfill", "--config", str(world.config), "--yes", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_backfills_at_once_encode_no_item_twice(world: World, migrator: Migrator) -> None:
    from migrator.project import Project

    to_stage(migrator, "backfill")
    world.configure(backfill__nice=0.5)
    both = [_start(world), _start(world)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    with Project.open(world.config) as project:
        runs = project.ledger.runs(project.migration().id)
        assert sum(run.items for run in runs) == 120
        with project.store() as store:
            assert store.count(stamp=project.encoder_ids()[1]) == 120
    assert migrator("rollout", "--stage", "cutover") == 0


def test_sigterm_ends_at_a_chunk_boundary(world: World, migrator: Migrator) -> None:
    from migrator.project import Project

    to_stage(migrator, "backfill")
    world.configure(backfill__nice=5.0)
    process = _start(world)
    with Project.open(world.config) as project:
        migration = project.migration()
        try:
            deadline = time.monotonic() + 60
            while not project.ledger.counts(migration.id).written:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, errors
        counts = project.ledger.counts(migration.id)
        assert set(counts.by_state) == {"done", "pending"}
        assert counts.written == counts.by_state["done"] * 10
        with project.store() as store:
            assert store.count(stamp=project.encoder_ids()[1]) == counts.written
    assert migrator("backfill", "--max-items", "10") == 0
