"""The FAISS adapter under the contract of all stores, for every kind of index that it understands."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import pytest
from hypothesis import strategies as st

from migrator.adapters.base import ItemId, Vectors
from migrator.adapters.testing import Make, StoreContract
from tests.integration.stores.galleries import Flavour, Gallery

INTEGERS = [
    Flavour("Flat"),
    Flavour("Flat", faiss.METRIC_L2),
    Flavour("IDMap,Flat"),
    Flavour("IDMap2,Flat"),
    Flavour("IVF8,Flat"),
    Flavour("IDMap2,IVF8,Flat", faiss.METRIC_L2),
    Flavour("HNSW8"),
    Flavour("IDMap2,HNSW8_SQ8", faiss.METRIC_L2),
    Flavour("SQ8"),
    Flavour("PQ8x6np"),
    Flavour("IVF8,SQ8", faiss_ids=True),
    Flavour("IVF8,PQ8x6np", faiss_ids=True),
    Flavour("IVF8_HNSW8,Flat"),
    Flavour("IMI2x2,Flat", faiss.METRIC_L2),
    Flavour("L2norm,Flat"),
    Flavour("IDMap2,L2norm,Flat"),
    Flavour("OPQ4,IVF8_HNSW8,PQ8x6np"),
    Flavour("IDMap2,RR32,SQ8,RFlat", faiss.METRIC_L2),
]
STRINGS = [
    Flavour("Flat", strings=True),
    Flavour("IDMap2,Flat", strings=True, faiss_ids=True),
    Flavour("IVF8,Flat", faiss.METRIC_L2, strings=True, faiss_ids=True),
    Flavour("HNSW8", strings=True),
]


class FaissContract(StoreContract):
    @pytest.fixture
    def make(self, tmp_path: Path, flavour: Flavour) -> Make:
        number = itertools.count()

        def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Gallery:
            gallery = Gallery(tmp_path / f"gallery {next(number)}", flavour)
            gallery.fill(ids, vectors, payloads)
            return gallery

        return make


@pytest.mark.parametrize("flavour", INTEGERS, ids=str)
class TestFaissWithIntegers(FaissContract):
    # -1 is FAISS's word for no answer: an ID map cannot hold it.
    id_strategy = st.integers(-(2**63), 2**63 - 1).filter(lambda item: item != -1)


@pytest.mark.parametrize("flavour", STRINGS, ids=str)
class TestFaissWithStrings(FaissContract):
    id_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(
        ["7", "07", " ", "a b", "it's", '"', "\\", "é", "e\u0301", "𝄞", "\uffff", "\x00"]
    )

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        return [f"{word} {number}" for number in range(50) for word in ("cat", "it's", "Ärger", '"𝄞"')]
