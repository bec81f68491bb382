"""Caption files: what is read, and what each wrong file is called."""

import itertools
import subprocess

import pytest

from util.captions import read_captions, read_lines
from util.cli import InputError

TEXT = "A dog runs .\nTwo cafés .\n\nThe end .\n"
LINES = ["A dog runs .", "Two cafés .", "", "The end ."]


@pytest.mark.parametrize(
    "encoding",
    ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "be with a mark"],
)
@pytest.mark.parametrize("text", [TEXT, TEXT * 300, "a\n"])
def test_wide_characters_are_named_and_the_command_helps(tmp_path, encoding, text):
    path = tmp_path / "dev caps.txt"
    marked = "\ufeff" + text if encoding == "be with a mark" else text
    path.write_bytes(marked.encode("utf-16-be" if encoding == "be with a mark" else encoding))
    with pytest.raises(InputError, match="dev caps.txt: text in UTF-") as error:
        read_captions(path)
    command = str(error.value).split("`")[1]
    assert "iconv -f utf-" in command and "latin1" not in str(error.value)
    done = subprocess.run(command, shell=True, cwd=tmp_path)
    assert done.returncode == 0
    assert read_captions(tmp_path / "NEW") == [line.strip() for line in text.splitlines()]


def test_wide_characters_of_other_scripts(tmp_path):
    path = tmp_path / "caps.txt"
    for encoding in ("utf-16", "utf-32", "utf-32-le", "utf-32-be"):
        path.write_bytes("一个小孩在公园里玩\n狗\n".encode(encoding))
        with pytest.raises(InputError, match=f"text in {encoding[:6].upper()}"):
            read_captions(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a dog\nb\0d\n", r"line 2 holds a NUL byte \(column 2\)"),
        (b"fine\n" * 2000 + b"\0\0\0\0", "line 2001 holds a NUL byte"),
        (b"\0" * 50, "found zero bytes"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "found a web page"),
        (b"<html lang=en>\n", "found a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-LFS pointer"),
        (b"\x93NUMPY\x01\x00v\x00", r"found a NumPy array"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b'{"images": [{"sentids": [0]}]}', "found JSON"),
        (b'[{"caption": "a dog"}]\n', "found JSON"),
        (b"[\n  {\n", "found JSON"),
        (b"fine\nbad \xe9 byte\n", r"line 2 is not UTF-8 \(byte 0xe9 at column 5\)"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, said):
    path = tmp_path / "train_caps.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"train_caps.txt: .*{said}"):
        read_captions(path)


def rows(form: str, n: int = 12) -> list[str]:
    return [form.format(i=1000 + 7 * (i // 5), k=i % 5, n=i) for i in range(n)]


TABLES = [
    "{i}.jpg#{k}\tA dog number {n} .",
    "{i}_693b08cb0e.jpg\tA dog number {n} .",
    "{i}.JPEG\tA dog number {n} .",
    "flickr30k-images/{i}.png#{k}\tA dog number {n} .",
    "{n}\t{i}.jpg\tA dog number {n} .",
    "{i}.jpg\t{k}\tA dog number {n} .",
    "{i}\tA dog number {n} .",
    "COCO_val2014_{i:012d}\tA dog number {n} .",
    "my photo {i}.jpg\tA dog number {n} .",
    "{i}.jpg|{k}|A dog number {n} .",
    "{i}.jpg| {k}| A dog number {n} .",
    "{i}.jpg,A dog number {n} .",
    "{i}.jpg,{k},A dog number {n} .",
    "{i}.jpg;A dog number {n} .",
    "{i}.jpg#{k} A dog number {n} .",
    "{i}.jpg: A dog number {n} .",
    "{n},{i}.jpg,A dog number {n} .",
    "{i}00,A dog number {n} .",
    "{i}00,{n},A dog number {n} .",
    "{n};{i}00;A dog number {n} .",
    "{n},A dog number {n} .",
    "{i},{n},A dog number {n} .",
    "A dog number {n} .\t{i}.jpg",
    "A dog number {n} .\t{i}.jpg#{k}",
    "A dog number {n} .\t{i}",
    "A dog number {n} .,{i}.jpg",
    "A dog number {n} .|{k}|{i}.jpg",
    "{n}\tA dog number {n} .\t{i}.jpg",
]
HEADERS = [
    "",
    "image,caption",
    "image_name| comment_number| comment",
    "id\tcaption",
    "caption\timage",
]


@pytest.mark.parametrize(("form", "header"), list(itertools.product(TABLES, HEADERS)))
def test_a_table_is_refused_and_the_command_cuts_it(tmp_path, form, header):
    if header and not any(x in header and x in form for x in "\t|,"):
        header = ""
    path = tmp_path / "train_caps.txt"
    path.write_text("".join(f"{line}\n" for line in [header] * bool(header) + rows(form)))
    with pytest.raises(InputError, match="train_caps.txt: its lines hold more than") as error:
        read_captions(path)
    assert "image by image" in str(error.value)
    command = str(error.value).split("`")[1]
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0
    assert read_captions(tmp_path / "NEW") == rows("A dog number {n} .")
    assert read_lines(path)  # a file of ids may look like this


def test_quoted_captions_are_cut_from_a_csv(tmp_path):
    lines = ["image,caption", "1.jpg,A dog .", '2.jpg,"Two, or three ""dogs"" ."', "3.jpg,One"]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        read_captions(tmp_path / "c.txt")
    subprocess.run(str(error.value).split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert read_captions(tmp_path / "NEW") == ["A dog .", 'Two, or three "dogs" .', "One"]


@pytest.mark.parametrize(
    "lines",
    [
        ["A screen shows 1.jpg", "A dog", "photo.jpg is on the screen , a man looks"],
        ["A dog\truns", "Two cats", "A man", "A boy"],
        ["3\tdogs run", "Two cats", "A man", "A boy"],
        ["1.jpg\tA dog", *["A man in a red shirt ."] * 4],
        ["2,000 people stand", "3, 4 or 5 dogs", "10 men"],
        ["2 dogs", "3 dogs", "4 dogs"],
        ["A man | a woman", "A | b", "C | d"],
        ["image of a dog, running", "image of a cat, asleep"],
        ["a\tman", "the\tdog", "two\tcats"],
        ["{ braces }", "[ brackets ]"],
        ["<b> a tag", "version https of a page"],
        ["", "", "a dog"],
        ["3 men walking , one sits", "2 dogs, one brown", "2 men, 3 women"],
        ["3, a number", "12, a number", "7, a number"],
        ["2012, a man", "1950, a car", "1000, written on a wall"],
        ["10,000 people", "20,500 people", "2,000,000 ants"],
        ["10:30 on a clock", "4:15:00 on a clock", "A sign: stop"],
        ["1000 people", "2000 people", "10000 people: a crowd", "a dog"],
        ["a dog; 2", "a cat; 3", "a man; 4"],
        ["a dog, 2", "a cat, 3", "a man, 10,000"],
        ["image of a man, caption below", "a dog, brown", "a cat, black"],
        ["a photo, a caption", "a dog, brown", "a cat, black"],
        ["image: a dog", "image: a cat", "caption: a man"],
        ["caption", "a dog", "a cat"],
        ["a man, a file", "2 dogs, 3 cats", "a raw fish, a name"],
        ["he says: 3", "she says: 4"],
        ["player 23, in red", "number 7, in blue"],
        ["747 planes, 2 of them", "B52 planes, 3 of them", "A380, landing"],
    ],
)
def test_ordinary_captions_pass(tmp_path, lines):
    path = tmp_path / "caps.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    assert read_captions(path) == lines


def test_lists_of_ids_pass(tmp_path):
    path = tmp_path / "ids.txt"
    for lines in (["1.jpg#0", "1.jpg#1"], ["000391895", "77"], ["a/1.jpg", "a/2.jpg"]):
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
        assert read_captions(path) == read_lines(path, "id") == lines
    path.write_bytes(b"")
    with pytest.raises(InputError, match="ids.txt: no ids in it; expected one per line"):
        read_lines(path, "id")
    with pytest.raises(FileNotFoundError, match="no such id file; it holds one id per line"):
        read_lines(tmp_path / "no.txt", "id")


HEADED = [
    ("image_id,caption", "{n},{c}"),
    ("image_id,id,caption", "{n},{n},{c}"),
    (",image,caption", "{n},p{n},{c}"),
    (",caption", "{n},{c}"),
    ("Unnamed: 0,id,raw", "{n},{n},{c}"),
    ("imgid;sentid;sentence", "{n};{n};{c}"),
    ("filename|comment", "p|{c}"),
    ("caption,image_id", "{c},{n}"),
    ("raw\tfile\tsplit", "{c}\tp\ttrain"),
    ("id,caption,split", "{n},{c},train"),
    ('"id","caption"', '"{n}","{c}"'),
]


@pytest.mark.parametrize(("header", "form"), HEADED)
def test_a_header_settles_what_the_columns_are(tmp_path, header, form):
    captions = [f"{k} dogs, one brown" for k in range(20)]
    lines = [header, *(form.format(n=k, c=c) for k, c in enumerate(captions))]
    (tmp_path / "c.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="hold more than captions") as error:
        read_captions(tmp_path / "c.txt")
    subprocess.run(str(error.value).split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert read_captions(tmp_path / "NEW") == captions


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["一个小孩在公园里玩。\n狗在跑\n", "一只 狗 在 跑\n" * 900])
def test_wide_chinese_without_a_mark(tmp_path, encoding, text):
    (tmp_path / "c.txt").write_bytes(text.encode(encoding))
    with pytest.raises(
        InputError, match=f"text in {encoding.replace('-', '')[:3].upper()}"
    ) as error:
        read_captions(tmp_path / "c.txt")
    subprocess.run(str(error.value).split("`")[1], shell=True, cwd=tmp_path, check=True)
    assert read_captions(tmp_path / "NEW") == text.splitlines()


def test_the_letters_of_windows_are_told_from_latin1(tmp_path):
    for text, encoding in (("a\ndog\u2019s café", "cp1252"), ("café\nthe dog", "latin1")):
        (tmp_path / "c.txt").write_bytes(text.encode(encoding))
        with pytest.raises(InputError, match=f"`iconv -f {encoding} -t utf-8`"):
            read_captions(tmp_path / "c.txt")
