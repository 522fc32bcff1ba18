"""Imported by processes that fork others: all that commands load when they first need it, so that no child has to.

It leaves no thread of Python behind.
"""

# ruff: noqa: F401
import dataclasses
import encodings.cp437
import tempfile
from pathlib import Path

import accelerate
import alembic.command
import alembic.config
import faiss
import fsspec.implementations.local
import milvus_lite
import numpy as np
import numpy.testing
import PIL.Image
import pyarrow.dataset
import pyarrow.pandas_compat
import pyarrow.parquet
import pymilvus
import qdrant_client
import qdrant_edge
import rich._emoji_codes
import scipy.special
import sklearn.datasets
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite

import migrator.adapters.faiss
import migrator.adapters.milvus
import migrator.adapters.qdrant.edge
import migrator.adapters.qdrant.store
import migrator.backfill.run
import migrator.lifecycle.status
import migrator.rollout.rollback
import migrator.rollout.stages
import migrator.trainer.training.fit
from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.images.preprocessing import Preprocessing

PIL.Image.init()
# torch and timm load much at the first network of a kind; this is the one of `tests.world`.
spec = EncoderSpec("test_resnet", 24, Preprocessing(16))
with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder) / "weights.safetensors"
    save_encoder(build_model(spec), spec, weights)
    load_encoder(dataclasses.replace(spec, weights=weights)).encode(np.zeros((8, 3, 16, 16), np.uint8))
