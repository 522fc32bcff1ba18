"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, shows each block of code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_docs import DOCS, ROOT, code_blocks


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def built_page(site: Path, page: Path) -> str:
    return (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(DOCS)  # and those from the rest of the tree
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)\"", page.read_text())
        loaded += re.findall(r"<link[^>]*\shref=\"([^\"]+)\"", page.read_text())
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page


def test_each_block_of_code_is_one_on_its_page(site: Path) -> None:
    for page in DOCS:
        if page.name != "cli.md":  # it has more, from the commands
            shown = len(re.findall(r"<pre[ >]", built_page(site, page)))
            assert shown == len(code_blocks(page.read_text(), r"\w*")), page.name


def test_the_reference_of_commands_shows_their_options(site: Path) -> None:
    page = built_page(site, ROOT / "docs" / "reference" / "cli.md")
    assert "--max-seconds" in page
    assert "UNSET" not in page


def test_the_reference_of_keys_shows_every_section(site: Path) -> None:
    page = built_page(site, ROOT / "docs" / "reference" / "configuration.md")
    assert "<!-- keys:" not in page
    assert page.count("<th>default</th>") == 17


def test_lists_and_tables_are_lists_and_tables(site: Path) -> None:
    for page in sorted(site.rglob("*.html")):
        article = page.read_text().partition("<article")[2].partition("</article>")[0]
        text = re.sub(r"<pre[ >].*?</pre>", "", article, flags=re.DOTALL)
        assert re.findall(r"^\s*(?:[-*|] |\d+\. |```|===|!!!).*", text, re.MULTILINE) == [], page
