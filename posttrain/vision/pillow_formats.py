"""The formats that Pillow may open: of a file from anywhere, only these."""

from __future__ import annotations

import functools

from PIL import Image

# An allow-list: Pillow opens some of its other formats by starting a program (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")


@functools.cache
def pillow_formats() -> tuple[str, ...]:
    """Those of the allowed formats that this Pillow was built with, for `Image.open`."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
