"""What commands print with `--json` and the ledger keeps, as models: `migrator schema` prints their JSON Schema.

A key that an earlier version did not write has a default, so that what it stored can be read.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Outcome: TypeAlias = Literal["pass", "fail", "inconclusive"]
Metrics: TypeAlias = dict[str, float]
"""Metric -> mean over the queries."""


class Document(BaseModel):
    """A JSON object; its attributes are its keys."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Range(Document):
    """A mean and its two-sided interval, at the confidence of the verdict."""

    mean: float
    low: float
    high: float


class BoundFinding(Document):
    """One bound of the gate, and whether it holds."""

    metric: str
    bound: str
    """Such as `gain >= 0.02`."""
    segment: str | None
    """None for all queries."""
    outcome: Outcome
    interval: Range | None
    queries: int
    """Queries that count."""
    minimum_detectable: float | None
    """Minimum detectable effect at 80 % power."""
    reason: str
    test: Literal["cross", "lowest", "self"] = "cross"
    accepted: bool = False
    """It passes with a significant loss that the bound allows."""
    note: str | None = None
    gain: Range | None = None
    """Of the difference from today's search."""
    share: float | None = None
    """In the test `lowest`, the share of the backfill at which the mean is lowest."""
    queries_needed: int | None = None
    """Of an inconclusive bound: judged queries that would decide it with 80 % power."""


class Flips(Document):
    """Shares of the queries whose first result changed."""

    negative: float
    """It was relevant and no longer is."""
    positive: float


class Group(Document):
    """The queries of a class or a segment."""

    name: str
    queries: int
    old: float
    new: float
    gain: float
    low: float | None
    high: float | None
    negative_flips: float


class Groups(Document):
    """Those that lose most, of all that there are."""

    count: int
    worst: list[Group]


class Result(Document):
    """An item that a search found."""

    id: int | str
    path: str | None
    label: str | None
    relevant: bool


class ExampleQuery(Document):
    """The query of an example."""

    path: str
    label: str | None


class Example(Document):
    """A query with the first results of both searches."""

    class_: str | None = Field(alias="class")
    query: ExampleQuery
    old: list[Result]
    new: list[Result]
    old_value: float
    new_value: float


class OrderCurve(Document):
    """Search quality over the backfill, in one order of the items."""

    values: list[float]
    auc: float
    """Area under the curve."""


class LowestPoint(Document):
    """The minimum during the backfill."""

    share: float
    value: float
    gain: Range | None
    """Over today."""


class Curve(Document):
    """What new queries find at each share of the backfill."""

    metric: str
    shares: list[float]
    order: str
    """The one that the backfill uses."""
    orders: dict[str, OrderCurve]
    auc_gain: Range | None = None
    """Of `worst_first` over `id`."""
    lowest: LowestPoint


class PairCounts(Document):
    """Relevant and irrelevant pairs in each bin of a histogram."""

    positives: list[int]
    negatives: list[int]


class Histograms(Document):
    """Numbers of pairs by similarity, over the same bins in all tests."""

    edges: list[float]
    tests: dict[str, PairCounts]


class PassingShares(Document):
    """Shares of the pairs that reach a threshold."""

    positives: float | None
    negatives: float


class Threshold(Document):
    """What becomes of a threshold that 1 % of today's irrelevant pairs reach."""

    threshold: float
    tests: dict[str, PassingShares]
    sentence: str | None


class QuerySetFacts(Document):
    """The pinned query set."""

    sha256: str
    kind: Literal["labels", "relevant", "instance"]
    drawn_at: str
    queries: int
    gallery: int
    skipped: dict[str, int]
    """What was skipped in the draw, and how often."""


class LiveIndex(Document):
    """The same queries through the store's own index."""

    tests: dict[str, Metrics]
    index_recall: dict[str, int | float]
    """`k`, and for each test the share of the first k results of an exact search that the index finds."""
    items: int


class VerificationResults(Document):
    """The verdict of a verification and all that was measured, as the ledger keeps it."""

    outcome: Outcome
    accepted: bool = False
    reasons: list[str]
    interval: Range | None
    """Of the first bound."""
    confidence: float
    """Of every interval."""
    interim_analysis: int
    """Its number, from 1 on."""
    minimum_detectable: float | None
    findings: list[BoundFinding]
    served: Literal["cross", "self"]
    """The test that queries meet first."""
    kind: Literal["labels", "relevant", "instance"]
    evidence: str
    metric: str
    tests: dict[str, Metrics]
    """Test (baseline, cross, self, reverse) -> metric -> mean."""
    intervals: dict[str, dict[str, Range | None]]
    differences: dict[str, dict[str, Range | None]]
    """From the baseline."""
    flips: Flips
    scores: dict[str, float] | None
    """P_up, P_comp and P_1, where `verify.upper_bound` is set."""
    overlap: dict[str, float]
    classes: Groups | None
    segments: Groups | None
    examples: list[Example]
    curve: Curve | None
    histograms: Histograms
    shift: str | None
    """What an application that cuts off at a fixed similarity must know."""
    threshold: Threshold | None
    query_set: QuerySetFacts
    queries: int
    queries_without_relevant_items: int
    queries_without_old_vector: int
    gallery: int
    gallery_gone: int
    unreadable: dict[str, str]
    """Path -> reason."""
    encoding_seconds: float
    live: LiveIndex | None = None
    next_steps: list[str] = []
    """Where the gate did not pass: what can be done, with the commands."""

    def to_json(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class VerifyDocument(VerificationResults):
    """`migrator verify --json`."""

    format: Literal[1]
    migration: str


class Recommendation(Document):
    """The strategy that suits the store."""

    strategy: Literal["in_place", "shadow"]
    why: str


class Collection(Document):
    """The collection that was planned for."""

    name: str
    collection_id: str
    alias: str | None
    items: int
    dim: int
    metric: str
    index: str
    server: str
    schema_: dict[str, str] = Field(alias="schema")


class EncoderFacts(Document):
    """An encoder of the plan."""

    id: str | None
    """None before training."""
    arch: str
    weights: str | None
    """Which part of its weights file it is, where it is not all of it."""
    dim: int
    vectors: str | None = None
    """Of the new encoder: what makes its vectors as long as they are."""


class EncoderCheck(Document):
    """Whether the old encoder made the stored vectors."""

    sampled: int
    median_cosine: float | None
    """None where the old encoder is known by its vectors alone."""


class ForecastPoint(Document):
    """At a share of the backfill."""

    share: float
    value: float | None
    gain: Range | None = None
    at: str | None
    """ISO 8601, if the backfill began with the plan."""


class Forecast(Document):
    """Search quality by share of the backfill, on a small sample."""

    metric: str
    today: float | None
    points: list[ForecastPoint]
    sampled: int
    items_per_second: float


class PlanContent(Document):
    """What an upgrade costs and what stands in its way, as the ledger keeps it."""

    migration: str
    strategy: Literal["in_place", "shadow"]
    recommended: Recommendation
    capabilities: list[str]
    shadow_refused: str | None
    """Why the collection cannot be copied whole into a second one."""
    collection: Collection
    old_encoder: EncoderFacts
    new_encoder: EncoderFacts
    old_encoder_check: EncoderCheck
    images_per_second: float
    backfill_seconds: int | None
    forecast: Forecast
    chunks: int
    undo_bytes: int
    index_bytes: int
    visible: Literal["at_once", "on_publish", "at_cutover"]
    risks: list[str]
    stages: list[tuple[str, str]]
    """Command and purpose."""

    def to_json(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class PlanDocument(PlanContent):
    """`migrator plan --json`."""

    format: Literal[1]
    plan: str
    """The fingerprint of the facts that it stands on."""


class Place(Document):
    """An encoder and the collection that holds its vectors."""

    encoder: str
    collection: str


class RouteFacts(Document):
    """The route, without the salt that a report leaves out."""

    collection: str
    epoch: int
    phase: str
    query_encoder: str
    query_collection: str
    canary_encoder: str | None
    canary_collection: str | None
    canary_percent: float
    ttl: float
    """Seconds."""
    write_encoders: list[str]
    writes: list[Place]


class RouteDocument(RouteFacts):
    """`migrator route --json`."""

    format: Literal[1]
    salt: str


class LastHealthCheck(Document):
    """The last health check that evaluated the query set."""

    at: str
    metric: str
    value: float
    forecast: float | None
    share: float
    """Of the backfill."""
    outcome: Literal["ok", "accepted", "below the gate"]
    note: str | None


class StatusFacts(Document):
    """Where a migration stands; docs/reference/status.md has each key."""

    migration: str
    collection: str | None
    strategy: Literal["in_place", "shadow"] | None
    shadow: str | None
    stage: str
    state: str
    plan: str | None
    old_encoder: str | None
    new_encoder: str | None
    verification: Literal["pass", "accepted", "fail", "inconclusive"] | None
    verification_invalid: str | None
    losses: list[str]
    next_steps: list[str]
    paused: str | None
    epoch: int | None
    canary_percent: float | None
    items_total: int
    items_done: int
    items_failed: int
    items_gone: int
    catch_up_passes: int
    chunks: dict[str, int]
    items_per_second: float | None
    eta_seconds: int | None
    search: LastHealthCheck | None
    mixed_space: bool
    old_kept: bool
    next_command: str | None


class StatusDocument(StatusFacts):
    """`migrator status --json`."""

    format: Literal[1]


class Tile(Document):
    """One number of a report's verdict."""

    title: str
    value: float
    gain: Range | None = None
    state: Literal["better", "same", "worse"] | None = None


class ReportVerdict(Document):
    """The verdict as text."""

    answer: Literal["yes", "accepted", "no", "open", "back"]
    headline: str
    sentences: list[str]
    next_steps: list[str]
    tiles: list[Tile]


class VerificationFacts(Document):
    """The latest verification, and whether it still counts."""

    at: str
    outcome: Outcome
    state: Literal["pass", "accepted", "fail", "inconclusive"]
    invalid_reason: str | None
    """Why it no longer counts, as the end of a sentence about the migration."""
    old_encoder: str
    new_encoder: str
    query_set_sha256: str
    results: VerificationResults


class ReadBack(Document):
    """Items that were read back after a run and embedded again."""

    checked: int
    mismatched: int
    mismatched_items: list[int | str] = []
    worst_cosine: float | None


class Measurement(Document):
    """A health check, or what `verify --mixed` measured."""

    at: str
    stage: str
    run: int | None = None
    items_done: int | None = None
    items_total: int | None = None
    share: float | None = None
    read_back: ReadBack | None = None
    metric: str | None = None
    value: float | None = None
    mixed: Metrics | None = None
    interval: Range | None = None
    interim_analysis: int | None = None
    forecast: float | None = None
    outcome: Literal["ok", "accepted", "below the gate"] | None = None
    note: str | None = None
    gallery: str | None = None
    queries: int | None = None
    today: Metrics | None = None
    live: LiveIndex | None = None


class Run(Document):
    """A run of the backfill."""

    number: int
    started_at: str
    seen_at: str
    items: int
    chunks: int
    ended: str | None


class FailedItem(Document):
    """An item that could not be embedded."""

    id: int | str
    kind: str
    reason: str
    attempts: int


class Failures(Document):
    """How many are open, and some of them."""

    open: int
    items: list[FailedItem]


class Training(Document):
    """The training of the candidate, or the latest one."""

    method: str
    state: str
    encoder: str | None
    error: str | None
    started_at: str
    finished_at: str | None
    validation: dict[str, float | None] | None
    epochs: list[dict[str, float | None]]


class PlanFacts(PlanContent):
    """The latest plan."""

    fingerprint: str
    at: str


class Event(Document):
    """A line of the audit log."""

    at: str
    event: str
    stage: str
    actor: str
    detail: dict[str, Any]


class ReportDocument(Document):
    """`migrator report --json`: everything that is known of a migration."""

    format: Literal[1]
    verdict: ReportVerdict
    made_at: str
    status: StatusFacts
    verification: VerificationFacts | None
    measured: list[Measurement]
    runs: list[Run]
    failures: Failures
    training: Training | None
    plan: PlanFacts | None
    route: RouteFacts | None
    events: list[Event]


DOCUMENTS: dict[str, type[Document]] = {
    "plan": PlanDocument,
    "verify": VerifyDocument,
    "status": StatusDocument,
    "report": ReportDocument,
    "route": RouteDocument,
}
"""By the command that prints them with `--json`."""
