"""Does this encoder make these vectors? Where it does not: which other declaration of it does?

A loader that the application wrote reads, turns, flattens and resizes pictures in its own way. So where stored and
recomputed vectors differ, other values of the keys that declare this are tried on a few of the sampled images: one
change at a time, then further changes on top of the best one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from migrator.errors import PreconditionFailed
from migrator.retry import with_retries
from migrator.trainer.errors import ImageProblem, TrainerError

if TYPE_CHECKING:
    from migrator.adapters.base import Store
    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.source import ImageSource

SAME_ENCODER = 0.99
"""Cosine between a stored and a recomputed vector from which on one encoder counts as having made both. Other machines,
image libraries and lossy indexes cost a little; another model costs nearly everything."""
EXACT = 0.999
"""Median cosine below which a small difference in preprocessing is more likely than rounding."""
MAX_IMAGES, MIN_IMAGES = 32, 8
BATCH = 8
"""Images that are prepared in all ways at a time: bounds the memory."""
MAX_CHANGES = 3
SEARCH_SECONDS = 120.0
"""What the search may take, at the measured speed; images are saved first."""
GAIN = 0.001
"""The least gain in mean cosine for which a further change counts."""
NEAR = 0.9
"""Median cosine from which on a loader counts as nearly found."""
KEPT_BYTES = 8 * 2**20
"""Larger image files are read again for each round."""
SHOWN = 6
"""Rows of the printed table."""

_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

Keys = Mapping[str, Any]
"""Keys of an encoder's section in migrations.yaml, with their values."""

NORMALISATIONS: Mapping[str, Keys] = {
    "of ImageNet": _IMAGENET,
    "of CLIP": _CLIP,
    "0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "0 and 1": {"mean": (0.0,) * 3, "std": (1.0,) * 3},
    "for 0 to 255": {"mean": (0.0,) * 3, "std": (1 / 255,) * 3},
}
"""Usual mean and std, with what they are called in a table."""

PIXELS: tuple[Keys, ...] = (
    *({"exif": value} for value in ("apply", "ignore")),
    *({"alpha": value} for value in ("white", "black", "drop")),
    *({"convert": value} for value in ("scaled", "pil")),
    *({"resize": value} for value in ("squash", "crop", "letterbox", "border")),
    *({"interpolation": value} for value in ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")),
    *({"antialias": value} for value in (True, False)),
    *({"crop_pct": value} for value in (0.875, 0.9, 0.95, 1.0)),
    *({"fill": value} for value in ("black", "white", "#808080", "#727272")),
    *({"resize": "letterbox", "fill": value} for value in ("white", "#808080", "#727272")),
    *({"channels": value} for value in ("rgb", "bgr")),
    *NORMALISATIONS.values(),
    # What common loaders do all at once:
    {"resize": "crop", "interpolation": "bilinear", "crop_pct": 0.875, **_IMAGENET},
    {"resize": "crop", "interpolation": "bicubic", "crop_pct": 1.0, **_CLIP},
)
"""Other ways from a file to the numbers that the model is fed. Each is tried where its keys exist."""
MODELS: tuple[Keys, ...] = (
    *({"head": value} for value in ("classifier", "none")),
    *({"image_size": value} for value in (224, 256, 288, 384)),
)
"""Other models from the same file, which have to be loaded."""


Report = Callable[..., None]
"""Called with how far the search is, how far it goes, and what is being done."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A declaration of the old encoder, and the cosines between its vectors and the stored ones."""

    keys: Keys
    """What differs from what was declared; empty for that itself."""
    cosines: NDArray[np.float64]  # (n,)

    @property
    def median(self) -> float:
        """Of the cosines."""
        return float(np.median(self.cosines))

    @property
    def agreeing(self) -> int:
        """Images whose vectors are the same."""
        return int((self.cosines >= SAME_ENCODER).sum())

    @property
    def label(self) -> str:
        """The keys and values in one line, usual numbers by their name."""
        named = dict(self.keys)
        for name, keys in NORMALISATIONS.items():
            if keys.items() <= named.items():
                named = {key: value for key, value in named.items() if key not in keys} | {"mean and std": name}
        return ", ".join(f"{key}: {_written(value)}" for key, value in named.items()) or "as declared"

    def to_json(self) -> dict[str, Any]:
        """As `migrator plan --json` prints it."""
        return {
            "keys": {key: list(value) if isinstance(value, tuple) else value for key, value in self.keys.items()},
            "median_cosine": round(self.median, 4),
            "agreeing": self.agreeing,
            "images": len(self.cosines),
        }


@dataclass(frozen=True, slots=True)
class Search:
    """What was tried, best first."""

    declared: Tried
    tried: Sequence[Tried]
    best: Tried
    variant: _Variant
    """What made the best."""


class Disagreement(PreconditionFailed):
    """The old encoder as declared did not make the stored vectors, or not all of them."""

    def __init__(self, message: str, declared: Tried, search: Search | None, best: Tried | None = None) -> None:
        super().__init__(message)
        self.declared, self.search, self.best = declared, search, best

    def to_json(self) -> dict[str, Any]:
        """As `migrator plan --json` prints it."""
        tried = [] if self.search is None else self.search.tried
        best = None if self.best is None else self.best.to_json()
        return {"declared": self.declared.to_json(), "best": best, "tried": [each.to_json() for each in tried[:SHOWN]]}


AsKept = Callable[[NDArray[np.float32]], NDArray[np.float32] | None]
"""(n, d) -> (n, d): what a store that keeps approximations makes of vectors; None where it cannot tell."""


def as_kept_by(store: Store) -> AsKept | None:
    """What `store` makes of the vectors that are written to it; None where it keeps them, or cannot tell."""
    return None if store.capabilities.exact_vectors else store.approximations


def cosines(
    stored: NDArray[np.float32], made: NDArray[np.float32], as_kept: AsKept | None = None
) -> NDArray[np.float64]:
    """Row by row: stored vectors (n, d) of any length, and made ones (n, d) of unit length -> (n,).

    Approximations are compared with the approximation of what was made, too, and the better of the two counts: the
    coarsest index gives the same code to the same vector.
    """
    lengths = np.maximum(np.linalg.norm(stored.astype(np.float64), axis=1), np.finfo(np.float64).tiny)
    found: NDArray[np.float64] = np.einsum("nd,nd->n", stored.astype(np.float64), made.astype(np.float64)) / lengths
    if as_kept is None or len(made) == 0:
        return found
    approximations = as_kept(made)
    if approximations is None:
        return found
    kept = approximations.astype(np.float64)
    kept /= np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    of_kept: NDArray[np.float64] = np.einsum("nd,nd->n", stored.astype(np.float64), kept) / lengths
    return np.maximum(found, of_kept)


def check_agreement(
    spec: EncoderSpec,
    encoder: Encoder,
    images: ImageSource,
    paths: Sequence[str],
    stored: NDArray[np.float32],
    made: NDArray[np.float32],
    *,
    exact: bool,
    as_kept: AsKept | None = None,
    images_per_second: float,
    threads: int,
    retry_for: float,
    report: Report = lambda *_: None,
) -> tuple[NDArray[np.float64], list[str]]:
    """Cosines (n,) between the vectors that lie in the store for the images at `paths` (n,) and those that `encoder`
    made of them, and the risks that they show, as sentences.

    `stored` (n, dim) may have any length, `made` (n, dim) is of unit length; `exact` tells that the store gives vectors
    back as they were written, `as_kept` what it makes of vectors where it does not. Raises `Disagreement` where the
    encoder, declared as `spec`, did not make the stored vectors, or another declaration explains those that it did not
    make. Raises `ImagesUnavailable`.
    """
    declared = Tried({}, cosines(stored, made, as_kept))
    if declared.agreeing == len(paths) and (declared.median >= EXACT or not exact):
        return declared.cosines, []
    rows = _choose(declared.cosines, images_per_second=images_per_second)
    with ThreadPoolExecutor(threads, "image") as pool:
        trial = _Trial(images, paths, stored, as_kept, pool, retry_for, report)
        found, best = _search(trial, _Variant(spec, encoder), rows)
    manifest = _manifest_of(spec)
    explains = best is not None and best.agreeing > declared.agreeing
    if declared.median < SAME_ENCODER or explains:
        good = best is not None and best.median >= SAME_ENCODER
        raise refusal(declared, found, best if good else None, manifest=manifest)
    risks = []
    if declared.agreeing < len(paths):
        risks.append(_odd_items(declared, found))
    if best is not None and best.median >= EXACT > declared.median:
        risks.append(hint(declared, best, manifest=manifest))
    return declared.cosines, risks


def _manifest_of(spec: EncoderSpec) -> str | None:
    """Name of the file beside the weights that records how the encoder was declared."""
    from migrator.trainer.encoders.manifest import read_manifest

    known = spec.weights is not None and read_manifest(spec.weights) is not None
    return spec.weights.with_suffix(".json").name if spec.weights is not None and known else None


def _choose(found: NDArray[np.float64], *, images_per_second: float) -> NDArray[np.int64]:
    """The rows that the search is made on, of rows with these cosines (n,): of both kinds, where there are both."""
    candidates = len(PIXELS) + len(MODELS) + 1
    affordable = int(SEARCH_SECONDS * images_per_second / (MAX_CHANGES * candidates))
    size = max(MIN_IMAGES, min(MAX_IMAGES, affordable))
    odd, even = np.flatnonzero(found < SAME_ENCODER), np.flatnonzero(found >= SAME_ENCODER)
    of_odd = min(len(odd), max(size // 2, size - len(even)))
    return np.sort(np.concatenate([odd[:of_odd], even[: size - of_odd]]))


def _search(trial: _Trial, declared: _Variant, rows: NDArray[np.int64]) -> tuple[Search | None, Tried | None]:
    """What the search on `rows` found, and its best on all images; None where images can no longer be read."""
    try:
        found = _greedy(trial.part(rows), declared)
        if not found.best.keys:
            return found, None
        (best,) = trial.measure([found.variant])
    except ImageProblem:
        return None, None
    return found, best


def _greedy(trial: _Trial, declared: _Variant) -> Search:
    (start,) = trial.measure([declared])
    best, best_variant = start, declared
    every: dict[str, Tried] = {}
    for _ in range(MAX_CHANGES):
        variants = list(_alternatives(best_variant))
        measured = trial.measure(variants)
        found = [(tried, variant) for tried, variant in zip(measured, variants, strict=True) if len(tried.cosines)]
        every |= {tried.label: tried for tried, _ in found}
        if not found:
            break
        top, variant = max(found, key=lambda pair: (round(float(pair[0].cosines.mean()), 4), -len(pair[0].keys)))
        if top.cosines.mean() < best.cosines.mean() + GAIN:
            break
        best, best_variant = top, variant
        if best.cosines.min() >= EXACT:
            break
    best, best_variant = _refined(trial, declared, best, best_variant)
    best, best_variant = _shortest(trial, declared, best, best_variant)
    every[best.label] = best
    ranked = sorted(every.values(), key=lambda tried: (-round(float(tried.cosines.mean()), 4), len(tried.keys)))
    # A key that changes nothing here is no row of its own.
    different = {_mean(tried): tried for tried in reversed(ranked) if _mean(tried) != _mean(start)}
    return Search(start, list(different.values())[::-1], best, best_variant)


def _mean(tried: Tried) -> float:
    return round(float(tried.cosines.mean()), 6)


def _refined(trial: _Trial, declared: _Variant, best: Tried, variant: _Variant) -> tuple[Tried, _Variant]:
    """`best` with other values of the keys that it changes: one was chosen while the others were still wrong."""
    for change in (*PIXELS, *MODELS):
        if not change.keys() <= best.keys.keys() or len(change.keys() - {"mean", "std"}) > 1:
            continue
        other = _changed(declared, {**best.keys, **change})
        if other is None or other.spec == variant.spec:
            continue
        (tried,) = trial.measure([other])
        if len(tried.cosines) and tried.cosines.mean() > best.cosines.mean() + GAIN / 100:
            best, variant = tried, other
    return best, variant


def _shortest(trial: _Trial, declared: _Variant, best: Tried, variant: _Variant) -> tuple[Tried, _Variant]:
    """`best` without the keys that change nothing here: a common loader's set names more than one."""
    for group in [["mean", "std"], *([key] for key in best.keys if key not in ("mean", "std"))]:
        fewer = {name: value for name, value in best.keys.items() if name not in group}
        if len(fewer) == len(best.keys):
            continue
        shorter = _changed(declared, fewer)
        if shorter is None:
            continue
        (tried,) = trial.measure([shorter])
        if len(tried.cosines) and tried.cosines.mean() >= best.cosines.mean() - GAIN / 100:
            best, variant = tried, shorter
    return best, variant


# -- variants -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Variant:
    """An encoder that is declared otherwise."""

    spec: EncoderSpec
    encoder: Encoder
    keys: Keys = field(default_factory=dict)


def _alternatives(base: _Variant) -> Iterator[_Variant]:
    """Everything that differs from `base` in keys that are not changed yet."""
    seen = [base.spec]
    for change in (*PIXELS, *MODELS, *_other_weights(base)):
        if change.keys() & base.keys.keys():
            continue
        variant = _changed(base, change)
        if variant is not None and variant.spec not in seen:
            seen.append(variant.spec)
            yield variant


def _other_weights(base: _Variant) -> list[Keys]:
    """Other weights in the same file, where it has some: without a key only one of them fits."""
    from migrator.trainer.encoders.loading import checkpoint_keys

    if base.spec.checkpoint_key is None:
        return []
    return [{"checkpoint_key": key} for key in checkpoint_keys(base.spec)]


def _changed(base: _Variant, change: Keys) -> _Variant | None:
    """`base` with these keys; None where they do not exist, change nothing, or make no encoder."""
    from migrator.trainer.encoders.loading import load_encoder

    known = {each.name for each in fields(base.spec.preprocessing)}
    own = {each.name for each in fields(base.spec)}
    if not change.keys() <= known | own:
        return None
    of_pixels = {key: value for key, value in change.items() if key in known}
    of_model = {key: value for key, value in change.items() if key in own}
    new = {key: value for key, value in change.items() if _value(base, key) != value}
    if not new:
        return None
    try:
        spec = replace(base.spec, preprocessing=replace(base.spec.preprocessing, **of_pixels), **of_model)
        if of_model or spec.preprocessing.image_size != base.spec.preprocessing.image_size:
            encoder = load_encoder(spec)
        else:
            encoder = base.encoder.with_preprocessing(spec.preprocessing)
    except TrainerError:
        return None
    return _Variant(spec, encoder, {**base.keys, **new})


def _value(base: _Variant, key: str) -> Any:
    """What a key stands at, declared or not."""
    if key == "head":
        return base.encoder.manifest.head
    return getattr(base.spec, key, getattr(base.spec.preprocessing, key, None))


# -- measuring ----------------------------------------------------------------------------------------------------


class _Trial:
    """The images of a search, read once, and the vectors that they are to give."""

    def __init__(
        self,
        images: ImageSource,
        paths: Sequence[str],
        stored: NDArray[np.float32],
        as_kept: AsKept | None,
        pool: ThreadPoolExecutor,
        retry_for: float,
        report: Report,
    ) -> None:
        self._images, self._paths, self._stored, self._as_kept = images, paths, stored, as_kept
        self._pool, self._retry_for, self._report = pool, retry_for, report
        self._files: dict[str, bytes] = {}

    def part(self, rows: NDArray[np.int64]) -> _Trial:
        """The same with fewer images."""
        paths = [self._paths[row] for row in rows.tolist()]
        stored = self._stored[rows]
        return _Trial(self._images, paths, stored, self._as_kept, self._pool, self._retry_for, self._report)

    def measure(self, variants: Sequence[_Variant]) -> list[Tried]:
        """The cosines of each variant; none where it cannot take these images."""
        found: list[list[NDArray[np.float64]] | None] = [[] for _ in variants]
        total = len(variants) * len(self._paths)
        done = 0
        for start in range(0, len(self._paths), BATCH):
            paths = self._paths[start : start + BATCH]
            stored = self._stored[start : start + BATCH]
            prepared = list(self._pool.map(lambda path: self._prepared(path, variants), paths))
            made: dict[Any, NDArray[np.float64]] = {}  # most changes leave most pictures as they are
            for number, variant in enumerate(variants):
                of_one = found[number]
                pixels = [each[number] for each in prepared]
                if of_one is None or any(each is None for each in pixels):
                    found[number] = None
                    continue
                batch = np.stack([each for each in pixels if each is not None])
                preprocessing = variant.spec.preprocessing
                same = (id(variant.encoder.model), preprocessing.mean, preprocessing.std, batch.shape, batch.tobytes())
                try:
                    if same not in made:
                        made[same] = cosines(stored, variant.encoder.encode(batch), self._as_kept)
                    of_one.append(made[same])
                except TrainerError:
                    found[number] = None
                done += len(paths)
                self._report(done, total, "other declarations of the old encoder")
        return [
            Tried(variant.keys, np.concatenate(of_one) if of_one else np.empty(0))
            for variant, of_one in zip(variants, found, strict=True)
        ]

    def _prepared(self, path: str, variants: Sequence[_Variant]) -> list[NDArray[Any] | None]:
        """The input of each variant's model, made from one decoded picture."""
        picture = self._images.decode(self._file(path), path)
        found: list[NDArray[Any] | None] = []
        for variant in variants:
            try:
                found.append(variant.encoder.prepare(picture))
            except TrainerError:
                found.append(None)
        return found

    def _file(self, path: str) -> bytes:
        """An image file; those of usual size are kept."""
        if path in self._files:
            return self._files[path]
        data = with_retries(lambda: self._images.read(path), seconds=self._retry_for)
        if len(data) <= KEPT_BYTES:
            self._files[path] = data
        return data


# -- what is said -------------------------------------------------------------------------------------------------


def refusal(declared: Tried, found: Search | None, best: Tried | None, *, manifest: str | None) -> Disagreement:
    """What `plan` says where the old encoder as declared is not the one that made the vectors, or not all of them.

    `declared` and `best` are of the whole sample, `found` of a part. `manifest` is the file beside the weights, if
    there is one, that records another declaration.
    """
    count = len(declared.cosines)
    if declared.median < SAME_ENCODER:
        what = (
            f"the stored vectors were not made by this encoder: median cosine {declared.median:.2f} over {count} items"
        )
    else:
        what = (
            f"{count - declared.agreeing} of {count} sampled vectors were not made by this encoder as it is declared "
            f"(median cosine of all {declared.median:.2f})"
        )
    if best is not None:
        of = f"all {count}" if best.agreeing == count else f"{best.agreeing} of {count}"
        advice = (
            f"with {best.label} the median cosine is {best.median:.3f} and {of} agree: {_advice(best.keys, manifest)}"
        )
    elif found is not None and found.best.median > max(NEAR, declared.median + GAIN):
        advice = (
            f"{found.best.label} comes nearest, with {found.best.median:.2f}, but the loader does something else too: "
            "give it as old_encoder.transform, or correct the weights"
        )
    else:
        advice = (
            "no other preprocessing brings them near: the weights or the images are other ones, or the loader does "
            "what no key says (then give it as old_encoder.transform)"
        )
    lines = [f"{what}; {advice}"]
    if found is not None:
        lines += _table(found)
    lines.append("  without a model: old_encoder: stored continues with the vectors as they are")
    return Disagreement("\n".join(lines), declared, found, best)


def _odd_items(declared: Tried, found: Search | None) -> str:
    """What a plan that passes says of the items that do not agree."""
    count = len(declared.cosines)
    told = (
        f"{count - declared.agreeing} of {count} sampled items hold a vector that the old encoder does not give for "
        "their image today, and "
    )
    if found is not None:
        odd = found.declared.cosines < SAME_ENCODER
        agreeing = [int((tried.cosines[odd] >= SAME_ENCODER).sum()) for tried in found.tried]
        most = int(np.argmax(agreeing)) if agreeing else 0
        if agreeing and 2 * agreeing[most] > odd.sum():
            return told + (
                f"{agreeing[most]} of the {odd.sum()} of them that were tried agree with {found.tried[most].label}: "
                "the gallery was filled in two ways, and no declaration fits both"
            )
    return told + "no other declaration of the encoder explains it: the image may have changed since"


def hint(declared: Tried, best: Tried, *, manifest: str | None) -> str:
    """What a plan that passes says of an alternative that fits better."""
    return (
        f"the old encoder as declared gives a median cosine of {declared.median:.4f}, with {best.label} it is "
        f"{best.median:.4f}: {_advice(best.keys, manifest)}, so that queries meet vectors prepared as they are"
    )


def _advice(keys: Keys, manifest: str | None) -> str:
    *others, last = [f"old_encoder.{key} to {_written(value)}" for key, value in keys.items()]
    told = f"set {', '.join(others)} and {last}" if others else f"set {last}"
    return told if manifest is None else f"{told}, and move {manifest} away, which records the other declaration"


def _table(found: Search) -> list[str]:
    shown = [found.declared, *(tried for tried in found.tried if tried.keys)][: SHOWN + 1]
    width = max(len(tried.label) for tried in shown)
    count = len(found.declared.cosines)
    head = f"  {f'tried on {count} of them':<{width}}  median  agree"
    return [head, *(f"  {tried.label:<{width}}  {tried.median:6.3f}  {tried.agreeing:>5}" for tried in shown)]


def _written(value: Any) -> str:
    """A value as it stands in migrations.yaml."""
    if isinstance(value, tuple):
        return f"[{', '.join(f'{number:.10g}' for number in value)}]"
    return value if isinstance(value, str) and not value.startswith("#") else json.dumps(value)
