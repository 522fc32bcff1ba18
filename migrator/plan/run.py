"""What an upgrade would cost and what stands in its way: measured, saved, and bound to the facts it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from migrator.adapters.base import Capabilities, CollectionInfo, Store
from migrator.config import OldEncoder
from migrator.documents import PlanContent
from migrator.embedding.stored_encoder import SAME, StoredEncoder
from migrator.errors import ConfigError, PreconditionFailed
from migrator.ledger import now
from migrator.lifecycle.collection import check_shadow, check_unmixed, lost_in_shadow
from migrator.lifecycle.freshness import bound_facts, fingerprint_of
from migrator.lifecycle.strategy import STRATEGIES
from migrator.plan.capabilities import can_log_stamps, describe_capabilities, describe_dim, recommend
from migrator.plan.forecast import expected_quality, forecast, loss_risks
from migrator.plan.sample import dim_made_by, measure_sample, new_or_untrained
from migrator.project import Project

if TYPE_CHECKING:
    pass

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
    content: PlanContent


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
        new = new_or_untrained(project)
        check_unmixed(project, store, old_id, None if new.untrained else new.encoder.id)
        sample = measure_sample(project, store, old, new, report)
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
            "vectors": describe_dim(stored=info.dim, new=new.encoder.dim, made_by=dim_made_by(project, new)),
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
    plan = PlanContent.model_validate(content)
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
        content=plan.to_json(),
    )
    return Planned(fingerprint, plan)


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
