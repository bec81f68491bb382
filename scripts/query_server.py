"""Send the queries of a list to serve.py and write the published result lines.

    python scripts/query_server.py dist_sentence_t2i.json sentence 5091
    python scripts/query_server.py dist_tag_t2i.json tag 5091
    python scripts/query_server.py dist_tag_new_t2i.json tag 5092

Reads, from --meta, the files of Tencent-News' test set: `test_list.json`, a line a query with its
words `Tag` and `Content` and its candidates `Img_urls`; `img_id.txt`, lines of url and image id;
`test_own.tsv.0`, bottom-up-attention records; `test_features.json`, a line an image with its url
and the vector of the whole image. Candidates without features are left out. Writes a line a query:
{"urls": [...], "dist_t2i": [...], "dist_i2t": [...]}. scripts/tencent_map.py makes MAP of them.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.cli import InputError, progress, run
from util.convert_data import FIELDS

TEXT = {"tag": "Tag", "sentence": "Content"}


def json_lines(path: str) -> list:
    """The values of a file with one JSON value a line."""
    values = []
    with open(path, encoding="utf-8") as lines:
        for row, line in enumerate(lines, 1):
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}: line {row} is not JSON ({error})") from None
    return values


class Records:
    """Bottom-up-attention records by image id, left in their file until they are asked for."""

    def __init__(self, path: str):
        self.path, self.places = path, {}
        with open(path, "rb") as lines:
            start = 0
            for line in lines:
                self.places.setdefault(line.partition(b"\t")[0].decode(errors="replace"), start)
                start += len(line)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.places

    def __getitem__(self, image_id: str) -> dict:
        with open(self.path, "rb") as lines:
            lines.seek(self.places[image_id])
            fields = lines.readline().decode().rstrip("\r\n").split("\t")
        try:
            record = dict(zip(FIELDS, fields, strict=True))
            numbers = {name: int(record[name]) for name in ("image_w", "image_h", "num_boxes")}
        except ValueError:
            raise InputError(
                f"{self.path}: image {image_id}: expected {', '.join(FIELDS)}, tab-separated"
            ) from None
        return record | numbers


def read_ids(path: str) -> dict[str, str]:
    """Image ids by url."""
    ids = {}
    with open(path, encoding="utf-8") as lines:
        for row, line in enumerate(lines, 1):
            url, tab, image_id = line.strip().rpartition("\t")
            if not tab:
                raise InputError(f"{path}: line {row}: expected a url, a tab and an image id")
            ids[url] = image_id
    return ids


def read_whole(path: str) -> dict[str, list[float]]:
    """Vectors of whole images by image id, which is the name of the file in their url."""
    vectors = {}
    for row, value in enumerate(json_lines(path), 1):
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            raise InputError(f"{path}: line {row}: expected [url, vector]")
        vectors[value[0].rpartition("/")[2].partition(".")[0]] = value[1]
    return vectors


def ask(url: str, body: dict, tries: int = 20) -> dict:
    """The server's answer; waits where it has too much to do."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    for left in range(tries - 1, -1, -1):
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            if error.code != 503 or not left:
                raise InputError(f"{url}: {error.code}: {said}") from None
            time.sleep(0.5)
        except urllib.error.URLError as error:
            raise InputError(f"{url}: no answer ({error.reason}); is serve.py running?") from None
    raise AssertionError("unreachable")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("out", help="where to write, such as dist_sentence_t2i.json")
    parser.add_argument("text", choices=TEXT, help="which words of a query to send")
    parser.add_argument("port", type=int, nargs="?", default=5091)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--meta", default="data/tencent_data_meta", help="folder of the files")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time")
    opt = parser.parse_args(argv)
    url = f"http://{opt.host}:{opt.port}/scan_sentence_image_score"

    def file(name: str) -> str:
        return os.path.join(opt.meta, name)

    queries = json_lines(file("test_list.json"))
    for row, query in enumerate(queries, 1):
        if not isinstance(query, dict) or not {TEXT[opt.text], "Img_urls"} <= query.keys():
            raise InputError(
                f"{file('test_list.json')}: line {row}: expected {TEXT[opt.text]} and Img_urls"
            )
    ids, records = read_ids(file("img_id.txt")), Records(file("test_own.tsv.0"))
    whole = read_whole(file("test_features.json"))

    def answer(query: dict) -> dict:
        urls = [u for u in query["Img_urls"] if ids.get(u) in records and ids[u] in whole]
        if not urls:
            return {"urls": [], "dist_t2i": [], "dist_i2t": []}
        body = {
            "sentence": query[TEXT[opt.text]],
            "boxes": [records[ids[u]] for u in urls],
            "whole_items": [whole[ids[u]] for u in urls],
        }
        scores = ask(url, body)
        return {"urls": urls, "dist_t2i": scores["sim_t2i"], "dist_i2t": scores["sim_i2t"]}

    with open(f"{opt.out}.part", "w", encoding="utf-8") as out:
        pool = ThreadPoolExecutor(opt.clients)
        try:
            answers = pool.map(answer, queries)
            for line in progress(answers, "queries", len(queries)):
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)
    os.replace(f"{opt.out}.part", opt.out)
    print(f"{opt.out}: {len(queries)} queries")


if __name__ == "__main__":
    run(main)
