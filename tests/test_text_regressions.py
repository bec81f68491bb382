"""Texts, JSON and pickles that once crashed a reader, hung it, or filled its message."""

import json
import pickle
import struct
import sys

import numpy as np
import pytest

import cxc
from scripts import query_server
from tests.reader_cases import Bench, check_line
from tests.reader_texts import READERS, SETTINGS
from util import json_file
from util.cli import InputError
from util.image_ids import id_key, read_ids, written_key
from util.plain_pickle import load_objects, load_vocabulary

DEEP = b"[" * 200_000
CASES = {
    "vocabulary": [DEEP, b"9" * 5000, b'{"word2idx": NaN}', b"\xff\xfe[", b'{"lower": ["x"]}'],
    "CxC's judgements": [DEEP, b'{"1": [[2.9, 5]]}', b'{"1": [[1e400, 5]]}', b'{"x%s": []}' % DEEP],
    "extractor.json": [
        *(DEEP, b"[]"),
        *(
            json.dumps(SETTINGS | more).encode()
            for more in (
                *({"backend": "x" * 10**6}, {"grid": "6"}, {"skipped": 3}, {"photos": "a\nb"}),
                {"backend": "efficientnet_lite", "grid": 10**400},
            )
        ),
    ],
    "state of an extraction": [
        b'{"settings": {}, "done": 1e400, "rows": 0, "broken": []}',
        b'{"settings": {}, "done": 1, "rows": -2, "broken": []}',
        b'{"settings": {}, "done": 1, "rows": 1, "broken": ["ab"]}',
    ],
    "queries": [DEEP, b'{"Tag": 3, "Img_urls": "x"}', b'{"Tag": [], "Img_urls": [1]}'],
    "ids of urls": [b"\xff\t1\n", b"a\0\t1\n"],
    "records of queries": [b"%s\t300\t200\t2.9\tA\tA\n" % (b"n" * 10**5), b"1\t2\t2\tinf\tA\tA\n"],
    "vectors of whole images": [b'["u", "x"]', b'["u", [1e400]]', b'["u", [NaN]]'],
    "results of queries": [b'{"urls": ["a"], "dist_t2i": [%s]}' % (b"9" * 400)],
    "word vectors (fastText)": [b"1 %s\n" % (b"9" * 5000)],
    "preprocessor_config.json": [
        DEEP,
        b'{"size": 1e400, "image_mean": [1,1,1], "image_std": [1,1,1]}',
        b'{"size": 1000000000, "image_mean": [1,1,1], "image_std": [1,1,1]}',
    ],
    "ids": [b"a" * 10**6, b"1\n" + b".jpg" * 10**5],
    "BERT's config.json": [
        *(b"[]", DEEP, b'{"num_hidden_layers": 1000000000}', b'{"hidden_size": 1e30}'),
        *(
            b'{"vocab_size": 9999999, "hidden_size": 99996}',
            b'{"model_type": "%s"}' % (b"x" * 10**5),
        ),
    ],
}


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        pytest.param(reader, data, id=f"{reader.name} {k}")
        for reader in READERS
        for k, data in enumerate(CASES.get(reader.name, []))
    ],
)
def test_what_once_failed_is_refused(tmp_path, monkeypatch, reader, data):
    monkeypatch.chdir(tmp_path)
    assert Bench(reader, tmp_path).try_one(data) == "refused"


def test_every_case_has_a_reader():
    names = {reader.name for reader in READERS}
    assert {name for name in CASES if not name.startswith("BERT")} <= names


@pytest.mark.parametrize("index", [b"r" + struct.pack("<I", 2**32 - 1), b"p4294967295\n"])
def test_a_pickle_cannot_number_its_objects_at_will(tmp_path, index):
    """The unpickler in C would take 64 GB for the table."""
    path = tmp_path / "v.pkl"
    path.write_bytes(b"\x80\x02}" + index + b".")
    with pytest.raises(InputError, match="object number 4,294,967,295"):
        load_vocabulary(path)
    with pytest.raises(InputError, match="object number 4,294,967,295"):
        load_objects(path)


def test_a_pickle_of_many_objects_is_read(tmp_path):
    sizes = [{"image_w": n, "image_h": 2} for n in range(3000)]
    for protocol in (0, 2, 4):
        (tmp_path / "a.npy").write_bytes(pickle.dumps(np.array(sizes, dtype=object), protocol))
        assert load_objects(tmp_path / "a.npy")[-1] == sizes[-1]


def test_long_ids_are_names():
    assert written_key("9" * 5000) == "9" * 5000 and id_key("0012.jpg") == 12
    assert id_key(".jpg" * 10**6 + "x") == ".jpg" * 10**6 + "x"


def test_an_id_that_is_too_long_is_named(tmp_path):
    (tmp_path / "ids.txt").write_text("1\n" + "x" * 70_000)
    with pytest.raises(InputError, match="ids.txt: line 2: an id of 70,000 letters"):
        read_ids(str(tmp_path / "ids.txt"))


def test_half_a_character_is_written_as_json_has_it(tmp_path):
    path = tmp_path / "test_list.json"
    path.write_text('{"Tag": ["a"], "Img_urls": ["\\ud800"]}\n')
    (query,) = query_server.read_queries(str(path), "Tag")
    text = json.dumps(query, ensure_ascii=False).encode(errors="backslashreplace")
    assert json.loads(text) == query


@pytest.mark.parametrize(
    "text", [b"{", b'{"a": }', b"[1,\n 2", b"\xff", b"NaN", b"[-Infinity]", DEEP]
)
def test_json_faults_are_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError, match="x.json: not a JSON file ") as error:
        json_file.read_json(tmp_path / "x.json")
    check_line(str(error.value))


def test_values_of_files_are_shown_in_a_bounded_line():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    for value in (deep, "a\n" * 10**6, {k: "x" * 900 for k in range(1000)}, "\x1b[31m", 10**4000):
        check_line(json_file.shown_value(value))
    check_line(json_file.fault_of(ValueError("a\x1b" * 10**5)))


def test_marks_of_judgements_are_of_whole_ids(tmp_path):
    (tmp_path / "m.json").write_text('{"1": [["2", 5], [3, 5]]}')
    assert cxc.read_alike(str(tmp_path / "m.json"), [1, 2, 3], 2.5)[0] == [1, 2]
    assert sys.getrecursionlimit() < len(DEEP)
