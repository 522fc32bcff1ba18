"""The sections of `migrations.yaml`. Their docstrings are the reference.

The values of a configuration may be secrets: no message and no `repr` shows one. `Config.redacted` is for printing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
)

from migrator.config.values import (
    COLOUR_PATTERN,
    FLIPS,
    METRIC_PATTERN,
    POST_HOC,
    Dim,
    Duration,
    ImageSize,
    LocalFiles,
    LocalPath,
    Location,
    Method,
    Name,
    NotNegative,
    Place,
    Positive,
    Seed,
    Template,
    Text,
    as_canary,
    as_factory,
    as_gate_metric,
    as_ledger,
    as_location,
    as_metric,
    as_stored,
    shaped,
)
from migrator.lifecycle.strategy import STRATEGIES, StrategyName

_HIDDEN = "***"


_SENSITIVE = "(?:api|access|secret|private)[_-]?key|token|passw|secret|credential|auth"


SECRET_KEY = re.compile(_SENSITIVE, re.IGNORECASE)


URL_CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)


_URL_PARAMETER = re.compile(rf"([?&;][^=&;]*(?:{_SENSITIVE})[^=&;]*=)[^&;]*", re.IGNORECASE)


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
    uri: Annotated[Text, AfterValidator(as_location)]
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


STORES: Mapping[str | int | None, type[Store]] = {
    "<faiss>": FaissStore, "<milvus>": MilvusStore, "<qdrant>": QdrantStore
}  # fmt: skip


def store_kind(value: Any) -> str:
    """The discriminator of a store's section."""
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return f"<{kind}>" if f"<{kind}>" in STORES else "<other>"


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
    module: Annotated[str, AfterValidator(as_factory)] | None = None
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
    transform: Annotated[str, AfterValidator(as_factory)] | None = None
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
    alpha: Annotated[Text, shaped(f"{COLOUR_PATTERN}|drop")] | None = None
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
    fill: Annotated[Text, shaped(COLOUR_PATTERN)] | None = None
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
        if not re.fullmatch(f"{COLOUR_PATTERN}|drop", alpha):
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
        if not re.fullmatch(COLOUR_PATTERN, fill):
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

    metric: Annotated[Text, AfterValidator(as_metric), shaped(rf"{METRIC_PATTERN}|{FLIPS}")]
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

    metric: Annotated[Text, AfterValidator(as_gate_metric), shaped(METRIC_PATTERN)] = "map@100"
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
        list[Annotated[int, Field(ge=1, le=100)]], Field(min_length=1, max_length=100), AfterValidator(as_canary)
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
        Discriminator(store_kind),
    ]
    """Where the collection is stored."""
    images: Images
    """Where its images are stored."""
    old_encoder: Annotated[
        Annotated[Literal["stored"], BeforeValidator(as_stored), Tag("<stored>")]
        | Annotated[OldEncoder, Tag("<model>")],
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
    ledger: Annotated[Text, AfterValidator(as_ledger)] = Field("sqlite:///migrator.db", validate_default=True)
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

        Values with a secret's name and credentials in URLs are masked; a value that came from the environment
        is shown as it is written in the file (`${NAME}`).
        """

        def hide(value: Any, at: Place) -> Any:
            if isinstance(value, dict):
                return {
                    key: _HIDDEN if at[2:3] == ("store",) and SECRET_KEY.search(key) else hide(inner, (*at, key))
                    for key, inner in value.items()
                }
            if isinstance(value, list):
                return [hide(inner, (*at, index)) for index, inner in enumerate(value)]
            shown = self._texts.get(at, value)
            if not isinstance(shown, str):
                return shown
            return _URL_PARAMETER.sub(rf"\g<1>{_HIDDEN}", URL_CREDENTIALS.sub(f"{_HIDDEN}@", shown))

        redacted: dict[str, Any] = hide(self.model_dump(mode="json", by_alias=True, exclude_none=True), ())
        return redacted


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `migrations.yaml`, made from the same types that check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
