from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import queue
import re
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import migrator
from migrator import errors, formatting
from migrator.adapters.base import StoreBusy, StoreError, StoreRejected, StoreUnavailable
from migrator.adapters.files import Vanished
from migrator.cli import VERBS, common, run
from migrator.cli import status as status_verb
from migrator.config import load_config
from migrator.config.template import TEMPLATE
from migrator.embedding.agreement import Disagreement, Tried
from migrator.ledger import BackfillRun, Failure, LeaseLost, Ledger, Migration, RouteMoved, this_process
from migrator.route import choose, initial_route
from migrator.trainer import errors as trainer_errors

ROOT = Path(migrator.__file__).parents[1]
HEAVY = (
    "torch",
    "faiss",
    "timm",
    "PIL",
    "pyarrow",
    "accelerate",
    "sklearn",
    "pandas",
    "pymilvus",
    "qdrant_client",
    "qdrant_edge",
)

CONFIG = """\
version: 1
ledger: sqlite:///migrator.db
artifacts: ./artifacts
migrations:
  digits-v2:
    store: {kind: faiss, path: ./gallery}
    images: {uri: "{path}", root: ./images}
    old_encoder: {arch: resnet10t, weights: old.safetensors, dim: 128, image_size: 32}
    new_encoder: {arch: resnet18, dim: 128, image_size: 32}
    train: {items: train.csv}
    verify: {queries: queries.csv, label: "{category}"}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a configuration, in which the commands are run."""
    (tmp_path / "migrations.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ledger(folder) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{folder}/migrator.db")
    yield ledger
    ledger.close()


@pytest.fixture
def halfway(ledger) -> Migration:
    """A migration in its backfill, with a failure and a chunk that the store refused."""
    for encoder in ("old-id", "new-id"):
        ledger.save_encoder(encoder, "{}")
    ledger.save_plan(
        "digits-v2", collection="digits [old]", source="digits [old]", alias=None,
        strategy="in_place", old_encoder_id="old-id",
        new_encoder_id="new-id", fingerprint="f1n9e7", bound={}, content={"collection": {"items": 30}},
    )  # fmt: skip
    migration = ledger.migration("digits-v2")
    assert migration is not None
    migration = ledger.move(
        migration, stage="backfill", state="active", event="backfill", old_kept=True,
        route={**initial_route(migration, salt="s", epoch=0), "canary_encoder": "new-id", "canary_percent": 100.0},
    )  # fmt: skip
    ledger.add_chunks(migration.id, 0, [(None, 10, 10), (10, 20, 10), (20, 30, 10)])
    me = this_process()
    run = ledger.start_run(migration.id, me)
    chunk = ledger.lease_chunk(migration.id, me, seconds=60, leave=set())
    assert chunk is not None
    ledger.finish_chunk(
        chunk, me, run_id=run, written=[1, 2], gone=1, failures=[Failure("7", "image", "[red]torn[/red]")]
    )
    chunk = ledger.lease_chunk(migration.id, me, seconds=60, leave=set())
    assert chunk is not None
    ledger.fail_chunk(chunk, me, error="index is full", max_attempts=1)
    return migration


@pytest.fixture
def call(capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a command here; gives exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(arguments)
        return code, *capsys.readouterr()

    return call


def everything(ledger: Ledger, migration: Migration) -> list[Any]:
    """All that a command could have changed in the ledger."""
    now, route = ledger.migration("digits-v2"), ledger.route("digits [old]")
    assert now is not None
    assert route is not None
    return [
        (now.stage, now.state, now.paused),
        len(ledger.events(migration.id)),
        [(chunk.state, chunk.attempts) for chunk in ledger.chunks(migration.id)],
        len(ledger.failures(migration.id)),
        route.epoch,
    ]


# --- the verbs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_a_module_and_says_one_thing_everywhere(verb):
    command = importlib.import_module(f"migrator.cli.{verb}").command
    assert command.name == verb
    assert command.help.splitlines()[0] == VERBS[verb]


def test_there_is_no_module_without_a_verb():
    modules = {path.stem for path in (ROOT / "migrator" / "cli").glob("*.py")} - {"__init__", "common"}
    assert modules == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, call):
    code, out, err = call(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: migrator {verb} ")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("init", "config", "demo", "embed", "schema")])
def test_every_verb_on_a_migration_takes_its_name_and_the_configuration(verb, call):
    _, out, _ = call(verb, "--help")
    assert f"migrator {verb} [OPTIONS] [NAME]" in out
    assert "--config" in out


def test_embed_takes_images_in_place_of_a_name(call):
    _, out, _ = call("embed", "--help")
    assert "migrator embed [OPTIONS] [IMAGES]..." in out
    assert "--config" in out
    assert "--migration" in out


def test_the_help_lists_every_verb_and_its_line(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for verb, line in VERBS.items():
        assert f"  {verb} " in out
        assert line in " ".join(out.split())
    assert call("-h")[1] == out


def test_every_verb_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert [verb for verb in VERBS if f"migrator {verb}" not in page] == []


def test_the_version(call):
    assert call("--version") == (0, f"migrator, version {migrator.__version__}\n", "")


def loaded_by(arguments: list[str], folder: Path) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the heavy modules of a command in a process of its own."""
    code = (
        "import json, sys; from migrator.cli import run; code = run(sys.argv[1:]);"
        f"print(json.dumps([code, sorted(set({HEAVY!r}) & set(sys.modules))]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    status, heavy = json.loads(done.stderr.splitlines()[-1])
    return status, done.stdout, heavy


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["status", "--json"]])
def test_help_and_status_load_nothing_heavy(arguments, folder, halfway):
    code, out, heavy = loaded_by(arguments, folder)
    assert (code, heavy) == (0, [])
    assert out


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("c"), 2),
        (errors.UsageProblem("c"), 2),
        (errors.PreconditionFailed("c"), 3),
        (errors.InUse("c"), 3),
        (RouteMoved("c"), 3),
        (LeaseLost("c"), 3),
        (Disagreement("c", Tried({}, np.ones(1)), None), 3),
        (errors.TemporarilyUnavailable("c"), 4),
        (StoreUnavailable("c"), 4),
        (Vanished("c"), 4),
        (StoreBusy("c"), 4),
        (StoreRejected("c"), 2),
        (StoreError("c"), 2),
        (trainer_errors.ImagesUnavailable("c"), 4),
        (trainer_errors.ImageProblem("c"), 2),
        (trainer_errors.TableProblem("c"), 2),
        (trainer_errors.EncoderProblem("c"), 2),
        (trainer_errors.EncoderMismatch("c"), 3),
        (trainer_errors.TrainingProblem("c"), 2),
        (trainer_errors.TrainingFailed("c"), 3),
        (trainer_errors.TrainingInterrupted("c"), 130),
        (trainer_errors.TrainerError("c"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_exit_code_of_each_error(error, code, folder, call, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(status_verb, "open_project", fail)
    assert call("status") == (code, "", "migrator: c\n")


def test_no_error_was_forgotten_above():
    parametrize = test_the_exit_code_of_each_error.pytestmark[0]
    tried = {type(error) for error, _ in parametrize.args[1]}

    def family(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(family(child) for child in kind.__subclasses__()))

    ours = {kind for kind in family(errors.MigratorError) if kind.__module__.startswith("migrator.")}
    # What an adapter tells apart within a kind of refusal has the exit code of that kind.
    finer = {kind for kind in ours if re.match(r"migrator\.adapters\.(faiss|milvus|qdrant)\.", kind.__module__)}
    assert not any("exit_code" in vars(kind) for kind in finer)
    assert ours - finer - tried == {errors.MigratorError}


def test_a_bug_is_called_one_in_one_line(folder, call, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(status_verb, "open_project", fail)
    code, out, err = call("status")
    assert (code, out) == (1, "")
    assert err == "migrator: this is a bug: ZeroDivisionError: one two (`migrator --verbose ...` shows where)\n"
    code, out, err = call("--verbose", "status")
    assert (code, out) == (1, "")
    assert "Traceback" in err


def test_an_interrupt(folder, call, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status_verb, "open_project", interrupt)
    code, out, err = call("status")
    assert (code, out) == (130, "")
    assert err.strip() == "migrator: interrupted: run the same command again"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stauts"], "stauts"),
        (["status", "--jsn"], "--jsn"),
        (["status", "digits-v2", "more"], "more"),
        (["status", "no-such-migration"], "no-such-migration"),
        (["status", "--config", "no-such.yaml"], "no-such.yaml"),
        (["status", "--config", "."], "."),
        (["rollout"], "--stage"),
        (["rollout", "--stage", "sideways"], "sideways"),
        (["rollout", "--stage", "canary", "--percent", "101"], "101"),
        (["rollout", "--stage", "cutover", "--max-failures", "-1"], "-1"),
        (["backfill", "--max-items", "0"], "0"),
        (["backfill", "--max-seconds", "soon"], "soon"),
        (["schedule", "--every", "60"], "60"),
        (["train", "--resume", "--restart"], "--restart"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_wrong_command_line(arguments, says, folder, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_no_verb_shows_the_help(call):
    code, out, err = call()
    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize("verb", ["pause", "resume", "failures", "route", "rollback", "backfill", "verify"])
def test_before_the_first_plan(verb, folder, call):
    code, out, err = call(verb)
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert "migrator" in err.removeprefix("migrator:"), "it names the command that comes first"


def test_a_ledger_of_something_else(folder, call):
    (folder / "migrator.db").write_bytes(b"not a database" * 1000)
    code, out, err = call("status")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


# --- asking before a change ------------------------------------------------------------------------------------------

CHANGES = [
    ["pause"],
    ["rollback"],
    ["failures", "--retry"],
    ["backfill"],
    ["train"],
]


@pytest.mark.parametrize("arguments", CHANGES, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("stdin", ["a pipe", "closed"])
def test_without_yes_and_without_a_terminal_nothing_is_changed(
    arguments, stdin, folder, ledger, halfway, call, monkeypatch
):
    before = everything(ledger, halfway)
    monkeypatch.setattr(sys, "stdin", None if stdin == "closed" else open(os.devnull))  # noqa: SIM115, PTH123
    code, out, err = call(*arguments)
    if sys.stdin:
        sys.stdin.close()
    assert (code, out) == (2, "")
    assert err.splitlines()[0].startswith("About to ")
    assert err.splitlines()[1:] == ["migrator: nobody can answer here: add --yes"]
    assert everything(ledger, halfway) == before
    assert not (folder / "artifacts").exists()


class Terminal:
    """Somebody at a keyboard."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "code", "paused"), [("y\n", 0, "paused by hand"), ("n\n", 3, None), ("\n", 3, None)]
)
def test_somebody_is_asked(answer, code, paused, ledger, halfway, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    found, out, err = call("pause")
    assert found == code
    assert "Continue? [y/N]" in err
    assert ledger.migration("digits-v2").paused == paused
    assert bool(out) == (code == 0)


def test_pause_and_resume(ledger, halfway, call):
    assert call("pause", "--reason", "sale of the year", "--yes")[0] == 0
    assert "paused: sale of the year" in call("status")[1]
    assert "migrator resume digits-v2" in call("status")[1]
    assert call("resume", "--yes")[0] == 0
    assert ledger.migration("digits-v2").paused is None
    assert call("resume", "--yes")[0] == 3


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_status_of_nothing(folder, call):
    code, out, err = call("status", "--json")
    found = json.loads(out)
    assert (code, err, found["format"], found["stage"]) == (0, "", 1, "none")
    assert found["next_command"] == "migrator plan digits-v2"
    assert "migrator plan digits-v2" in call("status")[1]


def test_the_status_halfway(halfway, call):
    code, out, err = call("status", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["format"], found["migration"], found["collection"]) == (1, "digits-v2", "digits [old]")
    assert (found["stage"], found["state"], found["epoch"], found["canary_percent"]) == ("backfill", "active", 1, 100.0)
    assert (found["items_total"], found["items_done"], found["items_failed"], found["items_gone"]) == (30, 10, 1, 1)
    assert found["chunks"] == {"done": 1, "failed": 1, "pending": 1}
    assert found["mixed_space"] is True
    assert found["next_command"] == "migrator backfill digits-v2"
    code, out, _ = call("status")
    assert code == 0
    for text in ("digits [old]", "10 of 30 (33.3%)", "1 done, 1 failed, 1 pending", "yes: only new-encoder queries"):
        assert text in out


def test_the_next_command_is_one_that_helps(ledger, halfway, call):
    """Whatever the state, what status names exists and is not refused as coming too early."""

    def following() -> list[str]:
        return json.loads(call("status", "--json")[1])["next_command"].split()[1:]

    me = this_process()
    chunk = ledger.lease_chunk(halfway.id, me, seconds=60, leave=set())
    ledger.finish_chunk(chunk, me, run_id=1, written=[], gone=0, failures=[])
    assert following() == ["failures", "digits-v2"]
    assert call(*following(), "--retry", "--yes")[0] == 0
    assert following() == ["backfill", "digits-v2"]
    ledger.move(halfway, state="rolling_back", event="rollback begins")
    assert following() == ["rollback", "digits-v2"]
    assert call("backfill", "--yes")[0] == 3


def test_failures(ledger, halfway, call):
    code, out, _ = call("failures", "--json")
    found = json.loads(out)
    assert (code, found["format"]) == (0, 1)
    assert found["items"] == [{"id": "7", "kind": "image", "reason": "[red]torn[/red]", "attempts": 1}]
    assert found["chunks"] == [{"pass": 0, "ordinal": 1, "items": 10, "error": "index is full"}]
    _, out, _ = call("failures")
    assert '"7"' in out
    assert "[red]torn[/red]" in out, "a reason is text, not markup"
    assert "index is full" in out
    assert call("failures", "--retry", "--yes")[0] == 0
    assert ledger.counts(halfway.id).by_state == {"done": 1, "pending": 2}
    assert call("failures")[1] == "no failures\n"


def test_the_route(ledger, halfway, call):
    code, out, _ = call("route", "--json")
    found = json.loads(out)
    assert (code, found["format"], found["epoch"], found["canary_percent"]) == (0, 1, 1, 100.0)
    _, out, _ = call("route", "--key", "user-7", "--json")
    chosen = choose(ledger.route("digits [old]"), "user-7")
    assert json.loads(out) == {
        "format": 1, "key": "user-7", "encoder": chosen.encoder, "collection": chosen.collection, "epoch": 1
    }  # fmt: skip
    assert "new-id" in call("route", "--key", "user-7")[1]


def test_a_route_is_printed_in_lines(ledger, halfway, call):
    out = call("route")[1]
    assert not set("{}") & set(out)
    assert {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in out.splitlines()}.items() >= {
        "collection": "digits [old]",
        "phase": "old",
        "queries": "100 %: new-id in digits [old]",
        "writes": "old-id in digits [old]",
        "salt": "s",
    }.items()
    ledger.move(
        ledger.migration("digits-v2"), event="canary", route={"epoch": 1, "phase": "canary", "canary_percent": 12.5,
        "canary_collection": "beside", "write_encoders": ["old-id", "new-id"]},
    )  # fmt: skip
    lines = [line.split(None, 1) for line in call("route")[1].splitlines()]
    assert ["queries", "87.5 %: old-id in digits [old]"] in lines
    assert ["12.5", "%: new-id in beside"] in lines
    assert ["writes", "old-id in digits [old]"] in lines
    assert ["new-id", "in beside"] in lines


def test_the_time_left_is_told_only_while_the_backfill_is_open(ledger, halfway, call):
    def status() -> dict[str, Any]:
        return json.loads(call("status", "--json")[1])

    with ledger._write() as session:
        run = session.get_one(BackfillRun, 1)
        run.started_at -= dt.timedelta(seconds=5)
    assert status()["items_per_second"] == pytest.approx(2, abs=0.2)
    assert status()["eta_seconds"] == pytest.approx(10, abs=1)
    ledger.pause(halfway, "by hand")
    assert status()["eta_seconds"] is None
    ledger.pause(halfway, None)
    back = ledger.move(halfway, state="rolling_back", event="rollback begins")
    assert (status()["eta_seconds"], status()["items_per_second"]) == (None, None)
    for chunk in ledger.chunks(halfway.id):
        ledger.set_restored(chunk)
    ledger.move(back, state="rolled_back", event="rolled back", old_kept=False)
    assert (status()["eta_seconds"], status()["items_per_second"]) == (None, None)


# --- init, config ----------------------------------------------------------------------------------------------------


def test_init_writes_what_can_be_read_and_overwrites_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("init")
    assert (code, err) == (0, "")
    assert out.startswith("wrote migrations.yaml")
    assert "my-collection-v2" in load_config(Path("migrations.yaml")).migrations
    Path("migrations.yaml").write_text("mine")
    code, out, err = call("init")
    assert (code, out) == (2, "")
    assert "is there already" in err
    assert Path("migrations.yaml").read_text() == "mine"
    assert call("init", "other.yaml")[0] == 0
    assert Path("other.yaml").read_text() == TEMPLATE
    code, out, err = call("init", "no/such/folder.yaml")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_config_prints_what_it_understood_without_secrets(folder, call):
    (folder / "migrations.yaml").write_text(
        CONFIG.replace("sqlite:///migrator.db", "postgresql+psycopg://u:geheim@h/d")
    )
    code, out, err = call("config")
    assert (code, err) == (0, "")
    assert json.loads(out)["migrations"]["digits-v2"]["new_encoder"]["arch"] == "resnet18"
    assert "geheim" not in out
    assert list(folder.iterdir()) == [folder / "migrations.yaml"], "the ledger was not opened"


def test_the_schema_of_the_configuration(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)  # without a configuration
    code, out, err = call("config", "--schema")
    assert (code, err) == (0, "")
    assert "migrations" in json.loads(out)["properties"]


# --- schedule --------------------------------------------------------------------------------------------------------

AWKWARD = 'it\'s 100% $HOME "folder"'


@pytest.fixture
def awkward(tmp_path, monkeypatch) -> Path:
    """A configuration in a folder whose name a shell, cron and systemd would each like to misread."""
    folder = tmp_path / AWKWARD
    folder.mkdir()
    (folder / "migrations.yaml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    return folder


def test_a_crontab_line_does_what_it_says(awkward, call, monkeypatch):
    """The line is given to a shell as cron does it, with a migrator that writes down how it was called."""
    program = awkward / "bin" / "migrator"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"; echo trouble >&2\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    code, out, err = call("schedule", "--every", "5")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith("*/5 * * * * ")
    command = line.removeprefix("*/5 * * * * ")
    assert command.count("%") == command.count(r"\%"), "an unescaped % ends a cron command"
    subprocess.run(["/bin/sh", "-c", command.replace(r"\%", "%")], check=True, cwd="/", timeout=30)
    log = (awkward / "digits-v2-backfill.log").read_text().splitlines()
    assert log[0] == str(awkward)
    assert log[-1] == "trouble"
    words = log[1:-1]
    assert words[:2] == ["backfill", "digits-v2"]
    assert words[words.index("--config") + 1] == str(awkward / "migrations.yaml")
    assert words[words.index("--max-seconds") + 1] == "280", "it leaves before the next one is due"
    assert "--yes" in words


def test_a_crontab_line_without_the_script_on_the_path(folder, call, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    _, out, _ = call("schedule")
    assert shlex.split(out.split("&&")[1])[:4] == [sys.executable, "-m", "migrator", "backfill"]


def systemd_words(line: str) -> list[str]:
    """A command line as systemd.service(5) reads it, of the quoting and escapes that are used here."""
    words, word, quoted, at = [], "", False, 0
    while at < len(line):
        letter, following = line[at], line[at + 1 : at + 2]
        if letter == "\\" or (letter in "%$" and following == letter):
            word += following
            at += 1
        elif letter == '"':
            quoted = not quoted
        elif letter == " " and not quoted:
            words.append(word)
            word = ""
        else:
            assert letter not in "%$'", f"{letter} would be expanded or quote: {line}"
            word += letter
        at += 1
    assert not quoted
    return [*words, word]


def test_systemd_units(folder, call):
    code, out, err = call("schedule", "--systemd", "--every", "15")
    assert (code, err) == (0, "")
    units = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    assert units["OnCalendar"] == "*:0/15"
    assert units["WorkingDirectory"] == str(folder)
    assert units["SuccessExitStatus"] == "130"
    words = systemd_words(units["ExecStart"])
    assert words[-2:] == ["--config", str(folder / "migrations.yaml")]
    assert words[words.index("backfill") :][:2] == ["backfill", "digits-v2"]


def test_systemd_units_in_an_awkward_folder(awkward, call):
    _, out, _ = call("schedule", "--systemd")
    units = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    assert units["WorkingDirectory"].replace("%%", "%") == str(awkward)
    assert units["WorkingDirectory"].count("%") == 2 * str(awkward).count("%")
    assert "'" in str(awkward)
    words = systemd_words(units["ExecStart"].replace("'", "’"))
    assert words[-1].replace("’", "'") == str(awkward / "migrations.yaml")


# --- small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "–"), (0, "0 s"), (59.4, "59 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"),
     (12_600, "3.5 h"), (172_800, "2 days")],
)  # fmt: skip
def test_durations(seconds, said):
    assert formatting.duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_500_000, "1.5 MB"), (2e12, "2 TB")]
)
def test_sizes(count, said):
    assert formatting.size(count) == said


def test_plain_progress_lines_come_while_nothing_moves(monkeypatch):
    lines: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(common, "PLAIN_EVERY", 0.01)
    monkeypatch.setattr("migrator.cli.common.click.echo", lambda text, err: lines.put(text) if err else None)

    def next_line(awaited: str) -> None:
        while lines.get(timeout=60) != awaited:
            pass

    with common.progress("backfill") as advance:
        next_line("backfill: started")
        advance(5, 12, "images")
        next_line("backfill: 5 of 12 images")
        advance(10, 12)
        next_line("backfill: 10 of 12")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
