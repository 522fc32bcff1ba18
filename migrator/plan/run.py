"""What an upgrade would cost and what stands in its way: measured, saved, and bound to the facts it was made from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import Capabilities, CollectionInfo, ItemId, Payload, Store, StoreRejected
from migrator.config import POST_HOC, ItemsFrom, OldEncoder
from migrator.embedding.agreement import as_kept_by, check_agreement
from migrator.embedding.embed import embed, locate
from migrator.embedding.stored_encoder import SAME, StoredEncoder
from migrator.errors import ConfigError, PreconditionFailed
from migrator.labels import training_label
from migrator.ledger import Plan, now
from migrator.lifecycle.strategy import STRATEGIES
from migrator.plan.forecast import expected_quality, forecast, loss_risks
from migrator.project import Project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.encoders.encoder import Encoder

SAMPLE = 128
"""Stored items whose image is embedded again, to know the old encoder and the speed of the new one."""
LONGER = 0.1
"""How much longer than 1 an approximation may be; beyond that the vectors that it stands for are not of unit length."""
SEED = 0

_TRAIN = ("train", "learn the new encoder against the old one's vectors")

_UNCHECKED = (
    "old_encoder is stored: which model made the stored vectors, and whether one made them all, cannot be checked",
    "verify asks as today with stored vectors, so its queries must be items of the collection; how the old encoder "
    "serves other queries is not measured",
)
STORED_RISKS = {
    "in_place": (
        *_UNCHECKED,
        "a rollback cannot embed with the old encoder: of what the application writes after the cutover, changed items "
        "get the old vector that they had, and added ones keep the new encoder's; both are named",
    ),
    "shadow": (
        *_UNCHECKED,
        "a rollback cannot embed with the old encoder: of what the application writes after the cutover, changed items "
        "keep the old vector that they had, and added ones lie in the shadow alone, which is then kept",
    ),
}
"""What follows from having no old model, by strategy."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan as it is shown: `content` is what the ledger keeps."""

    fingerprint: str
    content: dict[str, Any]


def make_plan(project: Project, report: Callable[..., None] = lambda *_: None) -> Planned:
    """Looks at the collection, measures on a sample, and saves the plan. Changes nothing else.

    Raises `PreconditionFailed` if the stored vectors were not made by the declared old encoder.
    """
    settings = project.settings
    project.ledger.check_plannable(project.name)
    if settings.backfill.order == "worst_first" and settings.verify.label is None and find_spec("faiss") is None:
        raise ConfigError(
            f"{project.config.path}: migrations.{project.name}.backfill.order: worst_first finds clusters with faiss "
            "where there are no labels: `pip install 'advbct-migrator[faiss]'`, or set verify.label"
        )
    strategy = settings.rollout.strategy
    second_collection = STRATEGIES[strategy].second_collection
    with project.store() as store:
        info = store.describe()
        capabilities = store.capabilities
        _check_collection(project, info)
        lost = lost_in_shadow(store, settings.new_encoder.dim)
        if second_collection:
            check_shadow(store, settings.new_encoder.dim)
        if project.trains():
            project.training_folder()  # refused where it is no local one
        if not second_collection and capabilities.in_place_refusal is not None:
            raise PreconditionFailed(f"collection {info.name} {capabilities.in_place_refusal}")
        if not second_collection and not (capabilities.stamps or can_log_stamps(capabilities)):
            raise PreconditionFailed(
                f"collection {info.name} has no room for stamps and does not give vectors back as they were written, "
                "so what an application changes could not be found: set rollout.strategy to shadow"
            )
        old = None if project.old_is_stored else project.load(project.old_spec())
        old_id = _known_by_vectors(project, store).id if old is None else old.id
        new = _new_or_untrained(project)
        check_unmixed(project, store, old_id, None if new.untrained else new.encoder.id)
        sample = _measure_sample(project, store, old, new, report)
        quality = expected_quality(project, store, project.images(), None if new.untrained else new.encoder, report)
    risks = [*(STORED_RISKS[strategy] if old is None else ()), *sample.risks]
    if old is None and not capabilities.exact_vectors:
        risks.append("the index keeps approximations, and these stand for the old encoder in training and verify")
    risks += loss_risks(quality, settings.verify.gate)
    can = describe_capabilities(capabilities, lost=lost)
    recommended, why = recommend(capabilities, same_dim=info.dim == new.encoder.dim, lost=lost)
    median = None if sample.median_cosine is None else round(sample.median_cosine, 4)
    vector_bytes = info.count * info.dim * 4
    rate = sample.images_per_second
    content: dict[str, Any] = {
        "migration": project.name,
        "strategy": strategy,
        "recommended": {"strategy": recommended, "why": why},
        "capabilities": can,
        "shadow_refused": lost,
        "collection": {
            "name": info.name,
            "collection_id": info.collection_id,
            "alias": info.alias,
            "items": info.count,
            "dim": info.dim,
            "metric": info.metric,
            "index": info.index,
            "server": info.server,
            "schema": dict(info.schema),
        },
        "old_encoder": {
            "id": old_id,
            "arch": _called(settings.old_encoder),
            "weights": None if old is None else old.taken,
            "dim": info.dim,
        },
        "new_encoder": {
            "id": None if new.untrained else new.encoder.id,
            "arch": settings.new_encoder.named,
            "weights": new.encoder.taken,
            "dim": new.encoder.dim,
            "vectors": describe_dim(stored=info.dim, new=new.encoder.dim, made_by=_dim_made_by(project, new)),
        },
        "old_encoder_check": {"sampled": sample.compared, "median_cosine": median},
        "images_per_second": round(rate, 1),
        "backfill_seconds": round(info.count / rate) if rate else None,
        "forecast": forecast(
            quality, metric=settings.verify.gate.metric, items=info.count, items_per_second=rate, begin=now()
        ),
        "chunks": -(-info.count // settings.backfill.chunk_size),
        "undo_bytes": 0 if second_collection else vector_bytes,
        "index_bytes": _index_bytes(info, capabilities, strategy, new.encoder.dim),
        "visible": capabilities.visible,
        "risks": risks,
        "stages": [
            list(step) for step in [*([_TRAIN] if project.trains() else []), *STRATEGIES[strategy].purposes.items()]
        ],
    }
    bound = bound_facts(project, info, old_id)
    fingerprint = fingerprint_of(bound)
    project.ledger.save_plan(
        project.name,
        collection=info.name,
        source=info.collection_id,
        alias=info.alias,
        strategy=strategy,
        old_encoder_id=old_id,
        new_encoder_id=None if new.untrained else new.encoder.id,
        fingerprint=fingerprint,
        bound=bound,
        content=content,
    )
    return Planned(fingerprint, content)


def _called(old: OldEncoder | str) -> str:
    return old if isinstance(old, str) else old.named


def _known_by_vectors(project: Project, store: Store) -> StoredEncoder:
    """The old encoder of which only vectors are here: the one planned with before, if they are still those.

    Its manifest goes to the ledger. So planning again, after a rollback too, changes neither the id by which an
    application chooses its model nor the plan's fingerprint.
    """
    known = project.stored_encoder()
    if known is None or (known.agreement(store) or 0.0) < SAME:
        known = StoredEncoder.first_seen(store)
    project.ledger.save_encoder(known.id, known.to_json())
    return known


def _index_bytes(info: CollectionInfo, capabilities: Capabilities, strategy: str, dim: int) -> int:
    """What is needed beside the index at most: a new generation and what waits for it, or a second collection."""
    vector_bytes = info.count * info.dim * 4
    if not STRATEGIES[strategy].second_collection:
        if capabilities.visible == "at_once":  # the store replaces each vector where it lies
            return 0
        return 2 * (info.bytes_on_disk or vector_bytes) + vector_bytes
    return (info.bytes_on_disk or vector_bytes) * dim // info.dim


def lost_in_shadow(store: Store, dim: int) -> str | None:
    """What a second collection with vectors of `dim` could not take over, and the way out; None where it takes all."""
    try:
        store.check_create_like(dim=dim)
    except StoreRejected as problem:
        return str(problem)
    return None


def check_shadow(store: Store, dim: int) -> None:
    """Refuses a shadow with vectors of `dim` that would lose something of the collection."""
    lost = lost_in_shadow(store, dim)
    if lost is None:
        return
    info = store.describe()
    in_place = "" if dim == info.dim else f" (in_place needs an encoder with {info.dim}-d vectors)"
    raise PreconditionFailed(f"collection {info.name} cannot be copied whole into a shadow: {lost}{in_place}")


def describe_capabilities(can: Capabilities, *, lost: str | None = None) -> list[str]:
    """What this store, with its version, schema and index, can and cannot do, and what follows, as sentences.

    `lost` is what a shadow could not take over.
    """
    visible = {
        "at_once": "a written vector answers queries at once",
        "on_publish": "written vectors answer queries at the end of each backfill run",
        "at_cutover": "in place, the index is rebuilt at the cutover, and new vectors answer from then on",
    }[can.visible]
    return [
        visible,
        "stamps lie beside the vectors: an application's own writes are found by their missing stamp"
        if can.stamps
        else "the schema has no room for stamps: in place they are kept as digests in the artifacts folder, and every "
        "look for an application's own writes reads all vectors"
        if can_log_stamps(can)
        else "there is no room for stamps, without which an application's writes cannot be found in place",
        "a vector is replaced without touching the rest of its item"
        if can.partial_update
        else "in place, whole items are written anew: read right before and checked right after, so that deletions and "
        "payload changes made in between hold",
        "a rollback in place restores every vector bit for bit"
        if can.exact_vectors and not can.normalises
        else "a rollback in place restores every vector up to the store's own normalisation"
        if can.exact_vectors
        else "the index keeps approximations: in place, a rollback is exact only by the index file kept aside",
        "several backfill runs may write at once" if can.concurrent_writers else "one process at a time may write",
        "a shadow's cutover moves the alias in one step" if can.aliases else "there are no aliases: the route decides",
        *can.notes,
        *([] if lost is None else [f"a shadow is refused here: {lost}"]),
    ]


def describe_dim(*, stored: int, new: int, made_by: str) -> str:
    """How long the new vectors are beside the stored ones, and what makes them so. `made_by` is `projection`, `map`
    or, for an encoder that is there, `itself`."""
    what = {
        "projection": f"a projection behind its backbone makes {new} numbers",
        "map": f"a map behind it makes {new} numbers",
        "itself": f"gives {new} numbers",
    }[made_by]
    if new == stored:
        return f"{what}, as many as the stored vectors have"
    return f"{what}, the stored vectors have {stored}: old and new cannot be compared, and meet nowhere with a shadow"


def can_log_stamps(can: Capabilities) -> bool:
    """Whether a stamp log, which knows vectors by their bits, can stand in for stamps in the store."""
    return can.exact_vectors and not can.normalises


def recommend(can: Capabilities, *, same_dim: bool, lost: str | None = None) -> tuple[str, str]:
    """The strategy that suits a store, and why. `lost` is what a shadow could not take over."""
    if lost is not None and can.in_place_refusal is None:
        return "in_place", "a shadow would lose something of this collection"
    if not same_dim:
        return "shadow", "the new vectors have another length than the stored ones"
    if can.in_place_refusal is not None:
        return "shadow", "no vector of this collection can be replaced in place"
    if not can.update_in_place:
        return "shadow", "this index cannot be changed in place, so nothing is gained before a rebuild"
    if not can.exact_vectors:
        return "shadow", "this index keeps approximations, which an undo log cannot improve upon"
    if not (can.stamps or can_log_stamps(can)):
        return "shadow", "the store has no room for stamps, which in_place needs"
    if not can.partial_update:
        return "shadow", "whole items are written here, and what an application writes at that moment could be lost"
    return "in_place", "half the space, and every re-embedded item counts from the moment it is written"


def check_unmixed(project: Project, store: Store, old_encoder_id: str, new_encoder_id: str | None) -> None:
    """Refuses a collection that holds vectors of a migration which this ledger knows nothing of."""
    if not store.capabilities.stamps:
        return  # what an unknown migration left there cannot be told
    stamps = store.read(store.sample(SAMPLE, seed=SEED), vectors=False, payload=False).stamps
    foreign = {stamp for stamp in stamps if stamp not in (None, old_encoder_id)}
    if new_encoder_id is not None and new_encoder_id != old_encoder_id and store.count(stamp=new_encoder_id):
        foreign.add(new_encoder_id)
    if foreign:
        raise PreconditionFailed(
            f"{store.describe().name} holds vectors of {', '.join(sorted(map(str, foreign)))}, from a migration that "
            f"ledger {project.ledger} does not know: old queries must not meet them; restore that ledger and "
            "go on with it, or roll it back"
        )


def check_same_collection(project: Project, store: Store) -> None:
    """Refuses if the configuration has come to name another collection than the migration's."""
    migration, info = project.migration(), store.describe()
    name = info.name
    if name != migration.collection and (migration.shadow is None or info.collection_id != migration.shadow):
        raise PreconditionFailed(
            f"{project.name} migrates {migration.collection}, but the configuration now names {name}: undo the change"
        )


def bound_facts(project: Project, info: CollectionInfo, old_encoder_id: str) -> dict[str, Any]:
    """The facts that a plan stands on. The number of items is not among them: it changes by the minute."""
    document = project.config.redacted()
    settings = document["migrations"][project.name]
    return {
        "artifacts": document["artifacts"],
        "store": settings["store"],
        "images": {key: value for key, value in settings["images"].items() if key != "timeout"},
        "old_encoder": {**_of_model(settings["old_encoder"]), "id": old_encoder_id},
        "new_encoder": settings["new_encoder"],
        "rollout": {"strategy": settings["rollout"]["strategy"]},
        "backfill": {key: settings["backfill"][key] for key in ("chunk_size", "order")},
        "collection": {"name": info.name, "dim": info.dim, "metric": info.metric},
    }


def _of_model(old: dict[str, Any] | str) -> dict[str, Any]:
    return {"from": old} if isinstance(old, str) else old


def fingerprint_of(bound: Mapping[str, Any]) -> str:
    """A short name for a set of facts: equal facts, equal name."""
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()[:12]


def check_fresh(project: Project, store: Store) -> Plan:
    """The latest plan, if the facts under it are still what they were; else refused, saying what changed."""
    migration = project.migration()
    plan = project.ledger.latest_plan(migration.id)
    if plan is None or migration.old_encoder_id is None:
        raise PreconditionFailed(f"{project.name} has no plan yet: `migrator plan {project.name}`")
    changed = differences(plan.bound, bound_facts(project, store.describe(), migration.old_encoder_id))
    if changed:
        if migration.state == "planned":
            advice = f"plan again with `migrator plan {project.name}`"
        else:
            advice = f"undo the change, or `migrator rollback {project.name}` and plan again"
        raise PreconditionFailed(f"the plan {plan.fingerprint} is stale: {'; '.join(changed)}: {advice}")
    return plan


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """What changed between two sets of facts, as `old_encoder.image_size: 32 -> 64`."""
    found: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new, where = before.get(key), now.get(key), f"{at}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{where}.")
        elif old != new:
            found.append(f"{where}: {_show(old)} -> {_show(new)}")
    return found


def _show(value: Any) -> str:
    return "none" if value is None else str(value)


# -- measuring ----------------------------------------------------------------------------------------------------


def _check_collection(project: Project, info: CollectionInfo) -> None:
    old, new = project.settings.old_encoder, project.settings.new_encoder
    where = f"{project.config.path}: migrations.{project.name}"
    if info.count == 0:
        raise PreconditionFailed(f"collection {info.name} is empty: there is nothing to migrate")
    if not isinstance(old, str) and info.dim != old.dim:
        raise ConfigError(
            f"{where}.old_encoder.dim: collection {info.name} holds {info.dim}-d vectors but encoder {old.named} "
            f"gives {old.dim}: set old_encoder.dim to {info.dim}, with the weights that made them"
        )
    if info.dim != new.dim and not STRATEGIES[project.settings.rollout.strategy].second_collection:
        raise ConfigError(
            f"{where}.new_encoder.dim: collection {info.name} holds {info.dim}-d vectors but encoder {new.named} "
            f"gives {new.dim}: set new_encoder.dim to {info.dim} or rollout.strategy to shadow"
        )
    named = {threshold.test for threshold in project.settings.verify.gate.thresholds} - {None, "self"}
    if info.dim != new.dim and named:  # the configuration alone cannot know it where the old encoder is stored
        raise ConfigError(
            f"{where}.verify.gate.thresholds: the test {min(map(str, named))} compares {new.dim}-d queries with the "
            f"{info.dim}-d vectors of {info.name}: give test: self"
        )


@dataclass(frozen=True, slots=True)
class _New:
    encoder: Encoder
    untrained: bool


def _new_or_untrained(project: Project) -> _New:
    """The new encoder; before training one of random weights, which is as fast."""
    from migrator.trainer.encoders.building import untrained_encoder

    spec = project.new_spec()
    if spec is not None:
        return _New(project.load(spec), untrained=False)
    return _New(untrained_encoder(project.untrained_spec()), untrained=True)


def _dim_made_by(project: Project, new: _New) -> str:
    if not new.untrained:
        return "itself"
    train = project.settings.train
    return "map" if train is not None and train.method in POST_HOC else "projection"


@dataclass(frozen=True, slots=True)
class _Sample:
    compared: int
    median_cosine: float | None
    images_per_second: float
    risks: tuple[str, ...]


def _check_training_labels(project: Project, ids: Sequence[ItemId], payloads: Sequence[Payload]) -> None:
    """Refuses labels that no training could take, before anything is embedded."""
    train = project.settings.train
    if train is None or not isinstance(train.items, ItemsFrom) or train.items.label is None:
        return
    for item, payload in zip(ids, payloads, strict=True):
        training_label(project, train.items.label, item, payload)


def _measure_sample(
    project: Project, store: Store, old: Encoder | None, new: _New, report: Callable[..., None]
) -> _Sample:
    """Embeds sampled items with both encoders: is the old one the one that made them, how fast is the new one?

    Without an old model only the second can be told.
    """
    ids = store.sample(SAMPLE, seed=SEED)
    page = store.read(ids, vectors=True, payload=True)
    assert page.vectors is not None
    assert page.payloads is not None
    _check_training_labels(project, page.ids, page.payloads)
    images = project.images()
    paths = locate(images, zip(page.ids, page.payloads, strict=True))
    total = (1 if old is None else 2) * len(paths)
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        report(done, total, "images")

    def measured(encoder: Encoder) -> _Measured:
        began = time.monotonic()
        found = embed(images, paths, [encoder], report=step, **project.loading())
        if len(found.rows) == 0:
            raise PreconditionFailed(
                f"none of {len(paths)} sampled images could be read ({next(iter(found.problems.values()))}): "
                "check images.root and images.uri"
            )
        seconds = time.monotonic() - began
        return _Measured(found.rows, found.vectors[0], found.problems, len(found.rows) / seconds if seconds else 0.0)

    by_old = None if old is None else measured(old)
    seen = by_old or measured(new.encoder)
    stored = page.vectors[seen.rows]
    check_directions([page.ids[row] for row in seen.rows.tolist()], stored)
    info = store.describe()
    cosines: NDArray[np.float64] | None = None
    seen_risks: list[str] = []
    if old is not None:
        cosines, seen_risks = check_agreement(
            project.old_spec(),
            old,
            images,
            [str(paths[row]) for row in seen.rows.tolist()],
            stored,
            seen.vectors,
            exact=store.capabilities.exact_vectors,
            as_kept=as_kept_by(store),
            images_per_second=seen.images_per_second,
            threads=project.loading()["threads"],
            retry_for=project.loading()["retry_for"],
            report=report,
        )
    _check_lengths(info, stored, exact=store.capabilities.exact_vectors)
    by_new = seen if by_old is None else measured(new.encoder)
    return _Sample(
        0 if cosines is None else len(cosines),
        None if cosines is None else float(np.median(cosines)),
        by_new.images_per_second,
        (*_risks(page.ids, seen.problems, new), *seen_risks),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """The sample, embedded by one encoder."""

    rows: NDArray[np.int64]  # (n,) of the sample
    vectors: NDArray[np.float32]  # (n, dim), unit length
    problems: dict[int, str]
    images_per_second: float


def check_directions(ids: Sequence[ItemId], vectors: NDArray[np.float32]) -> None:
    """Refuses stored vectors (n, dim) that point nowhere."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise PreconditionFailed(
            f"item {ids[int(bad[0])]!r} holds a vector that is zero or not finite: remove or re-embed such items"
        )


def _check_lengths(info: CollectionInfo, vectors: NDArray[np.float32], *, exact: bool) -> None:
    """Refuses vectors (n, dim) that are not of unit length, where the metric looks at more than their direction."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    longest = norms.max() - 1
    # An approximation is a mean of what it stands for, and thereby shorter; it is hardly ever longer.
    if info.metric == "cosine" or (np.abs(norms - 1).max() <= 0.01 if exact else longest <= LONGER):
        return
    found = f"{norms.min():.3g} to {norms.max():.3g}"
    matter = {"ip": "a longer vector scores higher", "l2": "distances grow with the lengths"}[info.metric]
    raise PreconditionFailed(
        f"the stored vectors are not of unit length (sampled: {found}) and the metric is {info.metric}, with which "
        f"{matter}: new vectors, of length 1, cannot be ranked among them; normalise the vectors first, or move them "
        "to a collection with the metric cosine, which compares directions"
    )


def _risks(ids: Any, problems: Mapping[int, str], new: _New) -> tuple[str, ...]:
    risks = []
    if problems:
        row, why = next(iter(problems.items()))
        risks.append(
            f"{len(problems)} of {len(ids)} sampled images cannot be embedded, for instance item {ids[row]!r}: {why}. "
            "Such items keep their old vector and are listed by `migrator failures`"
        )
    if new.untrained:
        risks.append("the new encoder is not trained yet; its speed was measured with untrained weights")
    return tuple(risks)
