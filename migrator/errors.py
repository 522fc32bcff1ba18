"""The root of every exception that migrator, its adapters and its trainer raise on purpose.

A message says what is wrong, where, and what to do next, in one line. `exit_code` is what the command line returns:
2 usage or configuration, 3 ran fine and the answer is no, 4 something could not be reached and trying again may help.
This module imports nothing, so that all three packages can use it.
"""

from __future__ import annotations


class MigratorError(Exception):
    """The base of everything migrator raises on purpose."""

    exit_code = 1


class ConfigError(MigratorError):
    """The configuration cannot be used; the message lists every problem found, a line each."""

    exit_code = 2


class UsageProblem(MigratorError):
    """The command cannot be run as it was given."""

    exit_code = 2


class PreconditionFailed(MigratorError):
    """A precondition is missing, a gate failed or a plan is stale; the message names the command that helps."""

    exit_code = 3


class InUse(PreconditionFailed):
    """Another process holds what the command needs, and releases it by itself."""


class TemporarilyUnavailable(MigratorError):
    """The ledger or an artifact could not be reached; the same command may work later."""

    exit_code = 4
