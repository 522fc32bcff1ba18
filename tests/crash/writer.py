"""An application that owns a FAISS folder and writes without pause, with its own journal of what must be there."""

from __future__ import annotations

import json
import random
import select
import sys
from pathlib import Path

import numpy as np

from tests.kinds import FaissFolder
from tests.world import World


def main(folder: str, journal: str) -> None:
    kind = FaissFolder(World(Path(folder)))
    vectors = dict(np.load(Path(folder) / "old.npz"))
    names, rng = sorted(vectors), random.Random(11)
    holds = {item: payload for item, (_, payload) in kind.content().items()}
    following = 10_000
    with Path(journal).open("w") as file:
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            what = rng.choice(["insert", "image", "payload", "delete"])
            content = kind.content()
            if what == "insert":
                following += 1
                name = rng.choice(names)
                content[following] = (vectors[name], {"path": name, "kind": "new"})
            else:
                item = rng.choice(sorted(content))
                vector, payload = content[item]
                if what == "image":
                    name = rng.choice(names)
                    content[item] = (vectors[name], {**payload, "path": name})
                elif what == "payload":
                    content[item] = (vector, {**payload, "kind": f"kind {rng.randrange(1000)}"})
                else:
                    del content[item]
            kind.replace_content(content)
            holds = {item: payload for item, (_, payload) in content.items()}
            file.write(json.dumps({"what": what, "holds": holds}) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
