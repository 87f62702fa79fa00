from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin
from sklearn.datasets import load_digits, load_sample_images

from posttrain.vision import near_duplicates
from posttrain.vision.near_duplicates import (
    MAX_DIFFERENCE,
    MAX_HASH_DISTANCE,
    SIDE,
    PerceptualHashes,
    close_hashes,
    differences,
    near_duplicate_pairs,
    perceptual_hashes,
)


def grey(images: np.ndarray) -> np.ndarray:
    pixels, readable = near_duplicates.grey([image.tobytes() for image in images], images.shape[1:])
    assert readable.all()
    return pixels


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Grey tiles of 100 pixels a side of two photographs."""
    tiles = []
    for image in load_sample_images().images:
        pixels = np.asarray(Image.fromarray(image).convert("L"))
        tiles += [pixels[y : y + 100, x : x + 100] for y in range(0, 400, 40) for x in range(0, 600, 40)]
    tiles = np.stack([tile for tile in tiles if tile.shape == (100, 100) and tile.std() > 10])
    assert len(tiles) > 200
    return tiles


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    data = load_digits()
    assert not isinstance(data, tuple)
    return (data.images * 255 / 16).round().astype(np.uint8)


def as_jpeg(images: np.ndarray) -> np.ndarray:
    again = []
    for image in images:
        Image.fromarray(image).save(stream := io.BytesIO(), "JPEG", quality=75)
        again.append(np.asarray(Image.open(stream)))
    return np.stack(again)


CHANGES = {
    "the same": lambda images: images,
    "a JPEG": as_jpeg,
    "brighter": lambda images: np.clip(images.astype(int) + 20, 0, 255).astype(np.uint8),
    "darker": lambda images: (images * 0.8).astype(np.uint8),
    "cropped by a pixel": lambda images: images[:, 1:, 1:],
}


def recall(images: np.ndarray, changed: np.ndarray) -> float:
    i, j, _ = near_duplicate_pairs(perceptual_hashes(grey(images)), perceptual_hashes(grey(changed)))
    return len(np.intersect1d(i[i == j], np.arange(len(images)))) / len(images)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_of_a_photograph_is_found(photographs: np.ndarray, change: str) -> None:
    least = 0.7 if change == "cropped by a pixel" else 0.95
    assert recall(photographs, CHANGES[change](photographs)) >= least


LEAST = {"the same": 1.0, "a JPEG": 0.85, "brighter": 0.99, "darker": 0.99}


@pytest.mark.parametrize(("change", "least"), LEAST.items())
def test_a_changed_copy_of_an_image_of_8_by_8_pixels_is_found(digits: np.ndarray, change: str, least: float) -> None:
    assert recall(digits, CHANGES[change](digits)) >= least


def test_different_digits_are_no_near_duplicates(digits: np.ndarray) -> None:
    mine, others = perceptual_hashes(grey(digits[:900])), perceptual_hashes(grey(digits[900:]))
    # by their hashes alone, many would be
    hits = {pair for found in close_hashes(mine.hashes, others.hashes) for pair in zip(*found, strict=True)}
    assert len(hits) > 50
    assert len(near_duplicate_pairs(mine, others)[0]) == 0


def test_close_hashes_are_those_of_a_plain_comparison_of_all_with_all() -> None:
    generator = np.random.default_rng(0)
    centres = generator.integers(0, 2**64, 20, dtype=np.uint64)

    def close(count: int) -> np.ndarray:
        flips = np.zeros(count, np.uint64)
        for _ in range(4):
            flips ^= np.uint64(1) << generator.integers(0, 64, count).astype(np.uint64)
        return centres[generator.integers(0, 20, count)] ^ flips

    mine, others = close(300), close(200)
    found = {(int(a), int(b)) for pairs in close_hashes(mine, others) for a, b in zip(*pairs, strict=True)}
    plain = {
        (a, b) for a in range(300) for b in range(200) if int(mine[a] ^ others[b]).bit_count() <= MAX_HASH_DISTANCE
    }
    assert found == plain and 100 < len(plain) < 300 * 200


def test_pairs_are_the_same_however_many_are_compared_at_a_time(
    digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = perceptual_hashes(grey(digits[:300])), perceptual_hashes(grey(digits[:400]))
    whole = near_duplicate_pairs(mine, others)
    monkeypatch.setattr(near_duplicates, "_PAIRS_AT_ONCE", 7)
    for one, other in zip(whole, near_duplicate_pairs(mine, others), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(whole[0]) >= 300


def test_the_difference_is_that_of_a_correlation(digits: np.ndarray) -> None:
    mine, others = perceptual_hashes(grey(digits[:50])).thumbnails, perceptual_hashes(grey(digits[50:100])).thumbnails
    expected = [
        np.sqrt(2 - 2 * np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) for a, b in zip(mine, others, strict=True)
    ]
    np.testing.assert_allclose(differences(mine, others), expected, rtol=1e-4)
    assert min(expected) > MAX_DIFFERENCE


def test_images_without_contrast_are_near_duplicates_of_none() -> None:
    black = perceptual_hashes(np.zeros((3, SIDE, SIDE), np.uint8))
    white = perceptual_hashes(np.full((2, SIDE, SIDE), 255, np.uint8))
    nothing = PerceptualHashes(np.empty(0, np.uint64), np.empty((0, 16, 16), np.uint8))
    for mine, others in ((black, white), (nothing, white), (white, nothing)):
        assert len(near_duplicate_pairs(mine, others)[0]) == 0


def test_cells_of_every_kind_give_the_same_pixels_and_unreadable_ones_are_left_to_others(digits: np.ndarray) -> None:
    Image.fromarray(digits[0]).save(stream := io.BytesIO(), "PNG")
    encoded = stream.getvalue()
    pixels, readable = near_duplicates.grey([encoded, {"bytes": encoded, "path": None}, encoded[:40], b"", None], None)
    assert readable.tolist() == [True, True, False, False, False]
    raw, _ = near_duplicates.grey([digits[0].tobytes(), digits[0].tolist(), digits[0].tobytes()[:-1]], (8, 8))
    assert len(raw) == 2
    for image in (*pixels, *raw):
        np.testing.assert_array_equal(image, raw[0])


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    Image.fromarray(pixels).save(stream := io.BytesIO(), kind)
    return stream.getvalue()


def test_an_eps_image_is_not_readable_and_starts_no_program(
    photographs: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho started >> {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    cells = [encoded(photographs[0], kind) for kind in ("EPS", "PNG")]
    pixels, readable = near_duplicates.grey(cells, None)
    assert readable.tolist() == [False, True] and len(pixels) == 1
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("error", [struct.error, KeyError, EOFError])
def test_an_image_is_not_readable_whatever_its_decoder_raises(
    photographs: np.ndarray, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(image: Image.Image) -> None:
        raise error("broken")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    cells = [encoded(photographs[0], kind) for kind in ("PNG", "BMP")]
    pixels, readable = near_duplicates.grey(cells, None)
    assert readable.tolist() == [False, True] and len(pixels) == 1
