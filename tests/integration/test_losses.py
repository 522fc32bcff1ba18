"""A worse search is never shown as a success, and what can be done about it can be done."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator.cli import cli
from migrator.config import load_config
from migrator.project import Project
from migrator.report.facts import facts_of
from tests.reported import before_tests, save_verification
from tests.world import NAME, World, embed_images

Migrator = Callable[..., int]
NAMES = [f"{number:05d}.png" for number in range(120)]


@pytest.fixture
def worse(world: World) -> World:
    """A world whose classes are what the old encoder finds alike, which the new one does not."""
    vectors = embed_images(world, "old", NAMES)
    centred = vectors - vectors.mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    kinds = [f"kind {place // 10}" for place in np.argsort(np.argsort(along))]
    items = pq.read_table(world.gallery / "items.parquet")
    pq.write_table(items.set_column(2, "kind", pa.array(kinds)), world.gallery / "items.parquet")
    world.configure(verify__sample=120, verify__gate__cluster="query")
    return world


@pytest.fixture
def out(migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that succeeds, or ends with `code`, prints on stdout."""

    def call(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert migrator(*words) == code
        return capsys.readouterr().out

    return call


Out = Callable[..., str]


@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_a_loss_that_the_gate_allows_is_called_accepted_wherever_it_is_shown(
    worse: World, out: Out, strategy: str
) -> None:
    worse.configure(rollout__strategy=strategy)
    planned = json.loads(out("plan", "--json"))
    after = planned["forecast"]["points"][-1]
    assert after["gain"]["high"] < 0
    risks = " ".join(planned["risks"])
    assert re.search(r"forecast after the backfill: map@100 worse by 0\.\d{3} \(between -0\.\d{4} and -0", risks)
    assert "accepted by your gate (min_gain -1)" in risks
    assert f"(worse than today by {-after['gain']['mean']:.3f})" in out("plan")

    found = json.loads(out("verify", "--json"))
    assert (found["outcome"], found["accepted"], found["next_steps"]) == ("pass", True, [])
    findings = {finding["test"]: finding for finding in found["findings"]}
    assert list(findings) == (["cross", "lowest", "self"] if strategy == "in_place" else ["self"])
    loss = found["tests"]["baseline"]["map@100"] - found["tests"]["self"]["map@100"]
    note = f"worse by {loss:.3f}; accepted by your gate (min_gain -1)"
    assert (findings["self"]["outcome"], findings["self"]["accepted"], findings["self"]["note"]) == ("pass", True, note)
    said = f"after the backfill: {note}"

    printed = out("verify")
    assert "verdict: accepted: " in printed
    assert f"{note}" in printed.split("verdict: ")[1]
    assert not re.search(r"^(verdict: )?pass", printed, re.MULTILINE)

    status = json.loads(out("status", "--json"))
    assert status["verification"] == "accepted"
    assert said in status["losses"]
    assert status["next_command"] == f"migrator rollout {NAME} --stage prepare"
    printed = out("status")
    assert "verification  accepted: " in printed
    assert said in printed

    assert f"; search {said}" in out("rollout", "--stage", "prepare")
    with Project.open(worse.config) as project:
        told = facts_of(project)["verdict"]
    assert (told["answer"], told["headline"]) == ("accepted", f"A{said[1:]}.")
    assert told["tiles"][-1]["title"] == "after the backfill"
    assert told["tiles"][-1]["state"] == "worse"
    assert told["tiles"][-1]["value"] == found["tests"]["self"]["map@100"]


def test_the_health_check_calls_it_accepted_too(worse: World, out: Out) -> None:
    open_backfill(out)
    assert "accepted by your gate (min_gain -1)" in out("backfill", "--max-items", "60")
    search = json.loads(out("status", "--json"))["search"]
    assert search["outcome"] == "accepted"
    assert search["note"].startswith("worse by 0.")
    assert f"(accepted: {search['note']}, " in out("status")


def open_backfill(out: Out) -> None:
    for words in [("plan",), ("verify",), ("rollout", "--stage", "prepare")]:
        out(*words)
    out("rollout", "--stage", "canary")
    out("rollout", "--stage", "backfill")


def test_a_verification_of_an_earlier_version_is_read_and_does_not_open_a_stage(
    worse: World, out: Out, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    out("plan")
    found = json.loads(out("verify", "--json"))
    with Project.open(worse.config) as project:
        save_verification(project.ledger, project.migration(), before_tests(found))
    status = json.loads(out("status", "--json"))
    assert (status["verification"], status["next_command"]) == ("accepted", f"migrator verify {NAME}")
    assert status["losses"][-1].endswith("; the gate of the version that verified did not cover it")
    assert "opens no stage: was verified by an earlier version, whose gate did not cover" in out("status")
    assert migrator("rollout", "--stage", "prepare") == 3
    assert "whose gate did not cover the backfill and the end state: `migrator verify" in capsys.readouterr().err
    assert out("report").endswith("report.html\n")


# -- what can be done -------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    return [shlex.split(found)[1:] for found in re.findall(r"`(migrator [^`]+)`", text)]


def parses(words: list[str]) -> bool:
    """Whether the command line accepts these words; nothing is run."""
    verb = cli.get_command(click.Context(cli), words[0])
    assert verb is not None
    verb.make_context(words[0], words[1:])
    return True


def settings(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([a-z_.]+): ([^`]+)`", text)


@pytest.mark.parametrize("changes", [{}, {"backfill__order": "worst_first", "verify__gate__min_gain": {"lowest": 0}}])
def test_what_is_advised_after_a_failed_gate_can_be_done(
    worse: World, out: Out, migrator: Migrator, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    worse.configure(verify__gate__min_gain=0.0)
    worse.configure(**changes)
    out("plan")
    found = json.loads(out("verify", "--json", code=3))
    assert found["outcome"] == "fail"
    ways = found["next_steps"]
    assert [way.split(":")[0] for way in ways] == ["Try another encoder", "Stay with the old encoder"]
    assert all(parses(words) for way in ways for words in commands(way))
    printed = out("verify", code=3)
    assert printed.endswith("next steps:\n" + "".join(f"  - {way}\n" for way in ways))
    assert f"migrator verify {NAME}`" not in printed.replace(ways[0], "")
    status = json.loads(out("status", "--json"))
    assert (status["verification"], status["next_steps"], status["next_command"]) == ("fail", ways, None)
    assert "next          one of the next steps" in out("status")
    assert migrator("rollout", "--stage", "prepare") == 3
    assert f"`migrator status {NAME}` lists the next steps" in capsys.readouterr().err


def test_a_shadow_is_advised_where_only_the_way_is_worse_and_can_be_had(
    worse: World, out: Out, migrator: Migrator
) -> None:
    # The end state may be much worse, the way there not at all.
    worse.configure(
        verify__gate__min_gain={"self": -1, "lowest": -1, "cross": 0.5},
        backfill__order="worst_first",
        verify__gate__cluster="query",
    )
    out("plan")
    ways = json.loads(out("verify", "--json", code=3))["next_steps"]
    (way,) = [way for way in ways if way.startswith("Fill a second collection")]
    assert settings(way) == [("rollout.strategy", "shadow")]
    assert "remove `backfill.order` and `verify.gate.min_gain.cross` and `verify.gate.min_gain.lowest`" in way
    worse.configure(rollout__strategy="shadow", backfill__order="id", verify__gate__min_gain={"self": -1})
    for words in commands(way):
        assert migrator(*[word for word in words if word != NAME]) == 0


def test_more_queries_are_advised_where_the_gate_cannot_decide(worse: World, out: Out, migrator: Migrator) -> None:
    (worse.folder / "queries.csv").write_text(
        "path,label\n" + "".join(f"{name},kind {number % 12}\n" for number, name in enumerate(NAMES[:12]))
    )
    worse.configure(verify__queries="queries.csv", verify__gate__min_gain=-1.0)
    out("plan")
    ways = json.loads(out("verify", "--json", code=3))["next_steps"]
    assert ways[0].startswith("Judge it on more queries: about 30 judged queries would probably decide, 12 were used.")
    assert "list the further ones in queries.csv" in ways[0]
    assert settings(ways[0]) == [("verify.sample", "30")]
    with (worse.folder / "queries.csv").open("a") as file:
        file.writelines(f"{name},kind {number % 12}\n" for number, name in enumerate(NAMES[12:60]))
    worse.configure(verify__sample=30)
    load_config(worse.config)
    (again,) = commands(ways[0])
    assert migrator(*[word for word in again if word != NAME]) == 0


# -- after the cutover ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_what_is_served_can_be_measured_after_the_cutover_and_status_agrees_on_what_is_mixed(
    world: World, out: Out, migrator: Migrator, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    # A batch's size may change the last bits of a vector, and with them the order of results that are nearly as far.
    world.configure(rollout__strategy=strategy, backfill__batch_size=8)
    stages = ["prepare", "canary", "backfill"] if strategy == "in_place" else ["prepare", "backfill"]

    def mixed() -> bool:
        """What status and verify say, which must be the same."""
        said = bool(json.loads(out("status", "--json"))["mixed_space"])
        capsys.readouterr()
        code = migrator("verify")
        assert code == (3 if said else 0)
        assert ("its collection already mixed" in capsys.readouterr().err) == said
        return said

    out("plan")
    verified = json.loads(out("verify", "--json"))
    for stage in stages:
        out("rollout", "--stage", stage)
    assert not mixed()
    out("backfill", "--max-items", "60")
    assert mixed() == (strategy == "in_place")
    out("backfill")
    if strategy == "shadow":
        out("rollout", "--stage", "canary")
    for stage in ("cutover", "finalize"):
        out("rollout", "--stage", stage)
        assert json.loads(out("status", "--json"))["mixed_space"] is False
        assert migrator("verify") == 3
        assert f"`migrator verify {NAME} --live` measures what is served" in capsys.readouterr().err
        found = json.loads(out("verify", "--live", "--json"))
        assert found["gallery"] == "new"
        # The gallery is the whole collection, and its index exact.
        assert found["mixed"] == pytest.approx(verified["tests"]["self"], abs=1e-6)
        assert found["live"]["tests"]["self"] == pytest.approx(verified["tests"]["self"], abs=1e-6)
        assert found["today"] == verified["tests"]["baseline"]
        printed = out("verify", "--live")
        assert "old query, old gallery" in printed
        assert "new query, new gallery" in printed


def test_an_encoder_of_another_length_is_not_measured_before_the_cutover(
    world: World, out: Out, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.saving import save_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing
    from tests.world import ARCH, SIZE

    spec = EncoderSpec(arch=ARCH, dim=48, preprocessing=Preprocessing(image_size=SIZE))
    save_encoder(build_model(spec), spec, world.folder / "longer.safetensors")
    world.configure(
        rollout__strategy="shadow",
        new_encoder={"arch": ARCH, "weights": "longer.safetensors", "dim": 48, "image_size": SIZE},
    )
    for words in [("plan",), ("verify",), ("rollout", "--stage", "prepare"), ("rollout", "--stage", "backfill")]:
        out(*words)
    capsys.readouterr()
    assert migrator("verify", "--mixed") == 3
    assert "which the new encoder's 48-d queries cannot search before the cutover" in capsys.readouterr().err
