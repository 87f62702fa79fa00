from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from posttrain.errors import DataError
from posttrain.vision import images
from posttrain.vision.images import UnreadableImage, decode, decode_column, normalize

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
RGB = torch.from_numpy(PIXELS).permute(2, 0, 1)
SIZE = (10, 12)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def binary_column(*cells: bytes | None, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(cells, kind or pa.binary())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_that_were_saved(kind: str):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert torch.equal(decode(encoded(PIXELS, kind, **options), channels=3, size=SIZE), RGB)


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_mode_is_converted_as_pillow_converts_it(mode: str, kind: str, channels: int):
    if (mode, kind) == ("CMYK", "PNG"):
        kind = "JPEG"
    image = Image.fromarray(PIXELS).convert("L" if mode == "LA" else "RGB").convert(mode)
    data = encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {}))
    expected = Image.open(io.BytesIO(data)).convert("RGB").convert("RGB" if channels == 3 else "L")
    found = decode(data, channels=channels, size=SIZE).permute(1, 2, 0).squeeze(-1)
    assert np.abs(found.numpy().astype(int) - np.asarray(expected)).max() <= (1 if kind != "JPEG" else 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_alpha_is_laid_on_the_background_the_same_in_every_kind_of_cell(
    channels: int, background: tuple[int, int, int]
):
    colours, alpha = PIXELS.astype(float), PIXELS[:, :, :1] / 255
    expected = (colours * alpha + np.array(background) * (1 - alpha)).round().astype(np.uint8)
    cell = np.dstack([PIXELS, PIXELS[:, :, 0]])
    wanted = decode(expected, channels=channels, size=SIZE)
    raw = pa.array([cell.tobytes()], pa.binary())
    for found in (
        decode(cell, channels=channels, size=SIZE, background=background),
        decode(encoded(cell, "PNG"), channels=channels, size=SIZE, background=background),
        decode_column(raw, channels=channels, size=SIZE, shape=cell.shape, background=background)[0][0],
    ):
        # grey is made by Pillow in one case and by torchvision in the other
        assert (found.int() - wanted.int()).abs().max() <= (channels == 1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_a_shape_in_the_alpha_channel_alone_is_seen_on_white(mode: str):
    shape = Image.fromarray(np.kron([[255, 0], [0, 255]], np.ones((4, 4))).astype(np.uint8))
    if mode in ("P", "L", "RGB"):  # one colour is transparent
        image = Image.eval(shape, lambda value: 0 if value else 1).convert(mode)
        data = encoded(image, "PNG", transparency=(1, 1, 1) if mode == "RGB" else image.getpixel((7, 0)))
    else:
        image = Image.new("RGBA", (8, 8), "black")
        image.putalpha(shape)
        data = encoded(image.convert(mode), "PNG")
    found = decode(data, channels=1, size=(8, 8))
    assert torch.equal(found[0], 255 - torch.from_numpy(np.array(shape)))
    assert decode(data, channels=1, size=(8, 8), background=(0, 0, 0)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str):
    deep = np.array([[0, 257], [128 * 257, 65535]], np.uint16)
    found = decode(encoded(deep, kind), channels=1, size=(2, 2))
    assert found.tolist() == [[[0, 1], [128, 255]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_is_applied(kind: str):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise by 90 degrees
    upright = decode(encoded(smooth(10, 12), kind, exif=exif), channels=3, size=(12, 10)).int()
    plain = decode(encoded(smooth(10, 12), kind), channels=3, size=(10, 12)).int()
    assert (upright - torch.rot90(plain, -1, (1, 2))).abs().max() <= 1


def test_the_first_frame_of_an_animation_counts():
    frames = [np.full((4, 4), 10, np.uint8), np.full((4, 4), 200, np.uint8)]
    data = encoded(Image.fromarray(frames[0]), "GIF", save_all=True, append_images=[Image.fromarray(frames[1])])
    assert decode(data, channels=1, size=(4, 4)).unique().tolist() == [10]


def test_without_torchvisions_decoder_pillow_gives_the_same_png(monkeypatch: pytest.MonkeyPatch):
    data = encoded(PIXELS, "PNG")
    monkeypatch.setattr(images, "decode_image", None)
    assert torch.equal(decode(data, channels=3, size=SIZE), RGB)


@pytest.mark.parametrize("height, width", [(20, 31), (31, 20), (7, 9), (64, 64)])
def test_another_size_is_resized_and_cropped_as_torchvision_does(height: int, width: int):
    image = torch.from_numpy(smooth(height, width).copy()).permute(2, 0, 1)
    expected = v2.CenterCrop(16)(v2.Resize(16, antialias=True)(image))
    assert torch.equal(decode(image.numpy(), channels=3, size=(16, 16)), expected)


@pytest.mark.parametrize("size", [(8, 20), (20, 8), (2, 2)])
def test_sizes_that_are_not_square_are_covered(size: tuple[int, int]):
    assert decode(smooth(9, 13), channels=3, size=size).shape == (3, *size)
    white = np.full((9, 13), 255, np.uint8)
    assert decode(white, channels=1, size=size).min() == 255


@pytest.mark.parametrize(
    "cell",
    [
        PIXELS,
        PIXELS.tolist(),
        PIXELS.astype(np.int64),
        RGB.numpy(),
        np.dstack([PIXELS, np.full_like(PIXELS[:, :, 0], 255)]),
        {"bytes": encoded(PIXELS, "PNG"), "path": None},
        bytearray(encoded(PIXELS, "PNG")),
    ],
    ids=["HWC", "list", "int64", "CHW", "RGBA", "dict", "bytearray"],
)
def test_arrays_lists_and_mappings_are_images_too(cell: object):
    assert torch.equal(decode(cell, channels=3, size=SIZE), RGB)


def test_raw_bytes_need_only_their_shape():
    assert torch.equal(decode(PIXELS.tobytes(), channels=3, size=SIZE, shape=(10, 12, 3)), RGB)
    grey = PIXELS[:, :, 0]
    found = decode(np.ascontiguousarray(grey).tobytes(), channels=3, size=SIZE, shape=(10, 12))
    assert torch.equal(found, torch.from_numpy(grey.copy()).expand(3, -1, -1))


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_that_declares(width: int, height: int) -> bytes:
    data = bytearray(encoded(PIXELS, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_that_declares(width: int, height: int) -> bytes:
    data = bytearray(encoded(PIXELS, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_that_declares, jpeg_that_declares, bmp_that_declares])
def test_a_decompression_bomb_is_refused_before_its_pixels_are_allocated(bomb, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "decode_image", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(UnreadableImage, match=r"(60000x50000|3000000000) pixels.* limit"):
        decode(bomb(60000, 50000), channels=3, size=SIZE)


@pytest.mark.parametrize(
    "cell, reason",
    [
        (None, "no image"),
        (b"", "empty"),
        ({"bytes": None, "path": "a.png"}, "no image"),
        (b"no image at all", "not an image in a known format"),
        (encoded(PIXELS, "PNG")[:100], "broken PNG"),
        (encoded(PIXELS, "JPEG")[:-60], "broken JPEG"),
        (encoded(PIXELS, "TIFF")[:-60], "broken TIFF"),
        (encoded(PIXELS, "GIF")[:-80], "broken GIF"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
            "not an image in a known format",
        ),
        (encoded(np.zeros((2, 2), np.float32), "TIFF"), "32-bit"),
        (np.zeros((2, 2, 2, 3), np.uint8), "image is 4-dimensional"),
        (np.zeros((2, 2, 5), np.uint8), r"image is 3-dimensional with shape \(2, 2, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4), np.float32), "float32 values"),
        ([[0, 256]], "values from 0 to 256"),
        ([[1, 2], [3]], "rows of different length"),
        ([[1, None]], "object values"),
        ("picture.png", "values where whole numbers"),
        (np.zeros((1, 2_000_000), np.uint8), "too long and narrow"),
    ],
)
def test_what_is_no_image_gets_a_reason(cell: object, reason: str):
    with pytest.raises(UnreadableImage, match=reason):
        decode(cell, channels=3, size=(32, 32))


@pytest.mark.parametrize("cell", [bytes(7), np.zeros(7, np.uint8), np.zeros((3, 2, 4), np.uint8)])
def test_pixels_that_do_not_have_the_declared_shape_are_refused(cell: object):
    with pytest.raises(UnreadableImage, match=r"\(2, 4, 3\)"):
        decode(cell, channels=3, size=(2, 4), shape=(2, 4, 3))


def test_no_warning_escapes():
    palette = Image.fromarray(PIXELS).convert("P")
    palette.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encoded(palette, "PNG"), channels=3, size=SIZE)
        decode_column(binary_column(encoded(PIXELS, "PNG"), b"x"), channels=3, size=SIZE)


PNG = [encoded(np.roll(PIXELS, shift, 0), "PNG") for shift in range(3)]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())],
    ids=str,
)
def test_rows_of_a_column_are_decoded_in_order_and_the_others_get_their_reasons(kind: pa.DataType):
    cells = [PNG[0], None, PNG[1], b"", b"junk", PNG[2], None]
    column = pa.array(cells, pa.binary()).cast(kind)
    found, readable, reasons = decode_column(column, channels=3, size=SIZE)
    assert readable.tolist() == [True, False, True, False, False, True, False]
    assert torch.equal(found, torch.stack([decode(cell, channels=3, size=SIZE) for cell in PNG]))
    assert reasons[:2] + reasons[3:] == ["no image", "empty", "no image"]
    assert reasons[2].startswith("not an image")


def test_the_hugging_face_layout_is_understood():
    cells = [None, {"bytes": PNG[0], "path": "a"}, {"bytes": None, "path": "b"}, None]
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})).slice(1)
    found, readable, reasons = decode_column(column, channels=3, size=SIZE)
    assert (len(found), readable.tolist(), reasons) == (1, [True, False, False], ["no image"] * 2)


MANY = np.random.default_rng(2).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def dense_columns() -> dict[str, pa.Array]:
    raw = [row.tobytes() for row in MANY]
    return {
        "fixed_size_binary": pa.array(raw, pa.binary(60)),
        "binary": pa.array(raw, pa.binary()),
        "large_binary": pa.array(raw, pa.large_binary()),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(MANY),
        "flat lists": pa.array([row.ravel() for row in MANY]),
        "nested lists": pa.array(MANY.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8(), 3)))),
        "int64 lists": pa.array(MANY.tolist()),
    }


@pytest.mark.parametrize("name", dense_columns())
def test_raw_pixels_of_one_shape_are_taken_as_one_array(name: str, monkeypatch: pytest.MonkeyPatch):
    column = dense_columns()[name]
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("was decoded cell by cell"))
    gap = column.take(pa.array([0, 1, None, 2, 3, 4, 5]))
    expected = torch.from_numpy(MANY).permute(0, 3, 1, 2)
    for part, rows in [(column, slice(0, 6)), (column.slice(2, 3), slice(2, 5)), (gap.slice(1), slice(1, 6))]:
        found, readable, reasons = decode_column(part, channels=3, size=(4, 5), shape=(4, 5, 3))
        assert torch.equal(found, expected[rows])
        assert readable.sum() == len(found) and len(readable) == len(part)
        assert reasons == ["no image"] * (len(part) - len(found))


@pytest.mark.parametrize("name", dense_columns())
def test_taking_pixels_as_one_array_is_the_same_as_one_by_one(name: str):
    column = dense_columns()[name]
    wanted = {"channels": 1, "size": (3, 3), "shape": (4, 5, 3)}
    found, _, _ = decode_column(column, **wanted)
    assert torch.equal(found, torch.stack([decode(row, **wanted) for row in MANY]))


def test_the_pixels_do_not_share_memory_with_the_column():
    column = dense_columns()["fixed_size_binary"]
    found, _, _ = decode_column(column, channels=3, size=(4, 5), shape=(4, 5, 3))
    found.zero_()
    assert column[0].as_py() == MANY[0].tobytes()


@pytest.mark.ray
def test_the_tensor_columns_of_ray_are_understood():
    extensions = pytest.importorskip("ray.data.extensions")
    same = extensions.ArrowTensorArray.from_numpy(MANY)
    found, readable, _ = decode_column(same.slice(1), channels=3, size=(4, 5))
    assert torch.equal(found, torch.from_numpy(MANY[1:]).permute(0, 3, 1, 2)) and readable.all()
    cells = np.empty(2, object)
    cells[0], cells[1] = MANY[0], MANY[1][:2]
    mixed = extensions.ArrowVariableShapedTensorArray.from_numpy(cells)
    found, readable, _ = decode_column(mixed, channels=3, size=(2, 5))
    assert readable.all() and torch.equal(found[1], torch.from_numpy(MANY[1][:2]).permute(2, 0, 1))


def test_a_malformed_row_among_raw_ones_costs_only_itself():
    good = MANY[0].tobytes()
    wanted = {"channels": 3, "size": (4, 5), "shape": (4, 5, 3)}
    found, readable, reasons = decode_column(binary_column(good, good[:-1], good), **wanted)
    assert (len(found), readable.tolist()) == (2, [True, False, True])
    assert reasons == ["59 values where shape (4, 5, 3) needs 60"]
    lists = pa.array([[[0, 1], [2, 3]], [[0, 1], [2, 300]], [[0, 1], [2]]])
    _, readable, reasons = decode_column(lists, channels=1, size=(2, 2))
    assert readable.tolist() == [True, False, False]
    assert reasons == ["values from 0 to 300 where 0 to 255 are needed", "rows of different length"]


def test_chunks_and_empty_columns_add_up():
    chunked = pa.chunked_array([[PNG[0], b"x"], [], [None, PNG[1]]], pa.binary())
    found, readable, reasons = decode_column(chunked, channels=3, size=SIZE)
    assert readable.tolist() == [True, False, False, True] and len(found) == 2 and len(reasons) == 2
    empty = pa.FixedShapeTensorArray.from_numpy_ndarray(MANY)[:0]
    for column in (pa.chunked_array([], pa.binary()), pa.array([], pa.binary(60)), empty):
        found, readable, reasons = decode_column(column, channels=3, size=(4, 5), shape=(4, 5, 3))
        assert found.shape == (0, 3, 4, 5) and readable.shape == (0,) and reasons == []
    assert decode_column(pa.nulls(2), channels=3, size=SIZE)[2] == ["no image"] * 2


@pytest.mark.parametrize("column", [pa.array(["a.png"]), pa.array([1.0]), pa.array([{"path": "a"}])])
def test_a_column_that_cannot_hold_images_is_an_error_and_no_quarantine(column: pa.Array):
    with pytest.raises(DataError, match=r"the image column holds .*; set data\.image"):
        decode_column(column, channels=3, size=SIZE)


def test_normalize_is_the_textbook_formula():
    batch = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = v2.Normalize(list(mean), list(std))(batch.float() / 255)
    torch.testing.assert_close(normalize(batch, mean, std), expected)
    half = normalize(batch, (0.5,), (0.5,), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), batch.float() / 127.5 - 1, atol=4e-3, rtol=0)
