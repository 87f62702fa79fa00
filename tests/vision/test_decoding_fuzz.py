"""Whatever the bytes, an image or a reason comes out, and the process lives."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.workshop import bomb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from posttrain.vision.images import UnreadableImage, decode

CHECKS = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.function_scoped_fixture,
]
"""Not of interest: hard cases are slow and large."""

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def encoded(mode: str, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


WHOLE = [
    *(encoded(mode, "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")),
    *(encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")),
    encoded("RGB", "JPEG", progressive=True),
    *(encoded("RGB", kind) for kind in ("GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")),
    encoded("RGB", "TIFF", compression="tiff_lzw"),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """An image file with a few bytes changed, left out or put in, or cut short."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        until = at + draw(st.integers(0, 12))
        data[at:until] = draw(st.binary(max_size=12))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


def decoded(data: bytes) -> None:
    for channels in (1, 3):
        try:
            image = decode(data, channels=channels, size=(8, 8))
        except UnreadableImage as reason:
            assert str(reason) and "\n" not in str(reason)
        else:
            assert image.shape == (channels, 8, 8) and image.dtype == torch.uint8


@given(mutated() | st.binary(max_size=300))
@settings(max_examples=300, deadline=None, suppress_health_check=CHECKS)
def test_a_damaged_file_is_an_image_or_has_a_reason(data: bytes) -> None:
    decoded(data)


DECODE_ALL = """
import resource, sys
from pathlib import Path
from posttrain.vision.images import UnreadableImage, decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try: decode(path.read_bytes(), channels=1, size=(8, 8)); print("image")
    except UnreadableImage as reason: print(reason)
print(peak() - before)
"""


def test_neither_a_decompression_bomb_nor_what_makes_libpng_stop_costs_the_process(tmp_path: Path) -> None:
    whole = encoded("L", "PNG")
    start = whole.index(b"IDAT") + 4
    for at in range(12):
        # torchvision's decoder crashes on some of these
        damaged = bytearray(whole)
        damaged[start + at] ^= 0xFF
        (tmp_path / f"{at:02d}.png").write_bytes(damaged)
    (tmp_path / "bomb.png").write_bytes(bomb(30_000, 30_000))
    done = subprocess.run(
        [sys.executable, "-c", DECODE_ALL, str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-500:]
    *reasons, megabytes = done.stdout.splitlines()
    assert len(reasons) == 13 and any(reason.startswith("broken PNG") for reason in reasons)
    assert reasons[-1] == "30000x30000 pixels, more than the limit of 178,956,970"
    assert int(megabytes) < 100  # its pixels take 900


@pytest.mark.parametrize("data", WHOLE, ids=range(len(WHOLE)))
def test_each_of_the_files_is_an_image_before_it_is_damaged(data: bytes) -> None:
    assert decode(data, channels=3, size=(8, 8)).float().std() > 10
