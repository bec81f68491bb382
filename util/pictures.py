"""Read pictures that anybody may have sent: formats, sizes and damage are checked.

It imports neither numpy nor torch: util/upload_worker.py reads uploads with it in little memory.
"""

import io
import os
import stat
import warnings

from util.cli import InputError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # in lower case
MAX_PIXELS = 200_000_000
ORIENTATION = 0x0112  # EXIF's number of the note how a photo is turned


def pillow():
    """Pillow's module Image."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("reading photos needs Pillow: pip install pillow") from None
    # Pillow's own bound is lower, and only warns. open_picture compares the pixels itself.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of notes that are damaged
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return Image


def open_picture(
    source: str | os.PathLike | bytes, max_pixels: int = MAX_PIXELS, turn: bool = True
):
    """The picture of a file, or of a file's bytes, in RGB, turned as EXIF says (`turn`).

    Accepts JPEG, PNG, WebP, GIF, BMP and TIFF, of any colours. What is transparent becomes white;
    grey of 16 bits becomes 8 bits; of an animation the first frame is taken. The file's head tells
    the number of pixels, so a larger picture is refused before it is decoded.

    Raises InputError with one line if it is no such picture, damaged, cut or too large, and OSError
    if the file cannot be opened.
    """
    Image = pillow()
    given = isinstance(source, bytes | bytearray | memoryview)
    name = "the picture" if given else printable(os.fspath(source))
    if not given and not stat.S_ISREG(os.stat(source).st_mode):  # a pipe would never end
        raise InputError(f"{name}: not a file that holds a picture")
    with io.BytesIO(source) if given else open(source, "rb") as file:
        if not file.read(1):
            raise InputError(f"{name}: empty (0 bytes)")
        file.seek(0)
        try:
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > max_pixels:
                    raise InputError(
                        f"{name}: {picture.width} x {picture.height} pixels, more than "
                        f"{max_pixels:,}; make it smaller"
                    )
                picture.load()
                return _in_rgb(picture, turn)
        except InputError:
            raise
        except Image.UnidentifiedImageError:
            kinds = "JPEG, PNG, WebP, GIF, BMP or TIFF"
            raise InputError(f"{name}: not a picture that can be read; expected {kinds}") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise InputError(f"{name}: more than {max_pixels:,} pixels; make it smaller") from None
        except Exception as error:  # decoders raise errors of all types for damaged files
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{name}: damaged, or not a picture that can be read ({said[:200]})"
            ) from None


def _in_rgb(picture, turn: bool):
    """A decoded picture in RGB, turned or not."""
    Image = pillow()
    wide = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
    found = _eight_bits(picture) if wide else picture
    if found.has_transparency_data:
        found = found.convert("RGBA")
        found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found)
    found = found.convert("RGB")
    return _turn(found, picture) if turn else found


def _turn(picture, source):
    """`picture` turned as the EXIF notes of `source` say."""
    Image = pillow()
    moves = Image.Transpose
    ways = {
        2: moves.FLIP_LEFT_RIGHT,
        3: moves.ROTATE_180,
        4: moves.FLIP_TOP_BOTTOM,
        5: moves.TRANSPOSE,
        6: moves.ROTATE_270,
        7: moves.TRANSVERSE,
        8: moves.ROTATE_90,
    }
    try:
        way = ways.get(source.getexif().get(ORIENTATION))
    except Exception:  # damaged notes of a picture that is whole: it stays as it is
        way = None
    return picture if way is None else picture.transpose(way)


def _eight_bits(picture):
    """Grey of 8 bits from grey of 16 bits, or from other numbers, whose range is stretched."""
    if picture.mode.startswith("I;16"):
        numbers, low, high = picture.convert("I").convert("F"), 0.0, 65535.0
    else:
        numbers = picture.convert("F")
        low, high = numbers.getextrema()
    scale = 255 / (high - low) if high > low else 1.0
    grey = numbers.point(lambda x: x * scale + -low * scale).convert("L")
    grey.info.pop("transparency", None)  # one of the numbers that were
    return grey
