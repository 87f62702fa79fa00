"""Pairs of images that are nearly the same, by a perceptual hash and a comparison of thumbnails.

The hash finds candidates without comparing all with all; the thumbnails decide. A hash alone will not do: small images
have so few details that different ones often share it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
from PIL import Image

from posttrain.vision.pillow_formats import pillow_formats

SIDE = 32
"""Pixels a side of the grey images that are compared."""
_THUMBNAIL_SIDE = SIDE // 2
MAX_HASH_DISTANCE = 7
"""Bits in which the hashes of two candidates differ at most."""
_BANDS, _BAND_BITS = 4, 16
_PAIRS_AT_ONCE = 1_000_000
"""Pairs of hashes that are compared at once."""
MAX_DIFFERENCE = 0.1
"""Two images are near duplicates whose thumbnails differ (`differences`) by at most this."""
_MAX_PIXELS = 50_000_000
_MIN_DEVIATION = 2.0
"""Standard deviation of a thumbnail, of 255, below which there is nothing to be seen, and all images are the same."""


@dataclass(frozen=True)
class PerceptualHashes:
    """What images are compared by, one row for each."""

    hashes: np.ndarray
    """uint64 [n]."""
    thumbnails: np.ndarray
    """uint8 [n, 16, 16]."""


def grey(cells: Iterable[object], shape: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Grey images, uint8 [n_readable, 32, 32], squeezed to squares, and which cells could be decoded, bool [n].

    `cells`: encoded bytes, {bytes, path}, or raw pixels of this `shape`. Decoded by Pillow, which decodes a large JPEG
    no finer than is asked for, and starts in a hundredth of the time that torch takes.
    """
    pixels, readable = [], []
    for cell in cells:
        try:
            image = _opened(cell, shape)
            light = _without_alpha(image) if image.has_transparency_data else image
            light = light if light.mode == "L" else light.convert("L")
            pixels.append(light.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0).tobytes())
            readable.append(True)
        except MemoryError:
            raise
        except Exception:  # on broken files Pillow raises what its parsers run into
            readable.append(False)  # embedding quarantines it, with the reason
    return np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, SIDE, SIDE), np.array(readable, bool)


def _opened(cell: object, shape: tuple[int, ...] | None) -> Image.Image:
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, bytes) and shape is None:
        image = Image.open(io.BytesIO(cell), formats=pillow_formats())
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError("too large")
        image.draft("L", (2 * SIDE, 2 * SIDE))
        return image
    values = np.frombuffer(cell, np.uint8) if isinstance(cell, bytes) else np.asarray(cell)
    values = values.reshape(shape or values.shape).astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def _without_alpha(image: Image.Image) -> Image.Image:
    """Grey, laid on white, or where nothing is to be seen on that, on black: the shape may be in the alpha alone."""
    rgba = image.convert("RGBA")
    found = Image.new("L", image.size)
    for behind in ("white", "black"):
        found = Image.alpha_composite(Image.new("RGBA", image.size, behind), rgba).convert("L")
        if np.asarray(found).std() >= _MIN_DEVIATION:
            break
    return found


def perceptual_hashes(pixels: np.ndarray) -> PerceptualHashes:
    """The hashes and thumbnails of grey images, uint8 [n, 32, 32]."""
    # only 64 of the 1,024 coefficients are asked for: two small products take a tenth of the whole transform's time
    waves = np.asarray(scipy.fft.dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho"))[:8]
    spectrum = (waves @ pixels.astype(np.float32) @ waves.T).reshape(-1, 64)
    # the first coefficient is the brightness, which does not count, as in pHash (Zauner 2010)
    above = spectrum > np.median(spectrum[:, 1:], axis=1, keepdims=True)
    above[:, 0] = False
    hashes = np.packbits(above, axis=1).view(">u8").astype(np.uint64)[:, 0]
    # sums of two by two pixels; a mean over two axes of a view takes seven times as long
    sums = pixels.astype(np.uint16)
    sums = sums[:, ::2] + sums[:, 1::2]
    sums = sums[:, :, ::2] + sums[:, :, 1::2]
    return PerceptualHashes(hashes, (sums / np.float32(4)).round().astype(np.uint8))


def concatenated(parts: Sequence[PerceptualHashes]) -> PerceptualHashes:
    none = np.empty((0, _THUMBNAIL_SIDE, _THUMBNAIL_SIDE), np.uint8)
    return PerceptualHashes(
        np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)]),
        np.concatenate([none, *(part.thumbnails for part in parts)]),
    )


def near_duplicate_pairs(mine: PerceptualHashes, others: PerceptualHashes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (i, j) of all near duplicates, each pair once, and their differences.

    Images without contrast are left out.
    """
    here, there = np.flatnonzero(_has_contrast(mine)), np.flatnonzero(_has_contrast(others))
    pairs = [np.empty((2, 0), np.int64)]
    found = [np.empty(0, np.float32)]
    for a, b in close_hashes(mine.hashes[here], others.hashes[there]):
        i, j = here[a], there[b]
        difference = differences(mine.thumbnails[i], others.thumbnails[j])
        near = difference <= MAX_DIFFERENCE
        pairs.append(np.stack([i[near], j[near]]))
        found.append(difference[near])
    (i, j), difference = np.concatenate(pairs, axis=1), np.concatenate(found)
    # a pair is found once for each band that is nearly the same
    _, once = np.unique(np.stack([i, j]), axis=1, return_index=True)
    return i[once], j[once], difference[once]


def close_hashes(mine: np.ndarray, others: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (i, j) of hashes that differ in at most MAX_HASH_DISTANCE bits; a pair may come several times.

    Multi-index hashing (Norouzi, Punjani, Fleet 2012): of two such hashes at least one of four bands of 16 bits
    differs in one bit at most, so that only those are compared whose band is the same up to a bit.
    """
    for band in range(_BANDS):
        my_bands, other_bands = _band(mine, band), _band(others, band)
        order = np.argsort(other_bands, kind="stable")
        for flipped in (0, *(1 << bit for bit in range(_BAND_BITS))):
            for i, at in _matches(my_bands ^ np.uint32(flipped), other_bands[order]):
                j = order[at]
                near = np.bitwise_count(mine[i] ^ others[j]) <= MAX_HASH_DISTANCE
                yield i[near], j[near]


def _matches(wanted: np.ndarray, among: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (i, j) of all equal values, in parts; `among` is sorted."""
    first = np.searchsorted(among, wanted, side="left")
    counts = np.searchsorted(among, wanted, side="right") - first
    there = np.flatnonzero(counts)
    for i in np.array_split(there, 1 + int(counts.sum()) // _PAIRS_AT_ONCE):
        ends = np.cumsum(counts[i])
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts[i], counts[i])
        yield np.repeat(i, counts[i]), np.repeat(first[i], counts[i]) + within


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return ((hashes >> np.uint64(band * _BAND_BITS)) & np.uint64(2**_BAND_BITS - 1)).astype(np.uint32)


def differences(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The root mean square difference of each pair of thumbnails once both have mean 0 and deviation 1.

    0: the same; 1.4: unrelated.
    """
    normal = []
    for thumbnails in (mine, others):
        values = thumbnails.reshape(-1, _THUMBNAIL_SIDE**2).astype(np.float32)
        values = values - values.mean(axis=1, keepdims=True)
        normal.append(values / values.std(axis=1, keepdims=True))
    return np.sqrt(np.mean((normal[0] - normal[1]) ** 2, axis=1))


def _has_contrast(hashes: PerceptualHashes) -> np.ndarray:
    return hashes.thumbnails.reshape(-1, _THUMBNAIL_SIDE**2).std(axis=1) >= _MIN_DEVIATION
