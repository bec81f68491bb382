"""Uploaded pictures: hostile and odd ones, and a worker that hangs, dies, lies or lacks memory."""

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is an extra")

from util import uploads  # noqa: E402
from util.cli import InputError  # noqa: E402
from util.uploads import PictureLimits, PictureReader, Unavailable  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
RNG = np.random.default_rng(0)
PHOTO = np.kron(RNG.integers(0, 256, (6, 9, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
HANG = "import time, util.upload_worker as w; w.decode = lambda *x: time.sleep({}); w.main()"


@pytest.fixture(scope="module")
def reader():
    with PictureReader(PictureLimits(bytes=2**22, pixels=10**6, side=400, seconds=30)) as one:
        yield one


@pytest.fixture
def program(monkeypatch):
    """Let workers run other code than util/upload_worker.py."""
    plain = uploads.command

    def use(code: str | None) -> None:
        def other(limits: PictureLimits) -> list[str]:
            return [sys.executable, "-c", code, *plain(limits)[3:]]

        monkeypatch.setattr(uploads, "command", plain if code is None else other)

    return use


def encoded(picture, kind: str = "PNG", **options) -> bytes:
    """A picture's file; `picture` is one of Pillow's, or an array."""
    file = io.BytesIO()
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks: bytes) -> bytes:
    """PHOTO as a PNG with more chunks after its head."""
    plain = encoded(PHOTO)
    return plain[:33] + b"".join(chunks) + plain[33:]


def enormous(width: int, height: int) -> bytes:
    """A PNG whose head promises a large picture."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reads(reader: PictureReader, data: bytes) -> np.ndarray | str:
    """The pixels, or the message of the InputError; both are checked."""
    try:
        pixels = reader.read(data)
    except InputError as error:
        assert str(error) and str(error).isprintable() and len(str(error)) <= 500
        return str(error)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert pixels.flags.writeable and 1 <= min(pixels.shape) and max(pixels.shape[:2]) <= 400
    return pixels


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(test, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not test() and time.monotonic() < end:
        time.sleep(0.02)
    return test()


# Pictures that are accepted.


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_lossless_picture_comes_back_as_it_is(reader, kind):
    more = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(reader.read(encoded(PHOTO, kind, **more)), PHOTO)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_is_turned_as_its_exif_notes_say(reader, turn):
    stored = {  # what the camera stored, so that the turned photo is PHOTO
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO),
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PHOTO, -1),
    }[turn]
    notes = Image.Exif()
    notes[0x0112] = turn
    data = encoded(np.ascontiguousarray(stored), exif=notes)
    assert np.array_equal(reader.read(data), PHOTO)


COLOUR = Image.new("RGB", (20, 10), (200, 40, 90))
COLOURS = {
    "grey of 16 bits": (encoded(np.full((5, 7), 0x8000, np.uint16)), 128),
    "TIFF of 16 bits": (encoded(np.full((5, 7), 0x8000, np.uint16), "TIFF"), 128),
    "CMYK": (encoded(COLOUR.convert("CMYK"), "JPEG", quality=95), [200, 40, 90]),
    "grey": (encoded(COLOUR.convert("L")), 94),
    "black and white": (encoded(Image.new("1", (9, 9), 1)), 255),
    "palette": (encoded(COLOUR.quantize(2)), [200, 40, 90]),
    "palette, clear": (encoded(COLOUR.quantize(2), transparency=0), 255),  # on white
    "clear": (encoded(Image.new("RGBA", (3, 3), (9, 9, 9, 0))), 255),
    "grey with alpha": (encoded(Image.new("LA", (3, 3), (9, 255))), 9),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_other_kinds_are_converted(reader, name):
    data, colour = COLOURS[name]
    assert np.abs(reader.read(data).astype(int) - colour).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 50000), (50000, 1), (7, 3), (401, 2), (800, 600)])
def test_pictures_of_any_form_are_made_no_longer_than_the_side(reader, size):
    width, height = size
    found = reader.read(encoded(Image.new("RGB", size, (10, 20, 30))))
    scale = min(1, 400 / max(size))
    assert found.shape == (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    assert (found == [10, 20, 30]).all()


def test_only_the_first_frame_of_an_animation_is_read(reader):
    frames = [Image.new("L", (16, 12), value % 251) for value in range(3000)]
    data = encoded(frames[7], "GIF", save_all=True, append_images=frames)
    assert Image.open(io.BytesIO(data)).n_frames > 2900
    assert (reader.read(data) == 7).all() and reader.read(data).shape == (12, 16, 3)
    for kind in ("WEBP", "PNG", "TIFF"):
        more = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[9], kind, save_all=True, append_images=frames[:20], **more)
        assert (reader.read(data) == 9).all(), kind


def test_what_follows_a_picture_or_goes_with_it_does_no_harm(reader):
    jpeg = encoded(PHOTO, "JPEG")
    both = io.BytesIO(jpeg)
    with zipfile.ZipFile(both, "a") as file:
        file.writestr("page.html", "<script>alert(1)</script>")
    assert len(both.getvalue()) > len(jpeg) and zipfile.is_zipfile(both)
    assert np.array_equal(reader.read(both.getvalue()), reader.read(jpeg))
    for notes in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + RNG.bytes(3000)):
        assert np.array_equal(reader.read(encoded(PHOTO, "JPEG", exif=notes)), reader.read(jpeg))
    zeros = zlib.compress(bytes(10**8))
    for bomb in (chunk(b"zTXt", b"a\0\0" + zeros), chunk(b"iCCP", b"a\0\0" + zeros)):
        found = reads(reader, png_with(*[bomb] * 20))
        assert isinstance(found, str) or np.array_equal(found, PHOTO)
    assert np.array_equal(reader.read(png_with()), PHOTO)


# Pictures that are refused.


def test_what_is_no_accepted_picture_is_refused(reader):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run showpage\n"
    pdf, ico = (encoded(Image.new("RGB", (32, 32)), kind) for kind in ("PDF", "ICO"))
    psd = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(500)
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    cases = [b"\x89PNG\r\n\x1a\n", b"x" * 8, svg, script, pdf, psd, ico, b"PK\3\4" + bytes(99)]
    for head in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\1\0\0WEBPVP8 "):
        cases += [head + RNG.bytes(size) for size in (1, 8, 100, 5000)]
    for case in cases:
        assert "picture" in reads(reader, case), case[:20]
    assert reads(reader, b"") == "the picture has 0 bytes"
    assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)


def test_a_picture_that_is_cut_is_refused(reader):
    whole = Image.effect_noise((90, 60), 80).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = encoded(whole, kind)
        for end in np.linspace(1, len(data) - 40, 50).astype(int):
            assert "picture" in reads(reader, data[:end]), (kind, end)


def test_damage_anywhere_is_refused_or_read(reader):
    whole = Image.effect_noise((40, 30), 80).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(whole, kind)
        for seed in range(60):
            rng = np.random.default_rng([seed, len(kind)])
            broken = bytearray(data)
            room = 64 if seed % 2 else len(data)  # the heads are short, but most can go wrong there
            for place in rng.integers(0, room, 1 + seed % 5):
                broken[place] = rng.integers(256)
            reads(reader, bytes(broken))
    assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)


@pytest.mark.parametrize("size", [(1001, 1000), (2**31 - 1, 2**31 - 1), (1, 10**6 + 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(reader, size):
    assert "1,000,000" in reads(reader, enormous(*size))


def test_too_many_bytes_are_refused(reader):
    said = reads(reader, encoded(PHOTO) + bytes(2**22))
    assert "4,194,304" in said and f"{len(encoded(PHOTO)) + 2**22:,}" in said


# The worker.


def test_a_picture_that_takes_too_long_is_given_up(program):
    program(HANG.format(600))
    with PictureReader(PictureLimits(seconds=0.5)) as reader:
        first = reader.process.pid
        assert reads(reader, b"x") == "decoding the picture took longer than 0.5 s"
        program(None)
        reader.restart()
        reader.limits = PictureLimits()
        assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)
        assert gone(first) or sys.platform != "linux"


def test_a_worker_that_stands_still_is_replaced():
    with PictureReader(PictureLimits(bytes=2**22, seconds=0.5)) as reader:
        reader.wait()
        os.kill(reader.process.pid, signal.SIGSTOP)
        assert "longer than" in reads(reader, bytes(2**22))  # more than the pipe takes
        reader.limits = PictureLimits()
        assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)


def test_a_worker_that_was_killed_is_replaced(reader):
    for _ in range(3):
        reader.read(encoded(PHOTO))
        os.kill(reader.process.pid, signal.SIGKILL)
        assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)
    os.kill(reader.process.pid, signal.SIGKILL)  # while it starts, too
    reader.restart()
    os.kill(reader.process.pid, signal.SIGKILL)
    reader.process.wait()
    assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)


def test_a_picture_that_ends_its_decoder_is_refused(program):
    die = "import os, util.upload_worker as w; w.decode = lambda *x: os._exit(3); w.main()"
    program(die)
    with PictureReader() as reader:
        assert reads(reader, b"x") == "the picture cannot be decoded: its decoder broke off"
        program(None)
        reader.restart()
        assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)


@linux
def test_memory_is_bounded():
    data = encoded(Image.new("RGBA", (6000, 6000), (1, 2, 3, 200)))
    with PictureReader(PictureLimits(memory=250 * 10**6, seconds=60)) as reader:
        assert reads(reader, data) == "decoding the picture needs more than 250,000,000 bytes"
        assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)


LIES = [
    "HEAD.pack(b'P', 2**32 - 1, 2**32 - 1)",
    "HEAD.pack(b'P', 0, 5)",
    "HEAD.pack(b'P', 10, 10) + bytes(299)",
    "HEAD.pack(b'R', 2**32 - 1, 0)",
    "HEAD.pack(b'?', 1, 1)",
    "b'P'",
]


@pytest.mark.parametrize("reply", LIES)
def test_a_worker_that_lies_is_not_believed(program, reply):
    lie = "import sys; from util.upload_worker import *; give = sys.stdout.buffer; "
    lie += f"give.write(READY); give.flush(); give.write(READY + {reply}); give.flush(); "
    program(lie + "give.close(); os.close(1); sys.stdin.buffer.read()")
    with PictureReader() as reader:
        assert "broke off" in reads(reader, b"x")


def test_what_a_library_prints_and_odd_messages_do_no_harm(program):
    odd = "import os, util.upload_worker as w; w.open_picture = lambda *x, **y: {}; w.main()"
    program(odd.format("[print('noise'), os.write(1, b'noise'), [][0]]"))
    with PictureReader() as reader:
        assert "IndexError" in reads(reader, b"x")
        program(odd.format("(_ for _ in ()).throw(w.InputError('a\\x1b[31m\\n' + 5000 * 'é'))"))
        reader.restart()
        assert reads(reader, b"x").startswith("a?[31m?éé")


def test_without_pillow_or_a_worker_the_error_says_so(program, monkeypatch):
    program("raise SystemExit(1)")
    with PictureReader() as reader, pytest.raises(Unavailable, match="does not start"):
        reader.read(b"x")
    program(None)
    with PictureReader() as reader:
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "command", lambda limits: ["/no/such/program"])
            reader.process.kill()
            reader.process.wait()
            assert "does not start: No such file" in reads(reader, b"x")
        assert np.array_equal(reader.read(encoded(PHOTO)), PHOTO)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install pillow"):
        PictureReader()


def test_threads_get_their_own_pictures(reader):
    def one(value: int) -> bool:
        return bool((reader.read(encoded(Image.new("L", (20, 30), value))) == value).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))


def test_who_waits_too_long_is_told_that_the_worker_is_busy(program):
    program(HANG.format(600))
    with PictureReader(PictureLimits(seconds=0.5)) as reader, reader.lock:
        with pytest.raises(Unavailable, match="busy"):
            reader.read(b"x")


def test_close_gives_up_a_picture_that_is_read(program):
    program(HANG.format(600))
    reader = PictureReader(PictureLimits(seconds=600))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, b"x")
        assert eventually(lambda: reader.waited)
        reader.close()
        with pytest.raises(Unavailable, match="closed"):
            reading.result(60)
    reader.close()
    assert reader.process.returncode is not None
    with pytest.raises(Unavailable, match="closed"):
        reader.read(b"x")


@linux
def test_no_file_is_leaked_or_inherited():
    with socket.socket() as listening, PictureReader() as reader:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.set_inheritable(True)
        reader.read(encoded(PHOTO))
        before = len(os.listdir("/proc/self/fd"))
        for k in range(200):
            reads(reader, encoded(PHOTO) if k % 2 else RNG.bytes(50))
            if k % 50 == 0:
                os.kill(reader.process.pid, signal.SIGKILL)
        assert len(os.listdir("/proc/self/fd")) == before
        reader.read(encoded(PHOTO))
        files = Path(f"/proc/{reader.process.pid}/fd")
        kinds = {os.readlink(file).partition(":")[0] for file in files.iterdir()}
        assert kinds == {"pipe", "/dev/null"}


@linux
@pytest.mark.parametrize("hangs", [False, True])
def test_no_worker_outlives_its_parent(hangs):
    code = "import sys, time; from util import uploads; hang = sys.argv[1]\n"
    code += "plain = uploads.command\n"
    code += "if hang: uploads.command = lambda x: [sys.executable, '-c', hang, *plain(x)[3:]]\n"
    code += "reader = uploads.PictureReader(uploads.PictureLimits(seconds=1.5)); reader.wait()\n"
    code += "print(reader.process.pid, flush=True)\n"
    code += "reader.read(b'x') if hang else time.sleep(600)"
    hang = HANG.format(600) if hangs else ""
    command, pipe = [sys.executable, "-c", code, hang], subprocess.PIPE
    with subprocess.Popen(command, cwd=uploads.ROOT, stdout=pipe) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)  # it has the picture
        parent.kill()
    assert eventually(lambda: gone(pid))
