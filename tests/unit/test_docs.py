"""The documentation says what the program does: keys, defaults, commands, links."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
import pytest
import yaml
from pydantic import ValidationError

from docs._site.configuration import definitions
from docs._site.configuration import table as keys_of
from migrator import demo
from migrator.cli import VERBS, cli
from migrator.config import Section, Verify, load_config
from migrator.demo_stores import STORES
from migrator.ledger.ledger import SCHEMA
from migrator.lifecycle.status import Status
from migrator.rollout.stages import TRANSITIONS
from migrator.trainer.training.settings import FitSettings

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
REFERENCE = ROOT / "docs" / "reference"


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same level or above."""
    level = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert level is not None, f"no heading {heading!r}"
    rest = text[level.end() :]
    following = re.search(rf"^#{{1,{len(level[1])}}} ", without_code(rest), re.MULTILINE)
    return rest[: following.start()] if following else rest


def without_code(text: str) -> str:
    """The text with code blocks blanked, so that positions stay what they are."""
    return re.sub(r"^( *)```.*?^\1```", lambda block: " " * len(block[0]), text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str, language: str) -> list[str]:
    """The blocks in a language, those that are indented (in a list, below a tab) too."""
    found = re.findall(rf"^( *)```{language}(?: [^\n]*)?\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    return [dedent(block) for _, block in found]


def table(text: str) -> list[list[str]]:
    """The cells of the first table, without its header."""
    rows = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[0].splitlines()[2:]]


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", definitions())
def test_every_key_of_the_configuration_is_in_the_reference_with_type_default_and_description(name: str) -> None:
    rows = {row[0].strip("`"): row for row in table(keys_of(name) + "\n")}
    found = definitions()[name]
    assert rows.keys() == found["properties"].keys()
    for key, (_, kind, default, description) in rows.items():
        assert kind, key
        assert description[-1] in ".)", key
        assert (default == "required") == (key in found.get("required", ())), key


def test_the_reference_shows_each_section_once() -> None:
    page = (REFERENCE / "configuration.md").read_text()
    shown = re.findall(r"^<!-- keys: (\w+) -->$", page, re.MULTILINE)
    assert sorted(shown) == sorted(definitions())


def test_the_reference_shows_the_values_that_hold_where_nothing_is_given() -> None:
    rows = {name: {row[0]: row for row in table(keys_of(name) + "\n")} for name in ("Train", "Verify", "QdrantStore")}
    assert rows["Train"]["`lr`"][1:3] == ["number, above 0", f"`{FitSettings().lr}`"]  # the trainer's own
    assert rows["Verify"]["`max_age`"][2] == "`7d`"
    assert rows["QdrantStore"]["`engine`"][1:3] == ["`local`, `edge`", "none"]


def test_the_seven_days_of_max_age() -> None:
    assert Verify.model_fields["max_age"].default == timedelta(days=7)


def test_the_examples_of_the_configuration_can_be_loaded(tmp_path: Path) -> None:
    examples = [text for page in PAGES for text in code_blocks(page.read_text(), "yaml") if "version:" in text]
    assert examples
    for text in examples:
        file = tmp_path / "migrations.yaml"
        file.write_text(text)
        load_config(file)


def entries(text: str) -> list[dict[str, Any]]:
    """The keys of an example, cut in two where a key comes a second time."""
    found: list[dict[str, Any]] = [{}]
    for part in re.split(r"^(?=\w+:)", text, flags=re.MULTILINE):
        for key, value in (yaml.safe_load(part) or {}).items():
            if key in found[-1]:
                found.append({})
            found[-1][key] = value
    return found


def test_the_examples_of_a_migrations_keys_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QDRANT_API_KEY", "MILVUS_TOKEN"):
        monkeypatch.setenv(name, "a")
    blocks = [text for page in PAGES for text in code_blocks(page.read_text(), "yaml") if "version:" not in text]
    examples = [example for text in blocks for example in entries(text) if example]
    assert any("engine" in example.get("store", {}) for example in examples)
    for example in examples:
        whole = {
            "store": {"kind": "faiss", "path": "./gallery"},
            "images": {"root": "./images"},
            "old_encoder": {"arch": "resnet18", "weights": "./old.safetensors", "dim": 128, "image_size": 224},
            "new_encoder": {"arch": "resnet50", "dim": 128, "image_size": 224},
            "train": {"items": "train.csv"},
            "verify": {},
            "rollout": {"strategy": "shadow"},
            **example,
        }
        file = tmp_path / "migrations.yaml"
        file.write_text(yaml.safe_dump({"version": 1, "migrations": {"example": whole}}))
        load_config(file)


def sections() -> list[type[Section]]:
    found: list[type[Section]] = [Section]
    for each in found:
        found.extend(each.__subclasses__())
    return found[1:]


def refused(kind: type[Section], key: str, value: Any) -> bool:
    """Whether a section refuses this value of its key, whatever else it lacks."""
    arch = {"arch": "resnet18"} if key in ("pretrained", "preprocessing", "head") else {}  # keys of timm's models
    weights = {"weights": "old.pt"} if key in ("head", "checkpoint_key") else {}
    transform = {"transform": "loader:transform"} if (key, value) == ("convert", "none") else {}
    try:
        kind.model_validate({**arch, **weights, **transform, key: value})
    except ValidationError as error:
        return any(problem["loc"][:1] == (key,) for problem in error.errors())
    return False


def settings_in_sentences() -> list[Any]:
    """Each `key: value` of a sentence whose key is a section's."""
    found: dict[str, str] = {}
    for page in PAGES:
        for line in re.findall(r"`((?:\w+\.)*\w+: [^`]+)`", without_code(page.read_text())):
            found[line] = str(page.relative_to(ROOT))
    keys = {key for kind in sections() for key in kind.model_fields}
    return [
        pytest.param(line, id=f"{page}: {line}")
        for line, page in found.items()
        if line.partition(":")[0].split(".")[-1] in keys
    ]


@pytest.mark.parametrize("line", settings_in_sentences())
def test_a_setting_in_a_sentence_is_one_that_its_key_takes(line: str) -> None:
    ((path, value),) = yaml.safe_load(line).items()
    key = path.split(".")[-1]
    kinds = [kind for kind in sections() if key in kind.model_fields]
    assert not all(refused(kind, key, value) for kind in kinds)


def test_settings_in_sentences_are_found() -> None:
    lines = [str(each.values[0]) for each in settings_in_sentences()]
    assert {"grpc: true", "engine: edge", "rollout.strategy: shadow"} <= set(lines)


# -- operation --------------------------------------------------------------------------------------------------------


def test_every_verb_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert {verb for verb in VERBS if not re.search(rf"\bmigrator {verb}\b", text)} == set()


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    rows = table((REFERENCE / "exit-codes.md").read_text())
    told = re.findall(r"\b(\d+) [a-z]", (cli.help or "").partition("Exit codes:")[2])
    assert [row[0] for row in rows] == told == ["0", "1", "2", "3", "4", "130"]


def test_every_stage_is_documented() -> None:
    commands = " ".join(row[0] for row in table(section((REFERENCE / "stages.md").read_text(), "In place")))
    assert [stage for stage in TRANSITIONS if f"--stage {stage}" not in commands] == []


def test_every_field_of_the_status_is_documented() -> None:
    rows = table((REFERENCE / "status.md").read_text())
    assert {name.strip("` ") for row in rows for name in row[1].split(",")} == {field.name for field in fields(Status)}


# -- commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[Any]:
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text()
        inline = re.findall(r"`(migrator [^`]+)`", without_code(text))
        blocks = [line for block in code_blocks(text, r"\w*") for line in block.splitlines()]
        in_blocks = [
            command for line in blocks for command in re.findall(r"(?<![\w.-])(?<!from )migrator [a-z-].*", line)
        ]
        found |= {" ".join(line.split()): str(page.relative_to(ROOT)) for line in inline + in_blocks}
    return [pytest.param(line, id=f"{page}: {line[:60]}") for line, page in found.items()]


def words_of(line: str) -> list[str]:
    """A command's words, up to a comment, a pipe or a redirection; quotes in messages end the command too."""
    words = shlex.split(re.split(r"[`>|;]|&&|\.\.\.", line, maxsplit=1)[0], comments=True)
    return words[1:]


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documentation_exists(line: str) -> None:
    words = words_of(line)
    at = next((number for number, word in enumerate(words) if not word.startswith("-")), len(words))
    with suppress(click.exceptions.Exit):  # --help and --version
        group = cli.make_context("migrator", words[: at + 1])
        command = cli.get_command(group, words[at])
        assert command is not None
        command.make_context(words[at], words[at + 1 :], parent=group)


def test_commands_are_found() -> None:
    lines = [str(each.values[0]) for each in commands()]
    assert any(line.startswith("migrator backfill products-v2 --max-seconds") for line in lines)  # in a crontab line
    assert any("--max-failures 3" in line for line in lines)  # in a sentence


# -- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "migrations.yaml"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_no_path_of_one_machine_is_left(page: Path) -> None:
    assert re.findall(r"(?<![\w./])/(?:work|tmp|root|home)/\S*|\.\./shared\S*", page.read_text()) == []


def test_the_schema_that_the_documentation_quotes_is_the_newest() -> None:
    quoted = [known for page in PAGES for known in re.findall(r"this one knows up to (\d+)", page.read_text())]
    assert quoted == [SCHEMA]


def test_the_example_at_the_root_is_the_demo_seen_from_above(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "migrations.yaml").write_text(
        demo.CONFIG.format(
            name=demo.NAME, store=STORES["faiss"].settings, dim=demo.DIM, size=demo.SIZE, queries=demo.QUERIES
        )
    )
    (tmp_path / "migrations.yaml").write_text((ROOT / "migrations.yaml").read_text())
    assert load_config(tmp_path / "migrations.yaml").redacted() == load_config(folder / "migrations.yaml").redacted()


def test_the_numbers_in_the_benchmarks_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "explanation" / "benchmarks.md").read_text()
    measured = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())["demo"]["quality"]
    for row in measured:
        shown = f"| {row['what']} | {row['metrics']['map@100']:.4f} | {row['metrics']['recall@1']:.4f} |"
        assert shown in page
    results = json.loads((ROOT / "bench" / "results" / "backfill.json").read_text())
    assert f"| {results['pipeline']['median_ratio']:.2f} |" in page
    for row in results["engine"]:
        assert f"| {row['median_vectors_per_second']:,} |" in page
