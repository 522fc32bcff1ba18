"""An encoder: a network with its preprocessing and its manifest; images in, vectors of unit length out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from migrator.trainer.encoders.manifest import Manifest
from migrator.trainer.encoders.networks import EmbeddingNet, MappedNet, hash_weights
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing
from migrator.trainer.images.preprocessing import fingerprint_image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from migrator.trainer.encoders.spec import EncoderSpec


_MIN_NORM = 1e-12


class Encoder:
    """A model with its preprocessing: pictures in, vectors of unit length out."""

    def __init__(
        self, model: EmbeddingNet | MappedNet, manifest: Manifest, device: torch.device, taken: str | None = None
    ) -> None:
        self.model = model
        self.manifest = manifest
        self.device = device
        self.taken = taken
        """Which part of its weights file it is, in a few words; None where it is all of it."""

    @property
    def id(self) -> str:
        """Hash of weights, architecture, preprocessing and fingerprint; what items are stamped with."""
        return self.manifest.id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.manifest.dim

    def with_preprocessing(self, preprocessing: Preprocessing) -> Encoder:
        """The same model behind another preprocessing: another encoder, with a manifest of its own."""
        fingerprint = fingerprint_of(self.model, preprocessing, self.device)
        manifest = Manifest.make(
            arch=self.manifest.arch,
            dim=self.manifest.dim,
            head=self.manifest.head,
            preprocessing=preprocessing,
            weights_sha256=self.manifest.weights_sha256,
            fingerprint=fingerprint,
            map=self.manifest.map,
        )
        return Encoder(self.model, manifest, self.device)

    def prepare(self, image: Image.Image) -> NDArray[Any]:
        """`Preprocessing.prepare` of this encoder: a decoded picture -> (3, H, W). Safe in many threads."""
        return self.manifest.preprocessing.prepare(image)

    def encode(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """(n, 3, H, W) from `prepare` -> (n, dim) float32 of unit length.

        A row's vector does not depend on the other rows, beyond the last bits of floating-point sums.
        Raises EncoderProblem for a batch of another shape or type, and where a vector is zero or not finite.
        """
        return _encode(self.model, self.manifest.preprocessing, self.device, batch)


def _encode(
    model: EmbeddingNet | MappedNet, preprocessing: Preprocessing, device: torch.device, batch: NDArray[Any]
) -> NDArray[np.float32]:
    height, width = preprocessing.size
    if batch.dtype != preprocessing.dtype or batch.shape[1:] != (3, height, width):
        raise EncoderProblem(
            f"batch is {batch.dtype} {batch.shape}, but the encoder takes {preprocessing.dtype.__name__} "
            f"(n, 3, {height}, {width})"
        )
    if not len(batch):
        return np.empty((0, model.dim), dtype=np.float32)
    deviation = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * preprocessing.levels
    mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * preprocessing.levels
    try:
        with torch.inference_mode():
            # torch.tensor copies: sharing a read-only array (a memory map) would draw a warning
            pixels = torch.tensor(np.ascontiguousarray(batch), device=device).contiguous(
                memory_format=torch.channels_last
            )
            embeddings = model((pixels.float() - mean) / deviation).float()
            if embeddings.shape != (len(batch), model.dim):
                raise EncoderProblem(
                    f"the encoder gives {tuple(embeddings.shape)} for {len(batch)} images, not {model.dim} numbers each"
                )
            norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
            vectors: NDArray[np.float32] = (embeddings / norms).cpu().numpy()
            usable = (torch.isfinite(norms) & (norms > _MIN_NORM)).squeeze(1).cpu().numpy()
    except torch.OutOfMemoryError as error:
        raise EncoderProblem(
            f"{len(batch)} images at once do not fit into the memory of {device}: lower batch_size"
        ) from error
    if not usable.all():
        rows = tuple(int(row) for row in np.flatnonzero(~usable))
        raise EncoderProblem(
            f"the encoder gives no usable vector (zero or not finite) for {len(rows)} of {len(batch)} images, "
            f"the first in row {rows[0]}",
            rows=rows,
        )
    return vectors


def fingerprint_of(
    model: EmbeddingNet | MappedNet, preprocessing: Preprocessing, device: torch.device
) -> NDArray[np.float32]:
    """The vector (dim,) of the fingerprint image. Raises EncoderProblem as `Encoder.encode` does."""
    image = preprocessing.prepare(fingerprint_image())
    vector: NDArray[np.float32] = _encode(model, preprocessing, device, image[np.newaxis])[0]
    return vector


def manifest_of(spec: EncoderSpec, model: EmbeddingNet | MappedNet, fingerprint: NDArray[np.float32]) -> Manifest:
    """The manifest of a network that `spec` declares, with its fingerprint (dim,)."""
    return Manifest.make(
        arch=spec.arch,
        dim=spec.dim,
        head=model.head,
        preprocessing=spec.preprocessing,
        weights_sha256=hash_weights(model),
        fingerprint=fingerprint,
        map=model.map.kind if isinstance(model, MappedNet) else None,
    )
