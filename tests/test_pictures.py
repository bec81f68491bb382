"""Pictures of all formats and colours are read as they are seen; faults are said in a line."""

import io
import os

import numpy as np
import pytest

from util.cli import InputError
from util.pictures import ORIENTATION, open_picture

Image = pytest.importorskip("PIL.Image", reason="pillow")
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def encoded(picture, kind: str = "PNG", **more) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def halves(size=(40, 30), first="red", second="blue"):
    """A picture whose left half is of one colour, and its right half of another."""
    picture = Image.new("RGB", size, first)
    picture.paste(Image.new("RGB", size, second), (size[0] // 2, 0))
    return picture


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_from_a_file_and_from_bytes(tmp_path, kind):
    data = encoded(halves(), kind)
    (tmp_path / "ein bild").write_bytes(data)  # the content tells the format, not the name
    for source in (data, tmp_path / "ein bild", str(tmp_path / "ein bild")):
        picture = open_picture(source)
        assert (picture.mode, picture.size) == ("RGB", (40, 30))
        left, right = picture.getpixel((3, 3)), picture.getpixel((36, 3))
        assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "F"])
@pytest.mark.parametrize("grey", [0, 255])
def test_colours(mode, grey):
    picture = Image.new("L", (5, 4), grey)
    picture.putpixel((0, 0), 255 - grey)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "F", "I") else "PNG"
    if mode in ("LA", "RGBA", "CMYK", "YCbCr"):
        picture = picture.convert("RGB") if mode == "YCbCr" else picture
        picture = picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
    else:
        picture = picture.convert(mode)
    found = np.asarray(open_picture(encoded(picture, kind)))
    assert found.shape == (4, 5, 3)
    assert abs(int(found[2, 2, 0]) - grey) < 3 and abs(int(found[0, 0, 0]) - (255 - grey)) < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(kind):
    shades = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(3, 0)
    found = np.asarray(open_picture(encoded(Image.fromarray(shades), kind)))[0, :, 0].astype(int)
    assert abs(found - np.arange(256)).max() <= 1


def test_what_is_transparent_is_white():
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.putpixel((1, 1), (0, 0, 255, 255))
    found = open_picture(encoded(picture))
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (0, 0, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    for kind in ("PNG", "GIF"):
        found = open_picture(encoded(palette, kind, transparency=0))
        assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (0, 0, 255)


@pytest.mark.parametrize("note", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_turned_as_their_note_says(note, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ORIENTATION] = note
    data = encoded(halves(), kind, exif=exif)
    found = open_picture(data)
    with Image.open(io.BytesIO(data)) as file:
        expected = ImageOps.exif_transpose(file).convert("RGB")
    assert found.size == ((30, 40) if note > 4 else (40, 30))
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    if kind != "TIFF":  # which Pillow turns itself
        assert open_picture(data, turn=False).size == (40, 30)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"\0" * 40]
)
def test_a_damaged_note_does_not_lose_the_photo(exif):
    assert open_picture(encoded(halves(), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    found = open_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    red, green, blue = found.getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_small_and_thin_pictures(size):
    assert open_picture(encoded(halves(size), "JPEG")).size == size


def test_the_bound_is_compared_before_anything_is_decoded(monkeypatch):
    data = encoded(halves((40, 30)))
    assert open_picture(data, max_pixels=1200).size == (40, 30)

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(InputError, match="40 x 30 pixels, more than 1,199; make it smaller"):
        open_picture(data, max_pixels=1199)


@pytest.mark.parametrize("side", [15_000, 25_000, 60_000])
def test_a_bomb_is_refused_in_one_line(side):
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = side.to_bytes(4, "big") * 2  # the size in a PNG's head
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="pixels") as error:
        open_picture(bytes(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_cut_files_raise_one_line_or_are_whole(kind, part):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(InputError, match="the picture: ") as error:
        open_picture(data[: int(len(data) * part)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_never_raise_anything_else(kind):
    data, rng = encoded(halves(), kind), np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            damaged[place] = rng.integers(256)
        try:
            assert open_picture(bytes(damaged), max_pixels=10**6).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"not a picture", "not a picture that can be read; expected JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (b"P6 1 1 255 abc", "not a picture that can be read"),  # Pillow reads it; we do not
    ],
)
def test_other_files(tmp_path, data, said):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(InputError, match="the picture: .*" + said):
        open_picture(data)
    with pytest.raises(InputError, match="x.jpg: .*" + said):
        open_picture(path)


def test_a_missing_file_keeps_its_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        open_picture(tmp_path / "none.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_a_folder_is_no_picture_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").mkdir()
    for name in ("b.jpg", "c.jpg", "/dev/zero"):
        with pytest.raises(InputError, match="not a file that holds a picture"):
            open_picture(tmp_path / name)


def test_a_name_cannot_control_the_terminal(tmp_path):
    path = tmp_path / "a\x1b[31mred\x9b.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(InputError) as caught:
        open_picture(path)
    assert str(caught.value).isprintable() and "a?[31mred?.jpg" in str(caught.value)
