"""BERT as the text encoder of any system, from the transformers library.

Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding,
NAACL 2019 (arXiv:1810.04805). A piece is a WordPiece token. Shapes: C captions, W pieces, H hidden
size of BERT, D joint dimension.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from model import l2norm
from util.cli import InputError
from util.hub import offline
from util.json_file import fault_of, first_line, parse_json, shown_value
from util.long_captions import cut

PIECES = "bert.embeddings.word_embeddings.weight"  # a key in the weights of a text encoder

# The part of BERT's configuration that a checkpoint keeps: all that its output depends on.
CONFIG = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)
# The largest that a file may say. The largest BERTs have 250,000 pieces, 2,560 numbers, 48 layers.
MOST = {
    **{"vocab_size": 10**7, "hidden_size": 10**5, "num_hidden_layers": 1000},
    **{"num_attention_heads": 10**4, "intermediate_size": 10**6},
    **{"max_position_embeddings": 10**6, "type_vocab_size": 1000},
}
# The parts of BERT's tokenizers; others may hold regular expressions that never end.
PARTS = {
    *("BertNormalizer", "Lowercase", "StripAccents", "Strip", "NFC", "NFD", "NFKC", "NFKD"),
    *("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Sequence"),
}
LONGEST_WORD = 1000  # letters; BERT's own tokenizers have 100


def library():
    """The transformers package, which only BERT needs. Raises InputError."""
    try:
        # A model may be being built on the meta device, on which the library's own tensors fail.
        with torch.device("cpu"):
            import transformers

            _ = transformers.BertModel  # it imports a part when it is asked for
    except ImportError:
        raise InputError(
            "--text_enc_type bert needs the transformers library: pip install transformers"
        ) from None
    found = transformers.__version__
    if int(found.partition(".")[0]) < 5:  # it takes other masks
        raise InputError(
            f"--text_enc_type bert needs transformers 5 or newer, found {found}: pip install "
            "--upgrade transformers"
        )
    transformers.utils.logging.set_verbosity_error()  # else it reports unused heads
    transformers.utils.logging.disable_progress_bar()
    return transformers


def source_of(given: str | os.PathLike | None, named: str, path: str) -> str:
    """The BERT that a checkpoint's missing tokens or configuration come from: a folder or a name.

    It is what the user has `given`, or else the folder that the options of the checkpoint at `path`
    have `named`. A name in a file is not looked up: a file must not choose a network request.
    """
    if given:
        return os.fspath(given)
    if os.path.isdir(named):
        print(f"notice: {path}: what it lacks of its BERT is read from {named}, as its options say")
        return named
    raise InputError(
        f"{path}: it does not hold its BERT's tokens and configuration, and its options name BERT "
        f"{shown_value(named)[1:-1]}, which is not a folder here and is not looked up; give "
        "--vocab_path (to train: --bert_path) the folder, or the name, of the BERT that it started "
        "from"
    )


def fetch(what: str, path: str, read: Callable, *files: str):
    """The result of `read` on a folder, or on a name that the library's hub knows (Q37).

    `read` is a function of the library that takes `local_files_only`. If `files` are given, a
    folder must hold one of them, and the hub must hold the last one. `what` names the result in
    errors. Whatever a folder holds, the library asks for nothing elsewhere.
    """
    transformers = library()
    folder = os.path.isdir(path)
    if not folder:
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise InputError(f"BERT {path}: no such folder")
        print(f"notice: {path}: no such folder, so it is looked up at huggingface.co")
    try:
        if folder:
            there = [file for file in files if os.path.isfile(os.path.join(path, file))]
            if files and not there:
                raise FileNotFoundError(f"no {' or '.join(files)} in it")
            with offline():
                return read(path, local_files_only=True)
        if files:
            transformers.utils.cached_file(path, files[-1])
        return read(path)
    except Exception as error:  # a damaged or hostile file can fail anywhere in the library
        where = (
            "" if folder else ", which is not a folder, and its files are not in the local cache"
        )
        raise InputError(
            f"BERT {path}{where}: no {what} could be read ({fault_of(error)}); give --bert_path "
            "(to evaluate: --vocab_path) a folder with config.json, model.safetensors and "
            "vocab.txt, as of bert-base-uncased"
        ) from None


class WordPieces:
    """BERT's tokenizer in place of a Vocabulary: encode() gives [CLS], the pieces, [SEP]."""

    unknown, mask, pieces = "[UNK]", "[MASK]", True
    max_words = 0  # see encode

    def __init__(self, text: str, source: str):
        """`text` is the tokenizer in the tokenizers library's JSON; `source` names it in errors."""
        library()
        from tokenizers import Tokenizer

        with tokens_of(source):
            check_parts(parse_json(text))
            self.tokenizer = Tokenizer.from_str(text)
        # "[MASK]" in a caption is plain text: published programs split it like other text (Q38).
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.word2idx = self.tokenizer.get_vocab()
        if self.tokenizer.encode("").tokens != ["[CLS]", "[SEP]"]:
            raise InputError(f"{source}: not BERT's tokens: no [CLS] and [SEP] around a caption")

    @classmethod
    def read(cls, path: str | os.PathLike) -> "WordPieces":
        """Read the tokenizer of a BERT: a folder with vocab.txt or tokenizer.json, or a name."""
        path = os.fspath(path)
        file = os.path.join(path, "tokenizer.json")
        if os.path.isfile(file):  # before the library makes a table as long as it says
            text = Path(file).read_bytes()
            with tokens_of(file):
                check_parts(parse_json(text))
        read = library().BertTokenizerFast.from_pretrained
        # Without these files the library would invent a tokenizer of five pieces.
        tokenizer = fetch("tokens", path, read, "tokenizer.json", "vocab.txt")
        return cls(tokenizer.backend_tokenizer.to_str(), path)

    def check_rows(self, rows: int, source: str) -> "WordPieces":
        """Return self; raise InputError if a BERT with `rows` piece embeddings has too few."""
        if len(self) > rows:
            raise InputError(f"{source}: {len(self)} WordPiece tokens, but BERT has {rows} rows")
        if len(self) < rows:
            print(
                f"warning: {source}: {len(self)} WordPiece tokens, but BERT has {rows} rows for "
                "them: are they the tokens of this BERT?"
            )
        return self

    def __len__(self) -> int:
        return max(self.word2idx.values()) + 1

    def encode(self, caption: str) -> list[int]:
        """The ids of a caption's pieces, the first `max_words` if it is not 0, in [CLS], [SEP]."""
        return cut(self.encode_whole(caption), self.max_words)

    def encode_whole(self, caption: str) -> list[int]:
        """The ids of all pieces of a caption, between [CLS] and [SEP]."""
        return self.tokenizer.encode(caption).ids

    def state_dict(self) -> dict:
        """Plain values that a checkpoint can store."""
        return {"tokenizer_json": self.tokenizer.to_str()}


@contextlib.contextmanager
def tokens_of(source: str) -> Iterator[None]:
    """Put the source of a tokenizer around any error: the library raises many types."""
    try:
        yield
    except Exception as error:
        said = first_line(str(error)) or type(error).__name__
        raise InputError(f"{source}: not BERT's tokens: {said}") from None


def check_parts(tokenizer: dict) -> None:
    """Raise ValueError unless the JSON of a tokenizer has BERT's parts only."""
    model = tokenizer["model"]
    # The library adds special tokens that a file lacks, but it cannot use them then.
    special = ["[CLS]", "[SEP]", WordPieces.unknown, WordPieces.mask]
    if model.get("type") != "WordPiece" or not model["vocab"].keys() >= set(special):
        raise ValueError(f"expected WordPiece, {' '.join(special)} among its pieces")
    # The library makes tables as long as the largest id.
    ids = [*model["vocab"].values(), *(x["id"] for x in tokenizer.get("added_tokens") or [])]
    if not all(type(x) is int and 0 <= x < 10 * len(ids) for x in ids):
        raise ValueError(f"expected ids of pieces from 0 to the {len(ids)} pieces that are there")
    if not 0 < model.get("max_input_chars_per_word", 100) <= LONGEST_WORD:
        raise ValueError(f"expected words of at most {LONGEST_WORD} letters")
    parts = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if part is not None:
            if part.get("type") not in PARTS:
                raise ValueError(f"a part {shown_value(part.get('type'))}, which no BERT has")
            parts += part.get("normalizers", []) + part.get("pretokenizers", [])


def read_config(path: str) -> dict:
    """The configuration (the names of CONFIG) of the BERT at a path."""
    kind = library().BertConfig
    raw, _ = fetch("config.json", path, kind.get_config_dict, "config.json")
    if not isinstance(raw, dict):
        raise InputError(f"BERT {path}: config.json: expected a JSON object")
    if raw.get("model_type", "bert") != "bert":
        said = shown_value(raw["model_type"]).strip("'")
        raise InputError(f"BERT {path}: a {said} model, expected bert")
    try:
        config = kind(**{name: raw[name] for name in CONFIG if name in raw})
    except Exception as error:  # the library raises its own errors for types
        raise InputError(f"BERT {path}: config.json: {fault_of(error)}") from None
    config = {name: getattr(config, name) for name in CONFIG}
    check_config(config, f"BERT {path}: config.json")
    check_size(config, path)
    return config


def check_config(config: dict, source: str) -> None:
    """Raise InputError unless BERT's configuration has possible values; `source` names it."""
    for name, most in MOST.items():
        if type(config[name]) is not int or not 1 <= config[name] <= most:
            raise InputError(
                f"{source}: {name} is {shown_value(config[name])}, expected a whole number from 1 "
                f"to {most:,}"
            )
    ends = {"layer_norm_eps": 1, "hidden_dropout_prob": 1, "attention_probs_dropout_prob": 1}
    for name, most in ends.items():
        x = config[name]
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x <= most:
            raise InputError(f"{source}: {name} is {shown_value(x)}, expected from 0 to {most}")
    if not isinstance(config["hidden_act"], str):
        raise InputError(f"{source}: hidden_act is {shown_value(config['hidden_act'])}")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise InputError(f"{source}: hidden_size {width}, which {heads} heads cannot share")


def check_size(config: dict, path: str) -> None:
    """Raise InputError if the files of weights in a folder are too small for a configuration.

    So a false number in a small file does not fill the memory.
    """
    if not os.path.isdir(path):
        return
    ends = ".safetensors", ".bin"
    held = sum(entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith(ends))
    words = config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"]
    layer = 4 * config["hidden_size"] + 2 * config["intermediate_size"]
    numbers = config["hidden_size"] * (words + config["num_hidden_layers"] * layer)
    if held and numbers > held:  # not even a byte for each
        raise InputError(
            f"BERT {path}: config.json describes {numbers:,} weights, but the files of weights "
            f"hold {held:,} bytes"
        )


def pretrained(path: str) -> dict[str, Tensor]:
    """The weights of the BERT at a path. Raises InputError if some are missing or do not fit."""
    read = partial(
        library().BertModel.from_pretrained,
        output_loading_info=True,
        attn_implementation="sdpa",  # not the file's choice, which can be code from elsewhere
    )
    model, report = fetch("weights", path, read)
    state = model.state_dict()
    # Only the parts that are used must fit: files also hold heads for pretraining.
    wrong = [f"no {name}" for name in sorted(report["missing_keys"]) if "pooler." not in name]
    wrong += [
        f"unknown {name}"
        for name in sorted(report["unexpected_keys"])
        if re.search(r"\b(encoder|embeddings)\.", name) and not name.endswith("position_ids")
    ]
    wrong += [f"{name} of another size" for name, *_ in report["mismatched_keys"]]
    if wrong:
        more = " ..." if len(wrong) > 3 else ""
        raise InputError(
            f"BERT {path}: its weights are not those of its config.json: {', '.join(wrong[:3])}"
            f"{more}"
        )
    odd = [name for name, x in state.items() if not torch.isfinite(x).all()]
    if odd:
        raise InputError(f"BERT {path}: its weights {odd[0]} hold NaN or Inf")
    return state


def infer_config(state: dict[str, Tensor]) -> dict:
    """The part of the configuration that a text encoder's weights show; see complete_config."""
    words = state["bert.embeddings.word_embeddings.weight"]  # (pieces, H)
    layers = [key for key in state if key.endswith("attention.self.query.weight")]
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": len(layers),
        "intermediate_size": state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["bert.embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state["bert.embeddings.token_type_embeddings.weight"].shape[0],
    }


def complete_config(known: dict, source: str, path: str) -> dict:
    """The whole configuration of a checkpoint's BERT; its weights show only the part `known`.

    The heads, activation, layer norm and dropout come from the config.json of the BERT at `source`,
    a folder or a name. If the folder has no config.json, they are those of bert-base (heads of 64
    numbers, GELU, 1e-12, 0.1), and a warning says so. `path` names the checkpoint in messages.
    Raises InputError if the sizes in config.json are not those of the weights.
    """
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        config = library().BertConfig(
            **known, num_attention_heads=max(known["hidden_size"] // 64, 1)
        )
        config = {name: getattr(config, name) for name in CONFIG}
        said = ", ".join(f"{name} {x}" for name, x in config.items() if name not in known)
        print(
            f"warning: {source}: no config.json, and the weights of {path} do not tell all of it; "
            f"guessed, as of bert-base-uncased: {said}"
        )
        return config
    config = read_config(source)
    for name, x in known.items():
        if config[name] != x:
            raise InputError(
                f"{source}: config.json: {name} {config[name]}, but the weights of {path} have "
                f"{x}; give the folder of the BERT that it started from"
            )
    return config


class EncoderTextBert(nn.Module):
    """Encodes each piece as one vector: BERT's last hidden state, a linear layer, unit length."""

    def __init__(self, config: dict, embed_size: int, no_txtnorm: bool = False):
        super().__init__()
        transformers = library()
        self.bert = transformers.BertModel(transformers.BertConfig(**config))
        self.bert.pooler.requires_grad_(False)  # published checkpoints hold it; nothing uses it
        self.linear = nn.Linear(config["hidden_size"], embed_size)
        self.no_txtnorm = no_txtnorm

    def start_from(self, path: str) -> None:
        """Load the weights of the BERT at a path."""
        self.bert.load_state_dict(pretrained(path))

    def forward(self, captions: Tensor, lengths: Tensor) -> Tensor:
        """captions (C, W) ids, lengths (C,) -> pieces (C, W, D), zero beyond each length."""
        return self.words_and_sentence(captions, lengths)[0]

    def words_and_sentence(self, captions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The pieces (C, W, D), and the sentence (C, D): the vector of [CLS] before unit length."""
        room = self.bert.config.max_position_embeddings
        if captions.size(1) > room:
            raise InputError(
                f"a caption of {captions.size(1)} pieces, but this BERT reads {room}; cut it"
            )
        at = torch.arange(captions.size(1))  # (W,)
        word_mask = (at < lengths.cpu()[:, None]).to(captions.device, non_blocking=True)  # (C, W)
        # The library takes a mask with four axes as it is. It would read the values of any other
        # mask on the host.
        mask = word_mask[:, None, None].expand(-1, 1, len(at), -1)  # (C, 1, W, W)
        hidden = self.bert(captions, attention_mask=mask).last_hidden_state  # (C, W, H)
        x = self.linear(hidden).float().masked_fill(~word_mask[..., None], 0)  # (C, W, D)
        return (x if self.no_txtnorm else l2norm(x, dim=-1)), x[:, 0]
