"""`migrator embed`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from migrator.cli.common import config_option, open_project, progress, say
from migrator.errors import UsageProblem


@click.command("embed")
@click.argument("images", nargs=-1)
@click.option("--migration", "name", help="The migration, where the file holds several.")
@config_option
@click.option("--encoder", help="old, new, or an encoder's id. Default: the new one, if there is one.")
@click.option(
    "--output", default="-", show_default=True, help="A .npy or .parquet file, or - for lines of JSON on stdout."
)
def command(images: tuple[str, ...], name: str | None, config_path: Path, encoder: str | None, output: str) -> int:
    """Turn images into vectors, as the backfill does.

    IMAGES are files and folders; without any, a list of them on stdin, one a line. Vectors have unit length. Images
    that cannot be read are named on stderr, and the exit code is 3.
    """
    from migrator.embedding.vector_files import check_output, embed_files, find_images, open_sink

    check_output(output)
    if not images and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageProblem("no images are given: name files or folders, or pipe a list of them")
    paths = find_images(images, () if images else sys.stdin)
    if not paths:
        raise UsageProblem("no images are given: name files or folders, or pipe a list of them")
    with open_project(config_path, name) as project:
        loaded = project.load_only(*project.declared_encoder(encoder))
        loading, max_pixels = project.loading(), project.settings.images.max_pixels
    try:
        with progress("embed") as advance:
            sink = open_sink(output, loaded, sys.stdout)
            problems = embed_files(paths, loaded, sink, advance, max_pixels=max_pixels, **loading)
    except BrokenPipeError:  # who reads the lines has enough of them
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains when it flushes at its end
        return 0
    except OSError as error:
        raise UsageProblem(f"--output {output} cannot be written: {error.strerror or error}") from error
    for why in problems.values():
        say(f"embed: {why}", err=True)
    embedded = len(paths) - len(problems)
    where = "" if output == "-" or not embedded else f" in {output}"
    say(f"{embedded} of {len(paths)} images embedded by {loaded.id}{where}", err=True)
    return 3 if problems else 0
