"""What `mkdocs build` adds to the pages of docs/: tables of the configuration, and pages from the rest of the tree."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[#)])")
FENCED = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LONG = 100
KEYS = re.compile(r"^<!-- keys: (\w+) -->$", re.MULTILINE)


def _sibling(name: str) -> ModuleType:
    """Loads a module of this folder, which is no package for mkdocs."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_elsewhere() -> list[Path]:
    """Pages that belong to the site and stay where they are in the tree, and the files that these show."""
    return [
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "bench" / "results").glob("*.md")),
        *sorted(path for path in (ROOT / "examples").glob("*/*") if path.suffix in (".md", ".py", ".yaml")),
    ]


def _wrapped(block: re.Match[str]) -> str:
    """Messages of one long line are wrapped; tables keep their lines, and scroll."""
    indent, language, text = block.groups()
    wraps = not language and max(map(len, text.splitlines())) > LONG and "│" not in text
    return f"{indent}``` {{ .text .wrap }}\n{text}{indent}```" if wraps else block[0]


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside docs/, under the path that they have in the tree."""
    for path in _from_elsewhere():
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in the tables of keys, and turns links between files of the tree into links between pages of the site."""
    tables = _sibling("configuration")
    markdown = KEYS.sub(lambda found: tables.table(found[1]), markdown)
    markdown = FENCED.sub(_wrapped, markdown)
    source = Path(page.file.abs_src_path)

    def on_site(link: re.Match[str]) -> str:
        target = link[1]
        if "://" in target or target.startswith("mailto:"):
            return target
        place = Path(os.path.normpath(source.parent / target))
        inside = place.relative_to(DOCS) if place.is_relative_to(DOCS) else place.relative_to(ROOT)
        return Path(os.path.relpath(inside, Path(page.file.src_uri).parent)).as_posix()

    return LINK.sub(on_site, markdown)
