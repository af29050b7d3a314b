from __future__ import annotations

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from dalle_zoo import images
from dalle_zoo.data import CorruptImageError, decode_image, decoding

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
JPEG_ERROR = 4  # flat areas at quality 95


def color(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


def test_gray_is_converted_to_rgb(make: Any) -> None:
    assert color(make.encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert color(make.encoded(Image.new("1", (4, 4), 1))) == WHITE


def test_palette_is_converted_to_rgb(make: Any) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*GREEN, *RED])
    assert color(make.encoded(image)) == RED
    assert color(make.encoded(image, transparency=1)) == WHITE
    assert color(make.encoded(image, "GIF")) == RED


def test_transparency_is_composited_on_white(make: Any) -> None:
    assert color(make.encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == WHITE
    assert color(make.encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 51)))) == (255, 204, 204)
    assert color(make.encoded(Image.new("LA", (4, 4), (0, 51)))) == (204, 204, 204)
    assert color(make.encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "WEBP")) == WHITE
    assert color(make.encoded(Image.new("RGB", (4, 4), RED), transparency=RED)) == WHITE
    assert color(make.encoded(Image.new("L", (4, 4), 3), transparency=3)) == WHITE


def test_cmyk_is_converted_to_rgb(make: Any) -> None:
    data = make.encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.subtract(color(data), RED)).max() <= JPEG_ERROR


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(make: Any, format: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = decode_image(make.encoded(Image.fromarray(values), format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_32_bit_integers_and_floats_are_scaled(make: Any) -> None:
    integers = np.array([[0, 65535]], np.int32)
    assert np.asarray(decode_image(make.encoded(Image.fromarray(integers), "TIFF")))[0, :, 1].tolist() == [0, 255]
    floats = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    assert np.asarray(decode_image(make.encoded(Image.fromarray(floats), "TIFF")))[0, :, 2].tolist() == [
        0,
        128,
        255,
        0,
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(make: Any, orientation: int) -> None:
    # Red is at the top left as displayed; the stored image is rotated.
    upright = Image.new("RGB", (32, 16), GREEN)
    upright.paste(RED, (0, 0, 16, 8))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(make.encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0))
    assert image.size == (32, 16)
    worst = np.abs(np.asarray(image).astype(int) - np.asarray(upright)).max()
    assert worst <= JPEG_ERROR


def test_broken_exif_does_not_lose_the_image(make: Any) -> None:
    data = make.encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0broken", quality=95)
    assert decode_image(data).size == (8, 8)


def test_animation_gives_the_first_frame(make: Any) -> None:
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = make.encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
        assert color(data) == RED


def test_one_pixel_is_decoded(make: Any) -> None:
    assert decode_image(make.encoded(Image.new("RGB", (1, 1), RED))).size == (1, 1)


def test_too_many_pixels_raise_before_decoding() -> None:
    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", b"") + block(b"IEND", b"")
    with pytest.raises(CorruptImageError, match="pixels"):
        decode_image(bomb)


def test_large_images_within_the_limit_do_not_warn(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns from here
    assert decode_image(make.encoded(Image.new("RGB", (15, 10)))).size == (15, 10)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 149)
    with pytest.raises(CorruptImageError, match="15 x 10"):
        decode_image(make.encoded(Image.new("RGB", (15, 10))))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_raise(make: Any, format: str) -> None:
    data = make.image(0, (64, 64), format)
    assert decode_image(data).size == (64, 64)
    with pytest.raises(CorruptImageError):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_file_that_is_no_image_raises(data: bytes) -> None:
    with pytest.raises(CorruptImageError, match="not a readable image") as caught:
        decode_image(data)
    assert "0x" not in str(caught.value), "an address differs from call to call"


def test_messages_contain_no_memory_address(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise OSError("broken data stream in <_io.BytesIO object at 0x7f00DEADbeef>")

    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(CorruptImageError, match=r"\(OSError: broken data stream in <_io.BytesIO object>\)"):
        decode_image(make.image())


def test_random_damage_raises_only_corrupt_image_error(make: Any) -> None:
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        complete = np.frombuffer(make.image(1, (16, 16), format), np.uint8)
        for _ in range(40):
            damaged = complete.copy()
            damaged[rng.integers(0, len(complete), 5)] = rng.integers(0, 256, 5, np.uint8)
            try:
                image = decode_image(damaged.tobytes())
            except CorruptImageError:
                continue
            assert image.mode == "RGB"
            assert len(image.tobytes()) == 3 * image.width * image.height


def test_transparent_sixteen_bit_gray_is_decoded(make: Any) -> None:
    values = np.array([[0, 257, 65535]], np.uint16)
    image = decode_image(make.encoded(Image.fromarray(values), transparency=257))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F"])
def test_crops_are_converted_like_the_image(make: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image = image.convert("RGB").quantize(8)
        image.info["transparency"] = 2
    elif mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert("L").convert("F") if mode == "F" else image.convert(mode)
    complete = np.asarray(images.to_rgb(image))
    monkeypatch.setattr(images, "_STRIP_PIXELS", 14)
    assert np.array_equal(np.asarray(images.to_rgb(image)), complete)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["I;16", "RGBA", "CMYK", "WEBP"])
def test_largest_image_stays_within_memory_limit(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "image"
    side = math.isqrt(decoding.MAX_PIXELS)
    formats = {"CMYK": "JPEG", "WEBP": "WEBP"}
    mode = "RGB" if kind == "WEBP" else kind
    Image.new(mode, (side, side)).save(file, formats.get(kind, "PNG"))
    code = (
        "import resource, sys; from dalle_zoo.data import decode_image; data = open(sys.argv[1], 'rb').read();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak();"
        "decode_image(data); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, file], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1.1e9


def test_files_above_the_size_limit_raise(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(11))
    assert decoding.read_file(tmp_path / "a.png", 11) == bytes(11)
    with pytest.raises(CorruptImageError, match="11 bytes, more than 10"):
        decoding.read_file(tmp_path / "a.png", 10)
    with pytest.raises(CorruptImageError, match="not a file"):
        decoding.read_file(tmp_path, 10)
