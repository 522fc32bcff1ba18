"""Absolute paths and URLs that begin with the root are cut; what points elsewhere is refused."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from migrator.trainer.errors import ImageProblem, TrainerError
from migrator.trainer.images.paths import plain_path
from migrator.trainer.images.source import ImageSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("images", "images2", "images/a"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("images")
    return tmp_path / "images"


@pytest.mark.parametrize(
    "spelled",
    ["{root}", "{root}/", "{parent}/./images", "{parent}/images2/../images", "{parent}/link", "file://{root}"],
)
@pytest.mark.parametrize(
    "path",
    [
        "a/1.jpg",
        "./a/1.jpg",
        "a//1.jpg",
        "a/./1.jpg",
        "{root}/a/1.jpg",
        "{root}//a/./1.jpg",
        "//{root}/a/1.jpg",
        "file://{root}/a/1.jpg",
        "file://localhost{root}/a/1.jpg",
        "FILE:{root}/a/%31.jpg",
    ],
)
def test_one_local_file_has_one_path(root: Path, spelled: str, path: str) -> None:
    source = ImageSource(spelled.format(root=root, parent=root.parent))
    assert source.locate(1, {"path": path.format(root=root)}) == "a/1.jpg"
    assert source.below_root(source.below_root(path.format(root=root))) == "a/1.jpg"


def test_a_relative_root_is_known_by_where_it_lies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    for spelled in ("images", "./images", "images2/../images", "link"):
        assert ImageSource(spelled).below_root(f"{root}/a/1.jpg") == "a/1.jpg"
    assert ImageSource("link").below_root(f"{root.parent}/link/a/1.jpg") == "a/1.jpg"
    assert ImageSource("/").below_root(f"{root}/a/1.jpg") == f"{root}/a/1.jpg"[1:]


@pytest.mark.parametrize(
    "path",
    [
        "{root}2/a.jpg",
        "{root}",
        "{root}/",
        "{root}/../images2/a.jpg",
        "{root}/../images/a.jpg",
        "file://{root}/%2e%2e/images2/a.jpg",
        "file://{root}2/a.jpg",
        "file://elsewhere{root}/a.jpg",
        "file://{root}/a%00.jpg",
        "file:///{root}/a%5c..%5cb.jpg",
        "file:a.jpg/../../x",
        "{parent}/link2/a.jpg",
        "http://host{root}/a.jpg",
        "s3://bucket/a.jpg",
        "C:\\images\\a.jpg",
        "file:///etc/passwd",
    ],
)
def test_what_is_not_below_a_local_root(root: Path, path: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        ImageSource(str(root)).locate(1, {"path": path.format(root=root, parent=root.parent)})
    assert str(caught.value).isprintable()


def test_the_cut_path_still_cannot_leave_through_a_link(root: Path) -> None:
    (root.parent / "secret.png").write_bytes(b"x")
    (root / "out").symlink_to("..")
    for path in (f"{root}/out/secret.png", f"file://{root}/out/secret.png"):
        with pytest.raises(ImageProblem, match="through a symbolic link"):
            ImageSource(str(root)).load(path)


HTTP = "https://Example.com:443/x%20y/z/"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("a.jpg", "a.jpg"),
        ("./b/a.jpg", "b/a.jpg"),
        ("100%.jpg", "100%.jpg"),
        ("a?b#c.jpg", "a?b#c.jpg"),
        ("https://example.com/x%20y/z/a.jpg", "a.jpg"),
        ("HTTPS://EXAMPLE.COM:443/x y/z//a.jpg", "a.jpg"),
        ("https://example.com/x%20y/./z/b/a%25%3F.jpg", "b/a%?.jpg"),
        ("//example.com/x%20y/z/a.jpg", "a.jpg"),
        ("/x%20y/z/%C3%BC.jpg", "ü.jpg"),
    ],
)
def test_what_is_below_a_web_root(path: str, place: str) -> None:
    source = ImageSource(HTTP)
    assert source.below_root(path) == place
    assert source.below_root(place) == place


@pytest.mark.parametrize(
    "path",
    [
        "http://example.com/x%20y/z/a.jpg",
        "https://example.com:8443/x%20y/z/a.jpg",
        "https://example.org/x%20y/z/a.jpg",
        "https://sub.example.com/x%20y/z/a.jpg",
        "https://example.com@evil.org/x%20y/z/a.jpg",
        "https://user@example.com/x%20y/z/a.jpg",
        "https://example.com/x%20y/z2/a.jpg",
        "https://example.com/x%20y/z",
        "https://example.com/x%20y/z/",
        "https://example.com/x%20y/z/../w/a.jpg",
        "https://example.com/x%20y/z/%2e%2e/w/a.jpg",
        "https://example.com/x%20y/z/%252e%252e/w/a.jpg",
        "https://example.com/x%20y%2Fz/a.jpg",
        "https://example.com/x%20y/z/b%2Fa.jpg",
        "https://example.com/x%20y/z/a.jpg?w=200",
        "https://example.com/x%20y/z/a.jpg#part",
        "https://example.com:port/x%20y/z/a.jpg",
        "https://[::1/x%20y/z/a.jpg",
        "file:///x%20y/z/a.jpg",
        "/z/a.jpg",
        "../a.jpg",
        "b\\a.jpg",
        "a\n.jpg",
    ],
)
def test_what_is_not_below_a_web_root(path: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        ImageSource(HTTP).below_root(path)
    assert str(caught.value).isprintable()


def test_a_host_that_is_an_address() -> None:
    assert ImageSource("http://[::1]:8000/x").below_root("http://[::1]:8000/x/a.jpg") == "a.jpg"


def test_roots_that_are_no_folder_of_a_web_server() -> None:
    for root in ("http://host/x?token=hunter2", "https://host/#a"):
        with pytest.raises(TrainerError, match="has a query or fragment") as caught:
            ImageSource(root)
        assert "hunter2" not in str(caught.value)
    for root in ("http://", "https://host:port/", "http://[::1/"):
        with pytest.raises(TrainerError, match="no valid URL"):
            ImageSource(root)


def test_urls_of_an_object_store() -> None:
    fsspec.filesystem("memory").pipe("/bucket/pre/a//1.jpg", b"1")
    source = ImageSource("memory://bucket/pre/")
    for path in ("memory://bucket/pre/a//1.jpg", "MEMORY://bucket/pre/a//1.jpg", "a//1.jpg", "./a//1.jpg"):
        assert source.below_root(path) == "a//1.jpg", "an object's name may hold two slashes"
        assert source.read(path) == b"1"
    for path in (
        "memory://bucket/prefix/1.jpg",
        "memory://bucket/pre",
        "memory://Bucket/pre/a.jpg",
        "memory://bucket/pre/../x.jpg",
        "s3://bucket/pre/a.jpg",
        "https://bucket/pre/a.jpg",
        "/bucket/pre/a.jpg",
        "zip://a::memory://bucket/pre/a.zip",
    ):
        with pytest.raises(ImageProblem):
            source.below_root(path)


def test_one_spelling() -> None:
    assert [plain_path(path) for path in ("a", "./a", "a//b/.", ".", "./", "a/b/")] == [
        "a",
        "a",
        "a/b",
        ".",
        ".",
        "a/b",
    ]
    assert plain_path("./a//b", merge=False) == "a//b"
