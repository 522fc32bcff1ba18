"""A migration's configuration, ledger and store, opened together; where each command begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.backfill.copies import CopyLog
from migrator.backfill.files import ChunkFiles, LogFiles
from migrator.backfill.stamps import StampLog, stamped_beside
from migrator.backfill.undo import UndoLog
from migrator.config import Config, Encoder, find_migration, load_config
from migrator.config import Migration as Settings
from migrator.errors import ConfigProblem, Refused
from migrator.ledger import Ledger, Migration
from migrator.retrying import patient

if TYPE_CHECKING:
    from adapters.base import ItemId, Store
    from trainer.encoder import Encoder as LoadedEncoder
    from trainer.encoder import EncoderSpec
    from trainer.images import ImageSource


class Project:
    """One migration of a configuration file. Opening it reads the file and the ledger, nothing else."""

    def __init__(self, config: Config, name: str, settings: Settings) -> None:
        self.config = config
        self.name = name
        self.settings = settings
        self.ledger = Ledger(config.ledger)

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> Project:
        """Opens the migration called `name`, or the only one of the file."""
        config = load_config(path)
        return cls(config, *find_migration(config, name))

    def close(self) -> None:
        """Lets go of the ledger."""
        self.ledger.close()

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the ledger knows ------------------------------------------------------------------------------------

    def migration(self) -> Migration:
        """The migration's row. Refused before the first plan."""
        found = self.ledger.migration(self.name)
        if found is None:
            raise Refused(f"{self.name} has no plan yet: `migrator plan {self.name}`")
        return found

    def encoder_ids(self) -> tuple[str, str]:
        """Ids of the old and the new encoder. Refused while there is no new one."""
        migration = self.migration()
        if migration.old_encoder_id is None or migration.new_encoder_id is None:
            raise Refused(f"{self.name} has no new encoder yet: `migrator train {self.name}`")
        return migration.old_encoder_id, migration.new_encoder_id

    def open_failures(self, migration: Migration) -> set[ItemId]:
        """The items whose failure waits for a decision; nothing touches them meanwhile."""
        return {json.loads(failure.item_id) for failure in self.ledger.failures(migration.id)}

    # -- folders ----------------------------------------------------------------------------------------------------

    def training_folder(self) -> Path:
        """Where training keeps its checkpoints and leaves the encoder. Artifacts must be local for that."""
        artifacts = self.config.artifacts.removeprefix("file://")
        if "://" in artifacts:
            raise ConfigProblem(
                f"{self.config.path}: training needs a local folder, artifacts is {artifacts}: train with a local "
                "one, then set new_encoder.weights to the encoder.safetensors it made"
            )
        return Path(artifacts) / self.name / "training"

    def undo_log(self, migration: Migration) -> UndoLog:
        """The undo log of a migration."""
        return UndoLog(ChunkFiles(self.config.artifacts, self.name, "undo", migration.key))

    def copy_log(self, migration: Migration) -> CopyLog:
        """The copy log of a migration."""
        return CopyLog(ChunkFiles(self.config.artifacts, self.name, "copy", migration.key))

    def stamp_log(self, migration: Migration) -> StampLog:
        """The stamp log of a migration whose store keeps no stamps."""
        return StampLog(LogFiles(self.config.artifacts, self.name, "stamps", migration.key))

    @staticmethod
    def _needs_stamp_log(migration: Migration) -> bool:
        going_on = migration.state in ("active", "rolling_back")
        return migration.strategy == "in_place" and (going_on or (migration.state == "finished" and migration.old_kept))

    # -- store, images, encoders ------------------------------------------------------------------------------------

    @contextmanager
    def store(self, *, write: bool = False) -> Iterator[Store]:
        """The collection that is migrated, closed at the end of the block.

        A store that cannot be opened is told at once; one that goes away later is waited for (`backfill.retry_for`).
        """
        from adapters.registry import open_store

        store = open_store(self.settings.store.settings(), write=write)
        try:
            migration = self.ledger.migration(self.name)
            if (
                migration is not None
                and migration.state in ("active", "rolling_back")
                and migration.shadow is not None
                and store.describe().local == migration.shadow
            ):
                # The cutover has moved the alias, and the collection that is migrated stays the one it was.
                shadow, store = store, store.sibling(migration.source)
                shadow.close()
            store = patient(store, seconds=self.settings.backfill.retry_for)
            if migration is not None and self._needs_stamp_log(migration) and not store.capabilities.stamps:
                log = self.stamp_log(migration)
                if self.ledger.counts(migration.id).by_state.get("done"):
                    log.check()
                store = stamped_beside(store, log)
            yield store
        finally:
            store.close()

    def loading(self) -> dict[str, Any]:
        """How `migrator.encoding.embed` is to load images."""
        backfill = self.settings.backfill
        return {
            "batch_size": backfill.batch_size, "threads": backfill.image_threads, "retry_for": backfill.retry_for,
        }  # fmt: skip

    def images(self) -> ImageSource:
        """Where the images of the items are."""
        from trainer.images import ImageSource

        images = self.settings.images
        return ImageSource(images.root, images.uri, max_pixels=images.max_pixels)

    def old_spec(self) -> EncoderSpec:
        """What the configuration says of the old encoder."""
        return _spec(self.settings.old_encoder, self.settings.old_encoder.weights)

    def new_spec(self) -> EncoderSpec:
        """What the configuration says of the new encoder; weights are None until they are given or trained."""
        new = self.settings.new_encoder
        weights = new.weights
        if weights is None:
            trained = self.training_folder() / "encoder.safetensors"
            weights = trained if trained.is_file() else None
        return _spec(new, weights)

    def untrained_spec(self) -> EncoderSpec:
        """What the configuration says of the new encoder before training."""
        new = self.settings.new_encoder
        return _spec(new, None, pretrained=new.pretrained)

    def old_encoder(self) -> LoadedEncoder:
        """The old encoder, proved to be the one planned with."""
        return self.load(self.old_spec(), self.migration().old_encoder_id)

    def new_encoder(self) -> LoadedEncoder:
        """The new encoder, proved to be the one trained or verified. Refused while there is none."""
        spec = self.new_spec()
        if spec.weights is None:
            raise Refused(f"{self.name} has no new encoder yet: `migrator train {self.name}`")
        return self.load(spec, self.migration().new_encoder_id)

    def load(self, spec: EncoderSpec, expected_id: str | None = None) -> LoadedEncoder:
        """Loads an encoder and keeps its card in the ledger. Raises `EncoderMismatch` if it is not the expected one."""
        from trainer.encoder import Card, load_encoder

        card = self.ledger.encoder_card(expected_id) if expected_id else None
        encoder = load_encoder(spec, expected=Card.from_json(card) if card else None)
        self.ledger.save_encoder(encoder.id, encoder.card.to_json())
        return encoder


def _spec(encoder: Encoder, weights: Path | None, *, pretrained: bool = False) -> EncoderSpec:
    from trainer.encoder import EncoderSpec, Preprocessing

    given: dict[str, Any] = encoder.model_dump(
        include={"image_size", "mean", "std", "resize", "interpolation"}, exclude_none=True
    )
    return EncoderSpec(
        arch=encoder.arch, dim=encoder.dim, preprocessing=Preprocessing(**given), weights=weights, pretrained=pretrained
    )
