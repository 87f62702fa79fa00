"""A folder to make bad input in, and images that are special in one way each."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from posttrain.vision import datasets, models

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
