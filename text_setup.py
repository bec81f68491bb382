"""What a run needs of words: its vocabulary, word vectors to start from, BERT's configuration."""

import argparse
import os

import torch
from torch import nn

import checkpoint as ckpt
import systems
from bert import WordPieces, read_config
from data import PrecompDataset
from util.cli import InputError
from util.fingerprint import other_captions
from util.word_vectors import read_vectors
from vocab import Vocabulary, check_captions, deserialize_vocab


def set_text_encoder(opt: argparse.Namespace, resumed: dict | None) -> None:
    """Refuse another text encoder than that of --resume; set `opt.bert_config`.

    Checkpoints hold the configuration of BERT, so that they need no folder of BERT's.
    """
    if resumed and resumed["opt"].text_enc_type != opt.text_enc_type:
        kind = resumed["opt"].text_enc_type
        raise InputError(f"{opt.resume}: give --text_enc_type {kind}, as it was trained with")
    if opt.text_enc_type != "bert":
        return
    if resumed:
        opt.bert_config = ckpt.find_bert_config(resumed, opt.resume, typed_bert(opt, resumed))
    else:
        opt.bert_config = read_config(opt.bert_path)


def typed_bert(opt: argparse.Namespace, resumed: dict) -> str | None:
    """The --bert_path of the command line; else it is that of the checkpoint's options."""
    return opt.bert_path if resumed.get("bert_given") else None


def read_vocab(opt: argparse.Namespace, resumed: dict | None) -> Vocabulary | WordPieces:
    """The vocabulary of a run, which cuts captions to --max_words."""
    vocab = find_vocab(opt, resumed)
    vocab.max_words = opt.max_words
    return vocab


def find_vocab(opt: argparse.Namespace, resumed: dict | None) -> Vocabulary | WordPieces:
    """The vocabulary file of the options, or BERT's; a resumed checkpoint must agree with it."""
    if opt.text_enc_type == "bert":
        if resumed:
            published = resumed.get("vocab") is None
            given = typed_bert(opt, resumed) if published else None
            return ckpt.find_vocab(resumed, opt.resume, given)
        rows = opt.bert_config["vocab_size"]
        return WordPieces.read(opt.bert_path).check_rows(rows, opt.bert_path)
    if resumed is None:
        path = ckpt.vocab_file(opt.vocab_path, opt)
        return systems.of(opt).vocabulary(deserialize_vocab(path), opt)
    if resumed.get("vocab") is not None and not resumed["vocab_given"]:
        return ckpt.find_vocab(resumed, opt.resume)
    # On other data too, the vocabulary is that of the data that the checkpoint was trained on.
    path = ckpt.vocab_file(opt.vocab_path, resumed["opt"])
    given = path if os.path.isfile(path) or resumed.get("vocab") is None else None
    return ckpt.find_vocab(resumed, opt.resume, given)


def check_words(opt: argparse.Namespace, vocab: Vocabulary, train_set: PrecompDataset) -> None:
    """Warn of a vocabulary of other captions, or refuse it if most of their words are unknown.

    Of one that has all words of train there is a notice only.
    """
    folder, resumed = os.path.dirname(train_set.path), bool(opt.resume)
    kind = kind_of_captions(train_set)
    counts = train_set.n_unknown, train_set.n_words
    source = opt.resume or ckpt.vocab_file(opt.vocab_path, opt)
    if not train_set.n_unknown and not vocab.pieces:
        other = other_captions(vocab.captions, folder, kind)
        # That of the captions of another name in the same folder is no other one.
        if other and not resumed and other_captions(vocab.captions, folder):
            print(f"notice: {source}: {other}; it has all words of train")
        return
    check_captions(vocab, folder, *counts, source, opt.allow_unknown, kind, checkpoint=resumed)


def kind_of_captions(train_set: PrecompDataset) -> str:
    """The name of the files of its captions, as util/fingerprint.py takes it."""
    return "sent_caps" if train_set.caption_path.endswith("_sent_caps.txt") else "caps"


def start_from_vectors(model: nn.Module, vocab: Vocabulary, opt: argparse.Namespace) -> None:
    """Fill the word embedding with the vectors of --wemb_path; they go on learning (Q12)."""
    if opt.wemb_type not in ("glove", "fasttext") or not opt.wemb_path:
        raise InputError(
            f"--wemb_type {opt.wemb_type!r} --wemb_path {opt.wemb_path!r}: expected glove or "
            "fasttext, and the file of vectors"
        )
    ids, vectors = read_vectors(opt.wemb_path, vocab, opt.word_dim)
    weight = model.txt_enc.embed.weight
    with torch.no_grad():
        systems.of(opt).start_words(weight)
        weight[torch.tensor(ids)] = vectors.to(weight.device)
    missing = len(vocab) - len(ids)
    print(f"Words: {len(ids)}/{len(vocab)} found in vocabulary; {missing} words missing")
