"""What becomes of bad input: a table of kinds, each with what has to happen, and the command that tries them all.

`python -m harness.bad_input` writes results/bad_input.md. Rows (`ROWS`) go into one run on the embedded
digits, where each is taken or quarantined with its reason; everything else (`REFUSALS`) must end before a run folder
is made, with exit code 2 and one sentence. `tests/end_to_end/test_wrong_input.py` checks every line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from pipelines.benchmarks.tables import document, markdown
from posttrain.vision import datasets, models
from posttrain.vision.weights import to_bytes

MODELS = "harness.bad_models"

Sections = Mapping[str, Mapping[str, Any]]
"""Keys of a run file, in place of those that `Workshop.run_file` has."""


class Workshop:
    """A folder with the digits as Parquet and weights that fit, and what the kinds need to make their input of."""

    def __init__(self, folder: Path, tracking: str | None = None) -> None:
        self.folder, self.tracking = folder, tracking
        table = datasets.digits(0)["train"].replace_schema_metadata(None)
        pixels = [np.frombuffer(cell, np.uint8).reshape(8, 8) for cell in table["image"].to_pylist()]
        self.digits = pa.table(
            {
                "id": table["id"].cast(pa.int64()),
                "image": pa.array([encoded(Image.fromarray(image), "PNG") for image in pixels], pa.binary()),
                "label": table["label"].cast(pa.int64()),
            }
        )
        self.train, self.validation = self.digits.slice(0, 600), self.digits.slice(600, 300)
        torch.manual_seed(0)
        self.written = 0
        self.weights = self.torch(models.mlp(10).state_dict())
        self.paths = {"train": self.parquet(self.train), "validation": self.parquet(self.validation)}

    def run_file(self, path: Path, changed: Sections) -> dict[str, Any]:
        """A run file on the digits, with other keys."""
        raw: dict[str, dict[str, Any]] = {
            "run": {"path": str(path)},
            "data": {"source": "parquet", **self.paths},
            "model": {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8},
            "removal": {"max_rounds": 1},
            "ray": {"workers": 2},
            "tracking": {"uri": self.tracking, "log_model": False},
        }
        if "factory" not in changed.get("model", {}):
            raw["model"]["weights"] = self.weights
        for section, keys in changed.items():
            raw[section] = {**raw.get(section, {}), **keys}
        return raw

    def parquet(self, *tables: pa.Table, end: Callable[[bytes], bytes] = lambda content: content) -> str:
        """A new folder with the tables as a.parquet, b.parquet, ...; `end` changes the bytes of the last one."""
        folder = self.new("data")
        folder.mkdir()
        for name, table in zip("abcdefgh", tables, strict=False):
            pq.write_table(table, folder / f"{name}.parquet")
        last = folder / f"{'abcdefgh'[len(tables) - 1]}.parquet"
        last.write_bytes(end(last.read_bytes()))
        return str(folder)

    def torch(self, content: object, name: str = "weights.pt") -> str:
        """A file by torch.save."""
        path = self.new(name)
        torch.save(content, path)
        return str(path)

    def bytes(self, content: bytes, name: str) -> str:
        """A file with this content."""
        path = self.new(name)
        path.write_bytes(content)
        return str(path)

    def folders(self, *images: str, links: Mapping[str, str] = {}) -> str:
        """A folder with copies of one digit at these paths, and symbolic links."""
        root = self.new("classes")
        for image in images:
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            (root / image).write_bytes(self.digits["image"][0].as_py())
        for link, target in links.items():
            (root / link).symlink_to(target)
        return str(root)

    def new(self, name: str) -> Path:
        """A path in the folder that is not there yet."""
        self.written += 1
        return self.folder / f"{self.written:03d}-{name}"


# what goes into the one run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A sample among the digits."""

    kind: str
    given: str
    image: Callable[[], bytes | None]
    reason: str | None = None
    """Why it is quarantined (the beginning of the reason); None: it is taken."""
    label: float | None = 3.0


@dataclass(frozen=True)
class File:
    """A Parquet file among those of the digits, of which every row is taken."""

    kind: str
    given: str
    write: Callable[[pa.Table, Path], None]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of that kind."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def drawn(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture of that mode, the same every time."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def animated(kind: str) -> bytes:
    """Two frames, dark and light."""
    return encoded(Image.new("L", (8, 8), 20), kind, save_all=True, append_images=[Image.new("L", (8, 8), 220)])


def rotated() -> bytes:
    """A JPEG whose EXIF says that it is to be turned clockwise by 90 degrees."""
    exif = Image.Exif()
    exif[0x112] = 6
    return encoded(drawn("RGB"), "JPEG", exif=exif)


def bomb(width: int, height: int) -> bytes:
    """A whole and valid PNG of black pixels, one bit each: a few kilobytes for gigabytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packing = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packing.compress(row) for _ in range(height)) + packing.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def deep_colour() -> bytes:
    """A PNG with three channels of 16 bits, which Pillow cannot write."""
    rows = b"".join(b"\0" + np.full((8, 3), 40_000, ">u2").tobytes() for _ in range(8))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _empty_row_groups(table: pa.Table, path: Path) -> None:
    with pq.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2)):
            writer.write_table(part)


def _digit() -> bytes:
    return encoded(drawn("L", (8, 8)), "PNG")


ROWS: tuple[Row, ...] = (
    Row("image: CMYK", "a JPEG in CMYK", lambda: encoded(drawn("CMYK"), "JPEG")),
    Row("image: 16 bit", "a grey PNG of 16 bits", lambda: encoded(Image.new("I;16", (8, 8), 40_000), "PNG")),
    Row("image: 16 bit", "a colour PNG of 16 bits", deep_colour),
    Row("image: palette", "a PNG with a palette", lambda: encoded(drawn("P"), "PNG")),
    Row("image: palette", "a GIF", lambda: encoded(drawn("P"), "GIF")),
    Row("image: transparent", "a PNG with alpha", lambda: encoded(drawn("RGBA"), "PNG")),
    Row("image: one bit", "a PNG of black and white", lambda: encoded(drawn("1"), "PNG")),
    Row("image: animated", "a GIF of two frames", lambda: animated("GIF")),
    Row("image: animated", "a PNG of two frames", lambda: animated("PNG")),
    Row("image: animated", "a WebP of two frames", lambda: animated("WEBP")),
    Row("image: 1x1", "a PNG of one pixel", lambda: encoded(Image.new("L", (1, 1), 99), "PNG")),
    Row("image: EXIF-rotated", "a JPEG to be turned by 90 degrees", rotated),
    Row("image: no colours", "a TIFF in LAB", lambda: encoded(drawn("LAB"), "TIFF")),
    Row("image: null", "nothing", lambda: None, "no image"),
    Row("image: zero bytes", "an empty cell", lambda: b"", "empty"),
    Row("image: wrong format", "text", lambda: b"see attachment", "not an image in a known format (14 bytes"),
    Row("image: wrong format", "a PDF", lambda: encoded(drawn("RGB"), "PDF"), "not an image in a known format"),
    Row("image: wrong format", "PostScript", lambda: encoded(drawn("RGB"), "EPS"), "not an image in a known format"),
    Row("image: wrong format", "pickle", lambda: pickle.dumps([0] * 64), "not an image in a known format"),
    Row("image: truncated", "half a PNG", lambda: encoded(drawn("RGB"), "PNG")[:600], "broken PNG"),
    Row("image: truncated", "half a JPEG", lambda: encoded(drawn("RGB"), "JPEG")[:700], "broken JPEG"),
    Row("image: truncated", "half a GIF", lambda: encoded(drawn("P"), "GIF")[:-80], "broken GIF"),
    Row("image: truncated", "half a TIFF", lambda: encoded(drawn("RGB"), "TIFF")[:500], "broken TIFF"),
    Row("image: truncated", "half a WebP", lambda: encoded(drawn("RGB"), "WEBP")[:200], "broken image"),
    Row(
        "image: truncated",
        "the header of a PNG",
        lambda: encoded(drawn("L"), "PNG")[:33],
        "not an image in a known format (33 bytes",
    ),
    Row("image: damaged", "a PNG with a wrong checksum", lambda: _damaged(_digit()), "broken PNG"),
    Row(
        "image: decompression bomb",
        "a PNG of 30,000x30,000 pixels in 110 kB",
        lambda: bomb(30_000, 30_000),
        "30000x30000 pixels, more than the limit of 178,956,970",
    ),
    Row(
        "image: long and narrow",
        "a PNG of 20,000,000x1 pixels",
        lambda: bomb(20_000_000, 1),
        "20000000x1 pixels are too long and narrow for 8x8",
    ),
    Row(
        "image: 32 bit",
        "a TIFF of floating-point numbers",
        lambda: encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
        "TIFF with 32-bit pixels, whose range is not known",
    ),
    Row("label: null", "no label", _digit, "no label", None),
    Row("label: NaN", "NaN in a column of floats", _digit, "no label", float("nan")),
    Row("label: float", "3.0 in a column of floats", _digit),
    Row(
        "features: NaN or infinite",
        "an image on which the network divides by 0",
        lambda: encoded(Image.new("L", (8, 8), 255), "PNG"),
        "features are not finite",
    ),
)

FILES: tuple[File, ...] = (
    File("Parquet: other column order", "label, id, more, image", lambda t, path: _reordered(t, path)),
    File("Parquet: empty row groups", "row groups of 0, 2, 0 and 2 rows", _empty_row_groups),
    File("Parquet: other width", "ids of 32 bits, images with 64-bit offsets", lambda t, path: _wider(t, path)),
)

MISSING_CLASS = ("label: a class missing", "data.classes = 11, and no sample of class 10")


def _damaged(png: bytes) -> bytes:
    at = png.index(b"IDAT") + 8
    return png[:at] + bytes([png[at] ^ 0xFF]) + png[at + 1 :]


def _reordered(table: pa.Table, path: Path) -> None:
    more = pa.array(range(table.num_rows))
    pq.write_table(table.append_column("more", more).select(["label", "id", "more", "image"]), path)


def _wider(table: pa.Table, path: Path) -> None:
    columns = {"id": table["id"].cast(pa.int32()), "image": table["image"].cast(pa.large_binary())}
    pq.write_table(pa.table({**columns, "label": table["label"].cast(pa.float32())}), path)


@dataclass(frozen=True)
class Outcome:
    """What became of a kind."""

    kind: str
    given: str
    outcome: str
    """taken, quarantined or refused."""
    message: str = ""


FIRST_ROW, FIRST_OF_FILES, ROWS_PER_FILE = 100_000, 200_000, 4


def _written_rows(workshop: Workshop) -> tuple[Path, int]:
    """A folder with the digits, all `ROWS` and all `FILES`, and how many samples these are."""
    folder = workshop.new("rows")
    folder.mkdir()
    floats = workshop.train.set_column(2, "label", workshop.train["label"].cast(pa.float64()))
    rows = pa.table(
        {
            "id": pa.array(range(FIRST_ROW, FIRST_ROW + len(ROWS)), pa.int64()),
            "image": pa.array([row.image() for row in ROWS], pa.binary()),
            "label": pa.array([row.label for row in ROWS], pa.float64()),
        }
    )
    pq.write_table(floats, folder / "digits.parquet")
    pq.write_table(rows, folder / "rows.parquet")
    for number, file in enumerate(FILES):
        table = floats.slice(ROWS_PER_FILE * number, ROWS_PER_FILE)
        file.write(table.set_column(0, "id", pa.array(_ids(number), pa.int64())), folder / f"file{number}.parquet")
    return folder, floats.num_rows + len(ROWS) + ROWS_PER_FILE * len(FILES)


def _ids(number: int) -> range:
    first = FIRST_OF_FILES + ROWS_PER_FILE * number
    return range(first, first + ROWS_PER_FILE)


def _outcomes(reasons: Mapping[int, str], taken: set[int]) -> list[Outcome]:
    def became(identity: int) -> tuple[str, str]:
        assert (identity in taken) != (identity in reasons), f"sample {identity} is in both or in none"
        return ("taken", "") if identity in taken else ("quarantined", reasons[identity])

    outcomes = [Outcome(row.kind, row.given, *became(FIRST_ROW + at)) for at, row in enumerate(ROWS)]
    for number, file in enumerate(FILES):
        assert len({became(identity) for identity in _ids(number)}) == 1
        outcomes.append(Outcome(file.kind, file.given, *became(_ids(number)[0])))
    return [*outcomes, Outcome(*MISSING_CLASS, "taken")]


def run_rows(workshop: Workshop, path: Path) -> list[Outcome]:
    """What becomes of all `ROWS` and `FILES` in one run, and of a class without a sample."""
    from posttrain.config import RunFile
    from posttrain.runs.clean import clean

    folder, samples = _written_rows(workshop)
    changed = {
        "data": {"train": str(folder), "classes": 11},
        "model": {"factory": f"{MODELS}:stumbling", "weights": workshop.torch(_stumbling(11))},
    }
    summary = clean(RunFile.model_validate(workshop.run_file(path, changed)), quiet=True)
    quarantined = pq.read_table(path / "quarantine.parquet")
    assert summary["live"] + summary["removed"] + summary["quarantined"] == samples
    return _outcomes(
        dict(zip(quarantined["sample_id"].to_pylist(), quarantined["reason"].to_pylist(), strict=True)),
        set(pyarrow.csv.read_csv(path / "issues.csv")["sample_id"].to_pylist()),
    )


def embedded_rows(workshop: Workshop) -> list[Outcome]:
    """The same without Ray: what a task that reads, and a worker that embeds, make of these files, in this process."""
    from posttrain.cluster.workers import embed_block
    from posttrain.data.normalise import normalise
    from posttrain.data.sources import ParquetSource, list_source
    from posttrain.schema import ImageSpec, ModelSpec

    folder, samples = _written_rows(workshop)
    factory = f"{MODELS}:stumbling"
    classes = tuple(map(str, range(11)))
    model = models.build(factory, classes=11, arguments={})
    model.load_state_dict(_stumbling(11))
    spec = ModelSpec(factory, {}, 11, "body.head", ImageSpec(1, (8, 8), (0.5,), (0.5,), None), ("body.head",), 256)
    reasons: dict[int, str] = {}
    taken: set[int] = set()
    assert list_source(ParquetSource((str(folder),), "id", "image", "label")).rows == samples
    for path in sorted(folder.iterdir()):
        source = ParquetSource((str(path),), "id", "image", "label")
        table = pq.read_table(path, columns=["id", "image", "label"])
        table = table.append_column("path", pa.array([str(path)] * table.num_rows))
        block = normalise(table, split="train", source=source, classes=classes)
        shard, quarantined = embed_block(model, spec, block, np.empty(0, np.int64), torch.device("cpu"))
        taken.update(shard.sample_ids.to_pylist())
        reasons.update({int(str(row["sample_id"])): str(row["reason"]) for row in quarantined})
    assert len(taken) + len(reasons) == samples
    return _outcomes(reasons, taken)


def _stumbling(classes: int) -> dict[str, torch.Tensor]:
    from harness.bad_models import stumbling

    torch.manual_seed(0)
    return stumbling(classes).state_dict()


# what is refused --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Input with which no run may begin."""

    kind: str
    given: str
    make: Callable[[Workshop], Sections | bytes] = field(repr=False)
    """Keys of the run file, or all of it as bytes."""
    says: str
    """What the sentence has to hold."""
    reads: bool = False
    """Whether it is found only when the data are read, with Ray."""


def refused(workshop: Workshop, refusal: Refusal) -> tuple[int, str, list[str]]:
    """Exit code, the lines of `posttrain clean` that begin with "error: ", and what it left behind."""
    from typer.testing import CliRunner

    from posttrain.cli import app

    run = workshop.new("run")
    made = refusal.make(workshop)
    file = workshop.new("run.yaml")
    if isinstance(made, bytes):
        file.write_bytes(made.replace(b"RUN", str(run).encode()))
    else:
        file.write_text(yaml.safe_dump(workshop.run_file(run, made)), encoding="utf-8")
    result = CliRunner().invoke(app, ["clean", str(file)])
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, "\n".join(lines), os.listdir(run) if run.exists() else []


def _train(**columns: Any) -> Callable[[Workshop], Sections]:
    """The training data with other columns; None takes one away, a function gets the one that is there."""

    def make(workshop: Workshop) -> Sections:
        table = workshop.train
        for name, column in columns.items():
            at = table.schema.get_field_index(name)
            new = column(table[name]) if callable(column) else column
            table = table.remove_column(at) if new is None else table.set_column(at, name, new)
        return {"data": {"train": workshop.parquet(table)}}

    return make


def _second(change: Callable[[pa.Table], pa.Table], end: Callable[[bytes], bytes] = bytes) -> Any:
    """The training data as two files, of which the second is another."""
    return lambda w: {"data": {"train": w.parquet(w.train.slice(0, 300), change(w.train.slice(300)), end=end)}}


def _with(at: int, value: Any) -> Callable[[pa.ChunkedArray], pa.Array]:
    """The column with another value in that row."""

    def change(column: pa.ChunkedArray) -> pa.Array:
        values = column.to_pylist()
        values[at] = value
        return pa.array(values)

    return change


def _model(**keys: Any) -> Callable[[Workshop], Sections]:
    return lambda workshop: {"model": {k: v(workshop) if callable(v) else v for k, v in keys.items()}}


def _pickled(column: pa.ChunkedArray) -> pa.Array:
    """The column as Ray stores Python objects: one pickle in each cell."""
    return pa.array([pickle.dumps(value) for value in column.to_pylist()], pa.large_binary())


def _pickles(workshop: Workshop) -> Sections:
    kind = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
    table = workshop.train.set_column(
        1, pa.field("image", pa.large_binary(), metadata=kind), _pickled(workshop.train["image"])
    )
    return {"data": {"train": workshop.parquet(table)}}


def _not_finite() -> dict[str, torch.Tensor]:
    state = models.mlp(10).state_dict()
    state["hidden.weight"][3, 5] = float("nan")
    return state


def _folders(*images: str, **links: str) -> Callable[[Workshop], Sections]:
    def make(workshop: Workshop) -> Sections:
        root = workshop.folders(*images, links={path.replace("__", "/"): target for path, target in links.items()})
        return {"data": {"source": "folder", "train": root, "validation": root}}

    return make


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSALS: tuple[Refusal, ...] = (
    # Parquet
    Refusal(
        "Parquet: truncated",
        "the second of two files, cut short",
        _second(lambda t: t, lambda b: b[:-40]),
        "b.parquet: not readable as Parquet",
    ),
    Refusal(
        "Parquet: truncated",
        "a file of 0 bytes",
        _second(lambda t: t, lambda b: b""),
        "b.parquet: not readable as Parquet (Could not open",
    ),
    Refusal(
        "Parquet: damaged",
        "labels overwritten, the footer whole",
        _second(lambda t: t, lambda b: _holed(b)),
        "b.parquet: not readable as Parquet",
    ),
    Refusal(
        "Parquet: no Parquet",
        "a text file",
        lambda w: {"data": {"train": w.bytes(b"id,label", "a.parquet")}},
        "a.parquet: not readable as Parquet",
    ),
    Refusal(
        "Parquet: no rows",
        "a file without rows",
        lambda w: {"data": {"train": w.parquet(w.train.slice(0, 0))}},
        "data: holds no samples; name a location with at least one row",
    ),
    Refusal(
        "Parquet: no such folder",
        "a path that is not there",
        lambda w: {"data": {"train": f"{w.folder}/absent"}},
        "absent: no such file or folder; check data.train",
    ),
    Refusal(
        "Parquet: wrong types",
        "paths instead of images",
        _train(image=lambda c: pa.array(["a.png"] * len(c))),
        "column 'image' is string where encoded images (binary), raw pixels or tensors are needed",
    ),
    Refusal(
        "Parquet: wrong types",
        "numbers instead of images",
        _train(image=lambda c: pa.array([0.5] * len(c))),
        "column 'image' is double where encoded images",
    ),
    Refusal(
        "Parquet: wrong types",
        "ids as floats",
        _train(id=lambda c: c.cast(pa.float64())),
        "a.parquet: column 'id' is double; ids have to be integers or strings (data.id)",
    ),
    Refusal(
        "Parquet: wrong types",
        "labels as timestamps",
        _train(label=lambda c: c.cast(pa.timestamp("s"))),
        "column 'label' is timestamp[ms]; labels have to be integers or class names",
    ),
    Refusal(
        "Parquet: null",
        "a label column of type null",
        _train(label=lambda c: pa.nulls(len(c))),
        "column 'label' is null; labels have to be integers or class names",
    ),
    Refusal(
        "Parquet: nested",
        "labels as lists",
        _train(label=lambda c: pa.array([[v] for v in c.to_pylist()])),
        "column 'label' is list<element: int64>; labels have to be",
    ),
    Refusal(
        "Parquet: nested",
        "labels in a struct",
        _train(label=lambda c: pa.array([{"y": v} for v in c.to_pylist()])),
        "column 'label' is struct<y: int64>; labels have to be",
    ),
    Refusal(
        "Parquet: missing column",
        "no column label",
        _train(label=None),
        "a.parquet: no column 'label'; the file has id, image; set data.label",
    ),
    Refusal(
        "Parquet: extra file with another schema",
        "a second file without labels",
        _second(lambda t: t.drop_columns(["label"])),
        "b.parquet: no column 'label'; the file has id, image; set data.label, or keep",
    ),
    Refusal(
        "Parquet: extra file with another schema",
        "names in the second file, numbers in the first",
        _second(lambda t: t.set_column(2, "label", t["label"].cast(pa.string()))),
        "b.parquet: column 'label' is string, and in",
    ),
    Refusal(
        "Parquet: two columns of one name",
        "two columns id",
        lambda w: {"data": {"train": w.parquet(w.train.append_column("id", w.train["label"]))}},
        "a.parquet: 2 columns 'id'; give each column a name of its own",
    ),
    Refusal(
        "Parquet: pickled objects",
        "images as Ray pickles Python objects",
        _pickles,
        "column 'image' holds pickled Python objects, which could run code and are refused",
    ),
    Refusal(
        "Parquet: broken metadata",
        "class_names that are no JSON",
        lambda w: {"data": {"train": w.parquet(w.train.replace_schema_metadata({"class_names": "[1, 2"}))}},
        "class_names in the schema's metadata are no list of names",
    ),
    # labels
    Refusal(
        "label: float",
        "2.5",
        _train(label=lambda c: pa.array([2.5, *map(float, c.to_pylist()[1:])])),
        "a.parquet: label 2.5 at sample_id",
        reads=True,
    ),
    Refusal(
        "label: infinite",
        "infinity",
        _train(label=lambda c: pa.array([float("inf"), *map(float, c.to_pylist()[1:])])),
        "data: a label is inf; is data.label = 'label' the right column?",
    ),
    Refusal("label: negative", "-1", _train(label=_with(7, -1)), "a.parquet: label -1 at sample_id", reads=True),
    Refusal(
        "label: out of range",
        "17 of 10 classes",
        lambda w: {"data": {**_train(label=_with(7, 17))(w)["data"], "classes": 10}},
        "a.parquet: label 17 at sample_id",
        reads=True,
    ),
    Refusal(
        "label: far out of range",
        "numbers of seconds",
        _train(label=_with(7, 1_700_000_000)),
        "the labels go up to 1700000000, with 600 samples; is data.label = 'label' the right column?",
    ),
    Refusal(
        "label: string names",
        "a name that data.classes lacks",
        lambda w: {
            "data": {
                **_train(label=lambda c: pa.array([f"n{v}" for v in c.to_pylist()]))(w)["data"],
                "classes": [f"n{v}" for v in range(9)] + ["other"],
            }
        },
        "a.parquet: label 'n9' at sample_id",
        reads=True,
    ),
    Refusal(
        "label: one class only",
        "0 everywhere",
        _train(label=lambda c: pa.array([0] * len(c))),
        "only one class (0); at least two are needed",
    ),
    Refusal(
        "label: one class only",
        "3 of 10 classes everywhere",
        lambda w: {"data": {**_train(label=lambda c: pa.array([3] * len(c)))(w)["data"], "classes": 10}},
        "only one class (3); at least two are needed",
        reads=True,
    ),
    # ids
    Refusal(
        "id: duplicate",
        "3 twice",
        _train(id=lambda c: pa.array([*c.to_pylist()[:-1], c[0].as_py()])),
        "occurs twice in the train data",
        reads=True,
    ),
    Refusal(
        "id: null",
        "one without",
        _train(id=_with(7, None)),
        "a.parquet: column 'id' has 1 empty ids; every sample needs one",
        reads=True,
    ),
    Refusal(
        "id: too large",
        "2^63 + 5",
        _train(id=lambda c: pa.array([*c.to_pylist()[:-1], 2**63 + 5], pa.uint64())),
        "a.parquet: column 'id' holds an id above 2^63 - 1; write it as a string (data.id)",
        reads=True,
    ),
    Refusal(
        "id: in two sets",
        "the first training id in the validation set, too",
        lambda w: {"data": {"validation": w.parquet(pa.concat_tables([w.validation, w.train.slice(0, 1)]))}},
        "is in both the train and the validation set",
        reads=True,
    ),
    # class folders
    Refusal(
        "folders: an image in no class",
        "an image beside the class folders",
        _folders("cat/a.png", "b.png"),
        "classes/b.png: lies in no class folder; expected <class>/<image>",
    ),
    Refusal(
        "folders: a link that leads back",
        "cat/again -> ..",
        _folders("cat/a.png", "dog/b.png", cat__again=".."),
        "cat/again: is a link that leads back to",
    ),
    Refusal(
        "folders: a link that leads nowhere",
        "cat/b.png -> gone.png",
        _folders("cat/a.png", "dog/b.png", **{"cat__b.png": "gone.png"}),
        "cat/b.png: is a link to",
    ),
    Refusal(
        "folders: no images",
        "a folder with a text file",
        _folders("cat/a.txt"),
        "classes: holds no image; expected <class>/<image>",
    ),
    # models
    Refusal(
        "model: head not found",
        "model.head = fc",
        _model(head="fc"),
        "model.head 'fc' does not exist; the Linear modules that could be meant: head",
    ),
    Refusal(
        "model: head not found",
        "a network without a Linear",
        _model(factory=f"{MODELS}:without_head"),
        "no Linear module of the model has 10 outputs",
    ),
    Refusal(
        "model: head on maps",
        "a Linear without pooling before it",
        _model(factory=f"{MODELS}:without_pooling"),
        "not one vector for each; name a Linear behind the pooling or flattening",
    ),
    Refusal(
        "model: other number of classes",
        "weights for 7 classes",
        _model(weights=lambda w: w.torch(models.mlp(7).state_dict())),
        "head.weight (7, 128) for (10, 128)",
    ),
    Refusal(
        "model: batch norm in train mode",
        "statistics of the batch in evaluation mode",
        _model(factory=f"{MODELS}:in_train_mode"),
        "depends on the other images of its batch, in evaluation mode",
    ),
    Refusal(
        "model: not deterministic",
        "dropout in evaluation mode",
        _model(factory=f"{MODELS}:forgetful"),
        "gives other values at model.head 'head' for the same images when it is run again",
    ),
    Refusal(
        "model: not deterministic",
        "random noise on the features",
        _model(factory=f"{MODELS}:noisy"),
        "gives other values at model.head 'head' for the same images when it is run again",
    ),
    Refusal(
        "model: not finite",
        "NaN for every image",
        _model(factory=f"{MODELS}:not_finite"),
        "what the model computes at model.head 'head' is not finite for an image of random pixels",
    ),
    Refusal(
        "model: weights not finite",
        "NaN in hidden.weight",
        _model(weights=lambda w: w.torch(_not_finite())),
        "are not finite in hidden.weight; use other weights",
    ),
    Refusal(
        "model: pickled weights",
        "a whole module by torch.save",
        _model(weights=lambda w: w.torch(models.mlp(10))),
        "holds pickled objects (torch.nn.modules.container.Sequential), which could run code",
    ),
    Refusal(
        "model: no weights",
        "a list by torch.save",
        _model(weights=lambda w: w.torch([1, 2])),
        "holds no state_dict (names to tensors)",
    ),
    Refusal(
        "model: weights cut short",
        "half a safetensors file",
        _model(weights=lambda w: w.bytes(to_bytes(models.mlp(10))[:900], "w.safetensors")),
        "w.safetensors is not a readable weights file",
    ),
    Refusal(
        "model: weights not there",
        "a path that is not there",
        _model(weights=lambda w: f"{w.folder}/absent.pt"),
        "absent.pt: no such weights file; check model.weights",
    ),
    Refusal(
        "model: no such factory",
        "resnet81",
        _model(factory="resnet81"),
        "model.factory 'resnet81' is no classifier of torchvision (nearest: resnet18",
    ),
    Refusal(
        "model: no such factory",
        "a function that its module lacks",
        _model(factory=f"{MODELS}:forgetfull"),
        "has no function 'forgetfull' (nearest: forgetful)",
    ),
    Refusal(
        "model: factory fails",
        "a function that raises",
        _model(factory=f"{MODELS}:raising"),
        "failed: RuntimeError: there is no such width; check model.arguments",
    ),
    Refusal(
        "model: factory gives no module",
        "a function that returns a dict",
        _model(factory=f"{MODELS}:no_module"),
        "returned dict; return a torch.nn.Module",
    ),
    Refusal(
        "model: other images",
        "a network for RGB, grey images",
        _model(factory="resnet18"),
        "the model cannot take a batch of shape (2, 1, 8, 8)",
    ),
    # run files
    Refusal(
        "run file: unknown key",
        "removal.budgte",
        lambda w: {"removal": {"budgte": 0.1}},
        "removal.budgte is not a key of a run file; did you mean removal.budget?",
    ),
    Refusal(
        "run file: wrong unit",
        "removal.budget: 5 %",
        lambda w: {"removal": {"budget": "5 %"}},
        'removal.budget = "5 %": should be a valid number, unable to parse string as a number (write 0.05)',
    ),
    Refusal(
        "run file: wrong unit",
        "removal.budget: 5",
        lambda w: {"removal": {"budget": 5}},
        "removal.budget = 5: should be less than 1",
    ),
    Refusal(
        "run file: wrong unit",
        "ray.object_store_gb: 4GB",
        lambda w: {"ray": {"object_store_gb": "4GB"}},
        "(write 4, without a unit)",
    ),
    Refusal(
        "run file: wrong type",
        "removal.max_rounds: yes",
        lambda w: {"removal": {"max_rounds": True}},
        "removal.max_rounds = true: should not be a boolean",
    ),
    Refusal(
        "run file: a key twice",
        "run, twice",
        lambda w: b"run: {path: RUN}\nrun: {seed: 1}\n",
        "run.yaml, line 2: the key run is there twice",
    ),
    Refusal(
        "run file: a key that is no text",
        "1: 2",
        lambda w: b"1: 2\n",
        "the run file has the key 1, which is no text (put quotes around it)",
    ),
    Refusal(
        "run file: cyclic anchor",
        "a list that holds itself",
        lambda w: b"model: {arguments: {a: &a [*a]}}\n",
        "line 1: found unconstructable recursive node; write out what the anchor stands for",
    ),
    Refusal(
        "run file: aliases of aliases",
        "a billion values in 700 bytes",
        lambda w: LAUGHS.encode(),
        "stand for billions of values, and a run file holds at most 100,000",
    ),
    Refusal(
        "run file: a tag that makes Python objects",
        "!!python/object/apply:os.system",
        lambda w: b"run: {path: !!python/object/apply:os.system [id]}\n",
        "python/object/apply:os.system'; leave the tag out",
    ),
    Refusal(
        "run file: nested deeply",
        "1,500 brackets",
        lambda w: b"run: " + b"[" * 1500,
        "nested too deeply to be a run file",
    ),
    Refusal("run file: no mapping", "a list", lambda w: b"- run\n", "a run file is a mapping with sections"),
    Refusal(
        "run file: no UTF-8",
        "Latin-1",
        lambda w: "run: {path: Prüfung}\n".encode("latin-1"),
        "a run file is YAML in UTF-8, and this is not UTF-8 text",
    ),
    Refusal(
        "run file: too large", "a megabyte of comments", lambda w: b"#\n" * 600_000, "is larger than 1,048,576 bytes"
    ),
    Refusal(
        "run file: control characters",
        "an escape sequence in run.path",
        lambda w: b'run: {path: "runs/\\e[2J"}\n',
        "should hold no control character such as \\x1b",
    ),
    Refusal(
        "run file: weights without validation",
        "no data.validation",
        lambda w: {"data": {"validation": None}},
        "a validation set the model has not seen is required",
    ),
)


def _holed(parquet: bytes) -> bytes:
    """The last column chunk's beginning overwritten; the footer stays."""
    file = pq.ParquetFile(io.BytesIO(parquet))
    column = file.metadata.row_group(0).column(2)
    at = column.dictionary_page_offset or column.data_page_offset
    return parquet[:at] + b"\xff" * 40 + parquet[at + 40 :]


# the table --------------------------------------------------------------------------------------------------


def report(outcomes: Sequence[Outcome], command: str, left_out: Sequence[Refusal] = ()) -> str:
    """The table in Markdown; `left_out` has not been tried."""
    counts = {name: sum(one.outcome == name for one in outcomes) for name in ("taken", "quarantined", "refused")}
    return document(
        [
            [
                "# Bad input",
                "",
                f"`{command}`",
                "",
                f"{len(outcomes)} inputs of {len({one.kind for one in outcomes})} kinds: "
                + ", ".join(f"{count} {name}" for name, count in counts.items())
                + ".",
                "What is refused ends with exit code 2 and this one sentence, and no run folder is made; what is",
                "quarantined is a row of `quarantine.parquet` with this reason, and the run goes on.",
            ],
            markdown(
                ["kind", "what was given", "outcome", "message"],
                [[_cell(text) for text in (one.kind, one.given, one.outcome, one.message)] for one in outcomes],
            ),
            [
                f"Not tried here, as it takes Ray to read the data ({len(left_out)}; the tests do): "
                + ", ".join(f"{one.kind} ({one.given})" for one in left_out)
                + "."
            ]
            * bool(left_out),
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pipelines/benchmarks/results"), help="folder of the table")
    parser.add_argument("--without-ray", action="store_true", help="what Ray is not needed for, in this process")
    options = parser.parse_args(arguments)
    from posttrain.cluster.session import session
    from posttrain.report.visible import visible

    outcomes: list[Outcome] = []
    unexpected = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workshop = Workshop(Path(folder))
        if not options.without_ray:
            stack.enter_context(session(num_cpus=2, object_store_gb=0.5))
            outcomes += run_rows(workshop, Path(folder, "run"))
        else:
            outcomes += embedded_rows(workshop)
        for refusal in REFUSALS:
            if options.without_ray and refusal.reads:
                continue
            code, said, left = refused(workshop, refusal)
            message = visible(re.sub(rf"{re.escape(folder)}/(\d\d\d-)?", "", said.removeprefix("error: ")))
            if code != 2 or left or "\n" in said or refusal.says not in message:
                unexpected.append(f"{refusal.kind} ({refusal.given}): exit code {code}, left {left}, said {message}")
            outcomes.append(Outcome(refusal.kind, refusal.given, "refused", message))
    wanted = {(row.kind, row.given): row.reason for row in ROWS}
    for one in outcomes:
        reason = wanted.get((one.kind, one.given))
        if one.outcome != "refused" and (one.outcome == "quarantined", one.message[: len(reason or "")]) != (
            reason is not None,
            reason or "",
        ):
            unexpected.append(f"{one.kind} ({one.given}): {one.outcome} {one.message}")
    command = f"python -m harness.bad_input{' --without-ray' * options.without_ray}"
    text = report(outcomes, command, [r for r in REFUSALS if options.without_ray and r.reads])
    print(text)
    (options.out / "bad_input.md").write_text(text, encoding="utf-8")
    if unexpected:
        raise SystemExit("\n".join(["UNEXPECTED:", *unexpected]))


if __name__ == "__main__":
    main()
