"""`migrations.yaml`: read, checked and typed. Every problem is found in one go and named with file, line and key.

The values of a configuration may be secrets: no message and no `repr` shows one. `Config.redacted` is for printing.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PrivateAttr,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from migrator.errors import ConfigError, UsageProblem
from migrator.lifecycle.strategy import STRATEGIES, StrategyName
from migrator.trainer.images.templates import parse

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_HIDDEN = "***"
_SENSITIVE = "(?:api|access|secret|private)[_-]?key|token|passw|secret|credential|auth"
_SECRET_KEY = re.compile(_SENSITIVE, re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)
_URL_PARAMETER = re.compile(rf"([?&;][^=&;]*(?:{_SENSITIVE})[^=&;]*=)[^&;]*", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\})?)")
_SQLITE = re.compile(r"(?P<driver>sqlite(?:\+pysqlite)?):///(?P<file>[^?]+)(?P<query>\?.*)?")
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_COLOUR = "white|black|#[0-9a-fA-F]{6}"
_SIDE = {"type": "integer", "minimum": 8, "maximum": 4096}
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

METRICS = ("map", "recall", "precision", "ndcg", "mrr")
"""Those of `migrator.evaluation.metrics`, named here so that reading a file does not load numpy."""
FLIPS = "negative_flips"
"""The share of queries whose first answer was right and is wrong now."""
MAX_ANSWERS = 1000
"""The longest ranking that a metric may look at."""
_METRIC = rf"(?:{'|'.join(METRICS)})@(?:[1-9][0-9]{{0,2}}|{MAX_ANSWERS})"

Place: TypeAlias = tuple[str | int, ...]
"""Keys and list positions from the top of the file to a value."""


# --- what a value may be ---------------------------------------------------------------------------------------------


def _folder(info: ValidationInfo) -> Path:
    return info.context["folder"] if info.context else Path()


def _local_path(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("must be the path of a local file or folder")
    if "://" in str(value):
        raise ValueError("must be a local path; a URL cannot be read here")
    try:
        return _folder(info) / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError("begins with the home folder of a user who does not exist") from error


def _local_files(value: Any, info: ValidationInfo) -> list[str]:
    """Names of files and patterns, absolute."""
    names = value if isinstance(value, list) and value else [value]
    found = []
    for name in names:
        path = str(_local_path(name, info))
        folder = str(_folder(info))
        if re.search(r"[*?[]", str(name)) and path == os.path.join(folder, str(Path(name))):  # noqa: PTH118 - a pattern
            path = str(Path(glob.escape(folder), name))  # what the folder is called is no pattern
        found.append(path)
    return found


def _location(value: str, info: ValidationInfo) -> str:
    return value if "://" in value else str(_local_path(value, info))


def _ledger(value: str, info: ValidationInfo) -> str:
    if re.match(r"postgresql(\+[a-z0-9_]+)?://", value):
        return value
    match = _SQLITE.fullmatch(value)
    if match is None or match["file"].startswith((":memory:", "file:")):
        raise ValueError("must be a database URL: sqlite:///file.db, or postgresql+psycopg://user@host/database")
    file = _local_path(match["file"], info)
    if "?" in str(file):
        raise ValueError("lies in a folder with a ? in its name, which a database URL cannot hold: move the ledger")
    return f"{match['driver']}:///{file}{match['query'] or ''}"


def _template(value: str) -> str:
    try:
        parse(value)
    except ValueError:
        raise ValueError(
            'must hold payload fields in braces, such as "{path}", "{shop}/{id}.jpg" or "{metadata.source}"'
        ) from None
    return value


def _duration(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be a duration: a number and s, m, h or d, such as 7d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _factory(value: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise ValueError("must be package.module:factory, such as encoders:lite2")
    return value


def _image_size(value: Any) -> int | tuple[int, int]:
    found = value if isinstance(value, list | tuple) else [value, value]
    sides = [int(side) if isinstance(side, str) and side.isdecimal() else side for side in found]  # of a ${VARIABLE}
    if len(sides) != 2 or any(type(side) is not int or not 8 <= side <= 4096 for side in sides):
        raise ValueError("must be a whole number from 8 to 4096, or two of them, [height, width]")
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def _stored(value: Any) -> Any:
    if value != "stored":
        raise ValueError("must be a mapping of keys to values, or the word stored")
    return value


def _metric(value: str) -> str:
    if not re.fullmatch(_METRIC, value) and value != FLIPS:
        near = difflib.get_close_matches(value.partition("@")[0], METRICS, n=1)
        advice = f'did you mean "{near[0]}@10"?' if near else f"known are {', '.join(f'{name}@k' for name in METRICS)}"
        raise ValueError(f"is no metric with k up to {MAX_ANSWERS}; {advice}")
    return value


def _gate_metric(value: str) -> str:
    if value == FLIPS:
        raise ValueError(f"{FLIPS} can be one of gate.thresholds: here a metric such as map@100 is compared")
    return _metric(value)


def _canary(value: list[int]) -> list[int]:
    if value[-1] != 100 or any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError("must rise from step to step and end with 100, such as [1, 10, 50, 100]")
    return value


Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
LocalPath: TypeAlias = Annotated[Path, BeforeValidator(_local_path)]
LocalFiles: TypeAlias = Annotated[
    list[str],
    BeforeValidator(_local_files),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""Names of local files or patterns such as metadata/*.parquet."""
Location: TypeAlias = Annotated[Text, AfterValidator(_location)]
Template: TypeAlias = Annotated[Text, AfterValidator(_template)]
Duration: TypeAlias = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(lambda value: f"{int(value.total_seconds())}s"),
    WithJsonSchema({"type": "string", "pattern": f"^{_DURATION.pattern}$"}),
]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]
Dim: TypeAlias = Annotated[int, Field(ge=1, le=65_536)]
ImageSize: TypeAlias = Annotated[
    int | tuple[int, int],
    BeforeValidator(_image_size),
    WithJsonSchema({"anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}]}),
]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Method: TypeAlias = Literal["advbct", "bct", "lce", "hot_refresh", "independent", "procrustes", "ridge", "residual_mlp"]
"""The methods of `migrator.trainer.methods` and `.maps`, named here so that reading a file does not load torch."""
POST_HOC: tuple[Method, ...] = ("procrustes", "ridge", "residual_mlp")
"""Those that map the vectors of a new encoder that is finished."""


def _shaped(pattern: str) -> Any:
    """For the JSON Schema; the words of a problem are a validator's."""
    return Field(json_schema_extra={"pattern": f"^(?:{pattern})$"})


def _takes_truth(annotation: Any) -> bool:
    """Whether true and false are values of this type, or of one of those that it is made of."""
    return annotation is bool or any(map(_takes_truth, get_args(annotation)))


class Section(BaseModel):
    """A mapping of the file: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_text_or_number(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        given = any(isinstance(each, bool) for each in values)
        if given and info.field_name and not _takes_truth(cls.model_fields[info.field_name].annotation):
            raise ValueError("must not be true or false (YAML also reads yes, no, on and off so): put text in quotes")
        return value

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Nothing: any value may be a secret."""
        return []


class Store(Section):
    """Where the collection lies."""

    def settings(self) -> dict[str, Any]:
        """What `migrator.adapters.registry.open_store` takes: plain values, local paths absolute."""
        return self.model_dump(mode="json")


class FaissStore(Store):
    """A folder with `index.faiss` and `items.parquet`, or an index and Parquet files of other names."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["path"], "not": {"anyOf": [{"required": ["index"]}, {"required": ["items"]}]}},
                {"required": ["index", "items"], "not": {"required": ["path"]}},
            ]
        }
    )

    kind: Literal["faiss"]
    """A FAISS index with Parquet files."""
    index: LocalPath | None = None
    """The index file; instead of `path`, together with `items`."""
    items: LocalFiles | None = None
    """The Parquet files of the items, instead of `path`: a name, a pattern such as `"./metadata/*.parquet"`, or a list
    of these. The files of a pattern are in the order of their names."""
    vectors: LocalFiles | None = None
    """`.npy` files with the exact vectors that the index was built from, in the order of the items. If the index stores
    approximations, old vectors are read from these files."""
    path: LocalPath | None = Field(None, validate_default=True)
    """The folder with `index.faiss` and `items.parquet`, or a symbolic link to it."""

    @field_validator("path")
    @classmethod
    def _one_layout(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        lacks = [name for name in ("index", "items") if name in info.data and info.data[name] is None]
        if path is not None and len(lacks) < 2:
            raise ValueError("is a folder, and index and items name files: keep the one or the other")
        if path is None and len(lacks) == 2:
            raise ValueError(
                "missing: the folder with index.faiss and items.parquet, or give index and items, the files"
            )
        if path is None and lacks:
            raise ValueError(f"missing, and so is {lacks[0]}: give path alone, or both index and items")
        return path

    def settings(self) -> dict[str, Any]:
        """As `Store.settings`, without what was not given."""
        return self.model_dump(mode="json", exclude_none=True)


class MilvusStore(Store):
    """A collection of a Milvus server, or of a Milvus Lite file."""

    kind: Literal["milvus"]
    """A Milvus server or a Milvus Lite file."""
    uri: Annotated[Text, AfterValidator(_location)]
    """`http://host:19530` of a server, or the path of a Milvus Lite file."""
    token: Text | None = None
    """`user:password`, or an API key."""
    database: Text | None = None
    """Name of the database; without it the server's default database."""
    collection: Text
    """Name or alias of the collection."""
    vector: Text | None = None
    """The vector field; required if there are several."""
    timeout: Annotated[int, Field(ge=1, le=3600)] = 30
    """Seconds for one request."""
    auto_id_in_shadow: Literal["keep_keys"] | None = None
    """For a collection that generates its own keys (`auto_id`), on a server that does not accept rows with a given key:
    the shadow keeps the keys and generates none, and the application supplies the key of every new row from then on."""

    def settings(self) -> dict[str, Any]:
        """As `Store.settings`, without what was not given."""
        return self.model_dump(mode="json", exclude_none=True)


class QdrantStore(Store):
    """A collection of a Qdrant server, or of a local folder."""

    kind: Literal["qdrant"]
    """A Qdrant server, a local folder or a Qdrant Edge folder."""
    url: Text | None = None
    """`http://host:6333` of a server."""
    path: LocalPath | None = None
    """A local folder, instead of `url`."""
    engine: Literal["local", "edge"] | None = None
    """What opens the folder: `local`, the local mode of the client (default), or `edge`, the engine of the server."""
    api_key: Text | None = None
    """API key of the server."""
    grpc: bool | None = None
    """Use gRPC, which is faster, if the server has its gRPC port open."""
    grpc_port: Annotated[int | None, Field(ge=1, le=65535)] = None
    """The gRPC port if it is not 6334."""
    collection: Text
    """Name or alias of the collection."""
    vector: Text | None = None
    """Name of the vector; required if there are several."""
    timeout: Annotated[int, Field(ge=1, le=3600)] = 30
    """Seconds for one request."""

    def settings(self) -> dict[str, Any]:
        """As `Store.settings`, without what was not given."""
        return self.model_dump(mode="json", exclude_none=True)


class OtherStore(Store):
    """A store of another kind; its adapter checks its keys."""

    model_config = ConfigDict(extra="allow")

    kind: Annotated[
        str,
        StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$"),
        Field(json_schema_extra={"not": {"enum": ["faiss", "milvus", "qdrant"]}}),
    ]
    """Name of an adapter that another package provides."""
    path: LocalPath | None = None
    """Folder of an embedded store."""

    def settings(self) -> dict[str, Any]:
        """As `Store.settings`, without a `path` that was not given."""
        return self.model_dump(mode="json", exclude=None if self.path else {"path"})


_STORES: Mapping[str | int | None, type[Store]] = {
    "<faiss>": FaissStore, "<milvus>": MilvusStore, "<qdrant>": QdrantStore
}  # fmt: skip


def _store_kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return f"<{kind}>" if f"<{kind}>" in _STORES else "<other>"


class Images(Section):
    """Where the images lie that the items were made from."""

    uri: Template = "{path}"
    """An image's path below `root`: a template over payload fields and `{id}`."""
    root: Location
    """A local folder, `https://host/folder/`, `s3://bucket/prefix` or another fsspec URL. Nothing outside it is
    read."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Larger images are rejected before they are decoded."""
    timeout: Annotated[int, Field(ge=1, le=3600)] = 30
    """Seconds without a byte after which an HTTP or S3 server counts as unavailable. Over HTTP a whole file may take
    ten times as long."""


_PREPROCESSING = {
    "image_size", "exif", "convert", "alpha", "mean", "std", "resize", "crop_pct", "fill", "interpolation", "antialias",
    "channels",
}  # fmt: skip


class Encoder(Section):
    """A model and its preprocessing."""

    arch: Text | None = None
    """Name of a timm architecture."""
    module: Annotated[str, AfterValidator(_factory)] | None = None
    """`package.module:factory`, instead of `arch`: a function without parameters that returns a `torch.nn.Module`. The
    function is executed."""
    weights: Annotated[LocalPath | None, Field(validate_default=True)] = None
    """A checkpoint with tensors: `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin`; without `arch` and `module` a `.pt2`
    or `.onnx` file that is the whole model."""
    checkpoint_key: Text | None = None
    """Which of several state dicts in `weights` to load: a key of the file such as `state_dict_ema`, or keys and
    leading parts of tensor names, joined by dots."""
    head: Literal["classifier", "none"] | None = None
    """With `arch` and the weights of a timm model: the outputs of its classifier, or its pooled features (`none`). By
    default the classifier's outputs if there are `dim` of them."""
    dim: Dim
    """Length of the encoder's vectors."""
    preprocessing: Literal["timm"] | None = None
    """`timm`: the keys below as timm's data config has them for `arch`. Keys that are set take precedence."""
    transform: Annotated[str, AfterValidator(_factory)] | None = None
    """`package.module:factory`: a function without parameters that returns a callable from a PIL image to a normalised
    float tensor (3, height, width), instead of the keys from `mean` to `channels`. The function is executed."""
    image_size: Annotated[ImageSize | None, Field(validate_default=True)] = None
    """Side of the square input in pixels, or `[height, width]`; required without `preprocessing` and `transform`. A
    `module` without it returns (module, transform)."""
    exif: Literal["apply", "ignore"] | None = None
    """Rotate the image by the EXIF orientation in its file (default), or leave it as stored, as `Image.open` does."""
    convert: Literal["scaled", "pil", "none"] | None = None
    """Conversion to RGB: `scaled` scales 16-bit and floating-point greyscale to 8 bits (default), `pil` does what
    `Image.convert("RGB")` does, `none` leaves it to a transform."""
    alpha: Annotated[Text, _shaped(f"{_COLOUR}|drop")] | None = None
    """Background colour of transparent pixels (default: white). `drop` ignores transparency, as `Image.convert("RGB")`
    does."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels, which range from 0 to 1 (default: ImageNet's)."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Divides the channels (default: ImageNet's)."""
    resize: Literal["squash", "crop", "letterbox", "border"] | None = None
    """Scale both sides to the input (`squash`, default); or keep the aspect ratio and crop the centre (`crop`), pad
    with `fill` (`letterbox`), or pad with the mean colour (`border`)."""
    crop_pct: Annotated[float, Field(ge=0.1, le=2)] | None = None
    """Scale to `image_size / crop_pct`, then crop the centre, or pad if it is above 1 (default: 1)."""
    fill: Annotated[Text, _shaped(_COLOUR)] | None = None
    """Colour of the padding (default: black)."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    """Resampling filter (default: bilinear)."""
    antialias: bool | None = None
    """Average over all pixels when an image is scaled down, as Pillow does (default), or interpolate between the
    nearest ones, as OpenCV's `resize` does."""
    channels: Literal["rgb", "bgr"] | None = None
    """Channel order of the model's input, and of `mean` and `std` (default: rgb)."""

    @property
    def named(self) -> str:
        """The model in a few words: its architecture, its factory, or its file."""
        return self.arch or self.module or (self.weights.name if self.weights else "encoder")

    @property
    def program(self) -> str | None:
        """The suffix of the file that is the whole model, if it is one."""
        suffix = self.weights.suffix if self.weights else ""
        return suffix if suffix in (".pt2", ".onnx") else None

    @field_validator("module")
    @classmethod
    def _one_model(cls, module: str | None, info: ValidationInfo) -> str | None:
        if module is not None and info.data.get("arch") is not None:
            raise ValueError("excludes arch: a model comes from one of them")
        return module

    @field_validator("weights")
    @classmethod
    def _some_model(cls, weights: Path | None, info: ValidationInfo) -> Path | None:
        if not {"arch", "module"} <= info.data.keys():
            return weights
        named = [key for key in ("arch", "module") if info.data[key] is not None]
        program = weights is not None and weights.suffix in (".pt2", ".onnx")
        if program and named:
            raise ValueError(f"is a file that holds the whole model: remove {named[0]}, or name a state dict")
        if not program and not named:
            raise ValueError(
                "names no model: add arch (a timm name) or module (package.module:factory), or let weights be a .pt2 "
                "or .onnx file"
            )
        return weights

    @field_validator("checkpoint_key")
    @classmethod
    def _of_file(cls, key: str | None, info: ValidationInfo) -> str | None:
        weights = info.data.get("weights", "")
        if key is not None and weights is None:
            raise ValueError("says which part of the weights is meant: add weights, or remove it")
        if key is not None and isinstance(weights, Path) and weights.suffix in (".pt2", ".onnx"):
            raise ValueError(f"is for a file with state dicts: a {weights.suffix} file is one program")
        return key

    @field_validator("head")
    @classmethod
    def _of_state_dict(cls, head: str | None, info: ValidationInfo) -> str | None:
        if head is not None and info.data.get("arch", "") is None:
            raise ValueError("is for a timm arch: a factory or a program decides itself what it gives")
        if head is not None and info.data.get("weights", "") is None:
            raise ValueError("says which layer of the weights gives the vector: add weights, or remove head")
        return head

    @field_validator("preprocessing")
    @classmethod
    def _of_timm(cls, preprocessing: str | None, info: ValidationInfo) -> str | None:
        if preprocessing is not None and info.data.get("arch", "") is None:
            raise ValueError("timm knows only its own architectures: give image_size, mean, std and resize instead")
        return preprocessing

    @field_validator("transform")
    @classmethod
    def _own_transform(cls, transform: str | None, info: ValidationInfo) -> str | None:
        if transform is not None and info.data.get("preprocessing") is not None:
            raise ValueError("excludes preprocessing: pictures are prepared by one of them")
        return transform

    @field_validator("image_size")
    @classmethod
    def _some_size(cls, image_size: Any, info: ValidationInfo) -> Any:
        known = {"preprocessing", "transform", "module"}
        if image_size is None and known <= info.data.keys() and all(info.data[key] is None for key in known):
            raise ValueError("missing")
        return image_size

    @field_validator("convert")
    @classmethod
    def _to_rgb(cls, convert: str | None, info: ValidationInfo) -> str | None:
        if convert == "none" and not cls._is_transformed(info.data):
            raise ValueError("none leaves the picture's mode to a transform: add transform, or give pil or scaled")
        return convert

    @field_validator("alpha", "fill", mode="before")
    @classmethod
    def _some_colour(cls, value: Any) -> Any:
        if value is None:
            raise ValueError('is empty: a # begins a comment, so put the colour in quotes, such as "#ffffff"')
        return value

    @field_validator("alpha")
    @classmethod
    def _used(cls, alpha: str, info: ValidationInfo) -> str:
        if not re.fullmatch(f"{_COLOUR}|drop", alpha):
            raise ValueError('must be white, black, drop or a colour such as "#f0f0f0"')
        if alpha != "drop" and info.data.get("convert") in ("pil", "none"):
            raise ValueError(f"is not used with convert: {info.data['convert']}: remove one of them")
        return alpha

    @field_validator("mean", "std", "resize", "crop_pct", "fill", "interpolation", "antialias", "channels")
    @classmethod
    def _not_transformed(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("transform") is not None:
            raise ValueError("is a matter of the transform: remove it")
        if value is not None and cls._is_transformed(info.data):
            raise ValueError("needs image_size; without both, module returns (module, transform)")
        return value

    @field_validator("fill")
    @classmethod
    def _padded(cls, fill: str, info: ValidationInfo) -> str:
        if not re.fullmatch(_COLOUR, fill):
            raise ValueError('must be white, black or a colour such as "#727272"')
        known = {"preprocessing", "resize", "crop_pct"} <= info.data.keys()
        may_pad = known and (
            info.data["preprocessing"] is not None
            or info.data["resize"] == "letterbox"
            or (info.data["crop_pct"] or 1) > 1
        )
        if known and not may_pad:
            raise ValueError("is not used: it pads with resize: letterbox, or a crop_pct above 1")
        return fill

    @field_validator("antialias")
    @classmethod
    def _interpolated(cls, antialias: bool | None, info: ValidationInfo) -> bool | None:
        if antialias is False and info.data.get("interpolation") in ("lanczos", "box", "hamming"):
            raise ValueError(f"must be true with interpolation: {info.data['interpolation']}")
        return antialias

    @staticmethod
    def _is_transformed(data: Mapping[str, Any]) -> bool:
        """Whether a factory prepares the pictures, of the keys that are checked so far."""
        if data.get("transform") is not None:
            return True
        return data.get("module") is not None and "image_size" in data and data["image_size"] is None

    def given_preprocessing(self) -> dict[str, Any]:
        """The fields of `migrator.trainer.images.preprocessing.Preprocessing` that are given."""
        return self.model_dump(include=_PREPROCESSING, exclude_none=True)


def _keys(*sets: str) -> ConfigDict:
    """For the JSON Schema: a mapping has the keys of one of these sets."""
    return ConfigDict(json_schema_extra={"anyOf": [{"required": [*keys.split()]} for keys in sets]})


class OldEncoder(Encoder):
    """The encoder that made the stored vectors."""

    model_config = _keys("weights image_size", "module", "arch weights preprocessing", "weights transform")

    @field_validator("weights")
    @classmethod
    def _finished(cls, weights: Path | None, info: ValidationInfo) -> Path | None:
        if weights is None and info.data.get("arch") is not None:
            raise ValueError("missing")
        return weights


class NewEncoder(Encoder):
    """The encoder to move to. Without `weights` it is trained, unless it is a `module` and there is no `train`."""

    model_config = _keys(
        "arch image_size", "arch preprocessing", "arch transform", "module", "weights image_size", "weights transform"
    )

    pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded."""

    @field_validator("pretrained")
    @classmethod
    def _timms(cls, pretrained: bool, info: ValidationInfo) -> bool:
        if pretrained and info.data.get("arch", "") is None:
            raise ValueError("is for a timm arch: a factory loads its weights itself")
        return pretrained


class ItemsFrom(Section):
    """Training images that no file lists."""

    source: Literal["store", "folders"] = Field(alias="from")
    """`store`: the items of the collection. `folders`: every image below `images.root`; its class is the first folder
    of its path."""
    label: Template | None = None
    """With `store`: the class of an item, from its payload; items without one are excluded. Without this key the images
    have no labels."""

    @field_validator("label")
    @classmethod
    def _only_of_items(cls, label: str | None, info: ValidationInfo) -> str | None:
        if label is not None and info.data.get("source") == "folders":
            raise ValueError("is for items of the store; with folders the first folder of a path is its class")
        return label


class Train(Section):
    """How the new encoder is trained. Keys that are not set take the trainer's default."""

    items: Annotated[
        Annotated[LocalPath, Tag("<file>")] | Annotated[ItemsFrom, Tag("<from>")],
        Discriminator(lambda value: "<from>" if isinstance(value, Mapping | ItemsFrom) else "<file>"),
    ]
    """CSV or Parquet file with the column `path` (below `images.root`) and, if there are labels, `label`; or `{from:
    store, label: "{category}"}`, or `{from: folders}`."""
    method: Method = "advbct"
    """`advbct`, `bct`, `lce`, `hot_refresh`, `independent` (an upper bound, not a migration), or a map behind a
    finished encoder: `procrustes`, `ridge`, `residual_mlp`. `migrator train --method` overrides it."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = 128
    """Images per optimiser step, over all processes."""
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    """Micro-batches per step, to save memory."""
    lr: Positive | None = None
    """Learning rate."""
    seed: Seed = 0
    """Seed of all random numbers."""
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of the images that is held out. With 0 none is, and the last epoch is kept."""
    upper_bound: Annotated[float, Field(gt=0, le=1)] | None = None
    """mAP@100 of an independent encoder's self-test, if known; P_1, which selects the best epoch, is measured against
    it."""
    pseudo_classes: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """For items without labels: number of classes to form by k-means over the old vectors."""
    class_balanced: bool = False
    """Draw all classes equally often, however many images they have."""
    flip: bool = False
    """Mirror images at random; wrong for digits and text."""
    arcface_scale: Positive | None = None
    """Scale of the ArcFace classification loss."""
    arcface_margin: Annotated[float, Field(ge=0, lt=1.5)] | None = None
    """Margin of the ArcFace loss, in radians."""
    boundary_weight: NotNegative | None = None
    """Weight of the elastic boundary, which keeps new vectors near their old class."""
    adversarial_weight: NotNegative | None = None
    """Weight of the discriminator that distinguishes old from new vectors."""
    anchor_weight: NotNegative | None = None
    """`advbct`: weight of the contrast between an image's new and old vector."""
    radius_quantile: Annotated[float, Field(gt=0, le=1)] | None = None
    """Which quantile of a class's distances is its radius; 1 for the largest."""
    radius_limit: Annotated[float, Field(gt=0, le=2)] | None = None
    """T of the elastic boundary."""
    influence_weight: NotNegative | None = None
    """`bct`: weight of the loss through the old classifier."""
    old_classifier: LocalPath | None = None
    """`bct`: the `classifier.safetensors` of the old encoder's training. Without it class centres are used."""
    temperature: Positive | None = None
    """Temperature of the contrast: `hot_refresh`, and the anchor of `advbct`."""
    reference: bool = False
    """The published recipe, term for term; it needs much data."""
    bf16: bool = False
    """Train the encoder in bfloat16, on devices that support it well."""
    compile: bool = False
    """Compile the encoder with `torch.compile`."""
    trackers: list[Text] = []
    """Accelerate trackers that receive losses and validation, such as `tensorboard` (`pip install
    'advbct-migrator[tensorboard]'`)."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of checkpoints to keep."""
    checkpoint_minutes: Positive = 10.0
    """Minutes between checkpoints within an epoch; one is also written at the end of each epoch."""
    cache: LocalPath | None = None
    """Folder of prepared images, shared by training runs (default: in the artifacts folder)."""
    cache_gib: Positive = 50.0
    """Maximum size of the cache in GiB."""
    image_threads: Annotated[int, Field(ge=1, le=256)] = 4
    """Threads that read and decode images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""


class Threshold(Section):
    """One more thing that must hold before queries are moved: a metric, its bound, and for whom."""

    metric: Annotated[Text, AfterValidator(_metric), _shaped(rf"{_METRIC}|{FLIPS}")]
    """As `gate.metric`, or `negative_flips`: the share of queries whose first result was relevant and is irrelevant
    now."""
    min: Annotated[float | None, Field(ge=0, le=1)] = None
    """Minimum value of the new search."""
    max: Annotated[float | None, Field(ge=0, le=1)] = None
    """Maximum value of the new search; for `negative_flips`, of the share."""
    min_gain: Annotated[float | None, Field(ge=-1, le=1)] = None
    """Minimum gain over the current search, in the metric's own unit."""
    min_ratio: Annotated[float | None, Field(gt=0, le=10, validate_default=True)] = None
    """Minimum value of the new search as a share of the current one."""
    segment: Text | None = None
    """The segment to bound, as `verify.segment` names it; `"*"` for each segment (default: all queries)."""
    test: Literal["cross", "self", "lowest"] | None = None
    """The search to bound: at the canary, after the backfill, or at the minimum during the backfill (default: the one
    that is served first, `cross` in place and `self` with a shadow)."""

    @field_validator("min_ratio")
    @classmethod
    def _one_bound(cls, ratio: float | None, info: ValidationInfo) -> float | None:
        bounds = ("min", "max", "min_gain")
        if not set(bounds) <= info.data.keys():
            return ratio
        given = [name for name in bounds if info.data[name] is not None] + (["min_ratio"] if ratio is not None else [])
        if len(given) != 1:
            raise ValueError("a threshold has one bound: give one of min, max, min_gain, min_ratio")
        if info.data.get("metric") == FLIPS and given != ["max"]:
            raise ValueError(f"{FLIPS} is a change against today's search already: give max")
        return ratio


_Gain = Annotated[float, Field(ge=-1, le=1)]


class MinGain(Section):
    """The least gain of each test, where one number for all of them does not do."""

    cross: _Gain | None = None
    """Minimum gain at the canary (default: 0); in place only."""
    self: _Gain | None = None
    """Minimum gain after the backfill (default: 0)."""
    lowest: _Gain | None = None
    """Minimum gain at the minimum during the backfill, which is never above the cross-test and the self-test (default:
    the lower of their two limits); in place only."""

    @field_validator("lowest")
    @classmethod
    def _lowest_is_lowest(cls, lowest: float | None, info: ValidationInfo) -> float | None:
        ends = min(info.data.get("cross") or 0.0, info.data.get("self") or 0.0)
        if lowest is not None and lowest > ends:
            raise ValueError(
                f"is {lowest:g}, and the lowest point of the backfill is never above its ends, for which {ends:g} is "
                f"enough: remove it, or give at most {ends:g}"
            )
        return lowest

    def of(self, test: str) -> float:
        """The least gain of `cross`, `lowest` or `self`."""
        given: dict[str, float | None] = self.model_dump()
        ends = min(given["cross"] or 0.0, given["self"] or 0.0)
        found = given[test]
        return found if found is not None else ends if test == "lowest" else 0.0


class Gate(Section):
    """What the new encoder must show before queries are moved to it."""

    metric: Annotated[Text, AfterValidator(_gate_metric), _shaped(_METRIC)] = "map@100"
    """The metric that is compared, query by query: `map@k`, `recall@k`, `precision@k`, `ndcg@k` or `mrr@k`, k up to
    1000."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence of the two-sided bootstrap interval, over all interim analyses: each further query set or encoder that
    is verified gets a smaller part of the remaining error."""
    min_gain: Annotated[
        Annotated[_Gain, Tag("<number>")] | Annotated[MinGain, Tag("<each>")],
        Discriminator(lambda value: "<each>" if isinstance(value, Mapping | MinGain) else "<number>"),
    ] = 0.0
    """Minimum gain over the current search in each default test, in the metric's own unit; a negative value accepts a
    loss, which is then shown as accepted. One number, or a mapping of tests."""
    min_queries: Annotated[int, Field(ge=10)] = 30
    """With fewer queries the result is inconclusive."""
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    """Resamples of the bootstrap."""
    cluster: Literal["class", "query"] = "class"
    """What the bootstrap resamples: whole classes (`class`), if more classes are yet to come, or single queries
    (`query`), if the classes are all there are."""
    thresholds: Annotated[list[Threshold], Field(max_length=100)] = []
    """Further bounds; all must hold."""

    def least_gain(self, test: str) -> float:
        """The least gain of `cross`, `lowest` or `self`."""
        return self.min_gain.of(test) if isinstance(self.min_gain, MinGain) else self.min_gain


class Verify(Section):
    """How old and new search are compared."""

    queries: LocalPath | None = None
    """CSV or Parquet file with the columns `path` (below `images.root`) and `label`, or `path` and `relevant` (list of
    relevant ids), optionally with `grades`. Without it items of the collection are the queries, each excluded from its
    own results."""
    label: Template | None = None
    """The class of an item, from its payload: items of the same class are relevant. Without labels and `relevant`, the
    queries are altered views of the collection's images: weaker evidence."""
    segment: Template | None = None
    """A group that a query belongs to, from the file's columns or its item's payload; results are reported for each."""
    sample: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Maximum number of queries, drawn evenly over the classes."""
    gallery: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    """Maximum number of items to search, drawn at random."""
    seed: Seed = 0
    """Seed of the draw."""
    upper_bound: Annotated[float | None, Field(gt=0, le=1)] = None
    """`gate.metric` of the self-test of an encoder trained independently of the old one; P_up, P_comp and P_1 are
    measured against it."""
    gate: Gate = Gate()
    """What the new encoder must show."""
    max_age: Annotated[Duration, Field(json_schema_extra={"default": "7d"})] = timedelta(days=7)
    """A number and `s`, `m`, `h` or `d`. An older result no longer opens a stage or a further canary step."""


class Rollout(Section):
    """How the collection and its queries move."""

    strategy: StrategyName = "in_place"
    """`in_place` replaces the vectors in the collection; `shadow` fills a second collection and moves the queries."""
    canary: Annotated[
        list[Annotated[int, Field(ge=1, le=100)]], Field(min_length=1, max_length=100), AfterValidator(_canary)
    ] = [1, 10, 50, 100]
    """Percentages of the queries that the new encoder answers, step by step; they rise and end with 100."""
    route_ttl: Annotated[float, Field(ge=0, le=3600)] = 5.0
    """Seconds for which an application may keep a row of the route. What earlier rows name is deleted, and in place no
    new vector is written, until this time has passed. It is part of the route from `prepare` on."""


class Backfill(Section):
    """How the stored images are embedded again."""

    chunk_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Items that are leased, written and reported together. A kill loses at most the work on the chunks in flight."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Images that pass through the encoder together; also in `plan`, `verify` and `rollback`."""
    nice: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Rest this many times as long as each batch took: `1` uses half of the time."""
    lease: Annotated[int, Field(ge=5, le=86_400)] = 300
    """Seconds after which a chunk of a silent process is taken over; a process that died on the same machine is noticed
    at once. At least twice `store.timeout`."""
    image_threads: Annotated[int, Field(ge=1, le=256)] = 4
    """Threads that read and decode images; also in `plan`, `verify` and `rollback`."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Attempts for a chunk that the store rejects, before it is listed as failed."""
    retry_for: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """Seconds to retry while a store or image source is unavailable; also in `plan`, `verify` and `rollback`."""
    order: Literal["id", "worst_first"] = "id"
    """`worst_first` starts with the items whose old vector is farthest from the centroid of its class or, without
    labels, of its cluster; fixed at the first run. In place only."""
    read_back: Annotated[int, Field(ge=0, le=100_000)] = 64
    """Written items that are read over a new connection after each run, embedded again and compared; 0 disables the
    check."""
    measure: bool = True
    """Run the queries of `verify` again after each run; a result below the gate pauses the backfill."""


class Migration(Section):
    """One collection, one old encoder, one new encoder."""

    store: Annotated[
        Annotated[FaissStore, Tag("<faiss>")]
        | Annotated[MilvusStore, Tag("<milvus>")]
        | Annotated[QdrantStore, Tag("<qdrant>")]
        | Annotated[OtherStore, Tag("<other>")],
        Discriminator(_store_kind),
    ]
    """Where the collection is stored."""
    images: Images
    """Where its images are stored."""
    old_encoder: Annotated[
        Annotated[Literal["stored"], BeforeValidator(_stored), Tag("<stored>")] | Annotated[OldEncoder, Tag("<model>")],
        Discriminator(lambda value: "<model>" if isinstance(value, Mapping | OldEncoder) else "<stored>"),
    ]
    """The encoder that made the stored vectors, or `stored` if its model is not available."""
    new_encoder: NewEncoder
    """The encoder to move to. With `in_place` it has the same `dim`."""
    train: Annotated[Train | None, Field(validate_default=True)] = None
    """How to train it; required unless `new_encoder.weights` is set or the new encoder is finished."""
    verify: Verify
    """How old and new search are compared."""
    rollout: Annotated[Rollout, Field(validate_default=True)] = Rollout()
    """How queries move to the new encoder."""
    backfill: Annotated[Backfill, Field(validate_default=True)] = Backfill()
    """How stored images are re-embedded."""

    @field_validator("backfill")
    @classmethod
    def _order_matters(cls, backfill: Backfill, info: ValidationInfo) -> Backfill:
        rollout = info.data.get("rollout")
        if backfill.order != "id" and rollout is not None and STRATEGIES[rollout.strategy].second_collection:
            raise ValueError("order is for in_place: a shadow answers no query before all of it is there")
        return backfill

    @field_validator("backfill")
    @classmethod
    def _lease_outlasts_requests(cls, backfill: Backfill, info: ValidationInfo) -> Backfill:
        timeout = getattr(info.data.get("store"), "timeout", None)
        if isinstance(timeout, int) and backfill.lease < 2 * timeout:
            raise ValueError(
                f"lease is {backfill.lease} s and must be twice store.timeout ({timeout} s) at least, for nothing is "
                f"written in the last {timeout} s of a lease: set lease to {2 * timeout}, or store.timeout to "
                f"{backfill.lease // 2}"
            )
        return backfill

    @field_validator("rollout")
    @classmethod
    def _same_dim(cls, rollout: Rollout, info: ValidationInfo) -> Rollout:
        old, new = info.data.get("old_encoder"), info.data.get("new_encoder")
        old = None if old == "stored" else old  # then plan compares with the collection
        second = STRATEGIES[rollout.strategy].second_collection
        if not second and old is not None and new is not None and old.dim != new.dim:
            raise ValueError(
                f"new_encoder gives {new.dim}-d vectors but old_encoder {old.dim}-d ones, and in_place keeps the "
                f"collection's length: set new_encoder.dim to {old.dim}, or rollout.strategy to shadow"
            )
        return rollout

    @field_validator("rollout")
    @classmethod
    def _tests_that_a_shadow_has(cls, rollout: Rollout, info: ValidationInfo) -> Rollout:
        old, new, verify = (info.data.get(key) for key in ("old_encoder", "new_encoder", "verify"))
        if not STRATEGIES[rollout.strategy].second_collection or verify is None:
            return rollout
        gains = verify.gate.min_gain
        if isinstance(gains, MinGain) and (gains.cross is not None or gains.lowest is not None):
            raise ValueError(
                "with a shadow no query meets a gallery that is not whole: of verify.gate.min_gain give self alone, "
                "or one number"
            )
        named = {threshold.test for threshold in verify.gate.thresholds} - {None, "self"}
        if named and isinstance(old, OldEncoder) and new is not None and old.dim != new.dim:
            raise ValueError(
                f"verify.gate.thresholds names the test {min(map(str, named))}, which compares {new.dim}-d with "
                f"{old.dim}-d vectors: with encoders of two lengths give test: self"
            )
        return rollout

    @field_validator("train")
    @classmethod
    def _folders_are_local(cls, train: Train | None, info: ValidationInfo) -> Train | None:
        images = info.data.get("images")
        of_folders = train is not None and isinstance(train.items, ItemsFrom) and train.items.source == "folders"
        if of_folders and images is not None and "://" in images.root.removeprefix("file://"):
            raise ValueError(
                "items {from: folders}: only folders of this machine can be walked, and images.root is a URL: list the "
                "images in a file"
            )
        return train

    @field_validator("train")
    @classmethod
    def _weights_from_somewhere(cls, train: Train | None, info: ValidationInfo) -> Train | None:
        new = info.data.get("new_encoder")
        if new is None or new.weights is not None or new.module is not None:
            return train
        if train is None:
            raise ValueError("missing, and new_encoder has no weights: add a train section or new_encoder.weights")
        if train.method in POST_HOC and not new.pretrained:
            raise ValueError(
                f"method {train.method} maps the vectors of a finished encoder, and new_encoder has no weights: add "
                "new_encoder.weights, or pretrained: true"
            )
        return train


class Config(Section):
    """A whole `migrations.yaml`."""

    version: Literal[1]
    """Version of the file format."""
    ledger: Annotated[Text, AfterValidator(_ledger)] = Field("sqlite:///migrator.db", validate_default=True)
    """Database that keeps the progress: `sqlite:///file.db`, or `postgresql+psycopg://user:${PGPASSWORD}@host/database`
    with the extra `postgres`. A relative SQLite path starts from the folder of this file."""
    artifacts: Location = Field("./artifacts", validate_default=True)
    """Folder or fsspec URL for plans, checkpoints, trained encoders, undo logs and reports. Training needs a local
    folder."""
    migrations: Annotated[dict[Name, Migration], Field(min_length=1)]
    """The migrations by name, at least one."""

    _path: Path = PrivateAttr(default=Path("migrations.yaml"))
    _texts: dict[Place, str] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file this was read from, absolute."""
        return self._path

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._path.parent

    def redacted(self) -> dict[str, Any]:
        """The configuration as plain values, fit for printing.

        Values with a secret's name and credentials in URLs are starred out; a value that came from the environment
        is shown as it is written in the file (`${NAME}`).
        """

        def hide(value: Any, at: Place) -> Any:
            if isinstance(value, dict):
                return {
                    key: _HIDDEN if at[2:3] == ("store",) and _SECRET_KEY.search(key) else hide(inner, (*at, key))
                    for key, inner in value.items()
                }
            if isinstance(value, list):
                return [hide(inner, (*at, index)) for index, inner in enumerate(value)]
            shown = self._texts.get(at, value)
            if not isinstance(shown, str):
                return shown
            return _URL_PARAMETER.sub(rf"\g<1>{_HIDDEN}", _URL_CREDENTIALS.sub(f"{_HIDDEN}@", shown))

        redacted: dict[str, Any] = hide(self.model_dump(mode="json", by_alias=True, exclude_none=True), ())
        return redacted


# --- from the file to the types --------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases: a few of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


class _Document:
    """Plain values of a YAML document, with the line of each, and every problem met on the way."""

    def __init__(self, file: Path, environment: Mapping[str, str]) -> None:
        self.file = file
        self.environment = environment
        self.scalars = yaml.constructor.SafeConstructor()
        self.lines: dict[Place, int] = {(): 1}
        self.texts: dict[Place, str] = {}  # as written, where the value came from the environment
        self.problems: dict[Place, tuple[int, str]] = {}

    def report(self, at: Place, problem: str, line: int | None = None) -> None:
        """Notes the first problem of a place; one that is not in the file has the line of what encloses it."""
        line = line or next(self.lines[at[:size]] for size in range(len(at), -1, -1) if at[:size] in self.lines)
        where = f"{_spell(at)}: " if at else ""
        self.problems.setdefault(at, (line, f"{self.file}:{line}: {where}{problem}"))

    def value(self, node: yaml.Node, at: Place) -> Any:
        """The plain value of a node: mapping, list, text, number, truth or None."""
        self.lines.setdefault(at, node.start_mark.line + 1)
        if len(at) > _MAX_DEPTH:
            self.report(at[:3], "is nested too deeply")
            return None
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(inner, (*at, index)) for index, inner in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp"):
            return self.expanded(node.value, at)
        if isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "bool", "null"):
            try:
                return self.scalars.construct_object(node)
            except (ValueError, LookupError):
                self.report(at, f"cannot be read as {kind}")
                return None
        self.report(at, "YAML tags are not supported: put a value that begins with ! in quotes")
        return None

    def mapping(self, node: yaml.MappingNode, at: Place) -> dict[str, Any]:
        """The values of a mapping; each key is text and stands once."""
        values: dict[str, Any] = {}
        for key, inner in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                self.report((*at, name), "this key is not text: put it in quotes", line)
            elif key.value in values:
                place = (*at, key.value)
                self.report(place, f"the key stands here again; remove it or the one on line {self.lines[place]}", line)
            else:
                self.lines[(*at, key.value)] = line
                values[key.value] = self.value(inner, (*at, key.value))
        return values

    def expanded(self, text: str, at: Place) -> str:
        """`text` with `${NAME}` and `${NAME:-default}` replaced from the environment; `$$` stands for `$`."""

        def replacement(match: re.Match[str]) -> str:
            if match["dollar"]:
                return "$"
            self.texts[at] = text
            name, default = match["name"], match["default"]
            if name is None:
                self.report(at, "${ begins a variable: write ${NAME} or ${NAME:-default}, or $${ for the characters")
            elif default is None and name not in self.environment:
                self.report(at, f"the environment variable {name} is not set: set it, or write ${{{name}:-default}}")
            else:
                return self.environment.get(name) or default or ""
            return ""

        return _VARIABLE.sub(replacement, text)


def _printable(text: str) -> str:
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _spell(at: Place) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in at)
    return "".join(parts).removeprefix(".")


def _compose(path: Path) -> yaml.Node:
    """The one document of a file, as YAML nodes with their lines."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder: give the path of the migrations.yaml in it")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: run `migrator init`, or name another with --config")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): correct its permissions") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB: this is not a migrations.yaml")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text: save it as UTF-8") from error
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        problem = re.sub(r"(handle|anchor) .*", r"\1", problem)  # its name may be a secret that begins with ! or &
        if mark and text[mark.index - 1 : mark.index + 1] == "${":
            problem += '; inside { } and [ ] write "${NAME}" with quotes'
        raise ConfigError(f"{path}:{line + 1}:{column + 1}: is not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: is not YAML: it holds a control character") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply: this is not a migrations.yaml") from None
    if node is None:
        raise ConfigError(f"{path}: is empty: run `migrator init` for an example")
    return node


def _known_keys(at: Place, tag: str | None) -> list[str]:
    """The keys that the section at `at` may hold; `tag` tells which kind of store it is."""
    section: type[Section] = Migration if len(at) >= 2 else Config
    if tag in _STORES:
        return list(_STORES[tag].model_fields)
    for key in at[2:]:
        if isinstance(key, int):  # a place in a list
            continue
        inner = section.model_fields[key].annotation
        members = (get_args(member)[0] if get_args(member) else member for member in get_args(inner))  # of a union
        section = next(kind for kind in (inner, *members) if isinstance(kind, type) and issubclass(kind, Section))
    return [field.alias or name for name, field in section.model_fields.items()]


def _wording(kind: str, message: str, at: Place, tag: str | None) -> str:
    """A pydantic problem in this program's words, without the value."""
    if kind == "extra_forbidden":
        known = _known_keys(at[:-1], tag)
        near = difflib.get_close_matches(str(at[-1]), known, n=1)
        return f'unknown key; did you mean "{near[0]}"?' if near else f"unknown key; known are {', '.join(known)}"
    if kind == "string_pattern_mismatch" and len(at) == 2:
        return "a migration's name has 1 to 63 characters of a-z, 0-9, . _ - and begins with a letter or digit"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys to values"
    if kind == "too_short" and at == ("migrations",):
        return "holds no migration; `migrator init` writes an example"
    if kind == "missing":
        return "missing"
    message = message.removeprefix("Value error, ").split(", unable to parse", 1)[0]
    return re.sub(r"^(Input|String|List|Tuple|Dictionary) should ", "must ", message)


def load_config(path: Path) -> Config:
    """Reads and checks `migrations.yaml`. What it names need not exist yet.

    Raises `ConfigError` with a line for each problem.
    """
    node = _compose(path)
    document = _Document(path, os.environ)
    absolute = path.absolute()
    try:
        raw = document.value(node, ())
        config = Config.model_validate(raw, context={"folder": absolute.parent})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            # The last place of an unknown key is the key, which may look like the tag of a union.
            end = len(detail["loc"]) - (detail["type"] == "extra_forbidden")
            above, key = detail["loc"][:end], detail["loc"][end:]
            at = (*(part for part in above if part != "[key]" and not str(part).startswith("<")), *key)
            tag = next((str(part) for part in above if part in _STORES), None)
            document.report(at, _wording(detail["type"], detail["msg"], at, tag))
    if document.problems:
        raise ConfigError("\n".join(text for _, text in sorted(document.problems.values())))
    config._path = absolute
    config._texts = document.texts
    return config


def read_store(text: str, file: Path) -> Store:
    """The section `store` written as `text`, as `load_config` would read it from `file`, which need not exist yet.

    Raises `ConfigError`, also for a secret that is written out: the file would keep it.
    """
    document = _Document(file, os.environ)
    node = yaml.compose(text, Loader=_Loader)
    assert node is not None
    raw = document.value(node, ())
    kind = _store_kind(raw)
    problems = [problem.split(": ", 1)[1] for _, problem in document.problems.values()]
    for key, value in raw.items():
        written = str(document.texts.get((key,), value))
        if (_SECRET_KEY.search(key) or _URL_CREDENTIALS.search(written)) and "${" not in written:
            problems.append(f"{key}: a secret belongs in the environment: write '${{NAME}}', in single quotes")
    if not problems:
        try:
            return _STORES.get(kind, OtherStore).model_validate(raw, context={"folder": file.absolute().parent})
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                # As if it stood in a file: the words for an unknown key depend on the section.
                at = ("migrations", "", "store", *detail["loc"])
                problems.append(f"{_spell(detail['loc'])}: {_wording(detail['type'], detail['msg'], at, kind)}")
    raise ConfigError("\n".join(f"store.{problem}" for problem in problems))


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `migrations.yaml`, made from the same types that check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def find_migration(config: Config, name: str | None) -> tuple[str, Migration]:
    """The migration called `name`, or the only one of the file where no name is given.

    Raises `UsageProblem`.
    """
    known = list(config.migrations)
    if name is None and len(known) == 1:
        name = known[0]
    if name is None:
        raise UsageProblem(f"{config.path} holds {len(known)} migrations: name one of {', '.join(known)}")
    if name not in config.migrations:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
        raise UsageProblem(f'{config.path} holds no migration "{_printable(name)}"; {advice}')
    return name, config.migrations[name]
