"""BERT for the words of any system, by the transformers library: WordPiece tokens, the encoder.

Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding,
NAACL 2019 (arXiv:1810.04805). Letters: C captions, W pieces, H BERT's hidden size, D joint
dimension.
"""

import json
import os

import torch
from torch import Tensor, nn

from model import l2norm
from util.cli import InputError

# What of BERT's configuration a checkpoint keeps: all that decides what it computes.
CONFIG = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)


def library():
    """The transformers package, which only BERT needs."""
    try:
        import transformers
    except ImportError:
        raise InputError(
            "--text_enc_type bert needs the transformers library: pip install transformers"
        ) from None
    transformers.utils.logging.set_verbosity_error()  # weights of heads that are not read
    transformers.utils.logging.disable_progress_bar()
    return transformers


def fetch(kind: str, path: str, *files: str):
    """A part of BERT (a class of transformers) from a folder, or by a name known to its hub.

    At least one of the `files`, if any are named, must be there.
    """
    transformers = library()
    try:
        for left, file in enumerate(files, 1 - len(files)):  # 0 at the last
            try:
                transformers.utils.cached_file(path, file)
                break
            except OSError:
                if left == 0:
                    raise
        return getattr(transformers, kind).from_pretrained(path)
    except Exception as error:  # a damaged or hostile file can fail anywhere in their readers
        where = "" if os.path.isdir(path) else ", which is no folder, and its files are not here"
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"--bert_path {path}{where}: no {kind} could be read ({said[0]}); give a folder with "
            "config.json, model.safetensors and vocab.txt, as of bert-base-uncased"
        ) from None


class WordPieces:
    """BERT's tokens in place of a Vocabulary: encode() gives [CLS], the pieces, [SEP]."""

    unknown, mask, pieces = "[UNK]", "[MASK]", True

    def __init__(self, text: str, source: str):
        """`text` is the tokenizer as the tokenizers library writes it; `source` names it."""
        library()
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_str(text)
            model = json.loads(text)["model"]
        except Exception as error:  # whatever the library's reader finds
            raise InputError(f"{source}: not a tokenizer ({error})") from None
        # The library adds special tokens that a file lacks, but then cannot use them.
        special = ["[CLS]", "[SEP]", self.unknown, self.mask]
        if model.get("type") != "WordPiece" or not model["vocab"].keys() >= set(special):
            raise InputError(
                f"{source}: not BERT's tokens: expected WordPiece, {' '.join(special)} among its "
                "pieces"
            )
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.word2idx = self.tokenizer.get_vocab()

    @classmethod
    def read(cls, path: str | os.PathLike) -> "WordPieces":
        """The tokens of a BERT: a folder with vocab.txt or tokenizer.json, or a name."""
        path = os.fspath(path)
        # Without these files the library would make up a tokenizer of five pieces.
        tokenizer = fetch("BertTokenizer", path, "tokenizer.json", "vocab.txt")
        return cls(tokenizer.backend_tokenizer.to_str(), path)

    def __len__(self) -> int:
        return max(self.word2idx.values()) + 1

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption's pieces, between [CLS] and [SEP]."""
        return self.tokenizer.encode(caption).ids

    def state_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return {"tokenizer_json": self.tokenizer.to_str()}


def read_config(path: str) -> dict:
    """What decides the architecture of the BERT at a path."""
    config = fetch("AutoConfig", path)
    if config.model_type != "bert":
        raise InputError(f"--bert_path {path}: a {config.model_type} model, expected bert")
    return {name: getattr(config, name) for name in CONFIG}


def infer_config(state: dict[str, Tensor]) -> dict:
    """The same from the weights of a text encoder that does not say: heads of 64 numbers each."""
    words = state["bert.embeddings.word_embeddings.weight"]  # (pieces, H)
    layers = [key for key in state if key.endswith("attention.self.query.weight")]
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(words.shape[1] // 64, 1),
        "intermediate_size": state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["bert.embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state["bert.embeddings.token_type_embeddings.weight"].shape[0],
    }


class EncoderTextBert(nn.Module):
    """Pieces to one vector each: BERT's last hidden states, a linear layer, unit length."""

    def __init__(self, config: dict, embed_size: int, no_txtnorm: bool = False):
        super().__init__()
        transformers = library()
        self.bert = transformers.BertModel(transformers.BertConfig(**config))
        self.bert.pooler.requires_grad_(False)  # in published checkpoints, and read by nothing
        self.linear = nn.Linear(config["hidden_size"], embed_size)
        self.no_txtnorm = no_txtnorm

    def start_from(self, path: str) -> None:
        """Take the weights of the BERT at a path."""
        self.bert.load_state_dict(fetch("BertModel", path).state_dict())

    def forward(self, captions: Tensor, lengths: Tensor) -> Tensor:
        """captions (C, W) ids, lengths (C,) -> pieces (C, W, D), zero beyond each length."""
        return self.words_and_sentence(captions, lengths)[0]

    def words_and_sentence(self, captions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The pieces (C, W, D), and the sentence (C, D): [CLS] before it gets unit length."""
        room = self.bert.config.max_position_embeddings
        if captions.size(1) > room:
            raise InputError(
                f"a caption of {captions.size(1)} pieces, but this BERT reads {room}; cut it"
            )
        at = torch.arange(captions.size(1))  # (W,)
        inside = (at < lengths.cpu()[:, None]).to(captions.device, non_blocking=True)  # (C, W)
        hidden = self.bert(captions, attention_mask=inside.long()).last_hidden_state  # (C, W, H)
        x = self.linear(hidden).float().masked_fill(~inside[..., None], 0)  # (C, W, D)
        return (x if self.no_txtnorm else l2norm(x, dim=-1)), x[:, 0]
