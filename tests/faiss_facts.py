"""Facts of FAISS indexes, read by FAISS's own means."""

from __future__ import annotations

from typing import Any

import faiss


def layers(raw: Any) -> list[Any]:
    found = [faiss.downcast_index(raw)]
    while True:
        layer = found[-1]
        if isinstance(layer, faiss.IndexRefine):
            found.append(faiss.downcast_index(layer.base_index))
        elif isinstance(layer, (faiss.IndexPreTransform, faiss.IndexIDMap)):
            found.append(faiss.downcast_index(layer.index))
        else:
            return found


def innermost(raw: Any) -> Any:
    return layers(raw)[-1]


def facts(raw: Any) -> dict[str, Any]:
    """What must be the same whatever the dimension, read by FAISS's own means."""
    found: dict[str, Any] = {}
    for depth, layer in enumerate(layers(raw)):
        kind = type(layer).__name__
        found[f"{depth}"] = "IndexFlat" if kind.startswith("IndexFlat") else kind
        found[f"{depth} metric"] = layer.metric_type
        if isinstance(layer, faiss.IndexRefine):
            found["k_factor"] = layer.k_factor
            refine = type(faiss.downcast_index(layer.refine_index)).__name__
            found["refine"] = "IndexFlat" if refine.startswith("IndexFlat") else refine
    inner = innermost(raw)
    for name in ("nlist", "nprobe", "by_residual", "search_type", "polysemous_ht", "bbs"):
        if hasattr(inner, name):
            found[name] = getattr(inner, name)
    if hasattr(inner, "pq"):
        found["pq"] = (inner.pq.M, inner.pq.nbits)
    if hasattr(inner, "sq"):
        found["sq"] = inner.sq.qtype
    graph: Any = inner if isinstance(inner, faiss.IndexHNSW) else None
    if hasattr(inner, "quantizer"):
        quantizer = faiss.downcast_index(inner.quantizer)
        kind = type(quantizer).__name__
        found["quantizer"] = "IndexFlat" if kind.startswith("IndexFlat") else kind
        graph = quantizer if isinstance(quantizer, faiss.IndexHNSW) else None
        if hasattr(quantizer, "pq"):
            found["quantizer pq"] = (quantizer.pq.M, quantizer.pq.nbits)
    if graph is not None:
        found["hnsw"] = (graph.hnsw.nb_neighbors(1), graph.hnsw.efConstruction, graph.hnsw.efSearch)
    return found
