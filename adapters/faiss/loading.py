"""Reads a FAISS collection: all its files, all that is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from migrator.adapters.base import StoreRejected
from migrator.adapters.faiss.folder import Folder, Generation
from migrator.adapters.faiss.index import Index
from migrator.adapters.faiss.items import Items, listed
from migrator.adapters.faiss.originals import Originals
from migrator.adapters.faiss.state import SAME_VECTORS, State

T = TypeVar("T")


def read_state(folder: Folder, generation: Generation) -> State:
    """The collection as its files give it. Raises `StoreRejected` with all that is wrong with them."""
    problems: list[str] = []
    items = _attempt(problems, folder.read_items)
    index = _attempt(problems, lambda: folder.read_index(folder.live(folder.index)))
    originals = _attempt(problems, folder.read_originals)
    if originals is not None:
        problems += _unlike(folder, originals, items, index)
    state = None
    if items is not None and index is not None:
        state = _attempt(problems, lambda: State(folder, items, index, originals, generation))
    if state is None or problems:
        raise StoreRejected(listed(problems))
    for file in folder.stamp_files():
        state.apply_stamps(folder.read_stamps(file))
    for file in folder.segment_files():
        state.apply_segment(folder.read_segment(file))
    for file in folder.change_files():
        state.apply_change(folder.read_change(file))
    if not state.originals_fit():
        raise StoreRejected(f"{originals} hold other vectors than {folder.index}, or in another order: {SAME_VECTORS}")
    return state


def check_there(folder: Folder) -> None:
    """Raises `StoreRejected` with all that is wrong where one of the user's files is not there."""
    problems = folder.missing()
    if problems:
        if folder.index.is_file():
            _attempt(problems, lambda: folder.read_index(folder.index))
        if folder.item_files():
            _attempt(problems, folder.read_items)
        _attempt(problems, folder.read_originals)
        raise StoreRejected(listed(problems))


def _attempt(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives; None, and a problem more, where it is refused."""
    try:
        return read()
    except StoreRejected as error:
        problems.append(str(error))
        return None


def _unlike(folder: Folder, originals: Originals, items: Items | None, index: Index | None) -> list[str]:
    """How files of vectors differ in number or length from what they should be the vectors of."""
    problems = []
    if items is not None and originals.count != len(items.ids):
        problems.append(f"{originals} hold {originals.count} vectors, but {folder.items} {len(items.ids)} items")
    elif index is not None and originals.count != index.count:
        problems.append(f"{originals} hold {originals.count} vectors, but {folder.index} {index.count}")
    if index is not None and originals.dim != index.dim:
        problems.append(f"{originals} hold {originals.dim}-d vectors, but {folder.index} {index.dim}-d ones")
    return [f"{problem}: {SAME_VECTORS}" for problem in problems]
