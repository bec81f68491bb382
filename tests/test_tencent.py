"""Tencent-News: the client of the server writes result files, and their MAP is computed."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from scripts import query_server, tencent_map
from tests.serving import WHOLE, Server, make_body, scores_of_evaluation, write_checkpoint
from util import tencent


def write_meta(folder: Path) -> None:
    """The tiny test split as the files of Tencent-News' test set."""
    folder.mkdir()
    body = make_body()
    url = "http://inews.example.com/{}.jpg".format
    with open(folder / "test_own.tsv.0", "w") as tsv:
        for record in body["boxes"][:14]:  # the last image has no features
            tsv.write("\t".join(str(record[name]) for name in query_server.FIELDS) + "\n")
    with open(folder / "test_features.json", "w") as lines:
        for i, vector in enumerate(body["whole_items"]):
            place = "http://inews.example.com/by/url.png" if i == 3 else f"/somewhere/{i}.jpg"
            lines.write(json.dumps([place, vector]) + "\n")
    ids = {url(i): i for i in range(15)} | {"http://inews.example.com/by/url.png": 3}
    (folder / "img_id.txt").write_text("".join(f"{u}\t{i}\n" for u, i in ids.items()))
    with open(folder / "test_list.json", "w") as lines:
        for q in range(5):
            urls = [url(i) for i in (3 * q, 3 * q + 1, 3 * q + 2, (3 * q + 4) % 15)]
            words = make_body(15 * q)["sentence"]
            query = {
                "Content": words,
                "Tag": words[:1],
                "Img_urls": urls,
                "Img_flags": [1, 0, 1, 0],
            }
            lines.write(json.dumps(query) + "\n")


def test_the_client_writes_result_lines_and_map_reads_them(server, tiny_positions, capsys):
    write_meta(tiny_positions / "meta")
    flags = [str(server.port), "--meta", "meta"]
    query_server.main(["dist_sentence_t2i.json", "sentence", *flags])
    query_server.main(["dist_tag_i2t.json", "tag", *flags, "--clients", "1"])
    lines = [json.loads(line) for line in open("dist_sentence_t2i.json")]
    want = scores_of_evaluation("model.pth.tar")
    assert [len(line["urls"]) for line in lines] == [4, 4, 4, 4, 3]  # image 14 has no features
    np.testing.assert_allclose(lines[2]["dist_t2i"], want[[6, 7, 8, 10], 30], atol=2e-6)
    assert "notice: 1 of 20 candidates have no features" in capsys.readouterr().out
    files = ["dist_sentence_t2i.json", "dist_tag_i2t.json"]
    tencent_map.main([*files, "--list", "meta/test_list.json", "--weights", "1", "1.5"])
    out = capsys.readouterr().out.splitlines()
    tags = [json.loads(line) for line in open("dist_tag_i2t.json")]
    scores = [
        [(a + 1.5 * b) / 2.5 for a, b in zip(x["dist_t2i"], y["dist_i2t"], strict=True)]
        for x, y in zip(lines, tags, strict=True)
    ]
    relevant = [[1, 0, 1, 0][: len(x)] for x in scores[:4]] + [[1, 0, 0]]
    metrics = tencent.average_precision(scores, relevant)
    assert out[0].startswith(f"MAP@1: {metrics['map@1']:.4f}  A@1: {metrics['a@1']:.4f}  (5 quer")
    assert out[1].startswith(f"MAP@2: {metrics['map@2']:.4f}") and out[1].endswith("(4 queries)")
    assert out[2].startswith("MAP@3: nan") and f"{metrics['map']:.4f}" in out[3]


def test_the_last_of_several_rows_of_an_image_counts(tmp_path):
    path = tmp_path / "test_own.tsv.0"
    rows = [("7", 100), ("8", 200), ("7", 300), ("9", 400), ("7", 500), ("9", 600)]
    path.write_text("".join(f"{image}\t{width}\t50\t1\tAA\tAA\n" for image, width in rows))
    records = query_server.Records(str(path))
    assert {image: records[image]["image_w"] for image in "789"} == {"7": 500, "8": 200, "9": 600}
    assert "10" not in records


def spoil_line(name, text):
    def spoil(folder):
        lines = (folder / name).read_text().splitlines()
        lines[1] = text
        (folder / name).write_text("\n".join(lines) + "\n")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_line("test_list.json", "{"), "test_list.json: line 2 is not JSON"),
        (spoil_line("test_list.json", "{}"), "test_list.json: line 2: expected Content and Img"),
        (spoil_line("img_id.txt", "x"), "img_id.txt: line 2: expected a url, a tab and an image"),
        (spoil_line("test_features.json", "[1]"), "test_features.json: line 2: expected .url, vec"),
        (spoil_line("test_own.tsv.0", "1\t2"), "test_own.tsv.0: image 1: expected image_id"),
        (
            lambda f: (f / "test_own.tsv.0").write_bytes(b"1\t\xff\t\xff\t1\t1\t1\n"),
            "test_own.tsv.0: image 1: expected image_id",
        ),
        (lambda f: (f / "img_id.txt").unlink(), "img_id.txt: no such file; --meta is the folder"),
        (
            lambda f: (f / "img_id.txt").write_text("a\t1\n"),
            "meta: none of the 20 candidates has an id in img_id.txt",
        ),
        (
            lambda f: (f / "test_features.json").write_text(
                "".join(f'["/{i}.jpg", [1]]\n' for i in range(15))
            ),
            "test_list.json: line 1: .*422: .*whole_items.0: 1 numbers, expected 12",
        ),
    ],
)
def test_the_client_names_bad_files_and_writes_nothing(server, tiny_positions, spoil, message):
    write_meta(tiny_positions / "meta")
    spoil(tiny_positions / "meta")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        query_server.main(["d.json", "sentence", str(server.port), "--meta", "meta"])
    assert not os.path.exists("d.json") and not os.path.exists("d.json.part")


def test_the_client_waits_for_a_busy_server(tiny_positions, starts_at_once):
    server = Server(write_checkpoint(WHOLE), "--max_waiting", "1")
    write_meta(tiny_positions / "meta")
    lines = (tiny_positions / "meta" / "test_list.json").read_text()
    (tiny_positions / "meta" / "test_list.json").write_text(lines * 8)
    query_server.main(["d.json", "tag", str(server.port), "--meta", "meta", "--clients", "6"])
    assert len(Path("d.json").read_text().splitlines()) == 40
    server.process.kill()
    server.process.communicate()


def test_the_client_says_when_no_server_answers(tiny_positions):
    write_meta(tiny_positions / "meta")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with pytest.raises(ValueError, match="no answer .*is serve.py running"):
        query_server.main(["d.json", "tag", port, "--meta", "meta"])


@pytest.mark.parametrize(
    ("results", "judged", "message"),
    [
        ('{"urls": ["a"], "dist_t2i": []}', "{}", "line 1: expected urls and as many dist_t2i"),
        ('{"urls": [], "dist_t2i": []}\n' * 2, "{}", "1 queries, but 2 were scored"),
        ('{"urls": [], "dist_t2i": []}', '{"Img_urls": ["a"]}', "line 1: expected Img_urls and"),
        ('{"urls": [], "dist_t2i": []}', "[1]", "line 1: expected Img_urls and"),
        ('{"urls": 3, "dist_t2i": [1]}', "{}", "line 1: expected urls and as many dist_t2i"),
        ('{"urls": "a", "dist_t2i": "5"}', "{}", "line 1: expected urls and as many dist_t2i"),
        ('{"urls": [["a"]], "dist_t2i": [5]}', "{}", "line 1: expected urls and as many"),
        ('{"urls": ["a"], "dist_t2i": [null]}', "{}", "line 1: expected numbers in dist_t2i"),
        ("\udcff", "{}", "line 1 is not JSON"),
    ],
)
def test_map_names_bad_lines(tmp_path, monkeypatch, results, judged, message):
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text(results, errors="surrogateescape")
    Path("list.json").write_text(judged)
    with pytest.raises(ValueError, match=message):
        tencent_map.main(["r.json", "--list", "list.json"])
