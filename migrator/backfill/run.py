"""One bounded run of the backfill, as cron starts it: a few chunks, then leave. Overlapping runs are harmless."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from migrator.adapters.base import ItemId, StoreBusy, StoreRejected
from migrator.backfill.chunks import cut_catch_up, cut_first_pass
from migrator.backfill.leases import Leases
from migrator.backfill.order import worst_first_ids
from migrator.backfill.pipeline import ChunkFailed, Finished, Pipeline
from migrator.backfill.throttle import Throttle
from migrator.backfill.transfer import Transfer, open_transfer
from migrator.errors import PreconditionFailed
from migrator.labels import label_of
from migrator.ledger import Chunk, LeaseLost, Ledger, Migration, this_process
from migrator.lifecycle.freshness import check_fresh
from migrator.lifecycle.strategy import STRATEGIES
from migrator.project import Project

if TYPE_CHECKING:
    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.images.source import ImageSource

Ended: TypeAlias = Literal["complete", "limit", "paused", "interrupted", "busy", "stuck"]

PASSES_A_RUN = 10  # an application that writes without pause must not keep one run busy permanently


@dataclass(frozen=True, slots=True)
class Summary:
    """What one run did."""

    ended: Ended
    chunks: int
    items: int
    failed: int
    gone: int
    seconds: float
    encoding_seconds: float
    """Time inside the encoder; the rest is what the pipeline could not hide behind it."""
    message: str = ""
    health_check: str = ""
    """What was seen in the collection afterwards."""


@dataclass(frozen=True, slots=True)
class Written:
    """What the health check after a run needs."""

    run_id: int
    encoder: Encoder
    sample: Sequence[ItemId] | None
    """Items that the run wrote, `backfill.read_back` of them at most; None where it wrote none."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the pass has come, for a progress bar."""

    pass_number: int
    done: int
    total: int


def backfill(
    project: Project,
    *,
    max_seconds: float | None = None,
    max_items: int | None = None,
    stop: threading.Event | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> tuple[Summary, Written | None]:
    """Works on chunks until everything is done, a limit is reached, a pause was asked for, or `stop` is set.

    `max_seconds` and `max_items` are checked between chunks; at least one chunk is done. Raises `PreconditionFailed`
    outside the backfill stage, `StoreUnavailable` or `ImagesUnavailable` when retries ran out.
    """
    migration = check_stage(project)
    if migration.paused is not None:
        return Summary("paused", 0, 0, 0, 0, 0.0, 0.0, f"paused: {migration.paused}"), None
    try:
        with open_transfer(project, migration) as transfer:
            run = _Run(project, migration, transfer, max_seconds, max_items, stop or threading.Event(), report)
            summary = run.run()
    except StoreBusy as busy:
        return Summary("busy", 0, 0, 0, 0, 0.0, 0.0, f"another run is in progress: {busy}"), None
    assert run.encoder is not None, "the run has loaded it"
    return summary, Written(run.run_id, run.encoder, run.written.items if summary.items else None)


class _Sample:
    """As many of the items that pass by as fit, each as likely as the others (reservoir sampling, Vitter 1985)."""

    def __init__(self, size: int) -> None:
        self.items: list[ItemId] = []
        self._size, self._seen, self._random = size, 0, random.Random(0)

    def add(self, items: Iterable[ItemId]) -> None:
        for item in items:
            self._seen += 1
            if len(self.items) < self._size:
                self.items.append(item)
            elif (at := self._random.randrange(self._seen)) < self._size:
                self.items[at] = item


def check_stage(project: Project) -> Migration:
    """The migration, if it is in its backfill stage; else refused with the command that comes first."""
    migration = project.migration()
    name = project.name
    if migration.state in ("finished", "rolled_back"):
        raise PreconditionFailed(f"{name} is {migration.state.replace('_', ' ')}: there is nothing to backfill")
    if migration.state == "rolling_back":
        raise PreconditionFailed(f"{name} is being rolled back: finish with `migrator rollback {name}`")
    if migration.stage == "cutover":
        raise PreconditionFailed(f"{name} has been cut over: next is `migrator rollout {name} --stage finalize`")
    strategy = STRATEGIES[migration.strategy]
    if migration.stage in strategy.backfill_stages and migration.state == "active":
        return migration
    if strategy.queries_first:
        route = project.ledger.route(migration.collection)
        percent = route.canary_percent if route and migration.state == "active" else 0
        if percent < 100:
            raise PreconditionFailed(
                f"{name}: {percent:g} % of the queries use the new encoder, and the others cannot be compared with "
                f"new vectors: first `migrator rollout {name} --stage canary` up to 100 %"
            )
    raise PreconditionFailed(f"{name}: the backfill stage is not open: `migrator rollout {name} --stage backfill`")


class _Run:
    """The state of one run: who holds the leases, what was done, and when it is enough."""

    def __init__(
        self,
        project: Project,
        migration: Migration,
        transfer: Transfer,
        max_seconds: float | None,
        max_items: int | None,
        stop: threading.Event,
        report: Callable[[Progress], None],
    ) -> None:
        self.project, self.migration, self.transfer = project, migration, transfer
        self.ledger: Ledger = project.ledger
        self.settings = project.settings.backfill
        self.max_seconds, self.max_items, self.stop, self.report = max_seconds, max_items, stop, report
        self.owner = this_process()
        self.began = time.monotonic()
        self.encoding_seconds = 0.0
        self.leased_items = self.encoded = self.chunks = self.items = self.failed = self.gone = 0
        self.tried: set[int] = set()
        self.failing: set[ItemId] = set()
        self.leases = Leases(self.ledger, migration.id, self.owner, seconds=self.settings.lease)
        self.throttle = Throttle(self.settings.nice, stop)
        self.written = _Sample(self.settings.read_back)
        self.encoder: Encoder | None = None
        self.run_id = 0

    def run(self) -> Summary:
        """The whole run, from loading the encoder to publishing what was written."""
        check_fresh(self.project, self.transfer.source)
        self.encoder = encoder = self.project.new_encoder()
        images = self.project.images()
        self.run_id = self.ledger.start_run(self.migration.id, self.owner)
        ended: Ended | Literal["failed"] = "failed"
        try:
            with self.leases:
                self._cut()
                ended = self._passes(encoder, images)
                self.transfer.publish()
        except StoreRejected as error:
            # A rollback deletes the shadow under a run that was frozen or cut off meanwhile.
            state = self.project.migration().state
            if state == "active":
                raise
            raise LeaseLost(f"{self.project.name} is {state.replace('_', ' ')}: this run is over ({error})") from error
        finally:
            self.ledger.end_run(self.run_id, ended)
        return Summary(
            ended,
            self.chunks,
            self.items,
            self.failed,
            self.gone,
            time.monotonic() - self.began,
            self.encoding_seconds,
        )

    def _cut(self) -> None:
        """Cuts the first pass, unless an earlier run has."""
        if self.ledger.counts(self.migration.id).passes:
            return
        order = None
        if self.settings.order == "worst_first":
            verify = self.project.settings.verify
            label = None if verify.label is None else partial(label_of, verify.label)
            order = worst_first_ids(self.transfer.source, label, seed=verify.seed)
        size = self.settings.chunk_size
        cut_first_pass(self.transfer, self.ledger, self.migration, size=size, order=order)

    def _passes(self, encoder: Encoder, images: ImageSource) -> Ended:
        """The chunks of each pass through the pipeline, until nothing is outstanding or it is enough."""
        for _ in range(PASSES_A_RUN):
            self.failing = self.project.open_failures(self.migration)
            counts = self.ledger.counts(self.migration.id)
            self.done_before, self.total = counts.done, counts.planned
            self.pass_number = max(counts.passes - 1, 0)
            pipeline = Pipeline(
                self,
                transfer=self.transfer,
                images=images,
                encoder=encoder,
                batch_size=self.settings.batch_size,
                image_threads=self.settings.image_threads,
                retry_for=self.settings.retry_for,
                leave=self.failing,
            )
            try:
                pipeline.run()
            finally:
                self.encoding_seconds += pipeline.encoding_seconds
            reason = self._why_stopped()
            if reason is not None or not self._catch_up():
                return reason or "complete"
        return "limit"

    def _why_stopped(self) -> Ended | None:
        """Why there is more to do but not now; None when every chunk that can be done is done."""
        by_state = self.ledger.counts(self.migration.id).by_state
        if self.stop.is_set():
            return "interrupted"
        if by_state.get("pending", 0) + by_state.get("leased", 0) == 0:
            return "stuck" if by_state.get("failed", 0) else None
        if self.project.migration().paused is not None:
            return "paused"
        return "limit" if self._over_limit() else "stuck"

    def _catch_up(self) -> int:
        """Cuts a pass over items that arrived or changed since; returns how many there are."""
        return cut_catch_up(
            self.transfer,
            self.ledger,
            self.migration,
            size=self.settings.chunk_size,
            leave=self.project.open_failures(self.migration),
        )

    # -- the pipeline's queue -----------------------------------------------------------------------------------

    def _out_of_time(self) -> bool:
        return self.max_seconds is not None and time.monotonic() - self.began >= self.max_seconds

    def _over_limit(self) -> bool:
        return self._out_of_time() or (self.max_items is not None and self.leased_items >= self.max_items)

    def is_enough(self) -> bool:
        """Whether a stop was asked for, or the time is over after at least one chunk."""
        self.encoded += 1
        return self.stop.is_set() or (self.encoded > 1 and self._out_of_time())

    def lease(self) -> Chunk | None:
        """The next free chunk within the limits."""
        if self.stop.is_set() or (self.leased_items and self._over_limit()):
            return None
        chunk = self.leases.acquire(self.tried)
        if chunk is not None:
            self.leased_items += chunk.items
        return chunk

    def check(self, chunk: Chunk, request_seconds: float) -> None:
        """See `Leases.check`."""
        self.leases.check(chunk, request_seconds)

    def on_batch(self, items: int) -> None:
        """Reports the progress and rests."""
        self.done_before += items
        self.report(Progress(self.pass_number, min(self.done_before, self.total), self.total))
        self.throttle.rest()

    def finish(self, finished: Finished) -> None:
        """In the ledger, and in what this run sums up."""
        self.ledger.finish_chunk(
            finished.chunk,
            self.owner,
            run_id=self.run_id,
            written=finished.written,
            gone=finished.gone,
            failures=finished.failures,
        )
        self.leases.drop(finished.chunk)
        self.chunks += 1
        self.items += len(finished.written)
        self.written.add(finished.written)
        self.failed += len(finished.failures)
        self.gone += finished.gone

    def fail(self, failed: ChunkFailed) -> None:
        """In the ledger; this run does not try it again."""
        self.tried.add(failed.chunk.id)
        self.leases.drop(failed.chunk)
        self.ledger.fail_chunk(failed.chunk, self.owner, error=failed.reason, max_attempts=self.settings.max_attempts)
