"""Images to train and test on: Fashion-MNIST and drawings of emoji, built once from Debian's and npm's packages.

Both become PNG files below a folder that git ignores (`bench-data/`), with `items.csv` (path, label, artist, part)
beside them. Nothing of the data is committed: the licences are open, and the packages are where they are.

A class of the emoji is a code point sequence, and its images are the drawings of several artists. Left out are
- flags, and the five patches of skin colour: no drawings, or all the same ones;
- whatever a sign for man or woman or a family makes of a person: such drawings differ by a haircut;
- skin tones: the packages list them as variants of a base, and only the base is taken;
- clock faces, which differ by the angle of a hand, and the smaller ones of the same square.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path("bench-data")
FASHION = Path("/usr/share/datasets/fashion-mnist")
EMOJI_SIDE = 64
MIN_ARTISTS = 4


@dataclass(frozen=True)
class Drawings:
    """Where an artist's drawings are: an npm package, and how it holds them."""

    artist: str
    package: str
    version: str
    kind: str  # "pngs": a PNG a code point; "icons": SVGs by name in icons.json
    licence: str


GOOGLE = Drawings("google", "emoji-datasource-google", "16.0.0", "pngs", "Apache-2.0")
ARTISTS = (
    GOOGLE,
    Drawings("blobs", "emoji-datasource-google", "3.0.0", "pngs", "Apache-2.0"),
    Drawings("twitter", "emoji-datasource-twitter", "16.0.0", "pngs", "CC-BY-4.0"),
    Drawings("openmoji", "@iconify-json/openmoji", "1.2.29", "icons", "CC-BY-SA-4.0"),
    Drawings("emojione", "@iconify-json/emojione", "1.2.3", "icons", "CC-BY-4.0"),
    Drawings("fluent", "@iconify-json/fluent-emoji", "1.2.7", "icons", "MIT"),
    Drawings("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "icons", "MIT"),
    Drawings("fxemoji", "@iconify-json/fxemoji", "1.2.2", "icons", "Apache-2.0"),
)
NAMED_BY_CODE = ("openmoji", "fluent-flat")
"""Artists whose package says which code points an icon's name stands for; the others use the same names."""


@dataclass(frozen=True)
class Images:
    """A data set: n images with their labels, below `root`."""

    name: str
    root: Path
    paths: tuple[str, ...]
    labels: NDArray[np.str_]  # (n,)
    artists: NDArray[np.str_]  # (n,), empty where there are none
    parts: NDArray[np.str_]  # (n,) "train" or "test" where the data set has such parts, else empty
    digest: str = field(repr=False)
    """Of the contents of all files."""

    @cached_property
    def classes(self) -> list[str]:
        return sorted(set(self.labels.tolist()))


def load(name: str, data: Path = DATA) -> Images:
    """The data set `fashion` or `emoji`, built first if it is not there."""
    root = data / name
    if not (root / "items.csv").exists():
        print(f"building {root}", flush=True)
        drawn = {"fashion": fashion, "emoji": emoji}[name](data)
        write(root, drawn)
    with (root / "items.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return Images(
        name,
        root,
        tuple(row["path"] for row in rows),
        np.array([row["label"] for row in rows]),
        np.array([row["artist"] for row in rows]),
        np.array([row["part"] for row in rows]),
        (root / "digest").read_text().strip(),
    )


@dataclass(frozen=True)
class Drawn:
    """One image before it is written."""

    path: str
    label: str
    png: bytes
    artist: str = ""
    part: str = ""


def write(root: Path, drawn: Iterator[Drawn]) -> None:
    digest = hashlib.sha256()
    rows = []
    for image in drawn:
        place = root / image.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image.png)
        digest.update(f"{image.path}\t{image.label}\t".encode() + image.png)
        rows.append((image.path, image.label, image.artist, image.part))
    (root / "digest").write_text(digest.hexdigest() + "\n")
    with (root / "unfinished.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "artist", "part"), *rows])
    (root / "unfinished.csv").rename(root / "items.csv")


def png(pixels: Any) -> bytes:
    """Of a Pillow picture, or of grey pixels (height, width) uint8."""
    from PIL import Image

    picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


# --- Fashion-MNIST --------------------------------------------------------------------------------------------------


def fashion(data: Path) -> Iterator[Drawn]:
    """70,000 product images of 28 x 28 grey pixels in 10 classes (MIT licence), as Debian packages them."""
    if not FASHION.exists():
        raise SystemExit(
            f"{FASHION} is missing: apt-get install -y --no-install-recommends dataset-fashion-mnist (Debian, Ubuntu)"
        )
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = idx(FASHION / f"{prefix}-images-idx3-ubyte.gz")
        labels = idx(FASHION / f"{prefix}-labels-idx1-ubyte.gz")
        for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            yield Drawn(f"{part}/{row // 1000:02d}/{row:05d}.png", str(label), png(image), part=part)


def idx(file: Path) -> NDArray[np.uint8]:
    """An array of bytes in the idx format: magic number, dimensions as big-endian integers, bytes."""
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{file} is not an idx file of bytes: install dataset-fashion-mnist again")
    dimensions = np.frombuffer(content, ">i4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dimensions)


# --- emoji ----------------------------------------------------------------------------------------------------------


def emoji(data: Path) -> Iterator[Drawn]:
    """Drawings on white, `EMOJI_SIDE` pixels square, of the code points that enough artists have drawn."""
    packages = {artist.artist: download(artist, data / "tarballs") for artist in ARTISTS}
    listed = json.loads(member(packages[GOOGLE.artist], "emoji.json"))
    wanted = {code(entry["unified"]): entry for entry in listed if kept(entry)}
    names = icon_names(wanted, [json.loads(member(packages[artist], "chars.json")) for artist in NAMED_BY_CODE])
    drawings: dict[str, dict[str, bytes]] = {}
    for artist in ARTISTS:
        reader = pngs if artist.kind == "pngs" else icons
        for found, image in reader(packages[artist.artist], names):
            if found in wanted:
                drawings.setdefault(found, {})[artist.artist] = image
    for found, by_artist in sorted(drawings.items()):
        if len(by_artist) >= MIN_ARTISTS:
            for name, image in sorted(by_artist.items()):
                yield Drawn(f"{name}/{found}.png", found, image, artist=name)


def code(text: str) -> str:
    """Code points as the packages write them -> one form: lower case, without the variation selector FE0F.

    The selector asks for a coloured drawing; whether it is written differs between packages.
    """
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


LINKS = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
PERSON_SIGNS = {"2640", "2642"}
SMALLER_SQUARE = re.compile(r"(MEDIUM|SMALL)\b.*\bSQUARE")


def kept(entry: dict[str, Any]) -> bool:
    """Whether an entry of emoji.json is a class of its own, that a drawing can be recognised by."""
    points = code(entry["unified"]).split("-")
    name = (entry["name"] or "").upper()
    gendered = PERSON_SIGNS & set(points[1:]) or (len(points) > 1 and points[0] in ("1f468", "1f469"))
    return not (
        entry["category"] in ("Flags", "Component")
        or entry["subcategory"] == "family"
        or gendered
        or name.startswith("CLOCK FACE")
        or SMALLER_SQUARE.search(name)
    )


def icon_names(wanted: dict[str, dict[str, Any]], charts: list[dict[str, str]]) -> dict[str, str]:
    """Code points by an icon's name, letters and digits alone: by Unicode's names, and by what packages call them.

    A name that stands for two code points says nothing and is left out.
    """
    found: dict[str, set[str]] = {}
    for point, entry in wanted.items():
        for name in (entry["name"] or "", *entry["short_names"]):
            found.setdefault(plain(name), set()).add(point)
    for chart in charts:
        for points, name in chart.items():
            found.setdefault(plain(name), set()).add(code(points))
    return {name: points.pop() for name, points in found.items() if len(points) == 1 and name}


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def download(drawings: Drawings, folder: Path) -> Path:
    """The package's tarball, by npm unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{drawings.package.lstrip('@').replace('/', '-')}-{drawings.version}.tgz"
    if not file.exists():
        try:
            subprocess.run(
                ["npm", "pack", "--silent", f"{drawings.package}@{drawings.version}"], cwd=folder, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"npm cannot get {drawings.package}@{drawings.version} ({error}): install npm, or put {file} in place"
            ) from error
    return file


def member(package: Path, name: str) -> bytes:
    with tarfile.open(package) as archive:
        stream = archive.extractfile(f"package/{name}")
        assert stream is not None
        return stream.read()


def pngs(package: Path, names: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """(code points, image) of img/<artist>/64/<code points>.png. Names are not needed here."""
    from PIL import Image

    with tarfile.open(package) as archive:
        for entry in archive:
            if match := re.fullmatch(r"package/img/[a-z]+/64/([0-9a-f-]+)\.png", entry.name):
                stream = archive.extractfile(entry)
                assert stream is not None
                picture = Image.open(io.BytesIO(stream.read())).convert("RGBA")
                yield code(match[1]), png(on_white(picture))


def on_white(picture: Any) -> Any:
    from PIL import Image

    if picture.size != (EMOJI_SIDE, EMOJI_SIDE):
        picture = picture.resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS)
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def icons(package: Path, names: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """(code points, image) of the SVGs in an Iconify package whose name is known."""
    try:
        import resvg_py
    except ImportError as error:
        raise SystemExit("resvg-py draws the SVGs: pip install -e '.[bench]'") from error
    from PIL import Image

    content = json.loads(member(package, "icons.json"))
    aliases = content.get("aliases", {})
    # A mirrored drawing of another class is no drawing of its own.
    shown = {name: alias["parent"] for name, alias in aliases.items() if set(alias) == {"parent"}}
    shown |= {name: name for name in content["icons"]}
    drawn: set[str] = set()
    for name, parent in sorted(shown.items(), key=lambda pair: pair[0] != pair[1]):  # own names before aliases
        points = names.get(plain(name))
        icon = content["icons"].get(parent)
        if points is None or icon is None or points in drawn:
            continue
        drawn.add(points)
        width = icon.get("width", content.get("width", 16))
        height = icon.get("height", content.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {LINKS} viewBox="{box}">{icon["body"]}</svg>'
        image = resvg_py.svg_to_bytes(svg_string=svg, width=EMOJI_SIDE, height=EMOJI_SIDE, background="white")
        yield points, png(on_white(Image.open(io.BytesIO(bytes(image))).convert("RGBA")))


def counts(images: Images) -> str:
    """One line for a report."""
    artists = sorted(set(images.artists.tolist()) - {""})
    by_artist = ", ".join(f"{artist} {int((images.artists == artist).sum())}" for artist in artists)
    return f"{images.name}: {len(images.paths):,} images of {len(images.classes):,} classes" + (
        f" ({by_artist})" if artists else ""
    )


if __name__ == "__main__":
    for name in ("fashion", "emoji"):
        print(counts(load(name)))
