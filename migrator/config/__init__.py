"""`migrations.yaml`: read, checked and typed."""

from __future__ import annotations

from migrator.config.load import find_migration, load_config, read_store
from migrator.config.schema import (
    Config,
    Encoder,
    Gate,
    ItemsFrom,
    Migration,
    MinGain,
    NewEncoder,
    OldEncoder,
    Section,
    Store,
    Threshold,
    Train,
    Verify,
    json_schema,
)
from migrator.config.values import FLIPS, MAX_ANSWERS, METRICS, POST_HOC, Method

__all__ = [
    "FLIPS",
    "MAX_ANSWERS",
    "METRICS",
    "POST_HOC",
    "Config",
    "Encoder",
    "Gate",
    "ItemsFrom",
    "Method",
    "Migration",
    "MinGain",
    "NewEncoder",
    "OldEncoder",
    "Section",
    "Store",
    "Threshold",
    "Train",
    "Verify",
    "find_migration",
    "json_schema",
    "load_config",
    "read_store",
]
