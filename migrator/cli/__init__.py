"""The command line: one file a verb, loaded when it is called. This module knows names and exit codes, nothing else."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from migrator import __version__
from migrator.cli.common import say
from migrator.errors import MigratorError

VERBS = {
    "init": "Write a commented migrations.yaml to begin with.",
    "config": "Check the configuration; print it or its JSON Schema.",
    "plan": "Check the collection and say what the upgrade costs.",
    "train": "Train the new encoder to be comparable with the old one.",
    "runs": "List the training runs side by side, with their validation and verification.",
    "verify": "Prove on sampled queries that search gets no worse.",
    "rollout": "Open the next stage: prepare, canary, backfill, cutover, finalize.",
    "backfill": "Re-embed stored images in one bounded run, as cron starts it.",
    "status": "Show where a migration stands and the next command.",
    "report": "Write one HTML page that says how the migration stands.",
    "pause": "Ask the backfill to stop at its next chunk.",
    "resume": "Lift a pause.",
    "failures": "List items that could not be re-embedded; --retry tries again.",
    "route": "Show which encoder and collection answer queries.",
    "rollback": "Restore every old vector and route queries back.",
    "embed": "Turn images into vectors, as the backfill does.",
    "export": "Write an encoder as a .pt2, .onnx or .safetensors file.",
    "schedule": "Print a crontab line or systemd units for the backfill.",
    "schema": "Print the JSON Schema of what a command prints with --json.",
    "demo": "Run a whole migration on scanned digits.",
}


class Verbs(click.Group):
    """Finds a verb's module by its name, so that `migrator status` loads no more than status needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, from `migrator.cli.<verb>`."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"migrator.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table above, without loading any verb."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="migrator")
@click.option("--verbose", is_flag=True, help="Show a traceback when something unexpected happens.")
def cli(verbose: bool) -> None:
    """Upgrade the embedding model behind an image-search vector database without downtime.

    \b
    Exit codes: 0 done, 1 a bug, 2 usage or configuration, 3 ran fine and the answer is no,
    4 something could not be reached: try again, 130 interrupted at a safe point.
    """


# A backfill shares its machine with the queries. OpenMP's threads spin while they wait for each other, unless told
# not to before torch is loaded; on two busy cores that made small models five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; what went wrong goes to stderr in one line."""
    try:
        result = cli.main(list(arguments), prog_name="migrator", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        click.echo(help_wanted.format_message(), err=True)
        return 2
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "migrator"
        message = " ".join(error.format_message().split())
        say(f"{command}: {message} (see `{command} --help`)", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        say("migrator: interrupted: run the same command again", err=True)
        return 130
    except Exception as error:
        if "--verbose" in arguments:
            traceback.print_exc()
        code = error.exit_code if isinstance(error, MigratorError) else 1
        if code == 1:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"migrator: this is a bug: {what} (`migrator --verbose ...` shows where)", err=True)
        else:
            say(f"migrator: {error}", err=True)
        return code
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
