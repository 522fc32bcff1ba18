"""The documentation says what the program does: keys, defaults, commands, links."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pydantic import ValidationError

from migrator.cli import VERBS, cli
from migrator.config import Section, Verify, load_config, schema
from migrator.ledger.ledger import SCHEMA
from migrator.rollout.stages import _STEPS
from migrator.status import Status
from migrator.trainer.fit import FitSettings

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
SECTIONS = {  # heading in docs/configuration.md -> definitions of the JSON Schema
    "Top level": ["Config"],
    "A migration": ["Migration"],
    "store": ["FaissStore"],
    "store: milvus": ["MilvusStore"],
    "store: qdrant": ["QdrantStore"],
    "images": ["Images"],
    "old_encoder and new_encoder": ["OldEncoder", "NewEncoder"],
    "train": ["Train"],
    "verify": ["Verify"],
    "verify.gate": ["Gate"],
    "verify.gate.min_gain": ["MinGain"],
    "verify.gate.thresholds": ["Threshold"],
    "rollout": ["Rollout"],
    "backfill": ["Backfill"],
}


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same level or above."""
    level = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert level is not None, f"no heading {heading!r}"
    rest = text[level.end() :]
    following = re.search(rf"^#{{1,{len(level[1])}}} ", without_code(rest), re.MULTILINE)
    return rest[: following.start()] if following else rest


def without_code(text: str) -> str:
    """The text with code blocks blanked, so that positions stay what they are."""
    return re.sub(r"^```.*?^```", lambda block: " " * len(block[0]), text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def table(text: str) -> list[list[str]]:
    """The cells of the first table, without its header."""
    rows = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[0].splitlines()[2:]]


# -- configuration ----------------------------------------------------------------------------------------------------


def definitions() -> dict[str, Any]:
    whole = schema()
    return {"Config": whole, **whole["$defs"]}


def shown(default: Any) -> str:
    if isinstance(default, str):
        return f"`{default}`"
    return f"`{json.dumps(default)}`"


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_of_the_configuration_is_documented_with_its_default(heading: str) -> None:
    found = definitions()
    rows = table(section((ROOT / "docs" / "configuration.md").read_text(), heading))
    documented = {row[0].strip("`"): row[2] for row in rows if "." not in row[0]}
    known: dict[str, Any] = {}
    required: dict[str, list[bool]] = {}
    for name in SECTIONS[heading]:
        known |= found[name]["properties"]
        for key in found[name]["properties"]:
            required.setdefault(key, []).append(key in found[name].get("required", ()))
    assert documented.keys() == known.keys()
    for key, said in documented.items():
        if all(required[key]):
            assert said == "required", key
        elif any(required[key]):
            assert said.startswith("required for"), key
        elif heading == "train" and known[key].get("default", ...) is None:
            assert said == ("none" if getattr(FitSettings(), key) is None else "trainer's"), key
        elif known[key].get("default", ...) is None:
            assert said == "none", key
        elif isinstance(known[key].get("default"), dict) or "$ref" in known[key]:
            assert said == "see below", key
        else:
            assert said == shown("7d" if key == "max_age" else known[key]["default"]), key


def test_no_section_of_the_schema_is_left_out() -> None:
    in_words = {"OtherStore", "ItemsFrom"}  # another store's keys are its own; train.items.* are rows of train
    assert {name for names in SECTIONS.values() for name in names} | in_words == definitions().keys()
    rows = table(section((ROOT / "docs" / "configuration.md").read_text(), "train"))
    nested = {row[0].strip("`").partition(".")[2] for row in rows if "." in row[0]}
    assert nested == definitions()["ItemsFrom"]["properties"].keys()


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
            found[line] = page.name
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
    text = (ROOT / "docs" / "operation.md").read_text()
    assert {verb for verb in VERBS if not re.search(rf"\bmigrator {verb}\b", text)} == set()


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    rows = table(section((ROOT / "docs" / "operation.md").read_text(), "Exit codes"))
    told = re.findall(r"\b(\d+) [a-z]", (cli.help or "").partition("Exit codes:")[2])
    assert [row[0] for row in rows] == told == ["0", "1", "2", "3", "4", "130"]


def test_every_stage_is_documented() -> None:
    commands = " ".join(row[0] for row in table(section((ROOT / "docs" / "operation.md").read_text(), "Stages")))
    assert [stage for stage in _STEPS if f"--stage {stage}" not in commands] == []


def test_every_field_of_the_status_is_documented() -> None:
    rows = table(section((ROOT / "docs" / "operation.md").read_text(), "Watching"))
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
        found |= {" ".join(line.split()): page.name for line in inline + in_blocks}
    return [pytest.param(line, id=f"{page}: {line[:60]}") for line, page in found.items()]


def words_of(line: str) -> list[str]:
    """A command's words, up to a comment, a pipe or a redirection; quotes in messages end the command too."""
    words = shlex.split(re.split(r"[`>|;]|&&|\.\.\.", line, maxsplit=1)[0], comments=True)
    return words[1:]


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documentation_exists(line: str) -> None:
    words = words_of(line)
    at = next(number for number, word in enumerate(words) if not word.startswith("-"))
    with suppress(click.exceptions.Exit):  # --help and --version
        group = cli.make_context("migrator", words[: at + 1])
        command = cli.get_command(group, words[at])
        assert command is not None
        command.make_context(words[at], words[at + 1 :], parent=group)


def test_commands_are_found() -> None:
    lines = [str(each.values[0]) for each in commands()]
    assert any(line.startswith("migrator backfill products-v2 --max-seconds") for line in lines)  # in a crontab line
    assert any("--accept-failures 3" in line for line in lines)  # in a sentence


# -- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "migrations.yaml"], ids=lambda page: str(page.name)
)
def test_no_path_of_one_machine_is_left(page: Path) -> None:
    assert re.findall(r"(?<![\w./])/(?:work|tmp|root|home)/\S*|\.\./shared\S*", page.read_text()) == []


def test_the_schema_that_the_documentation_quotes_is_the_newest() -> None:
    quoted = [known for page in PAGES for known in re.findall(r"this one knows up to (\d+)", page.read_text())]
    assert quoted == [SCHEMA]
