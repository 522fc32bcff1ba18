"""What must hold of the collection itself, before a plan and before each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.adapters.base import Store, StoreRejected
from migrator.errors import PreconditionFailed
from migrator.project import Project

if TYPE_CHECKING:
    pass

SAMPLE = 128
"""Stored items whose image is embedded again, to know the old encoder and the speed of the new one."""
SEED = 0


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


def check_unmixed(project: Project, store: Store, old_encoder_id: str, new_encoder_id: str | None) -> None:
    """Refuses a collection that holds vectors of a migration which this ledger knows nothing of."""
    if not store.capabilities.stamps:
        return  # what an unknown migration left there cannot be told
    stamps = store.read_stamps(store.sample(SAMPLE, seed=SEED)).stamps
    foreign = {stamp for stamp in stamps if stamp not in (None, old_encoder_id)}
    if new_encoder_id is not None and new_encoder_id != old_encoder_id and store.count(stamp=new_encoder_id):
        foreign.add(new_encoder_id)
    if foreign:
        raise PreconditionFailed(
            f"{store.describe().name} holds vectors of {', '.join(sorted(map(str, foreign)))}, from a migration that "
            f"ledger {project.ledger} does not know: old queries must not meet them; restore that ledger and "
            "continue with it, or roll it back"
        )
