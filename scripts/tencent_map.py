"""MAP@k and A@k of the result lines that scripts/query_server.py writes.

    python scripts/tencent_map.py dist_tag_t2i.json dist_sentence_t2i.json dist_tag_new_t2i.json \\
        --list data/tencent_data_meta/test_list.json --weights 1 1 1.5

If the name of a file ends in _i2t.json, its i-t scores are used, else its t-i scores. A candidate
that several files score gets the weighted mean of its scores. The list holds one line per query,
with the candidates `Img_urls` and the flags `Img_flags`: 1 for a relevant candidate, else 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.query_server import is_number, json_lines
from util import tencent
from util.arguments import COUNT, Parser
from util.cli import InputError, run


def read_scores(path: str) -> list[dict[str, float]]:
    """For each query, the scores of its candidates by url."""
    name = "dist_i2t" if path.endswith("_i2t.json") else "dist_t2i"
    scores = []
    for row, line in enumerate(json_lines(path), 1):
        urls, values = lists(line, "urls", name, f"{path}: line {row}")
        if not all(map(is_number, values)):
            raise InputError(f"{path}: line {row}: expected numbers in {name}, finite ones")
        scores.append(dict(zip(urls, values, strict=True)))
    return scores


def lists(line: dict, urls: str, values: str, where: str) -> tuple[list[str], list]:
    """The two lists that a line holds under these names; they must have the same length."""
    found = [line.get(name) for name in (urls, values)] if isinstance(line, dict) else [None]
    if (
        not all(isinstance(x, list) for x in found)
        or len(found[0]) != len(found[1])
        or not all(isinstance(url, str) for url in found[0])
    ):
        raise InputError(f"{where}: expected {urls} and as many {values}")
    return found[0], found[1]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="files of result lines")
    parser.add_argument("--list", required=True, help="test_list.json, with Img_flags")
    parser.add_argument("--weights", type=float, nargs="+", help="one per file; default: equal")
    parser.add_argument("--k", type=COUNT, nargs="+", default=[1, 2, 3])
    opt = parser.parse_args(argv)
    queries = tencent.weighted_scores([read_scores(p) for p in opt.results], opt.weights)
    judged = json_lines(opt.list)
    if len(judged) != len(queries):
        raise InputError(f"{opt.list}: {len(judged)} queries, but {len(queries)} were scored")
    scores, relevant = [], []
    for row, (query, found) in enumerate(zip(judged, queries, strict=True), 1):
        urls, flags = lists(query, "Img_urls", "Img_flags", f"{opt.list}: line {row}")
        kept = [(found[u], flag) for u, flag in zip(urls, flags, strict=True) if u in found]
        scores.append([score for score, _ in kept])
        relevant.append([flag for _, flag in kept])
    metrics = tencent.average_precision(scores, relevant, opt.k)
    for k in opt.k:
        print(
            f"MAP@{k}: {metrics[f'map@{k}']:.4f}  A@{k}: {metrics[f'a@{k}']:.4f}  "
            f"({metrics[f'queries@{k}']} queries)"
        )
    print(f"MAP (of all candidates): {metrics['map']:.4f}")


if __name__ == "__main__":
    run(main)
