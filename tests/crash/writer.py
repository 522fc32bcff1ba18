"""An application that owns a collection and writes without pause, with its own journal of what must be there."""

from __future__ import annotations

import json
import random
import select
import sys
from pathlib import Path

import numpy as np

from tests.kinds import kind_of
from tests.world import World

PAUSE = {False: 0.02, True: 0.3}
"""Seconds between two writes; longer where one process at a time may open the store, or nobody else gets to it."""


def main(folder: str, journal: str) -> None:
    kind = kind_of(World(Path(folder)))
    vectors = dict(np.load(Path(folder) / "old.npz"))
    names, rng = sorted(vectors), random.Random(11)
    holds = {int(item): payload for item, payload in json.loads(Path(journal).read_text())["holds"].items()}
    following = 10_000

    def write(what: str) -> None:
        nonlocal following
        name, item = rng.choice(names), rng.choice(sorted(holds))
        if what == "insert":
            payload = {"path": name, "kind": "new"}
            kind.put([following + 1], vectors[name][None], [payload])
            following += 1
            holds[following] = payload
        elif what == "image":
            payload = {**holds[item], "path": name}
            kind.put([item], vectors[name][None], [payload])
            holds[item] = payload
        elif what == "payload":
            payload = {**holds[item], "kind": f"kind {rng.randrange(1000)}"}
            kind.set_payload(item, payload)
            holds[item] = payload
        else:
            kind.delete([item])
            del holds[item]

    with Path(journal).open("a") as file:
        while not select.select([sys.stdin], [], [], PAUSE[kind.exclusive])[0]:
            what = rng.choice(["insert", "image", "payload", "delete"])
            try:
                write(what)
            except Exception as error:
                if not kind.is_busy(error):
                    raise
                continue  # nothing was written; another try soon
            file.write(json.dumps({"what": what, "holds": holds}) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
