"""Training that is interrupted and continued, and several runs side by side, from the command line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from migrator.project import Project
from migrator.training_runs import list_runs
from tests.world import NAME, World

Migrator = Callable[..., int]


@pytest.fixture
def trained(world: World) -> World:
    """The world with a new encoder that has to be trained, and a validation that is worth choosing by."""
    rows = ["path,label", *(f"{number:05d}.png,kind {number % 3}" for number in range(120))]
    (world.folder / "train.csv").write_text("\n".join(rows))
    configure(world, epochs=500)
    return world


def configure(world: World, **train: Any) -> None:
    document = yaml.safe_load(world.config.read_text())
    document["migrations"][NAME]["new_encoder"].pop("weights", None)
    document["migrations"][NAME]["train"] = {"items": "train.csv", "batch_size": 32, "device": "cpu", **train}
    world.config.write_text(yaml.safe_dump(document))


def interrupt_after_an_epoch(world: World) -> tuple[int, int, str]:
    """Starts the command, sends SIGINT when an epoch is done; gives that epoch, the exit code and the last line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "migrator", "train", "--config", str(world.config), "--yes"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        epoch = next(int(found[1]) for line in process.stderr if (found := re.match(r"epoch (\d+)/500", line)))
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().splitlines()
        return epoch, process.wait(timeout=60), lines[-1]
    finally:
        process.kill()
        process.stderr.close()


def test_ctrl_c_then_the_same_command_continues_then_finish(
    trained: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert migrator("plan") == 0
    first, code, told = interrupt_after_an_epoch(trained)
    assert code == 130
    assert re.fullmatch(
        r"migrator: training stopped in epoch \d+ of 500, after a checkpoint: "
        r"the same command continues; with --finish it takes the best epoch so far",
        told,
    )
    stopped_in = int(told.split()[5])
    with Project.open(trained.config) as project:
        (run,) = list_runs(project.training_folder())
        assert (run.run, run.state, run.encoder, run.epochs) == ("default", "interrupted", None, stopped_in - 1)
        assert project.ledger.trainings(project.migration().id)[-1].state == "failed"
    again, code, _ = interrupt_after_an_epoch(trained)
    assert code == 130
    assert again == stopped_in, "it began again"  # the first epoch that the second command completes
    assert again > first - 1

    capsys.readouterr()
    assert migrator("train", "--finish", "--json") == 0
    finished = json.loads(capsys.readouterr().out)
    rows = (trained.folder / "artifacts" / NAME / "training" / "metrics.csv").read_text().splitlines()
    p1 = [float(row.rpartition(",")[2]) for row in rows[1:]]
    assert rows[0].endswith(",p1")
    assert migrator("runs", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert listed["state"] == "finished"
    assert listed["candidate"]
    assert (listed["epochs"], listed["epochs_planned"], listed["method"]) == (len(p1), 500, "advbct")
    assert p1[listed["best_epoch"] - 1] == listed["p1"] == max(p1)
    assert (listed["encoder"], listed["validation"]) == (finished["encoder"], finished["validation"])
    assert migrator("verify") == 0


def test_two_candidates_side_by_side(trained: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> None:
    def candidate() -> str | None:
        with Project.open(trained.config) as project:
            spec = project.new_spec()
            assert spec is not None
            assert spec.weights is not None
            assert project.new_encoder().id == project.migration().new_encoder_id
            return spec.weights.parent.name

    assert migrator("plan") == 0
    configure(trained, epochs=1)
    assert migrator("train") == 0
    assert candidate() == "training"
    configure(trained, epochs=2)
    capsys.readouterr()
    assert migrator("train") == 2
    assert "train.epochs was 1 and is 2" in (refused := capsys.readouterr().err)
    assert "--run NAME" in refused
    assert migrator("train", "--run", "b", "--method", "independent") == 0
    assert f"next: migrator verify {NAME} --run b" in capsys.readouterr().out
    assert candidate() == "training", "a run beside it took the candidate's place"

    assert migrator("verify", "--run", "b") == 0
    assert candidate() == "b"
    assert migrator("plan") == 0  # planning again stays with it
    assert candidate() == "b"
    assert migrator("verify", "--run", "default") == 0
    assert candidate() == "training"
    assert migrator("verify", "--run", "b") == 0
    capsys.readouterr()
    assert migrator("runs") == 0
    table = capsys.readouterr().out
    assert re.search(r"default +│ +advbct +│ +1/1 .* pass", table)
    assert re.search(r"b \(candidate\) +│ +independent +│ +2/2 .* pass", table)
    assert migrator("rollout", "--stage", "prepare") == 0
    with Project.open(trained.config) as project:
        route = project.ledger.route(project.migration().collection)
        assert project.encoder_ids()[1] == {run.run: run.encoder for run in list_runs(project.training_folder())}["b"]
        assert route is not None

    capsys.readouterr()
    assert migrator("verify", "--run", "default") == 3
    assert "first `migrator rollback toys`" in capsys.readouterr().err
    assert migrator("verify", "--run", "c") == 3
    assert "`migrator train toys --run c`" in capsys.readouterr().err
    assert migrator("verify", "--run", "../../elsewhere") == 2


def test_two_candidates_of_two_image_sizes(
    trained: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(trained, epochs=1)
    assert migrator("plan") == 0
    assert migrator("train") == 0
    trained.configure(new_encoder__image_size=24)
    assert migrator("plan") == 0  # the encoder of the first run is another one than is declared now
    capsys.readouterr()
    assert migrator("train") == 2
    assert "new_encoder.image_size was 16 and is 24" in capsys.readouterr().err
    assert migrator("train", "--run", "large") == 0
    assert migrator("verify") == 0
    with Project.open(trained.config) as project:
        small, large = list_runs(project.training_folder())
        assert project.migration().new_encoder_id == large.encoder != small.encoder
    capsys.readouterr()
    assert migrator("verify", "--run", "default") == 3
    refused = capsys.readouterr().err
    assert "image_size 24 instead of 16" in refused
    assert "`migrator plan toys` and again `migrator verify toys --run default`" in refused
    trained.configure(new_encoder__image_size=16)
    assert migrator("plan") == 0
    assert migrator("verify", "--run", "default") == 0
    assert migrator("rollout", "--stage", "prepare") == 0
    # Under way, another declaration is a changed plan and no other candidate.
    trained.configure(new_encoder__image_size=24)
    capsys.readouterr()
    assert migrator("rollout", "--stage", "canary") == 3
    assert "new_encoder.image_size: 16 -> 24" in capsys.readouterr().err


def test_a_run_without_an_encoder_is_no_candidate(trained: World, migrator: Migrator) -> None:
    assert migrator("plan") == 0
    assert migrator("runs") == 0
    assert migrator("train", "--finish") == 2
    assert migrator("train", "--finish", "--restart") == 2
    assert migrator("verify", "--run", "default") == 3
