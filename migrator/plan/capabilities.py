"""What a store can do, as sentences, and the strategy that follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.adapters.base import Capabilities

if TYPE_CHECKING:
    pass


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
        else "in place, whole items are rewritten: read just before and checked just after, so that deletions and "
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
