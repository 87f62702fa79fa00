"""Samples and files that go into one run, where each is taken or quarantined with its reason: `ROWS` and `FILES`."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from PIL import Image

from harness.bad_models import stumbling
from harness.workshop import MODELS, Workshop, animated, bomb, deep_colour, drawn, encoded, rotated


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

    torch.manual_seed(0)
    folder, samples = _written_rows(workshop)
    changed = {
        "data": {"train": str(folder), "classes": 11},
        "model": {"factory": f"{MODELS}:stumbling", "weights": workshop.torch(stumbling(11).state_dict())},
    }
    summary = clean(RunFile.model_validate(workshop.run_file(path, changed)), quiet=True)
    quarantined = pq.read_table(path / "quarantine.parquet")
    assert summary["live"] + summary["removed"] + summary["quarantined"] == samples
    return _outcomes(
        dict(zip(quarantined["sample_id"].to_pylist(), quarantined["reason"].to_pylist(), strict=True)),
        set(pyarrow.csv.read_csv(path / "issues.csv")["sample_id"].to_pylist()),
    )
