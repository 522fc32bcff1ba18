"""Whether the latest plan still holds: the facts that it was made from, and what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from migrator.adapters.base import CollectionInfo, Store
from migrator.errors import PreconditionFailed
from migrator.ledger import Plan
from migrator.project import Project

if TYPE_CHECKING:
    pass


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
            found.append(f"{where}: {_to_text(old)} -> {_to_text(new)}")
    return found


def _to_text(value: Any) -> str:
    return "none" if value is None else str(value)
