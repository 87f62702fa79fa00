"""Images: table cells decoded to uint8 tensors of one size (or the reason why that fails), and normalised."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from posttrain.arrow_compute import pc
from posttrain.errors import DataError
from posttrain.vision.pillow_formats import pillow_formats

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # announced by torchvision 0.29; Pillow decodes these formats, too, only slower
    ImageReadMode = decode_image = None

WHITE = (255, 255, 255)

PIXEL_LIMIT = 178_956_970
"""Most pixels of an image that is decoded: where Pillow, too, refuses a decompression bomb."""

# An allow-list: Ray has an extension type whose cells are pickles, and unpickles them when they are looked at.
_TENSORS = (
    "arrow.fixed_shape_tensor",
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
)


class UnreadableImage(ValueError):  # noqa: N818  a finding about a cell, no failure of the program
    """A cell cannot be decoded to an image; the message is the short reason that goes into quarantine."""


def decode(
    cell: object,
    *,
    channels: int,
    size: tuple[int, int],
    shape: tuple[int, ...] | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Tensor:
    """The image in one table cell, uint8 [channels, height, width].

    A cell holds an encoded image (bytes), raw pixels (bytes, where `shape` gives (H, W) or (H, W, C)), an
    array or nested list of whole numbers 0..255 as (H, W), (H, W, C) or (C, H, W), or a dict {"bytes": ...}.
    Another size is resized by its short side (bilinear, antialiased) and cropped to the centre; grey and RGB
    are converted into each other; what has alpha is laid on the `background` (red, green, blue); of an animation the
    first frame counts; EXIF rotation is applied. Raises UnreadableImage with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(cell, channels, size, shape, background).contiguous()


def decode_column(
    column: pa.Array | pa.ChunkedArray,
    *,
    channels: int,
    size: tuple[int, int],
    shape: tuple[int, ...] | None = None,
    background: tuple[int, int, int] = WHITE,
) -> tuple[Tensor, np.ndarray, list[str]]:
    """All readable images of a column, which rows those are, and why the others are not.

    Returns uint8 [n_ok, channels, height, width], bool [n], and one reason for each False, in row order.
    Columns: binary of any kind, struct{bytes, path} (Hugging Face), tensor extension types (Arrow's, Ray's),
    nested lists. Rows of one raw shape are taken as one array; others are decoded one by one (see `decode`).
    Raises DataError where the column's type cannot hold images.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_decode_chunk(_plain(chunk), channels, size, shape, background) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]
    nothing = torch.empty((0, channels, *size), dtype=torch.uint8)
    return (
        torch.cat([nothing, *(images for images, _, _ in parts)]),
        np.concatenate([np.zeros(0, bool), *(readable for _, readable, _ in parts)]),
        [reason for _, _, reasons in parts for reason in reasons],
    )


def normalize(
    batch: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(batch / 255 - mean) / std per channel, for uint8 [n, channels, height, width]."""
    # float32 whatever the result's dtype: 255 * mean does not fit into the 8 bits of a bfloat16 mantissa
    centre = torch.tensor(mean, device=batch.device).mul_(255).view(-1, 1, 1)
    spread = torch.tensor(std, device=batch.device).mul_(255).view(-1, 1, 1)
    return batch.float().sub_(centre).div_(spread).to(dtype)


def _decode(
    cell: object,
    channels: int,
    size: tuple[int, int],
    shape: tuple[int, ...] | None,
    background: tuple[int, int, int],
) -> Tensor:
    if isinstance(cell, Mapping):
        cell = cell.get("bytes")
    if cell is None:
        raise UnreadableImage("no image")
    if isinstance(cell, bytes | bytearray | memoryview):
        if not len(cell):
            raise UnreadableImage("empty")
        if shape is None:
            return _fitted(_decoded(bytes(cell), channels, background), channels, size, background)
        pixels = np.frombuffer(cell, np.uint8)
    else:
        try:
            pixels = np.asarray(cell)
        except ValueError:
            raise UnreadableImage("rows of different length") from None
    return _fitted(_planar(pixels[None], shape)[0], channels, size, background)


def _decode_chunk(
    column: pa.Array,
    channels: int,
    size: tuple[int, int],
    shape: tuple[int, ...] | None,
    background: tuple[int, int, int],
) -> tuple[Tensor, np.ndarray, list[str]]:
    readable = np.array(column.is_valid())
    cells = column.drop_null() if column.null_count else column
    missing = len(column) - len(cells)
    if len(cells):
        dense = _dense(cells, shape)
        if dense is not None:
            try:
                images = _fitted(_planar(dense, shape), channels, size, background).contiguous()
                return images, readable, ["no image"] * missing
            except UnreadableImage:
                pass  # the loop below finds out which of the cells it is
    images = torch.empty((len(cells), channels, *size), dtype=torch.uint8)
    reasons = dict.fromkeys(np.flatnonzero(~readable).tolist(), "no image")
    done = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row, cell in zip(np.flatnonzero(readable).tolist(), _each(cells), strict=True):
            try:
                images[done] = _decode(cell, channels, size, shape, background)
                done += 1
            except UnreadableImage as reason:
                readable[row] = False
                reasons[row] = str(reason)
    return images[:done], readable, [reasons[row] for row in sorted(reasons)]


def _plain(column: pa.Array) -> pa.Array:
    """The cells without dictionary, view or {bytes, path} around them."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary_decode())
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary())
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        # flatten, not field: a row that is null has null bytes
        return _plain(column.flatten()[kind.get_field_index("bytes")])
    if holds_images(kind):
        return column
    raise DataError(
        f"the image column holds {kind} where encoded images (binary), raw pixels or tensors are needed; "
        "set data.image to the column that holds the images"
    )


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold images at all (see `decode_column`)."""
    if pa.types.is_dictionary(kind):
        return holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and holds_images(kind.field(at).type)
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name in _TENSORS
    return _is_binary(kind) or pa.types.is_binary_view(kind) or _is_list(kind) or pa.types.is_null(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _each(cells: pa.Array) -> Iterable[Any]:
    if isinstance(cells, pa.FixedShapeTensorArray):
        return cells.to_numpy_ndarray()
    if isinstance(cells.type, pa.BaseExtensionType):
        return cells.to_numpy(zero_copy_only=False)
    return (cell.as_py() for cell in cells)


def _dense(cells: pa.Array, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """Cells without nulls as one array [n, ...]; None where they are encoded or not all of one shape."""
    if isinstance(cells.type, pa.BaseExtensionType):
        rows = np.asarray(_each(cells))
        return None if rows.dtype == object else rows
    if _is_list(cells.type):
        return _dense_lists(cells)
    if shape is None or not _is_binary(cells.type):
        return None
    length, n = math.prod(shape), len(cells)
    buffers = cells.buffers()
    if pa.types.is_fixed_size_binary(cells.type):
        start, uniform = cells.offset * length, cells.type.byte_width == length
    else:
        width = np.int64 if pa.types.is_large_binary(cells.type) else np.int32
        offsets = np.frombuffer(buffers[1], width)[cells.offset : cells.offset + n + 1]
        start, uniform = int(offsets[0]), bool((np.diff(offsets) == length).all())
    if not uniform or length == 0:
        return None
    return np.frombuffer(buffers[-1], np.uint8, count=n * length, offset=start).reshape(n, length)


def _dense_lists(cells: pa.Array) -> np.ndarray | None:
    shape = [len(cells)]
    while _is_list(cells.type):
        lengths = np.unique(pc.list_value_length(cells).to_numpy(zero_copy_only=False))
        if cells.null_count or len(lengths) != 1:
            return None
        shape.append(int(lengths[0]))
        cells = cells.flatten()
    if cells.null_count or not pa.types.is_integer(cells.type):
        return None
    return cells.to_numpy().reshape(shape)


def _planar(pixels: np.ndarray, shape: tuple[int, ...] | None) -> Tensor:
    """Arrays [n, H, W], [n, H, W, C], [n, C, H, W], or flat ones of a given shape, as uint8 [n, C, H, W]."""
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "iu":
            raise UnreadableImage(f"{pixels.dtype} values where whole numbers 0 to 255 are needed")
        if pixels.size and (pixels.min() < 0 or pixels.max() > 255):
            raise UnreadableImage(f"values from {pixels.min()} to {pixels.max()} where 0 to 255 are needed")
        pixels = pixels.astype(np.uint8)
    found = pixels.shape[1:]
    if shape is not None and found != shape:
        if len(found) != 1:
            raise UnreadableImage(f"shape {found} where {shape} is declared")
        if found[0] != math.prod(shape):
            raise UnreadableImage(f"{found[0]} values where shape {shape} needs {math.prod(shape)}")
        pixels = pixels.reshape(len(pixels), *shape)
    if 0 in pixels.shape[1:]:
        raise UnreadableImage("empty")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[3] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 3, 1)
    elif pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise UnreadableImage(
            f"image is {pixels.ndim - 1}-dimensional with shape {pixels.shape[1:]}; "
            "(H, W), (H, W, C) or (C, H, W) with 1 or 3 channels is needed"
        )
    # a copy: Arrow's memory is read-only, and torch warns of such arrays
    return torch.from_numpy(np.array(pixels, order="C"))


def _laid_on(images: Tensor, background: tuple[int, int, int]) -> Tensor:
    """uint8 [..., 4, h, w] with alpha as [..., 3, h, w]: colour x alpha + background x (1 - alpha), rounded."""
    alpha = images[..., 3:, :, :].int()
    behind = torch.tensor(background, dtype=torch.int32).view(3, 1, 1)
    return ((images[..., :3, :, :] * alpha + behind * (255 - alpha) + 127) // 255).to(torch.uint8)


def _fitted(images: Tensor, channels: int, size: tuple[int, int], background: tuple[int, int, int]) -> Tensor:
    """uint8 [..., c, h, w] with the number of channels and the size asked for."""
    if images.shape[-3] == 4:
        images = _laid_on(images, background)
    if images.shape[-3] != channels:
        rgb = (*images.shape[:-3], 3, *images.shape[-2:])
        images = transform.rgb_to_grayscale(images) if channels == 1 else images.expand(rgb)
    h, w = images.shape[-2:]
    height, width = size
    if (h, w) != size:
        # the smallest size that covers the one asked for; whole numbers, so that no side falls a pixel short
        tall, wide = (height, w * height // h) if height * w >= width * h else (h * width // w, width)
        if tall * wide > PIXEL_LIMIT:
            raise UnreadableImage(f"{w}x{h} pixels are too long and narrow for {width}x{height}")
        images = transform.resize(images, [tall, wide], antialias=True)
        images = transform.center_crop(images, [height, width])
    return images


def _decoded(data: bytes, channels: int, background: tuple[int, int, int]) -> Tensor:
    """Encoded bytes as uint8 [c, h, w]; c is `channels` wherever the decoder can do that itself."""
    declared = _declared_size(data)
    if declared is not None:
        _refuse_bomb(*declared)
    # JPEG alone: where libpng reports an error, torchvision (0.30 and before) crashes the process
    if data[:2] == b"\xff\xd8" and decode_image is not None and ImageReadMode is not None:
        mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
        try:
            return decode_image(torch.frombuffer(data, dtype=torch.uint8), mode, apply_exif_orientation=True)
        except RuntimeError:
            pass  # Pillow reads some of these after all, and says of the others what is wrong with them
    return _decoded_by_pillow(data, channels, background)


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a PNG or JPEG, without decoding; None for anything else.

    Asking Pillow costs as much again as decoding a small JPEG, hence by hand: 2 microseconds.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return struct.unpack_from(">II", data, 16)
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame: height, width
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise UnreadableImage(f"{width}x{height} pixels, more than the limit of {PIXEL_LIMIT:,}")


def _decoded_by_pillow(data: bytes, channels: int, background: tuple[int, int, int]) -> Tensor:
    kind = "image"
    try:
        with Image.open(io.BytesIO(data), formats=pillow_formats()) as image:
            kind = image.format or kind
            _refuse_bomb(*image.size)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would clip these at 255
                return torch.from_numpy(((np.array(upright, np.uint32) + 128) // 257).astype(np.uint8))[None]
            if upright.mode in ("I", "F"):
                raise UnreadableImage(f"{kind} with 32-bit pixels, whose range is not known")
            if upright.has_transparency_data:
                behind = Image.new("RGBA", upright.size, background)
                upright = Image.alpha_composite(behind, upright.convert("RGBA")).convert("RGB")
            # by way of RGB: of other modes, such as CMYK, grey would be another
            grey = channels == 1 and upright.mode != "L"
            colour = upright.convert("RGB") if grey or channels == 3 else upright
            pixels = np.array(colour.convert("L") if grey else colour)
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit: ours, if nobody changed it
        raise UnreadableImage(str(error)) from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage(
            f"not an image in a known format ({len(data)} bytes; raw pixels need data.image_shape)"
        ) from None
    except Exception as error:  # on broken files Pillow raises what its parsers run into, even SyntaxError
        text = str(error).strip().splitlines()
        raise UnreadableImage(f"broken {kind}: {text[0] if text else type(error).__name__}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
