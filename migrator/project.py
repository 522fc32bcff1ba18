"""A migration's configuration, ledger and store, opened together; where each command begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.artifacts.copy_log import CopyLog
from migrator.artifacts.files import LogFiles
from migrator.artifacts.stamp_log import StampedStore, StampLog
from migrator.artifacts.undo_log import UndoLog
from migrator.config import POST_HOC, Config, Encoder, find_migration, load_config
from migrator.config import Migration as Settings
from migrator.embedding.stored_encoder import StoredEncoder, is_stored
from migrator.errors import ConfigError, PreconditionFailed
from migrator.ledger import Ledger, Migration
from migrator.lifecycle.strategy import STRATEGIES
from migrator.retry import RetryingStore
from migrator.training_runs import DEFAULT_RUN, encoder_of, folder_of, list_runs

if TYPE_CHECKING:
    from migrator.adapters.base import ItemId, Store
    from migrator.trainer.encoders.encoder import Encoder as LoadedEncoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.source import ImageSource


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
        """Releases the ledger."""
        self.ledger.close()

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the ledger knows ------------------------------------------------------------------------------------

    def migration(self) -> Migration:
        """The migration's row. Raises `PreconditionFailed` before the first plan."""
        found = self.ledger.migration(self.name)
        if found is None:
            raise PreconditionFailed(f"{self.name} has no plan yet: `migrator plan {self.name}`")
        return found

    def encoder_ids(self) -> tuple[str, str]:
        """Ids of the old and the new encoder. Raises `PreconditionFailed` while there is no new one."""
        migration = self.migration()
        if migration.old_encoder_id is None or migration.new_encoder_id is None:
            raise PreconditionFailed(f"{self.name} has no new encoder yet: `migrator train {self.name}`")
        return migration.old_encoder_id, migration.new_encoder_id

    def open_failures(self, migration: Migration) -> set[ItemId]:
        """The items whose failure waits for a decision; nothing touches them meanwhile."""
        return {json.loads(failure.item_id) for failure in self.ledger.failures(migration.id)}

    # -- folders ----------------------------------------------------------------------------------------------------

    def training_folder(self, run: str = DEFAULT_RUN) -> Path:
        """Where a training run keeps its checkpoints and leaves the encoder. Artifacts must be local for that."""
        artifacts = self.config.artifacts.removeprefix("file://")
        if not self._keeps_artifacts_here():
            raise ConfigError(
                f"{self.config.path}: training needs a local folder, artifacts is {artifacts}: train with a local "
                "one, then set new_encoder.weights to the encoder.safetensors it made"
            )
        return folder_of(Path(artifacts) / self.name / "training", run)

    def _keeps_artifacts_here(self) -> bool:
        return "://" not in self.config.artifacts.removeprefix("file://")

    def write_alias(self, migration: Migration) -> str:
        """The alias that the backfill of a migration in place writes through, unique also among ledgers."""
        route = self.ledger.route(migration.collection)
        assert route is not None, "prepare writes it"
        return f"migrator_backfill_{migration.id}_{route.salt}"

    def undo_log(self, migration: Migration) -> UndoLog:
        """The undo log of a migration."""
        return UndoLog(LogFiles(self.config.artifacts, self.name, "undo", migration.key))

    def copy_log(self, migration: Migration) -> CopyLog:
        """The copy log of a migration."""
        return CopyLog(LogFiles(self.config.artifacts, self.name, "copy", migration.key))

    def stamp_log(self, migration: Migration) -> StampLog:
        """The stamp log of a migration whose store keeps no stamps."""
        return StampLog(LogFiles(self.config.artifacts, self.name, "stamps", migration.key))

    @staticmethod
    def _needs_stamp_log(migration: Migration) -> bool:
        going_on = migration.state in ("active", "rolling_back")
        return not STRATEGIES[migration.strategy].second_collection and (
            going_on or (migration.state == "finished" and migration.old_kept)
        )

    # -- store, images, encoders ------------------------------------------------------------------------------------

    @contextmanager
    def store(self, *, write: bool = False) -> Iterator[Store]:
        """The collection that is migrated, closed at the end of the block.

        A store that cannot be opened is reported at once; one that goes away later is waited for
        (`backfill.retry_for`).
        """
        from migrator.adapters.registry import open_store

        store = open_store(self.settings.store.settings(), write=write)
        try:
            migration = self.ledger.migration(self.name)
            if (
                migration is not None
                and migration.state in ("active", "rolling_back")
                and migration.shadow is not None
                and store.describe().collection_id == migration.shadow
            ):
                # The cutover has moved the alias, and the collection that is migrated stays the one it was.
                shadow, store = store, store.open_collection(migration.source)
                shadow.close()
            store = RetryingStore(store, seconds=self.settings.backfill.retry_for)
            if migration is not None and self._needs_stamp_log(migration) and not store.capabilities.stamps:
                log = self.stamp_log(migration)
                if self.ledger.counts(migration.id).by_state.get("done"):
                    log.check()
                store = StampedStore(store, log)
            yield store
        finally:
            store.close()

    def loading(self) -> dict[str, Any]:
        """How `migrator.embedding.embed.embed` is to load images."""
        backfill = self.settings.backfill
        return {
            "batch_size": backfill.batch_size, "threads": backfill.image_threads, "retry_for": backfill.retry_for,
        }  # fmt: skip

    def images(self) -> ImageSource:
        """Where the images of the items are."""
        from migrator.trainer.images.source import ImageSource

        images = self.settings.images
        return ImageSource(images.root, images.uri, max_pixels=images.max_pixels, timeout=images.timeout)

    @property
    def old_is_stored(self) -> bool:
        """Whether there is no old model: the application may have one, migrator has only the vectors that it made."""
        return self.settings.old_encoder == "stored"

    def old_spec(self) -> EncoderSpec:
        """What the configuration says of the old encoder. Raises `PreconditionFailed` where it names no model."""
        old = self.settings.old_encoder
        if isinstance(old, str):
            raise PreconditionFailed(f"{self.name}: old_encoder is stored: there is no model that could embed an image")
        return self._spec(old, old.weights)

    def new_spec(self) -> EncoderSpec | None:
        """What the configuration says of the new encoder; None while it has to be trained first.

        A map that `train` has fitted makes the new encoder, even where the one below it has weights in the file.
        """
        new, train = self.settings.new_encoder, self.settings.train
        trained = self._trained()
        if trained is not None and (new.weights is None or self._is_mapped(trained)):
            return self._spec(new, trained)
        if train is not None and train.method in POST_HOC:
            return None
        if new.weights is None and (train is not None or new.module is None):
            return None
        return self._spec(new, new.weights)

    def trains(self, method: str | None = None) -> bool:
        """Whether there is an encoder to train, or a map behind one. `method` stands in for `train.method`."""
        train = self.settings.train
        if train is None:
            return False
        return self.settings.new_encoder.weights is None or (method or train.method) in POST_HOC

    def untrained_spec(self) -> EncoderSpec:
        """What the configuration says of the new encoder before training."""
        new = self.settings.new_encoder
        return self._spec(new, new.weights if new.program else None, pretrained=new.pretrained)

    def base_spec(self) -> EncoderSpec:
        """The finished encoder whose vectors a map leads to the old ones; they may have another length than `dim`."""
        new = self.settings.new_encoder
        return self._spec(new, new.weights, pretrained=new.pretrained)

    def _trained(self) -> Path | None:
        """The encoder that `train` has left, if it has: of several runs that of the candidate, else of the default run,
        else of the one that was finished last."""
        new = self.settings.new_encoder
        if self.settings.train is None or (new.weights is not None and not self._keeps_artifacts_here()):
            return None
        runs = [run for run in list_runs(self.training_folder()) if (run.folder / "encoder.safetensors").is_file()]
        if not runs:
            return None
        migration = self.ledger.migration(self.name)
        if migration is None or migration.state not in ("active", "rolling_back"):
            # Who declares another architecture wants to plan and train that one, beside the others.
            runs = [run for run in runs if self._why_other_than_declared(run.folder / "encoder.safetensors") is None]
        candidate = None if migration is None else migration.new_encoder_id
        weights = [run.folder / "encoder.safetensors" for run in runs if run.encoder == candidate]
        weights += [run.folder / "encoder.safetensors" for run in runs if run.run == DEFAULT_RUN]
        by_time = [run.folder / "encoder.safetensors" for run in runs]
        weights += sorted(by_time, key=lambda path: path.stat().st_mtime, reverse=True)
        return weights[0] if weights else None

    def choose_run(self, run: str) -> None:
        """Makes the encoder of a training run the candidate.

        Raises `PreconditionFailed` where it has none, or a migration is under way.
        """
        from migrator.trainer.encoders.manifest import read_manifest

        folder = self.training_folder(run)
        if self.settings.train is None or encoder_of(folder) is None:
            raise PreconditionFailed(
                f"run {run} of {self.name} has no encoder: `migrator runs {self.name}` lists the runs, "
                f"`migrator train {self.name} --run {run}` trains this one"
            )
        manifest = read_manifest(folder / "encoder.safetensors")
        migration = self.migration()
        assert manifest is not None
        if (why := self._why_other_than_declared(folder / "encoder.safetensors")) is not None:
            raise PreconditionFailed(
                f"run {run}: {why}: declare new_encoder as it was trained, then `migrator plan {self.name}` and again "
                f"`migrator verify {self.name} --run {run}`"
            )
        if manifest.id == migration.new_encoder_id:
            return
        if migration.state != "planned":
            raise PreconditionFailed(
                f"{self.name} is at stage {migration.stage} ({migration.state}) with encoder "
                f"{migration.new_encoder_id}: to take run {run} instead, first `migrator rollback {self.name}` and "
                f"`migrator plan {self.name}`"
            )
        self.ledger.save_encoder(manifest.id, manifest.to_json())
        self.ledger.set_new_encoder(migration.id, manifest.id)

    def _why_other_than_declared(self, weights: Path) -> str | None:
        """What differs between new_encoder and a trained encoder; None where it is as declared, or has no manifest."""
        from migrator.trainer.encoders.manifest import read_manifest
        from migrator.trainer.encoders.spec import require_same_declaration
        from migrator.trainer.errors import EncoderMismatch, EncoderProblem

        try:
            manifest = read_manifest(weights)
            if manifest is not None:
                require_same_declaration(self._spec(self.settings.new_encoder, weights), manifest)
        except EncoderMismatch as mismatch:
            return str(mismatch)
        except EncoderProblem:  # a damaged manifest: reported where the encoder is loaded
            return None
        return None

    @staticmethod
    def _is_mapped(weights: Path) -> bool:
        from migrator.trainer.encoders.manifest import read_manifest

        manifest = read_manifest(weights)
        return manifest is not None and manifest.map is not None

    def old_encoder(self) -> LoadedEncoder:
        """The old encoder, proved to be the one planned with.

        Raises `PreconditionFailed` where there is no model of it.
        """
        planned_with = self.migration().old_encoder_id
        spec = self.old_spec()
        if is_stored(planned_with):
            raise PreconditionFailed(f"{self.name} was planned with `old_encoder: stored`: undo the change")
        return self.load(spec, planned_with)

    def stored_encoder(self) -> StoredEncoder | None:
        """The old encoder as its vectors showed it when it was planned with; None where it was a model, or none."""
        migration = self.ledger.migration(self.name)
        old = None if migration is None else migration.old_encoder_id
        manifest = self.ledger.encoder_manifest(old) if old is not None and is_stored(old) else None
        return None if manifest is None else StoredEncoder.from_json(manifest)

    def check_old_encoder(self, store: Store) -> None:
        """Refuses if the old encoder is not the one planned with: its model, or the vectors that stand for it."""
        if not self.old_is_stored:
            self.old_encoder()
        elif (known := self.stored_encoder()) is not None:
            known.check(store, name=self.name)

    def new_encoder(self) -> LoadedEncoder:
        """The new encoder, proved to be the one trained or verified.

        Raises `PreconditionFailed` while there is none.
        """
        spec = self.new_spec()
        if spec is None:
            raise PreconditionFailed(f"{self.name} has no new encoder yet: `migrator train {self.name}`")
        return self.load(spec, self.migration().new_encoder_id)

    def load(self, spec: EncoderSpec, expected_id: str | None = None) -> LoadedEncoder:
        """Loads an encoder and keeps its manifest in the ledger. Raises `EncoderMismatch` if it is not the same."""
        encoder = self.load_only(spec, expected_id)
        self.ledger.save_encoder(encoder.id, encoder.manifest.to_json())
        return encoder

    def load_only(self, spec: EncoderSpec, expected_id: str | None = None, *, device: str = "auto") -> LoadedEncoder:
        """Loads an encoder as `load` does and writes nothing."""
        from migrator.trainer.encoders.loading import load_encoder
        from migrator.trainer.encoders.manifest import Manifest

        manifest = self.ledger.encoder_manifest(expected_id) if expected_id else None
        return load_encoder(spec, expected=Manifest.from_json(manifest) if manifest else None, device=device)

    def declared_encoder(self, which: str | None = None) -> tuple[EncoderSpec, str | None]:
        """What `old`, `new` or an encoder's id means here: its declaration, and its id where the ledger has one.

        None is the new encoder, or the old one while there is no new one. Raises `PreconditionFailed` where there is no
        such model.
        """
        migration = self.ledger.migration(self.name)
        ids = {} if migration is None else {"old": migration.old_encoder_id, "new": migration.new_encoder_id}
        if which is None:
            spec = self.new_spec()
            return (self.old_spec(), ids.get("old")) if spec is None else (spec, ids.get("new"))
        if which not in ("old", "new"):
            known = [f"{encoder} ({side})" for side, encoder in ids.items() if encoder is not None]
            side = next((side for side, encoder in ids.items() if encoder == which), None)
            if side is None:
                raise PreconditionFailed(
                    f"{self.name} has no encoder {which}: it has {', '.join(known) or 'none in the ledger yet'}; "
                    "name old, new or one of these"
                )
            which = side
        if which == "old":
            return self.old_spec(), ids.get("old")
        spec = self.new_spec()
        if spec is None:
            raise PreconditionFailed(f"{self.name} has no new encoder yet: `migrator train {self.name}`")
        return spec, ids.get("new")

    def _spec(self, encoder: Encoder, weights: Path | None, *, pretrained: bool = False) -> EncoderSpec:
        from migrator.trainer.encoders.spec import EncoderSpec
        from migrator.trainer.encoders.timm_models import timm_preprocessing
        from migrator.trainer.factories import MODULE
        from migrator.trainer.images.preprocessing import Preprocessing
        from migrator.trainer.images.transforms import learn_transform

        given = encoder.given_preprocessing()
        if encoder.preprocessing == "timm" and encoder.arch is not None:
            preprocessing = timm_preprocessing(encoder.arch, **given)
        elif encoder.transform is not None:
            preprocessing = learn_transform(encoder.transform, self.config.folder, **given)
        elif encoder.module is not None and encoder.image_size is None:
            preprocessing = learn_transform(MODULE + encoder.module, self.config.folder, **given)
        else:
            preprocessing = Preprocessing(**given)
        if encoder.arch is not None:
            arch = encoder.arch
        elif encoder.module is not None:
            arch = MODULE + encoder.module
        else:
            arch = f"file{encoder.program}".replace(".", ":")
        return EncoderSpec(
            arch,
            encoder.dim,
            preprocessing,
            weights=weights,
            pretrained=pretrained,
            folder=self.config.folder,
            head=encoder.head,
            checkpoint_key=encoder.checkpoint_key if weights == encoder.weights else None,
        )
