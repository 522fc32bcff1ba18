"""Waiting for the application: a row of the route is out of use once no client can answer with it any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from migrator.ledger import SEARCH, RouteClientRow
from migrator.project import Project

Tell = Callable[[str], None]
"""Called with a line for whoever waits."""

EVERY = 0.5
"""Seconds between two reads of the clients that report."""
NAMED = 5
"""Clients that a message names."""


def wait_for_clients(project: Project, epoch: int, tell: Tell = lambda _: None) -> None:
    """Returns when no client can answer with a row of the route before `epoch`, nor be busy with a search by one.

    Clients without a name are waited for by the route's ttl, those with one until they report this epoch. By the
    database's clock; safe to repeat after a kill.
    """
    collection = project.migration().collection
    message: str | None = None
    while (seconds := project.ledger.seconds_to_settle(collection)) > 0:
        if message is None:
            message = f"waiting {seconds:.0f} s for clients that may still answer with an earlier row of the route"
            tell(message)
        time.sleep(seconds)
    longest = 0.0
    while behind := project.ledger.clients_behind(collection, epoch):
        longest = max(longest, *(client.ttl for client in behind))
        if (now := _still_answer(behind)) != message:
            message = now
            tell(now)
        time.sleep(EVERY)
    if longest:
        time.sleep(min(longest, SEARCH))


def _still_answer(behind: Sequence[RouteClientRow]) -> str:
    epochs = sorted({client.epoch for client in behind})
    names = ", ".join(client.name for client in behind[:NAMED]) + (" and more" if len(behind) > NAMED else "")
    one = len(behind) == 1
    return (
        f"{len(behind)} client{'' if one else 's'} still answer{'s' if one else ''} with epoch "
        f"{', '.join(map(str, epochs))} ({names}): waiting for {'its' if one else 'their'} next report"
    )
