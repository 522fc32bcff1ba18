"""The tests that decide whether the new encoder may answer queries, on a pinned query set and a sampled gallery.

M(q, g): queries by encoder q, gallery by encoder g. `baseline` is M(old, old), today's search; `cross` M(new, old),
what the canary will show; `self` M(new, new), what the finished migration will show; `reverse` M(old, new), what would
happen if queries stayed behind. Every encoder embeds every image once. `measure_mixed` evaluates new
queries on the collection as it is at this moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import ItemId, Payload, Store
from migrator.config import FLIPS, Gate
from migrator.documents import VerificationResults
from migrator.embedding.embed import embed, locate
from migrator.embedding.stored_encoder import unit
from migrator.embedding.stored_vectors import old_vectors
from migrator.errors import PreconditionFailed
from migrator.evaluation.bootstrap import BootstrapConfig, Interval, bootstrap
from migrator.evaluation.exact_search import rank
from migrator.evaluation.gate import Measured, Verdict, gate
from migrator.evaluation.metrics import (
    Relevance,
    negative_flips,
    overlap_at_k,
    p_1,
    p_comp,
    p_up,
    parse_metric,
    positive_flips,
    summarise,
)
from migrator.evaluation.similarity import (
    draw_listed_pairs,
    draw_pairs,
    draw_tag_pairs,
    score_histograms,
    score_pairs,
    shift,
)
from migrator.evaluation.verdicts import Test
from migrator.labels import Tags, tags_of
from migrator.ledger import Migration
from migrator.lifecycle.freshness import check_fresh
from migrator.lifecycle.next_steps import next_steps, situation_of
from migrator.lifecycle.strategy import STRATEGIES
from migrator.lifecycle.validity import Gallery, gallery_of, interim_analysis_of
from migrator.project import Project
from migrator.trainer.images.templates import NotText
from migrator.verify.backfill_curve import SHARES, BackfillCurve, curve_facts, measure_curve
from migrator.verify.baseline import Baseline, write_baseline
from migrator.verify.judged_queries import JudgedQueries, at_rows
from migrator.verify.live_index import Live, evaluate_live
from migrator.verify.query_set.augmented import altered
from migrator.verify.query_set.model import QuerySet
from migrator.verify.query_set.pinned import pinned_query_set
from migrator.verify.regressions import examples, worst_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.images.source import ImageSource

METRICS = ("map@100", "recall@1", "recall@5", "recall@10", "precision@10", "ndcg@10", "mrr@100")
"""Always measured, beside those that the gate names."""
TESTS = ("baseline", "cross", "self", "reverse")
OVERLAP_AT = 10
DEFAULT_TESTS: dict[str, tuple[Test, ...]] = {"cross": ("cross", "lowest", "self"), "self": ("self",)}
"""What `gate.min_gain` bounds, by the test that is served."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, how far it is and how far it goes."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The outcome of one `verify`."""

    verdict: Verdict
    results: VerificationResults
    """As `migrator verify --json` prints it, `migrator report` draws it and the ledger keeps it."""


def verify(
    project: Project, report: Report = lambda *_: None, *, resample_queries: bool = False, live: bool = False
) -> Verified:
    """Runs the four tests, decides, and keeps the result in the ledger. Needs a fresh plan and a new encoder.

    The query set is that of the first verification (with `resample_queries`: a new one). `live` also searches
    through the store's own index. Raises `PreconditionFailed` once the collection is mixed, and where no image can be
    read.
    """
    migration = project.migration()
    check_old_gallery(project, migration)
    with project.store() as store:
        plan = check_fresh(project, store)
        tests = _run_tests(project, migration, store, report, resample_queries=resample_queries)
        seen = None
        if live:
            vectors = {"baseline": tests.pairs["baseline"][0]}
            if "cross" in tests.pairs:
                vectors["cross"] = tests.pairs["cross"][0]
            seen = _live(project, store, tests.judged_queries, vectors, report)
    query_set, new_id = tests.judged_queries.query_set, tests.new_encoder_id
    analysis = interim_analysis_of(
        project.ledger.verifications(migration.id), new_encoder_id=new_id, query_set_sha256=query_set.sha256
    )
    verdict = gate(tests.measured(), project.settings.verify.gate, analysis=analysis, seed=project.settings.verify.seed)
    facts = {
        **_verdict_facts(verdict),
        **_measurement_facts(project, tests, verdict),
        "live": None if seen is None else seen.to_json(),
    }
    results = VerificationResults.model_validate({**facts, "next_steps": next_steps(facts, situation_of(project))})
    # The encoder may have been made elsewhere; from here on the migration is bound to it.
    project.ledger.set_new_encoder(migration.id, new_id)
    today = tests.judged["baseline"]
    write_baseline(
        project,
        migration,
        Baseline(
            query_set.sha256,
            new_id,
            tests.judged_queries.rows,
            tests.pairs["self"][0],
            tests.values["baseline"],
            first_relevant(today),
        ),
    )
    project.ledger.save_verification(
        migration,
        plan_fingerprint=plan.fingerprint,
        old_encoder_id=project.encoder_ids()[0],
        new_encoder_id=new_id,
        queries_sha256=query_set.sha256,
        outcome=verdict.outcome,
        results=results.to_json(),
    )
    return Verified(verdict, results)


def check_old_gallery(project: Project, migration: Migration) -> None:
    """Refuses a gallery without which there is no search of today to compare with."""
    gallery = gallery_of(migration, project.ledger.counts(migration.id))
    if gallery == "mixed":
        raise PreconditionFailed(
            f"{project.name} is at stage {migration.stage}, its collection already mixed, and today's search cannot be "
            f"compared with: `migrator verify {project.name} --mixed` measures it as it is, with --live through its "
            "own index"
        )
    if gallery == "new":
        raise PreconditionFailed(
            f"{project.name} is at stage {migration.stage}, queries meet the new encoder's vectors alone, and the old "
            f"search cannot be compared with: `migrator verify {project.name} --live` measures what is served"
        )


@dataclass(frozen=True, slots=True)
class _Tests:
    """The tests, run: each a pair of vectors, its ranking, and the metrics of every query."""

    judged_queries: JudgedQueries
    new_encoder_id: str
    served: Test
    """The test that queries meet first: `cross` in place, `self` with a shadow."""
    pairs: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    """Test -> vectors of the queries (q, dim) and of the items (g, dim)."""
    rankings: dict[str, NDArray[np.int32]]
    judged: dict[str, Relevance]
    values: dict[str, dict[str, NDArray[np.float64]]]
    """Test -> metric -> value of each query."""
    curve: BackfillCurve | None
    """None where no query meets a mixed gallery, and no threshold asks about one."""
    without_old_vector: int
    gone: int
    unreadable: dict[str, str]
    encoding_seconds: float

    @property
    def lost(self) -> NDArray[np.float64]:
        """1 for each query whose first result became irrelevant."""
        return negative_flips(self.judged["baseline"], self.judged[self.served])

    def measured(self) -> Measured:
        """For the gate. What users meet on the way is tested by default: in place all of it, of a shadow the end."""
        sides: dict[Test, dict[str, NDArray[np.float64]]] = {
            test: {**self.values[test], FLIPS: negative_flips(self.judged["baseline"], self.judged[test])}
            for test in ("cross", "self")
            if test in self.values
        }
        if self.curve is not None:
            sides["lowest"] = self.curve.chosen
        new = sides.pop(self.served)
        return Measured(
            old=self.values["baseline"],
            new=new,
            clusters=self.judged_queries.clusters(),
            segments=self.judged_queries.segments,
            served=self.served,
            others=sides,
            default_tests=DEFAULT_TESTS[self.served],
            shares=SHARES,
        )


def _run_tests(
    project: Project, migration: Migration, store: Store, report: Report, *, resample_queries: bool
) -> _Tests:
    images = project.images()
    old, new = None if project.old_is_stored else project.old_encoder(), project.new_encoder()
    query_set = pinned_query_set(project, migration, store, images, resample=resample_queries)
    gallery, stored = _stored_gallery(store, query_set)
    asking, by_own = np.arange(len(query_set.paths)), None
    if old is None:
        project.check_old_encoder(store)
        asking, by_own = _with_own_vectors(store, images, query_set)
    began = time.monotonic()
    embedded = _embed(project, images, query_set, asking, gallery, old, new, report)
    encoding = time.monotonic() - began
    judged_queries = JudgedQueries.of(query_set, embedded.query_rows, embedded.gallery_rows)
    by_new = embedded.by_new
    by_old = embedded.by_old if by_own is None else by_own[np.searchsorted(asking, judged_queries.rows)]
    gallery_old, gallery_new = stored[np.searchsorted(gallery, judged_queries.gallery)], embedded.gallery_by_new
    pairs = {
        "baseline": (by_old, gallery_old),
        "cross": (by_new, gallery_old),
        "self": (by_new, gallery_new),
        "reverse": (by_old, gallery_new),
    }
    if gallery_old.shape[1] != new.dim:  # such vectors cannot be compared, and in a shadow they never meet
        del pairs["cross"], pairs["reverse"]
    metrics = _metrics(project.settings.verify.gate)
    rankings: dict[str, NDArray[np.int32]] = {}
    for number, against in enumerate((("baseline", "cross"), ("self", "reverse"))):
        report("ranking", number, 2)
        tested = [test for test in against if test in pairs]
        queries = np.concatenate([pairs[test][0] for test in tested])  # one pass over a gallery serves both encoders
        found = rank(queries, pairs[tested[0]][1], _depth(metrics), exclude=np.tile(judged_queries.own, len(tested)))
        rankings |= dict(zip(tested, np.split(found, len(tested)), strict=True))
    judged = {test: judged_queries.judge(ranking) for test, ranking in rankings.items()}
    # In place, new queries meet old vectors; beside a shadow they only ever meet new ones.
    served: Test = STRATEGIES[migration.strategy].served_test
    report("backfill curve", 0, 1)
    curve = _curve(project, judged_queries, judged["baseline"], pairs, served)
    return _Tests(
        judged_queries=judged_queries,
        new_encoder_id=new.id,
        served=served,
        pairs=pairs,
        rankings=rankings,
        judged=judged,
        values={test: _values(found, metrics) for test, found in judged.items()},
        curve=curve,
        without_old_vector=len(query_set.paths) - len(asking),
        gone=len(query_set.gallery) - len(gallery),
        unreadable=embedded.unreadable,
        encoding_seconds=encoding,
    )


def _curve(
    project: Project,
    judged_queries: JudgedQueries,
    today: Relevance,
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    served: Test,
) -> BackfillCurve | None:
    """The backfill curve, where queries meet a mixed gallery or a threshold names the lowest point of one."""
    settings = project.settings.verify
    named = [threshold.metric for threshold in settings.gate.thresholds if threshold.test == "lowest"]
    if "cross" not in pairs or not (served == "cross" or named):
        return None
    queries, gallery = pairs["cross"]
    return measure_curve(
        judged_queries, today, queries, gallery, pairs["self"][1],
        order=project.settings.backfill.order, metrics=tuple(dict.fromkeys([settings.gate.metric, *named])),
        seed=settings.seed,
    )  # fmt: skip


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """What the gate decided, JSON-able."""
    return {
        "outcome": verdict.outcome,
        "accepted": verdict.accepted,
        "reasons": list(verdict.reasons),
        "interval": _interval(verdict.interval),
        "confidence": verdict.confidence,
        "interim_analysis": verdict.analysis,
        "minimum_detectable": verdict.findings[0].minimum_detectable,
        "findings": [
            {**asdict(finding), "interval": _interval(finding.interval), "gain": _interval(finding.gain)}
            for finding in verdict.findings
        ],
    }


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.to_json()


def _measurement_facts(project: Project, tests: _Tests, verdict: Verdict) -> dict[str, Any]:
    """All that was measured, JSON-able: what `migrator report` draws. Every interval is at the verdict's confidence."""
    settings = project.settings.verify
    judged_queries, query_set, values = tests.judged_queries, tests.judged_queries.query_set, tests.values
    clusters = judged_queries.clusters() if settings.gate.cluster == "class" else None
    metric, served = settings.gate.metric, tests.served
    config = BootstrapConfig(verdict.confidence, settings.gate.resamples, settings.seed)
    means = {test: {name: _mean(found) for name, found in of.items()} for test, of in values.items()}
    ways = {"old": values["baseline"][metric], "new": values[served][metric], FLIPS: tests.lost}
    classes = segments = None
    if judged_queries.labels is not None:
        classes = worst_groups(judged_queries.labels, ways, config=config)
    if judged_queries.segments is not None:
        segments = worst_groups(judged_queries.segments, ways, config=config)
    curve = None
    if tests.curve is not None:
        lowest = next(
            (at for at in verdict.findings if (at.test, at.metric, at.segment) == ("lowest", metric, None)), None
        )
        gain = None if lowest is None else lowest.gain
        curve = curve_facts(tests.curve, metric=metric, gain=gain, clusters=clusters, config=config)
    overlap = overlap_at_k(tests.rankings["baseline"], tests.rankings[served], OVERLAP_AT)
    counted = tests.judged["baseline"].total > 0
    return {
        "served": served,
        "kind": query_set.kind,
        "evidence": query_set.evidence,
        "metric": metric,
        "tests": means,
        **_intervals(values, clusters, config),
        "flips": {
            "negative": _mean(tests.lost),
            "positive": _mean(positive_flips(tests.judged["baseline"], tests.judged[served])),
        },
        "scores": _scores(means, metric, settings.upper_bound),
        "overlap": {f"overlap@{OVERLAP_AT}": _mean(overlap)},
        "classes": classes,
        "segments": segments,
        "examples": examples(
            judged_queries, {"old": tests.rankings["baseline"], "new": tests.rankings[served]}, ways, classes
        ),
        "curve": curve,
        **_score_facts(tests, seed=settings.seed),
        "query_set": {
            "sha256": query_set.sha256,
            "kind": query_set.kind,
            "drawn_at": query_set.drawn_at,
            "queries": len(query_set.paths),
            "gallery": len(query_set.gallery),
            "skipped": query_set.counts,
        },
        "queries": int(counted.sum()),
        "queries_without_relevant_items": int((~counted).sum()),
        "queries_without_old_vector": tests.without_old_vector,
        "gallery": len(judged_queries.gallery),
        "gallery_gone": tests.gone,
        "unreadable": tests.unreadable,
        "encoding_seconds": round(tests.encoding_seconds, 3),
    }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """New queries, evaluated on the collection as it is."""

    judged_queries: JudgedQueries
    values: dict[str, NDArray[np.float64]]
    """Metric -> value of each query, NaN where it has no relevant item."""
    first_relevant: NDArray[np.float64]  # (q,)

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean."""
        return {metric: _mean(values) for metric, values in self.values.items()}


def evaluate(
    project: Project,
    store: Store,
    query_set: QuerySet,
    rows: NDArray[np.int64],
    by_new: NDArray[np.float32],
) -> Evaluation:
    """Evaluates the queries at `rows` (q,), embedded as `by_new` (q, dim), on the vectors that are in `store` now."""
    gallery, stored = _stored_gallery(store, query_set)
    judged_queries = JudgedQueries.of(query_set, rows, gallery)
    metrics = _metrics(project.settings.verify.gate)
    judged = judged_queries.judge(rank(by_new, stored, _depth(metrics), exclude=judged_queries.own))
    return Evaluation(judged_queries, _values(judged, metrics), first_relevant(judged))


def first_relevant(judged: Relevance) -> NDArray[np.float64]:
    """1 where the first result is relevant, else 0, (q,); NaN where a query has no relevant item."""
    return np.where(judged.total > 0, judged.hits[:, 0].astype(np.float64), np.nan)


def is_served_by_new(project: Project) -> bool:
    """Whether queries meet the new encoder's vectors alone: then the search that is served can only be measured."""
    migration = project.migration()
    return gallery_of(migration, project.ledger.counts(migration.id)) == "new"


def measure_mixed(project: Project, report: Report = lambda *_: None, *, live: bool = False) -> dict[str, Any]:
    """The metrics of new queries against the served collection as it is at this moment, whatever made its vectors.

    After a shadow's cutover that is the shadow. With `live` also through the store's own index. What was found goes to
    the audit log. Raises `PreconditionFailed` where the new encoder's queries cannot search it.
    """
    migration = project.migration()
    gallery = gallery_of(migration, project.ledger.counts(migration.id))
    new, images = project.new_encoder(), project.images()
    with _served(project, migration, gallery) as store:
        info = store.describe()
        if info.dim != new.dim:
            raise PreconditionFailed(
                f"{info.name} holds {info.dim}-d vectors, which the new encoder's {new.dim}-d queries cannot search "
                f"before the cutover: `migrator status {project.name}` names the next command"
            )
        query_set = pinned_query_set(project, migration, store, images)
        rows, by_new, _ = embed_queries(project, images, query_set, np.arange(len(query_set.paths)), [new], report)
        current = evaluate(project, store, query_set, rows, by_new[0])
        found: dict[str, Any] = {
            "gallery": gallery,
            "mixed": current.means,
            "queries": len(rows),
            "today": _today(project, migration, query_set),
        }
        if live:
            test = "self" if gallery == "new" else "mixed"
            found["live"] = _live(project, store, current.judged_queries, {test: by_new[0]}, report).to_json()
    project.ledger.note(migration, "measured", found)
    return found


@contextmanager
def _served(project: Project, migration: Migration, gallery: Gallery) -> Iterator[Store]:
    """The collection that queries meet."""
    with project.store() as store:
        if migration.shadow is None or gallery != "new":
            yield store
        else:
            with closing(store.open_collection(migration.shadow)) as beside:
                yield beside


def _today(project: Project, migration: Migration, query_set: QuerySet) -> dict[str, float] | None:
    """What the old search gave for the same queries before the migration, by the last verification that has them."""
    for verification in reversed(project.ledger.verifications(migration.id)):
        if verification.queries_sha256 == query_set.sha256:
            found: dict[str, float] = verification.results["tests"]["baseline"]
            return found
    return None


# -- vectors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Embedded:
    query_rows: NDArray[np.int64]  # positions in the query set
    by_new: NDArray[np.float32]
    by_old: NDArray[np.float32]  # empty where there is no old model
    gallery_rows: NDArray[np.int64]  # positions in query_set.gallery
    gallery_by_new: NDArray[np.float32]
    unreadable: dict[str, str]


def _stored_gallery(store: Store, query_set: QuerySet) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which of the gallery's items are still there, as ascending positions (n,), and their vectors (n, dim): of unit
    length where the store compares directions, whatever length they have there."""
    where = {item: at for at, item in enumerate(query_set.gallery)}
    page = store.read_vectors(query_set.gallery)
    if not len(page):
        raise PreconditionFailed(
            "none of the gallery's items is left in the collection: draw a new query set with --resample-queries"
        )
    vectors = unit(page.vectors) if store.describe().metric == "cosine" else page.vectors
    return np.array([where[item] for item in page.ids], np.int64), vectors  # a page keeps the order asked for


def _with_own_vectors(
    store: Store, images: ImageSource, query_set: QuerySet
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The queries that are items of the collection, as positions (n,), with their stored vectors, (n, dim).

    Today's search is then a search for items like an item. Raises `PreconditionFailed` where no query is an item.
    """
    own = [item for item in query_set.own if item is not None]
    page = store.read_vectors(list(dict.fromkeys(own)))
    row_of = {item: row for row, item in enumerate(page.ids)}
    vectors = np.zeros((len(query_set.paths), page.vectors.shape[1] or store.describe().dim), np.float32)
    for row, item in enumerate(query_set.own):
        if item in row_of:
            vectors[row] = page.vectors[row_of[item]]
    elsewhere = [row for row, item in enumerate(query_set.own) if item is None]  # not sampled, but perhaps an item
    if elsewhere:
        vectors[elsewhere] = old_vectors(store, images, at_rows(query_set.paths, np.array(elsewhere)))
    vectors = unit(vectors)
    rows = np.flatnonzero(vectors.any(axis=1))
    if len(rows) == 0:
        raise PreconditionFailed(
            f"old_encoder is stored, and none of {len(vectors)} queries, for instance {query_set.paths[0]!r}, is an "
            f"item of {store.describe().name}: list paths as images.uri makes them, or leave verify.queries out"
        )
    return rows, vectors[rows]


def embed_queries(
    project: Project,
    images: ImageSource,
    query_set: QuerySet,
    asking: NDArray[np.int64],
    encoders: Sequence[Encoder],
    report: Report = lambda *_: None,
) -> tuple[NDArray[np.int64], Sequence[NDArray[np.float32]], dict[str, str]]:
    """The queries at `asking` (n,) whose images can be read, as positions (q,); their vectors by each encoder,
    (q, dim); and path -> reason for the others."""
    view = partial(altered, seed=query_set.made_from["seed"]) if query_set.kind == "instance" else None
    paths = at_rows(query_set.paths, asking)
    step = _counting(report, "queries", len(paths))
    found = embed(images, paths, encoders, report=step, view=view, **project.loading())
    return asking[found.rows], found.vectors, {paths[row]: why for row, why in found.problems.items()}


def _embed(
    project: Project,
    images: ImageSource,
    query_set: QuerySet,
    asking: NDArray[np.int64],
    gallery: NDArray[np.int64],
    old: Encoder | None,
    new: Encoder,
    report: Report,
) -> _Embedded:
    encoders = [new] if old is None else [new, old]
    rows, queries, unreadable = embed_queries(project, images, query_set, asking, encoders, report)
    if len(rows) == 0 and unreadable:
        path, why = next(iter(unreadable.items()))
        raise PreconditionFailed(
            f"none of {len(asking)} query images could be read, for instance {path}: {why}: check images.root and "
            "the paths of the queries"
        )
    paths = at_rows(query_set.gallery_paths, gallery)
    items = embed(images, paths, [new], report=_counting(report, "gallery", len(paths)), **project.loading())
    if len(items.rows) == 0:
        raise PreconditionFailed(
            f"none of {len(paths)} gallery images could be read, for instance "
            f"{next(iter(items.problems.values()))}: check images.root and images.uri"
        )
    unreadable |= {str(paths[row]): why for row, why in items.problems.items()}
    by_old = queries[1] if old is not None else np.empty((0, 0), np.float32)
    return _Embedded(rows, queries[0], by_old, gallery[items.rows], items.vectors[0], unreadable)


def _counting(report: Report, what: str, of: int) -> Callable[[int], None]:
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        report(what, done, of)

    return step


def _live(
    project: Project,
    store: Store,
    judged_queries: JudgedQueries,
    vectors: Mapping[str, NDArray[np.float32]],
    report: Report,
) -> Live:
    template, images = project.settings.verify.label, project.images()

    def describe(item: ItemId, payload: Payload) -> tuple[Tags, str | None]:
        (path,) = locate(images, [(item, payload)])
        try:
            tags = () if template is None else tags_of(template, item, payload)
        except NotText:
            tags = ()
        return tags, path if isinstance(path, str) else None

    return evaluate_live(
        store, judged_queries.query_set, judged_queries.rows, vectors,
        metrics=_metrics(project.settings.verify.gate), describe=describe,
        report=lambda done, of: report("live", done, of),
    )  # fmt: skip


# -- numbers ------------------------------------------------------------------------------------------------------


def _metrics(settings: Gate) -> tuple[str, ...]:
    named = [settings.metric, *(threshold.metric for threshold in settings.thresholds if threshold.metric != FLIPS)]
    return tuple(dict.fromkeys([*METRICS, *named]))


def _depth(metrics: Sequence[str]) -> int:
    return max(parse_metric(metric).k for metric in metrics)


def _values(judged: Relevance, metrics: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    return {metric: parse_metric(metric).per_query(judged) for metric in metrics}


def _mean(values: NDArray[np.float64]) -> float:
    return summarise(values).or_zero


def _intervals(
    values: Mapping[str, Mapping[str, NDArray[np.float64]]], clusters: NDArray[np.int64] | None, config: BootstrapConfig
) -> dict[str, Any]:
    """Of every mean, and of every difference from today's search: test -> metric -> interval. All of one bootstrap."""
    columns = {("intervals", test, metric): found for test, of in values.items() for metric, found in of.items()}
    columns |= {
        ("differences", test, metric): found - values["baseline"][metric]
        for test, of in values.items()
        if test != "baseline"
        for metric, found in of.items()
    }
    drawn = bootstrap(np.stack(list(columns.values()), axis=1), clusters, **config._asdict())
    found: dict[str, dict[str, dict[str, Any]]] = {"intervals": {}, "differences": {}}
    for column, (kind, test, metric) in enumerate(columns):
        found[kind].setdefault(test, {})[metric] = drawn.interval(column).to_json()
    return found


def _score_facts(tests: _Tests, *, seed: int) -> dict[str, Any]:
    """How high relevant and irrelevant pairs score in each test, and what that does to an application's threshold."""
    judged_queries = tests.judged_queries
    if judged_queries.relevant is not None:
        pairs = draw_listed_pairs(
            judged_queries.relevant, len(judged_queries.gallery), own=judged_queries.own, seed=seed
        )
    elif judged_queries.tags is not None:
        pairs = draw_tag_pairs(*judged_queries.tags, own=judged_queries.own, seed=seed)
    else:
        assert judged_queries.query_codes is not None
        assert judged_queries.gallery_codes is not None
        pairs = draw_pairs(judged_queries.query_codes, judged_queries.gallery_codes, own=judged_queries.own, seed=seed)
    scores = score_pairs(tests.pairs, pairs)
    moved = shift(scores)
    return {
        "histograms": score_histograms(scores).to_json(),
        "shift": None if moved is None else moved.sentence,
        "threshold": None if moved is None else moved.to_json(),
    }


def _scores(means: Mapping[str, Mapping[str, float]], metric: str, bound: float | None) -> dict[str, float] | None:
    """P_up, P_comp and P_1 (AdvBCT, section 4.1), where the self-test `bound` of an independent encoder is known."""
    if bound is None:
        return None
    new = means["self"][metric]
    scores = {"p_up": p_up([new], [bound])}
    if "cross" in means and bound > means["baseline"][metric]:  # else there is nothing between old and bound to gain
        cross, old = means["cross"][metric], means["baseline"][metric]
        scores |= {"p_comp": p_comp([cross], [old], [bound]), "p_1": p_1([new], [cross], [old], [bound])}
    return scores
