"""The manifest of an encoder: what it was when it was made, and the id that follows from it.

An encoder's id is a hash of its weights, architecture, preprocessing and fingerprint: the vector it gave for a fixed
image when its manifest was made. Floating-point results differ in their last bits between machines, so on loading the
vector is computed again and compared with the manifest's by their cosine, and the recorded one stays part of the id.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing
from migrator.trainer.maps import POST_HOC
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from pathlib import Path


Head = Literal["projection", "classifier", "none"]
"""What turns pooled features into the embedding: our projection and norm, the model's own classifier layer, nothing."""
FINGERPRINT_AGREEMENT = 0.9999
"""Minimum cosine between the recorded fingerprint and today's. Rounding, threads and batch size stay above 0.99999."""
_MANIFEST_FORMAT = 2
_FINGERPRINT_KEYS = {1: "probe", 2: "fingerprint"}
"""What the fingerprint is called in a manifest of each format."""


@dataclass(frozen=True)
class Manifest:
    """What an encoder was when its manifest was made; `encoder.json` beside its weights."""

    id: str
    arch: str
    dim: int
    head: Head
    preprocessing: Preprocessing
    weights_sha256: str
    """Of the state dict, of the bytes of a .pt2 or .onnx file, or of both where a map follows such a file."""
    fingerprint: tuple[float, ...]  # (dim,), unit length
    """Its vector for the fingerprint image, to 6 decimals."""
    map: str | None = None
    """Kind of the map that follows the network, from its vectors to another encoder's."""

    @classmethod
    def make(
        cls,
        *,
        arch: str,
        dim: int,
        head: Head,
        preprocessing: Preprocessing,
        weights_sha256: str,
        fingerprint: Any,
        map: str | None = None,  # noqa: A002 - as the field is called
    ) -> Manifest:
        """A manifest with the id that follows from its contents."""
        rounded = tuple(round(float(value), 6) + 0.0 for value in fingerprint)  # + 0.0: one zero, not two
        contents = {
            "arch": arch,
            "dim": dim,
            "head": head,
            "preprocessing": preprocessing.declared(),
            "weights_sha256": weights_sha256,
            "probe": rounded,  # as it was called in the first manifests: an id never changes
            "map": map,
        }
        digest = hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return cls(f"enc-{digest[:16]}", arch, dim, head, preprocessing, weights_sha256, rounded, map)

    def to_json(self) -> str:
        """One JSON document with `"format": 2`."""
        document = {"format": _MANIFEST_FORMAT, **asdict(self), "preprocessing": self.preprocessing.declared()}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote. Raises EncoderProblem for anything else, an edited manifest included."""
        try:
            document = json.loads(text)
            if document["format"] not in _FINGERPRINT_KEYS:
                raise EncoderProblem(
                    f"has format {document['format']!r}, but this version reads 1 to {_MANIFEST_FORMAT}"
                )
            manifest = cls.make(
                arch=str(document["arch"]),
                dim=int(document["dim"]),
                head=document["head"],
                preprocessing=Preprocessing(**document["preprocessing"]),
                weights_sha256=str(document["weights_sha256"]),
                fingerprint=document[_FINGERPRINT_KEYS[document["format"]]],
                map=document.get("map"),
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise EncoderProblem("is not an encoder manifest") from error
        usable = (
            manifest.head in get_args(Head)
            and manifest.map in (None, *POST_HOC)
            and len(manifest.fingerprint) == manifest.dim
            and math.isclose(math.hypot(*manifest.fingerprint), 1, rel_tol=1e-3)
        )
        if not usable or manifest.id != document.get("id"):
            raise EncoderProblem("was changed after it was written: its id does not follow from its contents")
        return manifest


def read_manifest(path: Path) -> Manifest | None:
    """The manifest beside the weights at `path`; None where there is none. Raises EncoderProblem for a damaged one."""
    place = manifest_path(path)
    if place == path:  # no weights file at all, which reading it reports
        return None
    try:
        return Manifest.from_json(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except EncoderProblem as problem:
        raise EncoderProblem(
            f"manifest {str(place)!r} {problem}: restore it, or move it away to make a new one"
        ) from problem
    except (OSError, UnicodeDecodeError) as error:
        raise EncoderProblem(f"manifest {str(place)!r} cannot be read: {one_line(error)}") from error


def manifest_path(weights: Path) -> Path:
    """Where the manifest of these weights lies: beside them."""
    return weights.with_suffix(".json")
