"""The readers of texts, JSON, pickles and BERT's folder; see tests/reader_cases.py."""

import base64
import functools
import importlib.util
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import bert
import checkpoint as ckpt
import cxc
import extended
import first_stage
import options
import vocab
from scripts import query_server, tencent_map
from tests.conftest import WORDS, train_args
from tests.reader_arrays import VOCABULARY
from tests.reader_cases import Reader
from util import extract_regions, tencent
from util.captions import read_captions
from util.cli import InputError
from util.coco_ids import read_pairs
from util.convert_data import FIELDS
from util.dependency_parser import read_part
from util.extractor_settings import read_settings
from util.image_ids import ImageIds, read_ids
from util.log import read_json_lines
from util.long_captions import encode_lines
from util.photo_folder import read_photo_captions
from util.plain_pickle import load_objects
from util.region_backends.given_boxes import GivenBoxes
from util.region_backends.hf_transformers import read_preprocessing
from util.word_vectors import read_vectors

CAPTIONS = [f"A {word} dog {other} ." for word, other in zip(WORDS, WORDS[1:], strict=False)]
NAMES = [f"{n}.jpg" for n in range(4)]


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    """What writes a text to a file of that name."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return make


def json_file(name: str, value: object) -> Callable[[Path], Path]:
    return text_file(name, json.dumps(value))


def json_lines(name: str, *values: object) -> Callable[[Path], Path]:
    return text_file(name, "".join(f"{json.dumps(value)}\n" for value in values))


# Captions, ids, words


def read_caption_file(path: Path) -> list:
    """All captions, and the ids of the first: nltk takes a second for 100,000 brackets."""
    captions = read_captions(path)
    return [captions, list(encode_lines(captions[:3], str(path), VOCABULARY))]


def read_id_file(path: Path) -> list:
    images = ImageIds(read_ids(str(path)))
    return [images.lines, images.alike, [images.find(x) for x in images.names]]


def make_coco_ids(folder: Path) -> Path:
    text_file("test_capids.txt", "".join(f"{n}\n" for n in range(10)))(folder)
    return text_file("test_ids.txt", "".join(f"COCO_val2014_{n:012}\n" for n in range(2)))(folder)


def use_vocabulary(path: Path) -> list:
    words = vocab.deserialize_vocab(path)
    vocab.check_captions(words, path.parent, 1, 100, str(path))
    return [words.word2idx, words.encode(CAPTIONS[0])]


def make_pickled_vocabulary(protocol: int) -> Callable[[Path], Path]:
    """A vocabulary as the published programs pickle it: an object of a class of theirs."""

    def make(folder: Path) -> Path:
        module = types.ModuleType("vocab_of_theirs")
        module.Vocabulary = type("Vocabulary", (), {"__module__": "vocab_of_theirs"})
        found = module.Vocabulary()
        vars(found).update(word2idx=VOCABULARY.word2idx, idx2word=VOCABULARY.idx2word, idx=20)
        sys.modules["vocab_of_theirs"] = module
        try:
            (folder / "f30k_vocab.pkl").write_bytes(pickle.dumps(found, protocol))
        finally:
            del sys.modules["vocab_of_theirs"]
        return folder / "f30k_vocab.pkl"

    return make


def make_objects(folder: Path) -> Path:
    sizes = [{"image_w": 300 + n, "image_h": 200} for n in range(4)]
    np.save(folder / "sizes.npy", np.array(sizes, dtype=object), allow_pickle=True)
    return folder / "sizes.npy"


def vectors(head: str = "") -> str:
    return head + "".join(f"{word} 0.5 -1 {n}e-2\n" for n, word in enumerate(WORDS))


# BERT


def make_bert(name: str) -> Callable[[Path], Path]:
    """A file of a BERT's folder, beside the others."""

    def make(folder: Path) -> Path:
        from tests.small_bert import write_bert

        model = write_bert(folder, num_hidden_layers=1, hidden_size=8)
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / name)
        if name == "tokenizer.json":
            (folder / name).write_text(bert.WordPieces.read(folder).tokenizer.to_str())
        return folder / name

    return make


def use_pieces(path: Path) -> list:
    pieces = bert.WordPieces.read(path.parent)
    return [pieces.encode(CAPTIONS[0]), len(pieces)]


# JSON files of judgements, extraction and search


def read_plausible(path: Path) -> dict:
    return extended.package(str(path.parent)).pm_gts


def make_plausible(folder: Path) -> Path:
    json_file(extended.PLAUSIBLE[0], {"9": [1, 2], "8": [3]})(folder)
    return json_file(extended.PLAUSIBLE[1], {"1": [9], "2": [9], "3": [8]})(folder)


SETTINGS = {
    **{"backend": "tiny", "weights": None, "weights_sha256": "0" * 64, "grid": 3, "regions": None},
    **{"half": False, "given_boxes": False, "width": 8, "photos": "photos", "skipped": []},
}


def read_state(path: Path) -> list:
    state = extract_regions.State(str(path.parent), {})
    return [state.read(), state.done, state.rows, state.broken]


def read_kept(path: Path) -> str | None:
    """Whether kept vectors can be taken."""
    return first_stage.fault_of(str(path.with_suffix("")), {"data": 1}, 5)


def make_kept(folder: Path) -> Path:
    np.save(folder / "images.npy", np.ones((5, 3), np.float32))
    record = {"about": {"data": 1}, "vectors": first_stage.as_written(f"{folder}/images.npy")}
    return json_file("images.json", record)(folder)


def use_settings(path: Path) -> dict:
    """As search.py does: nothing is fetched, and the weights of strangers are only read."""
    from util.region_backends import BACKENDS, open_extractor

    found = read_settings(str(path).removesuffix("_extractor.json"))
    if found["backend"] in BACKENDS:
        open_extractor(found, "cpu")
    return found


# The files of scripts/query_server.py and of its results


def make_records(folder: Path) -> Path:
    rows = [[str(n), "300", "200", "2", "AAAA", "AAAA"] for n in range(3)]
    assert len(rows[0]) == len(FIELDS)
    return text_file("test_own.tsv.0", "".join("\t".join(row) + "\n" for row in rows))(folder)


def read_records(path: Path) -> list:
    records = query_server.Records(str(path))
    return [records[image_id] for image_id in records.places]


def read_results(path: Path) -> list:
    found = tencent.weighted_scores([tencent_map.read_scores(str(path))])
    return [
        found,
        tencent.average_precision([list(x.values()) for x in found], [[1, 0]] * len(found)),
    ]


def of_query_server(read: Callable) -> Callable[[Path], object]:
    return lambda path: read(str(path))


# The body of a request to serve.py


def make_body(folder: Path) -> Path:
    numbers = base64.b64encode(np.ones(8, np.float32).tobytes()).decode()
    image = {"image_w": 30, "image_h": 20.5, "num_boxes": 2, "boxes": numbers, "features": numbers}
    return json_file("body.json", {"sentence": ["a", "dog"], "boxes": [image] * 2})(folder)


@functools.cache
def scorer():
    import serve

    opt = options.parse(train_args(cross_attn="t2i", img_dim=4, word_dim=3, embed_size=4))
    loaded = ckpt.build_model(opt, len(VOCABULARY)), VOCABULARY, opt
    return serve.Scorer("", None, torch.device("cpu"), serve.Limits(), loaded)


def read_body(path: Path) -> object:
    from util.request_bodies import Refused

    try:
        return scorer().score([scorer().read(path.read_bytes())])
    except Refused as error:
        raise InputError(str(error.args[-1])) from None


# Boxes of other programs


def make_boxes(folder: Path) -> Path:
    ids, boxes = np.array(NAMES), np.tile([1.0, 2, 30, 40], (4, 2, 1)).astype(np.float32)
    np.savez(folder / "boxes.npz", ids=ids, boxes=boxes, num_boxes=np.array([1, 2, 2, 1]))
    return folder / "boxes.npz"


def use_boxes(path: Path) -> list:
    given = GivenBoxes(str(path), NAMES, 3)
    return [given.of(name, (300, 200)) for name in NAMES]


TSV_BOXES = "".join(f"{name}\t1\t2\t30.5\t40\n" for name in NAMES)
LOG = [{"epoch": n, "step": 10 * n, "rsum": 100.5, "metrics": {"r1": 1.0}} for n in range(3)]
QUERY = {"Tag": ["a", "dog"], "Content": ["a"], "Img_urls": ["http://a/1.jpg"], "Img_flags": [1]}
RESULT = {"urls": ["a", "b"], "dist_t2i": [0.5, 0.25], "dist_i2t": [1, 2]}
PIXELS = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


READERS = [
    Reader(
        "captions",
        text_file("dev_caps.txt", "".join(f"{x}\n" for x in CAPTIONS)),
        read_caption_file,
    ),
    Reader("ids", text_file("ids.txt", "".join(f"{x}\n" for x in NAMES)), read_id_file),
    Reader("ids of COCO", make_coco_ids, lambda path: read_pairs(path.parent, "test")),
    Reader(
        "captions of photos",
        text_file("c.txt", "".join(f"{x}#0\ta dog runs\n" for x in NAMES)),
        lambda path: read_photo_captions(str(path), NAMES, None),
    ),
    Reader("vocabulary", json_file("v.json", VOCABULARY.state_dict()), use_vocabulary),
    Reader("vocabulary (pickle)", make_pickled_vocabulary(2), use_vocabulary),
    Reader("vocabulary (text pickle)", make_pickled_vocabulary(0), use_vocabulary),
    Reader("array of objects", make_objects, lambda path: load_objects(path).tolist()),
    Reader(
        "word vectors (GloVe)",
        text_file("glove.txt", vectors()),
        lambda path: read_vectors(str(path), VOCABULARY, 3),
    ),
    Reader(
        "word vectors (fastText)",
        text_file("wiki.vec", vectors(f"{len(WORDS)} 3\n")),
        lambda path: read_vectors(str(path), VOCABULARY, 3),
    ),
    Reader(
        "dependencies, half done",
        json_lines("caps.json.part", "key", [[0, 1], [1, 2]], [[0, 1]]),
        lambda path: read_part(str(path), "key"),
    ),
    Reader(
        "CxC's judgements",
        json_file("cxc_i2i.json", {"1": [[2, 3.5], [3, 1]], "2": [["1", 4]]}),
        lambda path: cxc.read_alike(str(path), [1, 2, 3], 2.5),
    ),
    Reader("extractor.json", json_file("test_extractor.json", SETTINGS), use_settings),
    Reader(
        "state of an extraction",
        json_file("state.json", {"settings": {}, "done": 3, "rows": 2, "broken": [["a", "b"]]}),
        read_state,
    ),
    Reader(
        "preprocessor_config.json",
        json_file("preprocessor_config.json", PIXELS),
        lambda path: read_preprocessing(str(path.parent)),
    ),
    Reader("record of kept vectors", make_kept, read_kept),
    Reader("boxes.tsv", text_file("boxes.tsv", TSV_BOXES), use_boxes),
    Reader("boxes.npz", make_boxes, use_boxes),
    Reader("log.jsonl", json_lines("log.jsonl", *LOG), of_query_server(read_json_lines)),
    Reader(
        "queries",
        json_lines("test_list.json", QUERY, QUERY),
        lambda path: query_server.read_queries(str(path), "Tag"),
    ),
    Reader(
        "ids of urls",
        text_file("img_id.txt", "http://a/1.jpg\t1\nhttp://b/2.jpg\t2\n"),
        of_query_server(query_server.read_ids),
    ),
    Reader("records of queries", make_records, read_records),
    Reader(
        "vectors of whole images",
        json_lines("test_features.json", ["http://a/1.jpg", [1, 2.5]], ["http://b/2.jpg", [3]]),
        lambda path: query_server.read_whole(str(path), {"http://a/1.jpg": "7"}),
    ),
    Reader("results of queries", json_lines("dist_t2i.json", RESULT, RESULT), read_results),
]
if importlib.util.find_spec("transformers"):
    READERS += [
        Reader(
            "BERT's config.json", make_bert("config.json"), lambda p: bert.read_config(p.parent)
        ),
        Reader("BERT's vocab.txt", make_bert("vocab.txt"), use_pieces),
        Reader("BERT's tokenizer.json", make_bert("tokenizer.json"), use_pieces),
        Reader(
            "BERT's model.safetensors",
            make_bert("model.safetensors"),
            lambda path: bert.pretrained(str(path.parent)),
        ),
        Reader(
            "BERT's pytorch_model.bin",
            make_bert("pytorch_model.bin"),
            lambda path: bert.pretrained(str(path.parent)),
        ),
    ]
if importlib.util.find_spec("fastapi"):
    READERS.append(Reader("body of a request", make_body, read_body))
if importlib.util.find_spec("eccv_caption"):
    READERS.append(Reader("Plausible Match's judgements", make_plausible, read_plausible))
