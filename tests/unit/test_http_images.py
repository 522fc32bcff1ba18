"""Images from a web server: names are quoted, answers told apart, and nothing is waited for without end."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from migrator.trainer.errors import ImageProblem, ImagesUnavailable, TrainerError
from migrator.trainer.images import http_folder
from migrator.trainer.images.source import ImageSource
from tests.web import Web, serve

NAMES = [
    "plain.png", "a b.png", "a%20b.png", "100%.png", "50%25.png", "what?.png", "n#1.png", "ü.png", "a+b.png",
    "a&b=c;d.png", "'quoted'.png", "~.png", "deep/er/x y.png", "@home:8.png",
]  # fmt: skip


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "www" / "my images"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (number + 1, 1)).save(root / name)
    (tmp_path / "www" / "secret.png").write_bytes(b"secret")
    with serve(tmp_path / "www") as server:
        yield server


def source(web: Web, **options: float) -> ImageSource:
    return ImageSource(f"{web.url}/my%20images/", **options)  # type: ignore[arg-type]


def test_every_name_is_the_picture_of_that_name(web: Web) -> None:
    images = source(web)
    assert [images.load(images.locate(1, {"path": name})).width for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert "/my%20images/a%2520b.png" in web.requests
    assert "/my%20images/what%3F.png" in web.requests


def test_whole_urls_are_cut_and_decoded(web: Web) -> None:
    images = source(web)
    for url in (f"{web.url}/my%20images/a%2520b.png", f"{web.url}/my images/a%2520b.png", "/my%20images/a%2520b.png"):
        assert images.load(images.locate(1, {"path": url})).width == NAMES.index("a%20b.png") + 1


def test_one_request_for_each_image_and_connections_are_kept(web: Web) -> None:
    images = source(web)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda name: images.load(name).width, NAMES * 4))
    assert sizes == [number + 1 for number in range(len(NAMES))] * 4
    assert len(web.requests) == 4 * len(NAMES)


@pytest.mark.parametrize("status", [400, 403, 404, 410, 204])
def test_an_answer_about_one_image_is_its_problem(web: Web, status: int) -> None:
    with pytest.raises(ImageProblem, match=f"cannot be read: the server answers {status}"):
        source(web).read(str(status))


def test_a_missing_name_with_a_percent_sign_is_explained(web: Web) -> None:
    with pytest.raises(ImageProblem, match=r"404 File not found: a path is a file's name, and its % is sent as %25"):
        source(web).read("n%231.png")
    assert source(web).read(f"{web.url}/my%20images/n%231.png"), "the advice: whole URLs"
    assert source(web).read("n#1.png"), "the advice: decoded names"


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_trouble_of_the_server_is_worth_another_try(web: Web, status: int) -> None:
    with pytest.raises(ImagesUnavailable, match=f"the server answers {status}") as caught:
        source(web).read(str(status))
    assert caught.value.retry_after == 7


def test_a_server_that_hangs_is_unavailable(web: Web) -> None:
    with pytest.raises(ImagesUnavailable, match=r"127\.0\.0\.1.* cannot be reached: no answer within 0\.2 s"):
        source(web, timeout=0.2).read("hangs")


def test_a_server_that_trickles_is_unavailable(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_folder, "TIMEOUTS_PER_FILE", 1)
    with pytest.raises(ImagesUnavailable, match=r"a file did not arrive within 0\.3 s"):
        source(web, timeout=0.3).read("trickles")


def test_a_server_that_is_gone_is_unavailable(web: Web, tmp_path: Path) -> None:
    with serve(tmp_path) as other:
        url = other.url
    with pytest.raises(ImagesUnavailable, match="cannot be reached"):
        ImageSource(url).read("a.png")


def test_an_answer_that_breaks_off_is_unavailable(web: Web) -> None:
    with pytest.raises(ImagesUnavailable):
        source(web).read("cut")


@pytest.mark.parametrize("name", ["huge", "endless"])
def test_too_large_a_file_is_not_read_to_its_end(web: Web, name: str) -> None:
    with pytest.raises(ImageProblem, match=r"larger than 1,000,000 bytes"):
        source(web, max_bytes=1_000_000).read(name)


def test_redirects_are_followed_below_the_root_only(web: Web, tmp_path: Path) -> None:
    images = source(web)
    web.redirect_to = "a%2520b.png"
    assert Image.open(io.BytesIO(images.read("moved"))).width == NAMES.index("a%20b.png") + 1
    web.redirect_to = f"{web.url}/secret.png"
    with pytest.raises(ImageProblem, match=r"which is not below images\.root .*: set images\.root to"):
        images.read("moved")
    web.redirect_to = "moved again"
    with pytest.raises(ImageProblem, match="more than 5 times"):
        images.read("moved")
    with serve(tmp_path) as other:
        web.redirect_to = f"{other.url}/my%20images/plain.png?token=hunter2"
        with pytest.raises(ImageProblem, match="which is not below") as caught:
            images.read("moved")
        assert other.requests == []
    assert "hunter2" not in str(caught.value)


def test_credentials_are_sent_and_not_shown(web: Web) -> None:
    url = web.url.replace("http://", "http://user:hunter2@")
    images = ImageSource(f"{url}/my%20images")
    assert images.load("plain.png").width == 1
    for name in ("500", "404"):
        with pytest.raises((ImageProblem, ImagesUnavailable)) as caught:
            images.read(name)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "package", "extra"),
    [("https://host/x", "httpx", "http"), ("s3://bucket/x", "s3fs", "s3"), ("s3a://bucket/x", "s3fs", "s3")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, root: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainerError, match=rf"needs a package .*: pip install 'advbct-migrator\[{extra}\]'"):
        ImageSource(root)
