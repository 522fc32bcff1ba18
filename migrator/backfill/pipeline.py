"""One chunk after the other through read, fetch, encode, undo and write, with the three kinds of work side by side.

A reader thread leases chunks, loads their items and has their images decoded in a pool; the calling thread encodes;
a writer thread writes the vectors into the store, then records that in the ledger. At any moment at most one
chunk is being read, one encoded and one written. A chunk's vectors are written in one go, so a kill loses encoding
work of the chunks in flight and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from migrator.adapters.base import ItemId, Payload, StoreRejected
from migrator.backfill.transfer import LoadedChunk, Transfer
from migrator.embedding.embed import encode_batch
from migrator.ledger import Chunk, Failure
from migrator.retry import with_retries
from migrator.trainer.errors import ImageProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.images.source import ImageSource


Loaded: TypeAlias = "list[NDArray[np.uint8] | ImageProblem]"

GROUP = 16
"""Images that one task of the pool loads: one task an image would cost more than decoding a small one."""


@dataclass(slots=True)
class Work:
    """A chunk on its way, and its images as they become ready."""

    loaded: LoadedChunk
    images: SimpleQueue[Future[Loaded]] = field(default_factory=SimpleQueue)
    """Groups of images, in the order of the page."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk whose new vectors are known and not yet written."""

    work: Work
    rows: Sequence[int]  # positions in work.loaded.page
    vectors: NDArray[np.float32]  # (len(rows), dim), unit length
    failures: list[Failure]


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of a chunk."""

    chunk: Chunk
    written: Sequence[ItemId]
    gone: int
    failures: Sequence[Failure]


class ChunkFailed(Exception):
    """The store refused a chunk as a whole."""

    def __init__(self, chunk: Chunk, reason: str) -> None:
        super().__init__(reason)
        self.chunk = chunk
        self.reason = reason


class ChunkQueue(Protocol):
    """Where chunks come from and what becomes of them. Called from the pipeline's threads."""

    def lease(self) -> Chunk | None:
        """The next chunk; None if there is none."""
        ...

    def check(self, chunk: Chunk, request_seconds: float) -> None:
        """Raises `LeaseLost` unless the chunk is held and a request of that many seconds may be sent."""
        ...

    def finish(self, finished: Finished) -> None:
        """Records a written chunk."""
        ...

    def fail(self, failed: ChunkFailed) -> None:
        """Records a chunk that the store refused."""
        ...

    def is_enough(self) -> bool:
        """Whether to stop before the next chunk is encoded."""
        ...

    def on_batch(self, items: int) -> None:
        """Called after each batch with the number of its items."""
        ...


class Pipeline:
    """Runs the chunks of a queue through one encoder and one `transfer`; items in `leave` are not touched."""

    def __init__(
        self,
        queue: ChunkQueue,
        *,
        transfer: Transfer,
        images: ImageSource,
        encoder: Encoder,
        batch_size: int,
        image_threads: int,
        retry_for: float,
        leave: Collection[ItemId],
    ) -> None:
        self.transfer, self.images, self.encoder = transfer, images, encoder
        self.batch_size, self.retry_for = batch_size, retry_for
        self.queue, self.leave = queue, leave
        self.encoding_seconds = 0.0
        self._image_threads = image_threads
        self._abort = threading.Event()
        # Groups of decoded images waiting for the encoder; bounds memory whatever the chunk size.
        self._groups = max(2 * image_threads, 4 * batch_size // GROUP)
        self._window = threading.Semaphore(self._groups)
        # One chunk in the encoder's hands and one being made ready.
        self._ahead = threading.Semaphore(2)

    def run(self) -> None:
        """Until the queue is empty or says that it is enough. On an error the chunks in flight are dropped."""
        works: SimpleQueue[Work | None] = SimpleQueue()
        with (
            ThreadPoolExecutor(self._image_threads, "image") as decoders,
            ThreadPoolExecutor(1, "reader") as reader,
            ThreadPoolExecutor(1, "writer") as writer,
        ):
            reading = reader.submit(self._read_ahead, works, decoders)
            writing: Future[None] | None = None
            try:
                for work in self._arriving(works, reading):
                    if self.queue.is_enough():
                        self._stop_reading(decoders)
                        break
                    encoded = self._encode(work)
                    self._ahead.release()
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self._write, encoded)
                if writing is not None:
                    writing.result()
            except BaseException:
                self._stop_reading(decoders)
                if writing is not None:
                    with suppress(Exception):
                        writing.result()  # let the chunk that is being written come to its end
                raise

    def _stop_reading(self, decoders: ThreadPoolExecutor) -> None:
        self._abort.set()
        self._ahead.release()
        self._window.release(self._groups)
        decoders.shutdown(wait=False, cancel_futures=True)

    def _arriving(self, works: SimpleQueue[Work | None], reading: Future[None]) -> Iterator[Work]:
        while (work := works.get()) is not None:
            yield work
        reading.result()

    # -- reader ---------------------------------------------------------------------------------------------------

    def _read_ahead(self, works: SimpleQueue[Work | None], decoders: ThreadPoolExecutor) -> None:
        try:
            while True:
                self._ahead.acquire()
                if self._abort.is_set() or (chunk := self.queue.lease()) is None:
                    return
                loaded = self.transfer.load_chunk(chunk, self.leave)
                work, page = Work(loaded), loaded.page
                works.put(work)
                for start in range(0, len(page), GROUP):
                    self._window.acquire()
                    if self._abort.is_set():
                        return
                    group = slice(start, start + GROUP)
                    work.images.put(decoders.submit(self._load, page.ids[group], page.payloads[group]))
        finally:
            works.put(None)

    def _load(self, ids: Sequence[ItemId], payloads: Sequence[Payload]) -> Loaded:
        loaded: Loaded = []
        for item, payload in zip(ids, payloads, strict=True):
            try:
                path = self.images.locate(item, payload)
                image = with_retries(lambda path=path: self.images.load(path), seconds=self.retry_for)  # type: ignore[misc]
                loaded.append(self.encoder.prepare(image))
            except ImageProblem as problem:
                loaded.append(problem)
        return loaded

    # -- encoder --------------------------------------------------------------------------------------------------

    def _encode(self, work: Work) -> Encoded:
        rows: list[int] = []
        vectors: list[NDArray[np.float32]] = []
        failures: list[Failure] = []
        batch: list[tuple[int, NDArray[np.uint8]]] = []
        ids = work.loaded.page.ids
        last = len(ids) - 1
        for row, image in enumerate(self._images_of(work)):
            if isinstance(image, ImageProblem):
                failures.append(Failure(ids[row], "image", str(image)))
            else:
                batch.append((row, image))
            if len(batch) == self.batch_size or (row == last and batch):
                began = time.monotonic()
                for done, vector in encode_batch(self.encoder, batch):
                    if isinstance(vector, str):
                        failures.append(Failure(ids[done], "encoder", vector))
                    else:
                        rows.append(done)
                        vectors.append(vector)
                self.encoding_seconds += time.monotonic() - began
                self.queue.on_batch(len(batch))
                batch = []
        stacked = np.stack(vectors) if vectors else np.empty((0, self.encoder.dim), np.float32)
        return Encoded(work, rows, stacked, failures)

    def _images_of(self, work: Work) -> Iterator[NDArray[np.uint8] | ImageProblem]:
        for _ in range(0, len(work.loaded.page), GROUP):
            loaded = work.images.get().result()
            self._window.release()
            yield from loaded

    # -- writer ---------------------------------------------------------------------------------------------------

    def _write(self, encoded: Encoded) -> None:
        loaded = encoded.work.loaded
        fence = partial(self.queue.check, loaded.chunk)
        fence(0.0)  # before the undo log too, which a rollback may have dropped by now
        self.transfer.set_fence(fence)
        try:
            report = self.transfer.write_chunk(loaded, encoded.rows, encoded.vectors)
        except StoreRejected as error:
            self.queue.fail(ChunkFailed(loaded.chunk, str(error)))
            return
        refused = [Failure(item, "store", reason) for item, reason in report.rejected.items()]
        self.queue.finish(
            Finished(
                loaded.chunk, [*loaded.repeated, *report.written], len(report.deleted), [*encoded.failures, *refused]
            )
        )
