"""`migrator init --store`: a configuration drafted from the collection itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from migrator.cli import run
from migrator.config import load_config
from migrator.config_from_store import draft_config
from tests.world import NAME, World

ENCODER = {"arch": "test_resnet", "weights": "old.safetensors", "image_size": 16}

Init = Callable[..., tuple[int, str, str]]


@pytest.fixture
def init(capsys: pytest.CaptureFixture[str]) -> Init:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(["init", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def make_qdrant(folder: Path, payloads: list[dict[str, Any]]) -> Path:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(folder))
    client.create_collection("Products Q4", models.VectorParams(size=4, distance=models.Distance.COSINE))
    client.upsert(
        "Products Q4",
        [models.PointStruct(id=n, vector=[1, n, 0, 0], payload=payload) for n, payload in enumerate(payloads)],
    )
    client.close()
    return folder


def drafted(folder: Path, payloads: list[dict[str, Any]]) -> dict[str, Any]:
    store = make_qdrant(folder / "qdrant", payloads)
    draft = draft_config({"kind": "qdrant", "path": str(store), "collection": "Products Q4"}, folder / "m.yaml")
    (migration,) = yaml.safe_load(draft.text)["migrations"].values()
    assert isinstance(migration, dict)
    return {**migration, "to_fill_in": draft.to_fill_in}


def test_a_drafted_file_needs_the_encoders_only(world: World, init: Init, monkeypatch, capsys) -> None:
    monkeypatch.chdir(world.folder.parent)
    file = world.folder / "drafted.yaml"
    code, out, err = init(str(file), "--store", "faiss", "--path", "world/gallery")
    assert (code, err) == (0, "")
    assert "120 items, 24-d, metric ip" in out
    assert out.splitlines()[-1].endswith("fill in old_encoder, new_encoder, then `migrator config` checks it")
    assert run(["config", "--config", str(file)]) == 2
    problems = capsys.readouterr().err
    assert "old_encoder" in problems
    assert "store" not in problems
    assert "images" not in problems

    document = yaml.safe_load(file.read_text())
    (migration,) = document["migrations"].values()
    assert migration["store"] == {"kind": "faiss", "path": "./gallery"}
    assert migration["images"] == {"uri": "{path}", "root": "./images"}
    assert migration["verify"]["label"] == "{kind}"
    assert migration["old_encoder"] == {"dim": 24}
    migration["old_encoder"].update(ENCODER)
    migration["new_encoder"].update(ENCODER, weights="new.safetensors")
    document["migrations"] = {NAME: migration}
    file.write_text(yaml.safe_dump(document))
    assert run(["plan", "--config", str(file)]) == 0


def test_nothing_is_overwritten_and_nothing_written_where_the_store_cannot_be_opened(tmp_path, init) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("mine")
    assert init(str(file), "--store", "faiss", "--path", str(tmp_path))[0] == 2
    assert file.read_text() == "mine"
    other = tmp_path / "other.yaml"
    for arguments, code, message in (
        (["--store", "faiss", "--path", str(tmp_path / "no")], 2, "no"),
        (["--store", "qdrant", "--url", "http://127.0.0.1:9", "--collection", "c"], 4, "127.0.0.1:9"),
        (["--store", "qdrant", "--url", "http://127.0.0.1:9"], 2, "store.collection: missing"),
        (["--store", "milvus", "--option", "colection=c"], 2, 'did you mean "collection"?'),
        (["--store", "nosuch"], 2, "known are"),
        (["--path", "gallery"], 2, "--store"),
        (["--store", "faiss", "--option", "path"], 2, "KEY=VALUE"),
    ):
        got, out, err = init(str(other), *arguments)
        assert (got, out) == (code, ""), err
        assert message in err
        assert "bug" not in err
    assert not other.exists()


def test_a_secret_is_not_written_into_the_file(tmp_path, init, monkeypatch) -> None:
    file = tmp_path / "m.yaml"
    qdrant = ["--store", "qdrant", "--url", "http://127.0.0.1:9", "--collection", "c"]
    for arguments in (
        [*qdrant, "--option", "api_key=geheim"],
        ["--store", "milvus", "--uri", "http://user:geheim@127.0.0.1:9", "--collection", "c"],
        ["--store", "milvus", "--uri", "http://127.0.0.1:9", "--collection", "c", "--option", "token=root:geheim"],
    ):
        code, _, err = init(str(file), *arguments)
        assert code == 2
        assert "write '${NAME}'" in err
        assert "geheim" not in err
    # What the message advises is taken, and the store is asked next.
    monkeypatch.setenv("KEY", "geheim")
    code, _, err = init(str(file), *qdrant, "--option", "api_key=${KEY}")
    assert code == 4
    assert "geheim" not in err


def test_a_variable_stays_a_variable_in_the_file(tmp_path, init, monkeypatch) -> None:
    make_qdrant(tmp_path / "qdrant", [{"path": "a.jpg"}])
    monkeypatch.setenv("WHICH", "Products Q4")
    file = tmp_path / "m.yaml"
    arguments = ["--store", "qdrant", "--path", str(tmp_path / "qdrant"), "--collection", "${WHICH}"]
    assert init(str(file), *arguments)[0] == 0
    assert 'collection: "${WHICH}"' in file.read_text()


def test_fields_of_image_and_label_are_found_at_any_depth(tmp_path) -> None:
    migration = drafted(
        tmp_path,
        [
            {"caption": "x", "metadata": {"source": f"https://host/x/{n % 3}/{n}.JPG", "category": f"c {n % 2}"}}
            for n in range(8)
        ],
    )
    assert migration["images"] == {"uri": "{metadata.source}", "root": "https://host/x"}
    assert migration["verify"]["label"] == "{metadata.category}"
    assert migration["to_fill_in"] == ("old_encoder", "new_encoder")


@pytest.mark.parametrize(
    ("places", "root"),
    [
        (["/data/a/1.png", "/data/b/2.png"], "/data"),
        (["/data/a/1.png", "/data/ab/2.png"], "/data"),
        (["/data/a/1.png", "/data/a/2.png"], "/data/a"),
        (["https://host/1.png", "https://host/2.png"], "https://host"),
        (["https://one/1.png", "https://other/2.png"], None),
        (["/a/1.png", "/b/2.png"], None),
        (["a/1.png", "../2.png"], None),
    ],
)
def test_the_root_is_what_absolute_places_share(tmp_path, places: list[str], root: str | None) -> None:
    migration = drafted(tmp_path, [{"src": place} for place in places])
    assert migration["images"]["uri"] == "{src}"
    assert migration["images"].get("root") == root
    assert ("images.root" in migration["to_fill_in"]) == (root is None)


def test_a_collection_without_names_of_image_files_says_so(tmp_path) -> None:
    migration = drafted(tmp_path, [{"sku": f"{n}", "price": n, "label": n} for n in range(6)])
    assert migration["images"] is None
    assert migration["to_fill_in"][:2] == ("images.uri", "images.root")
    assert migration["verify"] == {"sample": 500}, "six values in six items are no classes"


HOSTILE = ["a: b", "#x", "${HOME}", "'", '"\n', "{id}", "no", "1e3", "\u202eevil", "&a", "*a", "!t", "- x", "é" * 3]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_a_payload_stay_texts(tmp_path, text: str) -> None:
    payloads = [{"path": f"{text}/{n}.png", text: n, "category": text * (1 + n % 2)} for n in range(4)]
    migration = drafted(tmp_path, payloads)
    assert migration["images"]["uri"] == "{path}"
    assert migration["rollout"]["strategy"] in ("in_place", "shadow")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_root_is_written_so_that_it_is_read_back(tmp_path, text: str) -> None:
    root = f"/data/{text}"
    store = make_qdrant(tmp_path / "qdrant", [{"path": f"{root}/{n}.png"} for n in range(4)])
    file = tmp_path / "m.yaml"
    draft = draft_config({"kind": "qdrant", "path": str(store), "collection": "Products Q4"}, file)
    document = yaml.safe_load(draft.text)
    (migration,) = document["migrations"].values()
    file.write_text(
        draft.text.replace(
            "      # arch: resnet50\n", "      arch: resnet18\n      image_size: 32\n      weights: o.pt\n"
        )
        .replace("      # arch: resnet50 ", "      arch: resnet18 #")
        .replace("      # weights: ./new.safetensors", "      image_size: 32\n      weights: n.pt #")
    )
    (read,) = load_config(file).migrations.values()
    assert read.images.root == root
    assert migration["old_encoder"] == {"dim": 4}


def test_milvus_is_drafted_too(tmp_path, init) -> None:
    from pymilvus import MilvusClient

    file = tmp_path / "lite.db"
    client = MilvusClient(str(file))
    client.create_collection("shoes", dimension=4, metric_type="COSINE", vector_field_name="embedding")
    rng = np.random.default_rng(0)
    client.insert(
        "shoes", [{"id": n, "embedding": rng.random(4).tolist(), "file": f"{n}.webp", "class": n % 2} for n in range(6)]
    )
    client.close()
    from milvus_lite import server_manager_instance

    server_manager_instance.release_server(str(file))
    target = tmp_path / "m.yaml"
    code, out, err = init(str(target), "--store", "milvus", "--uri", str(file), "--collection", "shoes")
    assert (code, err) == (0, "")
    assert "6 items, 4-d, metric cosine" in out
    (migration,) = yaml.safe_load(target.read_text())["migrations"].values()
    assert migration["images"]["uri"] == "{file}"
    assert migration["verify"]["label"] == "{class}"
