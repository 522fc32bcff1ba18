"""The same Qdrant as in `tests.qdrant_front`, over gRPC: each call becomes the request that REST has for it."""

# ruff: noqa: N802 - the services name their methods
from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.http import models as m

from tests.qdrant_front import Front, Refusal

CODES: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ALREADY_EXISTS,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}


class _Service:
    def __init__(self, front: Front) -> None:
        self.front = front

    def serve(self, context: Any, request: str, body: Any = None) -> Any:
        key = dict(context.invocation_metadata()).get("api-key")
        try:
            result, fault = self.front.serve(request, key, body)
        except Refusal as refusal:
            advice = [(name.lower(), value) for name, value in refusal.headers]
            context.set_trailing_metadata(advice)
            context.abort(CODES.get(refusal.status, grpc.StatusCode.UNKNOWN), str(refusal))
        if fault is not None and fault.what in ("drop", "drop_after"):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if fault is not None and fault.what == "slow":
            self.front.hold()
        return result


class _Root(_Service, q.QdrantServicer):
    def HealthCheck(self, asked: Any, context: Any) -> Any:
        return RestToGrpc.convert_health_check_reply(self.serve(context, "GET /"))


class _Collections(_Service, q.CollectionsServicer):
    def List(self, asked: Any, context: Any) -> Any:
        found = self.serve(context, "GET /collections").collections
        return q.ListCollectionsResponse(collections=[RestToGrpc.convert_collection_description(one) for one in found])

    def Get(self, asked: Any, context: Any) -> Any:
        info = self.serve(context, f"GET /collections/{asked.collection_name}")
        return q.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(info))

    def Create(self, asked: Any, context: Any) -> Any:
        convert: dict[str, Any] = {
            "hnsw_config": GrpcToRest.convert_hnsw_config_diff,
            "optimizers_config": GrpcToRest.convert_optimizers_config_diff,
            "wal_config": GrpcToRest.convert_wal_config_diff,
            "quantization_config": GrpcToRest.convert_quantization_config,
            "sharding_method": GrpcToRest.convert_sharding_method,
            "strict_mode_config": GrpcToRest.convert_strict_mode_config,
            "payload": GrpcToRest.convert_payload_storage_params,
            "id_tracker": GrpcToRest.convert_id_tracker_params,
        }
        plain = ("shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload")
        settings = {name: act(getattr(asked, name)) for name, act in convert.items() if asked.HasField(name)}
        settings |= {name: getattr(asked, name) for name in plain if asked.HasField(name)}
        if asked.HasField("sparse_vectors_config"):
            settings["sparse_vectors"] = GrpcToRest.convert_sparse_vector_config(asked.sparse_vectors_config)
        if asked.metadata:
            settings["metadata"] = GrpcToRest.convert_payload(asked.metadata)
        body = m.CreateCollection(vectors=GrpcToRest.convert_vectors_config(asked.vectors_config), **settings)
        return self._done(context, f"PUT /collections/{asked.collection_name}", body)

    def Update(self, asked: Any, context: Any) -> Any:
        params = GrpcToRest.convert_collection_params_diff(asked.params) if asked.HasField("params") else None
        metadata = GrpcToRest.convert_payload(asked.metadata) if asked.metadata else None
        body = m.UpdateCollection(params=params, metadata=metadata)
        return self._done(context, f"PATCH /collections/{asked.collection_name}", body)

    def Delete(self, asked: Any, context: Any) -> Any:
        return self._done(context, f"DELETE /collections/{asked.collection_name}")

    def UpdateAliases(self, asked: Any, context: Any) -> Any:
        actions = [GrpcToRest.convert_alias_operations(action) for action in asked.actions]
        return self._done(context, "POST /collections/aliases", m.ChangeAliasesOperation(actions=actions))

    def _done(self, context: Any, request: str, body: Any = None) -> Any:
        return q.CollectionOperationResponse(result=self.serve(context, request, body))

    def ListAliases(self, asked: Any, context: Any) -> Any:
        return self._aliases(context, "GET /aliases")

    def ListCollectionAliases(self, asked: Any, context: Any) -> Any:
        return self._aliases(context, f"GET /collections/{asked.collection_name}/aliases")

    def _aliases(self, context: Any, request: str) -> Any:
        found = self.serve(context, request).aliases
        return q.ListAliasesResponse(aliases=[RestToGrpc.convert_alias_description(one) for one in found])


class _Points(_Service, q.PointsServicer):
    def Scroll(self, asked: Any, context: Any) -> Any:
        body = m.ScrollRequest(
            offset=GrpcToRest.convert_point_id(asked.offset) if asked.HasField("offset") else None,
            limit=asked.limit if asked.HasField("limit") else None,
            filter=_filter(asked, "filter"),
            **_wanted(asked),
        )
        result = self.serve(context, f"POST /collections/{asked.collection_name}/points/scroll", body)
        following = result.next_page_offset
        return q.ScrollResponse(
            result=[_record(record) for record in result.points],
            next_page_offset=None if following is None else RestToGrpc.convert_extended_point_id(following),
        )

    def Get(self, asked: Any, context: Any) -> Any:
        body = m.PointRequest(ids=[GrpcToRest.convert_point_id(one) for one in asked.ids], **_wanted(asked))
        records = self.serve(context, f"POST /collections/{asked.collection_name}/points", body)
        return q.GetResponse(result=[_record(record) for record in records])

    def Count(self, asked: Any, context: Any) -> Any:
        body = m.CountRequest(filter=_filter(asked, "filter"), exact=asked.exact)
        result = self.serve(context, f"POST /collections/{asked.collection_name}/points/count", body)
        return q.CountResponse(result=q.CountResult(count=result.count))

    def QueryBatch(self, asked: Any, context: Any) -> Any:
        body = m.QueryRequestBatch(searches=[GrpcToRest.convert_query_points(one) for one in asked.query_points])
        answers = self.serve(context, f"POST /collections/{asked.collection_name}/points/query/batch", body)
        return q.QueryBatchResponse(
            result=[
                q.BatchResult(result=[RestToGrpc.convert_scored_point(point) for point in answer.points])
                for answer in answers
            ]
        )

    def Upsert(self, asked: Any, context: Any) -> Any:
        points = [GrpcToRest.convert_point_struct(point) for point in asked.points]
        body = m.PointsList(points=points, update_filter=_filter(asked, "update_filter"))
        return self._update(context, f"PUT /collections/{asked.collection_name}/points", body)

    def UpdateVectors(self, asked: Any, context: Any) -> Any:
        points = [GrpcToRest.convert_point_vectors(point) for point in asked.points]
        body = m.UpdateVectors(points=points, update_filter=_filter(asked, "update_filter"))
        return self._update(context, f"PUT /collections/{asked.collection_name}/points/vectors", body)

    def UpdateBatch(self, asked: Any, context: Any) -> Any:
        operations = [GrpcToRest.convert_points_update_operation(one) for one in asked.operations]
        body = m.UpdateOperations(operations=operations)
        results = self.serve(context, f"POST /collections/{asked.collection_name}/points/batch", body)
        return q.UpdateBatchResponse(result=[RestToGrpc.convert_update_result(result) for result in results])

    def SetPayload(self, asked: Any, context: Any) -> Any:
        body = m.SetPayload(payload=GrpcToRest.convert_payload(asked.payload), **_chosen(asked.points_selector))
        return self._update(context, f"POST /collections/{asked.collection_name}/points/payload", body)

    def DeletePayload(self, asked: Any, context: Any) -> Any:
        body = m.DeletePayload(keys=list(asked.keys), **_chosen(asked.points_selector))
        return self._update(context, f"POST /collections/{asked.collection_name}/points/payload/delete", body)

    def Delete(self, asked: Any, context: Any) -> Any:
        body = GrpcToRest.convert_points_selector(asked.points)
        return self._update(context, f"POST /collections/{asked.collection_name}/points/delete", body)

    def CreateFieldIndex(self, asked: Any, context: Any) -> Any:
        if asked.HasField("field_index_params"):
            schema: Any = GrpcToRest.convert_payload_schema_params(asked.field_index_params)
        else:
            schema = m.PayloadSchemaType(q.FieldType.Name(asked.field_type).removeprefix("FieldType").lower())
        body = m.CreateFieldIndex(field_name=asked.field_name, field_schema=schema)
        return self._update(context, f"PUT /collections/{asked.collection_name}/index", body)

    def DeleteFieldIndex(self, asked: Any, context: Any) -> Any:
        return self._update(context, f"DELETE /collections/{asked.collection_name}/index/{asked.field_name}")

    def _update(self, context: Any, request: str, body: Any = None) -> Any:
        result = self.serve(context, request, body)
        return q.PointsOperationResponse(result=RestToGrpc.convert_update_result(result))


def _filter(asked: Any, field: str) -> Any:
    return GrpcToRest.convert_filter(getattr(asked, field)) if asked.HasField(field) else None


def _record(record: m.Record) -> Any:
    return RestToGrpc.convert_record(record.model_copy(update={"payload": record.payload or {}}))


def _wanted(asked: Any) -> dict[str, Any]:
    """What is to come back of each point."""
    return {
        "with_payload": GrpcToRest.convert_with_payload_selector(asked.with_payload),
        "with_vector": GrpcToRest.convert_with_vectors_selector(asked.with_vectors),
    }


def _chosen(selector: Any) -> dict[str, Any]:
    chosen = GrpcToRest.convert_points_selector(selector)
    return {"points": chosen.points} if isinstance(chosen, m.PointIdsList) else {"filter": chosen.filter}


@contextmanager
def grpc_door(front: Front) -> Iterator[int]:
    """The port of a gRPC server that opens on `front`."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
    q.add_QdrantServicer_to_server(_Root(front), server)
    q.add_CollectionsServicer_to_server(_Collections(front), server)
    q.add_PointsServicer_to_server(_Points(front), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        front.heal()
        server.stop(None).wait()
