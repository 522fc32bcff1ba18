"""Image files to files of vectors: what `migrator embed` does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from migrator.embedding.embed import embed
from migrator.errors import UsageProblem
from migrator.trainer.errors import ImageProblem
from migrator.trainer.files import sync_folder
from migrator.trainer.images.source import image_suffixes, open_file

if TYPE_CHECKING:
    from PIL import Image

    from migrator.trainer.encoders.encoder import Encoder

PART = 1024
"""Images that are embedded together: what an interrupted run to stdout loses at most."""
SUFFIXES = (".npy", ".parquet")

Vectors = NDArray[np.float32]
Report = Callable[[int, int], None]


def find_images(places: Sequence[str], lines: Iterable[str] = ()) -> list[str]:
    """The files named, those of `lines`, and the images below the folders named, each once, in order.

    A file that is named is taken for an image, whatever its suffix. Raises UsageProblem for a folder without images.
    """
    found: dict[str, None] = {}
    for place in [*places, *(line.rstrip("\n") for line in lines)]:
        if not place:
            continue
        if not Path(place).is_dir():
            found[place] = None
            continue
        inside = sorted(
            str(Path(folder, name))
            for folder, _, names in os.walk(place, followlinks=False)
            for name in names
            if Path(name).suffix.lower() in image_suffixes()
        )
        if not inside:
            raise UsageProblem(f"folder {place!r} holds no images ({', '.join(sorted(image_suffixes())[:6])}, ...)")
        found.update(dict.fromkeys(inside))
    return list(found)


class LocalFiles:
    """Image files by the paths that the user gave."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels

    def load(self, path: str) -> Image.Image:
        """Raises ImageProblem where the file is no picture, and where a list of paths could not hold its name."""
        if path.splitlines() != [path]:
            raise ImageProblem(f"image {path!r} has a line break in its name: rename it")
        return open_file(path, self._max_pixels)


class Sink(Protocol):
    """Where vectors go."""

    def write(self, paths: Sequence[str], vectors: Vectors) -> None:
        """Takes (n, dim) vectors of unit length and the paths of their images."""
        ...

    def finish(self) -> None:
        """Puts the whole in place. Without this call nothing is left behind."""
        ...

    def close(self) -> None:
        """Removes what was not finished."""
        ...


class JsonLines:
    """One JSON object a line, `{"path": ..., "vector": [...]}`, as soon as a part is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, paths: Sequence[str], vectors: Vectors) -> None:  # noqa: D102
        for path, vector in zip(paths, vectors.tolist(), strict=True):
            self._stream.write(json.dumps({"path": path, "vector": vector}) + "\n")
        self._stream.flush()

    def finish(self) -> None:  # noqa: D102
        pass

    def close(self) -> None:  # noqa: D102
        pass


class _File:
    """A file that appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.draft = path.with_name(path.name + ".tmp")

    def _publish(self, *drafts: tuple[Path, Path]) -> None:
        for draft, path in drafts:
            draft.replace(path)
        sync_folder(self.path.parent)

    def close(self) -> None:
        self.draft.unlink(missing_ok=True)


class NpyFile(_File):
    """A NumPy array (n, dim) float32, and beside it a .txt with the path of each row, a line each."""

    def __init__(self, path: Path, dim: int) -> None:
        super().__init__(path)
        self._dim = dim
        self._paths: list[str] = []
        self._vectors: list[Vectors] = []
        self._names = path.with_suffix(".txt.tmp")

    def write(self, paths: Sequence[str], vectors: Vectors) -> None:  # noqa: D102
        self._paths.extend(paths)
        self._vectors.append(vectors)

    def finish(self) -> None:  # noqa: D102
        whole = np.concatenate(self._vectors) if self._vectors else np.empty((0, self._dim), np.float32)
        with self.draft.open("wb") as stream:
            np.save(stream, whole)
        self._names.write_text("".join(f"{path}\n" for path in self._paths), encoding="utf-8", errors="surrogateescape")
        self._publish((self.draft, self.path), (self._names, self.path.with_suffix(".txt")))

    def close(self) -> None:  # noqa: D102
        super().close()
        self._names.unlink(missing_ok=True)


class ParquetFile(_File):
    """Columns `path` and `vector` (a list of `dim` float32); the encoder's id in the file's metadata."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(path)
        self._schema = pa.schema(
            [("path", pa.string()), ("vector", pa.list_(pa.float32(), encoder.dim))], metadata={"encoder": encoder.id}
        )
        self._writer = pq.ParquetWriter(self.draft, self._schema)

    def write(self, paths: Sequence[str], vectors: Vectors) -> None:  # noqa: D102
        import pyarrow as pa

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        names = [os.fsencode(path).decode(errors="replace") for path in paths]
        self._writer.write_table(pa.table([pa.array(names, pa.string()), column], schema=self._schema))

    def finish(self) -> None:  # noqa: D102
        self._writer.close()
        self._publish((self.draft, self.path))

    def close(self) -> None:  # noqa: D102
        self._writer.close()
        super().close()


def check_output(output: str) -> None:
    """Refuses an output that cannot be written, before an encoder is loaded."""
    path = Path(output)
    if output != "-" and path.suffix not in SUFFIXES:
        raise UsageProblem(f"--output {output} must end with {' or '.join(SUFFIXES)}, or be - for lines of JSON")
    if output != "-" and not path.parent.is_dir():
        raise UsageProblem(f"--output {output}: there is no folder {str(path.parent)!r}: make it first")


def open_sink(output: str, encoder: Encoder, stream: TextIO) -> Sink:
    """What `output` names: a .npy or .parquet file, or `-`."""
    if output == "-":
        return JsonLines(stream)
    return NpyFile(Path(output), encoder.dim) if output.endswith(".npy") else ParquetFile(Path(output), encoder)


def embed_files(
    paths: Sequence[str], encoder: Encoder, sink: Sink, report: Report, *, max_pixels: int, **loading: Any
) -> dict[str, str]:
    """Embeds image files into a sink, and returns the path and reason of each that has no vector.

    Where no image has one, the sink is left unfinished. `loading` is for `migrator.embedding.embed.embed`.
    """
    source = LocalFiles(max_pixels)
    problems: dict[str, str] = {}
    done = written = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        report(done, len(paths))

    with ExitStack() as stack:
        stack.callback(sink.close)
        for part in _parts(paths):
            found = embed(source, part, [encoder], report=advance, **loading)
            problems.update({part[row]: why for row, why in found.problems.items()})
            if len(found.rows):
                sink.write([part[row] for row in found.rows], found.vectors[0])
                written += len(found.rows)
        if written:
            sink.finish()
    return problems


def _parts(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (paths[start : start + PART] for start in range(0, len(paths), PART))
