"""A connection to a Qdrant: a server over REST or gRPC, or a local folder; the client's errors translated."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from migrator.adapters.base import StoreBusy, StoreRejected, StoreUnavailable
from migrator.adapters.qdrant.collection import set_only
from migrator.adapters.vectors import one_line

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

T = TypeVar("T")


def connect(config: Mapping[str, Any]) -> Connection:
    """A connection to the server at `url`, or to the folder `path`."""
    from qdrant_client import QdrantClient

    if "url" in config:
        return _reach(config)
    folder = Path(config["path"]).absolute()
    if not (folder / "meta.json").is_file():
        raise StoreRejected(f"{folder} holds no local Qdrant: correct `path` of the store")
    _check_free(folder)
    # Searching is brute force there, which its users know.
    warnings.filterwarnings("ignore", message="Local mode is not recommended", category=UserWarning)
    client = translated(str(folder), lambda: QdrantClient(path=str(folder), force_disable_check_same_thread=True))
    return Connection(client, str(folder), local=True)


def _reach(config: Mapping[str, Any]) -> Connection:
    """A connection to the server at `url`, which must be a Qdrant."""
    from qdrant_client import QdrantClient

    url, key = str(config["url"]), config.get("api_key")
    where = url.split("@")[-1].rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise StoreRejected(f"`url` of a qdrant store is http://HOST:PORT or https://HOST:PORT, not {where!r}")
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable() and key.strip() == key):
        # The client would put it into an error message, and call it a broken connection.
        raise StoreRejected("`api_key` of a qdrant store has characters that no key contains, perhaps a line break")
    # `plan` says so, once, and not as a warning among other lines.
    warnings.filterwarnings("ignore", message="Api key is used with an insecure connection", category=UserWarning)
    timeout = int(config.get("timeout", 30))
    client = translated(
        where,
        lambda: QdrantClient(
            url=url,
            api_key=key,
            prefer_grpc=bool(config.get("grpc", False)),
            grpc_port=int(config.get("grpc_port", 6334)),
            timeout=timeout,
            check_compatibility=False,
        ),
    )
    exposed, rest = key is not None and url.startswith("http://"), not config.get("grpc", False)
    connection = Connection(client, where, local=False, exposed=exposed, rest=rest, timeout=timeout)
    try:
        connection.version()
    except BaseException as error:
        connection.release()
        if isinstance(error, ForeignServer | StoreRejected) and not isinstance(error, AccessDenied):
            raise StoreRejected(f"{where} does not answer like a Qdrant: correct `url` of the store") from error
        raise
    return connection


def _check_free(folder: Path) -> None:
    """Refuses a folder that another process has open, before the client reads it and leaves files open."""
    import portalocker

    lock = folder / ".lock"
    if lock.exists():
        with lock.open("r+") as file:
            try:
                portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
            except portalocker.LockException as error:
                raise StoreBusy(f"{folder} is open in another process") from error
            portalocker.unlock(file)


class Connection:
    """A client that several stores share. The last one closes it."""

    def __init__(
        self,
        client: QdrantClient,
        where: str,
        *,
        local: bool,
        keep: bool = False,
        exposed: bool = False,
        rest: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.client, self.where, self.local, self.rest = client, where, local, rest
        self.timeout = timeout  # seconds that one request may take
        self.exposed = exposed  # the api key travels unencrypted
        self._version: str | None = None
        self._guard = threading.RLock() if local else nullcontext()  # the local client is not made for threads
        self._users = 2 if keep else 1  # `keep`: somebody else closes it

    def shared(self) -> Connection:
        """This connection, for one more store."""
        self._users += 1
        return self

    def release(self) -> None:
        """Closes the client with the last store that shares it."""
        self._users -= 1
        if self._users == 0:
            self.client.close()

    def ask(self, call: Callable[[QdrantClient], T]) -> T:
        """Makes a call; the client's exceptions become this package's."""
        with self._guard:
            return translated(self.where, lambda: call(self.client))

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the client by its name."""
        return self.ask(lambda client: getattr(client, method)(*arguments, **options))

    def version(self) -> str:
        """Version of the server, asked for once; of the client, for a folder."""
        if self._version is None:
            info = self.call("info")
            if "qdrant" not in info.title:
                raise ForeignServer(f"{self.where} calls itself {one_line(info.title)}")
            self._version = str(info.version)
        return self._version

    def description(self, collection: str) -> dict[str, Any]:
        """Settings and payload indexes of a collection; over REST also those that the client has no name for."""
        if self.rest:
            answer = self.ask(
                lambda client: client.http.client.request(
                    type_=dict[str, Any],
                    method="GET",
                    url="/collections/{collection_name}",
                    path_params={"collection_name": collection},
                )
            )
            found = answer["result"]
        else:
            found = self.call("get_collection", collection).model_dump(mode="json")
        config = {**set_only(found["config"]), "metadata": found["config"].get("metadata")}  # where null is a value
        return {"config": config, "payload_schema": set_only(found.get("payload_schema") or {})}

    def server_version(self) -> tuple[int, ...]:
        """Its first two numbers."""
        return tuple(int(part) for part in self.version().split("-")[0].split(".")[:2] if part.isdigit())


class MissingPoint(Exception):
    """A point that a request names does not exist; the others were written."""


class ForeignServer(StoreUnavailable):
    """What answered does not speak like a Qdrant: another server, or a proxy that stands before it."""


class AccessDenied(StoreRejected):
    """Wrong credentials."""


class BadRequest(StoreRejected):
    """Something in this request is wrong, perhaps a single point."""


def translated(where: str, call: Callable[[], T]) -> T:
    """Makes a call; the client's exceptions become this package's."""
    import grpc
    from pydantic import ValidationError
    from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    try:
        return call()
    except ResourceExhaustedResponse as error:
        raise StoreUnavailable(f"{where} is overloaded", retry_after=error.retry_after_s) from error
    except UnexpectedResponse as error:
        raise _of_status(where, error.status_code or 500, error.content, error.headers.get("Retry-After")) from error
    except ResponseHandlingException as error:
        if isinstance(error.source, ValidationError):
            if unknown := _unknown_setting(error.source):
                raise StoreRejected(
                    f"{where} has the setting {unknown}, which this qdrant-client does not know: upgrade qdrant-client"
                ) from error
            raise ForeignServer(f"{where} answered with something that is not Qdrant's: is it a Qdrant?") from error
        raise StoreUnavailable(f"{where} did not answer: {one_line(error.source)}") from error
    except QdrantException as error:
        raise StoreUnavailable(f"{where} did not answer: {one_line(error)}") from error
    except grpc.RpcError as error:
        raise _of_rpc(where, error) from error
    except KeyError as error:  # the local client's word for a point that is not there
        raise MissingPoint(str(error)) from error
    except RuntimeError as error:
        if "already accessed" in str(error):
            raise StoreBusy(f"{where} is open in another process") from error
        raise StoreUnavailable(f"{where} did not answer: {one_line(error)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ForeignServer(f"{where} answered with something that is not JSON: is it a Qdrant?") from error
    except AssertionError as error:  # the client's word for an answer without a result
        raise ForeignServer(f"{where} answered with nothing: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise BadRequest(f"{where} refused: {one_line(error)}") from error
    except OSError as error:
        raise StoreUnavailable(f"{where} did not answer: {one_line(error)}") from error


def _unknown_setting(error: Any) -> str | None:
    """The setting in a collection's description that the client has no name for, if that is what is wrong."""
    places = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
    deepest = max(places, key=len, default=())  # where a value may be of several types, the others complain earlier
    for part in ("config", "payload_schema"):
        if part in deepest:
            return ".".join(str(name) for name in deepest[deepest.index(part) + 1 :])
    return None


def _of_status(where: str, status: int, content: bytes, retry_after: str | None) -> Exception:
    said = _said(content)
    if status in (401, 403):
        return AccessDenied(f"{where} refuses these credentials ({said}): correct `api_key` of the store")
    if status == 404 and "No point" in said:
        return MissingPoint(said)
    if status in (408, 429) or status >= 500:
        advised = float(retry_after) if retry_after and retry_after.isdigit() else None
        return StoreUnavailable(f"{where} answered with status {status}: {said}", retry_after=advised)
    kind = BadRequest if status in (400, 413, 422) else StoreRejected
    return kind(f"{where} refused with status {status}: {said}")


def _said(content: bytes) -> str:
    """The error in a server's answer."""
    try:
        return one_line(json.loads(content)["status"]["error"])
    except (ValueError, LookupError, TypeError):
        return one_line(content.decode(errors="replace"))


def _of_rpc(where: str, error: Any) -> Exception:
    import grpc

    code, said = error.code(), one_line(error.details() or "")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return AccessDenied(f"{where} refuses these credentials ({said}): correct `api_key` of the store")
    if code == grpc.StatusCode.NOT_FOUND and "No point" in said:
        return MissingPoint(said)
    passing = (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN,
    )  # fmt: skip
    if code in passing:
        return StoreUnavailable(f"{where} did not answer ({code.name}): {said}")
    kind = BadRequest if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE) else StoreRejected
    return kind(f"{where} refused ({code.name}): {said}")
