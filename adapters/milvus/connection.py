"""A connection to a Milvus: a server, or Milvus Lite in this process; the client's errors translated."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from migrator.adapters.base import StoreBusy, StoreRejected, StoreUnavailable
from migrator.adapters.vectors import one_line

if TYPE_CHECKING:
    from pymilvus import MilvusClient

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]

PASSING = {1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 500, 501, 502, 503, 504, 505, 600, 901, 902, 903, 904}
"""Codes of a server that is starting, overloaded or moving things about."""
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
KEEP_KEYS = "keep_keys"


class NoCollection(StoreRejected):
    """No collection or alias of that name."""


class TooLarge(StoreRejected):
    """More in one message than the server takes or gives."""


class Connection:
    """A client that several stores share. The last one closes it."""

    _lite: dict[str, int] = {}  # noqa: RUF012 - how many connections this process has to each file
    _lite_lock = threading.Lock()

    def __init__(self, config: Mapping[str, Any]) -> None:
        from pymilvus import MilvusClient

        # They log every error, also those that are expected, with a traceback.
        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        uri, self.database = str(config["uri"]), str(config.get("database", "default"))
        self.lite = "://" not in uri
        self.timeout = float(config.get("timeout", 30))
        self.keep_keys = config.get("auto_id_in_shadow") == KEEP_KEYS
        self.where = os.path.realpath(uri) if self.lite else uri.split("@")[-1].rstrip("/")
        self._users = 1
        if self.lite and not Path(uri).exists():
            raise StoreRejected(f"{self.where} does not exist: correct `uri` of the store")
        if self.lite and not Path(uri, "collections").is_dir():  # opening it would make it one
            raise StoreRejected(f"{self.where} was not made by Milvus Lite 3: correct `uri` of the store")
        given: Row = {"uri": self.where if self.lite else uri, "timeout": self.timeout}
        if config.get("token"):
            given["token"] = config["token"]
        if not self.lite and self.database != "default":
            given["db_name"] = self.database
        with self._lite_lock:
            if self.lite:
                self._lite[self.where] = self._lite.get(self.where, 0) + 1
        try:
            self.client: MilvusClient = self._translated(lambda: MilvusClient(**given))
        except BaseException:
            self._release()
            raise

    def shared(self) -> Connection:
        """This connection, for one more store."""
        self._users += 1
        return self

    def release(self) -> None:
        """Closes the client with the last store that shares it."""
        self._users -= 1
        if self._users == 0:
            self.client.close()
            self._release()

    def _release(self) -> None:
        """Lite's server in this process holds the file until it is stopped."""
        if not self.lite:
            return
        with self._lite_lock:
            self._lite[self.where] -= 1
            if self._lite[self.where] == 0:
                from milvus_lite import server_manager_instance

                server_manager_instance.release_server(self.where)

    def engine_of(self, collection: str) -> Any:
        """The collection in the engine of Milvus Lite, which runs in this process; None if there is none."""
        from milvus_lite import MilvusLiteError, server_manager_instance

        _, engine, _ = server_manager_instance._servers.get(self.where, (None, None, None))
        try:
            return None if engine is None else engine.get_collection(collection)
        except MilvusLiteError:
            return None

    def ask(self, call: Callable[[MilvusClient], T]) -> T:
        """Makes a call; the client's exceptions become this package's."""
        return self._translated(lambda: call(self.client))

    def call(self, method: str, *arguments: Any, timeout: float | None = None, **options: Any) -> Any:
        """Calls a method of the client by its name. `timeout` in seconds (default: that of the connection)."""
        seconds = self.timeout if timeout is None else timeout
        return self.ask(lambda client: getattr(client, method)(*arguments, timeout=seconds, **options))

    def _translated(self, call: Callable[[], T]) -> T:
        import grpc
        from pymilvus.exceptions import ConnectionConfigException, MilvusException

        try:
            return call()
        except ConnectionConfigException as error:
            if "Open local milvus failed" in str(error):
                raise StoreBusy(f"{self.where} is open in another process: stop it, then try again") from error
            raise StoreRejected(f"{self.where} cannot be opened: {one_line(error)}") from error
        except MilvusException as error:
            raise self._of_code(error) from error
        except grpc.RpcError as error:
            raise self._of_rpc(error) from error
        except (TypeError, ValueError) as error:
            raise StoreRejected(f"{self.where} refused: {one_line(error)}") from error
        except OSError as error:
            raise StoreUnavailable(f"{self.where} did not answer: {one_line(error)}") from error

    def _of_code(self, error: Any) -> Exception:
        import grpc

        cause = error.__cause__  # the client itself calls it a failed connection
        if isinstance(cause, grpc.RpcError) and cause.code().name in (*REFUSED, "UNIMPLEMENTED"):
            return self._of_rpc(cause)
        said = one_line(getattr(error, "message", "") or error)
        code = error.code
        if code == 100 and "collection" in said.lower():
            return NoCollection(f"{self.where}: {said}: correct `collection` of the store")
        if code == 101:  # it was when it was opened: the server may have been restarted
            return StoreUnavailable(f"{self.where}: the collection is not loaded any more, or not yet again: {said}")
        if "maxOutputSize" in said or "exceed the limit size" in said:
            return TooLarge(f"{self.where}: {said}")
        known = isinstance(code, int)
        if not known or "Retry timeout" in said or "rate limit" in said or (not self.lite and code in PASSING):
            return StoreUnavailable(f"{self.where} did not answer: {said}")
        return StoreRejected(f"{self.where} refused (code {code}): {said}")

    def _of_rpc(self, error: Any) -> Exception:
        import grpc

        code, said = error.code(), one_line(error.details() or "")
        if code.name in REFUSED:
            return StoreRejected(f"{self.where} refuses these credentials: correct `token`")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in said:
            return TooLarge(f"{self.where}: {said}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return StoreRejected(f"{self.where} is no Milvus, or too old for this client: {said}")
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return StoreRejected(f"{self.where} cannot do this ({code.name}): {said}")
        return StoreUnavailable(f"{self.where} did not answer ({code.name}): {said}")
