"""Send the queries of a list to serve.py and write the published result lines.

    python scripts/query_server.py dist_sentence_t2i.json sentence 5091
    python scripts/query_server.py dist_tag_t2i.json tag 5091
    python scripts/query_server.py dist_tag_new_t2i.json tag 5092

The script reads the four files of Tencent-News' test set from --meta (docs/serving.md has their
formats). It leaves out candidates without features. It writes one line per query: {"urls": [...],
"dist_t2i": [...], "dist_i2t": [...]}. scripts/tencent_map.py computes MAP from these lines.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.arguments import COUNT, Parser
from util.captions import read_lines
from util.cli import InputError, progress, replacing, run
from util.convert_data import FIELDS
from util.json_file import fault_of, first_line, parse_json

TEXT = {"tag": "Tag", "sentence": "Content"}
FILES = "test_list.json", "img_id.txt", "test_own.tsv.0", "test_features.json"


def json_lines(path: str) -> list:
    """The values of a file with one JSON value per line."""
    values = []
    with open(path, "rb") as lines:
        for row, line in enumerate(lines, 1):
            try:
                values.append(parse_json(line))
            except ValueError as error:  # also if the line is not UTF-8
                raise InputError(
                    f"{path}: line {row} is not JSON ({fault_of(error)}); expected one JSON value "
                    "per line"
                ) from None
    return values


class Records:
    """Bottom-up-attention records by image id; each is read from its file when it is needed.

    Of several rows with one id the last counts, as published.
    """

    def __init__(self, path: str):
        self.path, self.places = path, {}
        with open(path, "rb") as lines:
            start = 0
            for line in lines:
                self.places[line.partition(b"\t")[0].decode(errors="replace")] = start
                start += len(line)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.places

    def __getitem__(self, image_id: str) -> dict:
        with open(self.path, "rb") as lines:
            lines.seek(self.places[image_id])
            line = lines.readline()
        try:
            record = dict(zip(FIELDS, line.decode().rstrip("\r\n").split("\t"), strict=True))
            numbers = {n: float(record[n]) for n in ("image_w", "image_h", "num_boxes")}
        except ValueError:
            numbers = {}
        fits = all(1 <= x < 2**31 for x in numbers.values())
        if not numbers or not fits or not numbers["num_boxes"].is_integer():
            raise InputError(
                f"{self.path}: image {first_line(image_id)}: expected {', '.join(FIELDS)}, "
                "tab-separated, sizes above 0 and a whole number of boxes"
            )
        return record | {name: int(x) for name, x in numbers.items()}


def read_queries(path: str, text: str) -> list[dict]:
    """The queries of a file; each has its candidates, and its words under the name `text`."""
    queries = json_lines(path)
    for row, query in enumerate(queries, 1):
        found = [query.get(x) for x in (text, "Img_urls")] if isinstance(query, dict) else [None]
        if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in found):
            raise InputError(f"{path}: line {row}: expected {text} and Img_urls, lists of texts")
    return queries


def read_ids(path: str) -> dict[str, str]:
    """The image ids by url."""
    ids = {}
    for row, line in enumerate(read_lines(path, "url"), 1):
        url, tab, image_id = line.rpartition("\t")
        if not tab:
            raise InputError(f"{path}: line {row}: expected a url, a tab and an image id")
        ids[url] = image_id
    return ids


def is_number(x) -> bool:
    """Whether a value of JSON is a number, and a finite one as a float."""
    return isinstance(x, (int, float)) and abs(x) < sys.float_info.max


def read_whole(path: str, ids: dict[str, str]) -> dict[str, list[float]]:
    """Vectors of whole images by image id: the id of their url, else the file name in the url."""
    vectors = {}
    for row, value in enumerate(json_lines(path), 1):
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            raise InputError(f"{path}: line {row}: expected [url, vector]")
        if not isinstance(value[1], list) or not all(map(is_number, value[1])):
            raise InputError(f"{path}: line {row}: expected a vector of finite numbers")
        name = value[0].rpartition("/")[2].partition(".")[0]
        vectors[ids.get(value[0], name)] = value[1]
    return vectors


# No proxy: the server is on this machine or near it.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, body: dict, tries: int = 20) -> dict:
    """The server's answer; asks again if the server is overloaded."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    said = ""
    for _ in range(tries):
        try:
            with OPENER.open(request, timeout=300) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = f"{error.code}: {error.read().decode(errors='replace')[:300]}"
            if error.code not in (503, 504):
                raise InputError(f"{url}: {said}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, ConnectionRefusedError) or not isinstance(reason, OSError):
                raise InputError(f"{url}: no answer ({reason}); is serve.py running?") from None
            said = f"no answer ({reason})"
        time.sleep(0.5)
    raise InputError(f"{url}: {said}, {tries} times")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="output file, e.g. dist_sentence_t2i.json")
    parser.add_argument("text", choices=TEXT, help="the words of a query to send")
    parser.add_argument("port", type=int, nargs="?", default=5091)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--meta", default="data/tencent_data_meta", help="folder of the four files")
    parser.add_argument("--clients", type=COUNT, default=4, help="requests at a time")
    opt = parser.parse_args(argv)
    paths = [os.path.join(opt.meta, name) for name in FILES]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: no such file; --meta is the folder of the four files that "
                "docs/serving.md describes"
            )
    url = f"http://{opt.host}:{opt.port}/scan_sentence_image_score"
    queries = read_queries(paths[0], TEXT[opt.text])
    ids, records = read_ids(paths[1]), Records(paths[2])
    whole = read_whole(paths[3], ids)
    candidates = [
        [u for u in query["Img_urls"] if ids.get(u) in records and ids[u] in whole]
        for query in queries
    ]
    total, left = (sum(map(len, x)) for x in ([q["Img_urls"] for q in queries], candidates))
    if not left:
        raise InputError(
            f"{opt.meta}: none of the {total} candidates has an id in img_id.txt, a record of that "
            "id in test_own.tsv.0 and a vector in test_features.json"
        )
    if left < total:
        print(f"notice: {total - left} of {total} candidates have no features and are left out")

    def answer(row: int) -> dict:
        query, urls = queries[row], candidates[row]
        if not urls:
            return {"urls": [], "dist_t2i": [], "dist_i2t": []}
        body = {
            "sentence": query[TEXT[opt.text]],
            "boxes": [records[ids[u]] for u in urls],
            "whole_items": [whole[ids[u]] for u in urls],
        }
        try:
            scores = ask(url, body)
        except InputError as error:
            raise InputError(f"{paths[0]}: line {row + 1}: {error}") from None
        return {"urls": urls, "dist_t2i": scores["sim_t2i"], "dist_i2t": scores["sim_i2t"]}

    pool = ThreadPoolExecutor(opt.clients)
    try:
        how = {
            "encoding": "utf-8",
            "errors": "backslashreplace",
        }  # half a character: JSON's \\ud800
        with replacing(opt.out) as part, open(part, "w", **how) as out:
            for line in progress(pool.map(answer, range(len(queries))), "queries", len(queries)):
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{opt.out}: {len(queries)} queries")


if __name__ == "__main__":
    run(main)
