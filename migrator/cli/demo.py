"""`migrator demo`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from migrator.cli.common import print_table, say, yes_option
from migrator.formatting import duration

SHOWN = ("map@100", "recall@1", "ndcg@10")


@click.command("demo")
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option(
    "--store", type=click.Choice(["faiss", "milvus", "qdrant"]), default="faiss", show_default=True,
    help="Where the gallery lies: embedded in each case, no server is needed.",
)  # fmt: skip
@click.option(
    "--stop-after",
    type=click.Choice(["prepare", "canary", "backfill", "cutover"]),
    help="Stop when this stage is open, to play on by hand.",
)
@yes_option
def command(folder: Path, store: str, stop_after: str | None, yes: bool) -> None:
    """Run a whole migration on scanned digits.

    Trains an old encoder and fills a gallery with it, then upgrades it with the commands a user has.
    Exit code 3 if the new encoder turns out not to be compatible.
    """
    from migrator import demo
    from migrator.cli import run

    began = time.monotonic()
    demo.make_folder(folder, replace=yes)
    say("Making the old system: images, an encoder trained on few of them, a gallery ...")
    demo.make_old_system(folder, store)
    demo.run_demo(folder, stop_after=stop_after, run=run, say=click.echo)
    if stop_after is not None:
        return
    say()
    rows = demo.results(folder)
    print_table(("quality", *SHOWN), [(what, *(f"{found[metric]:.4f}" for metric in SHOWN)) for what, found in rows])
    say("Checked:")
    for line in demo.check(folder):
        say(f"  - {line}")
    say(f"\nAll of it in {duration(time.monotonic() - began)}. Look around: cd {folder} && migrator status")
