"""Options to a model; model and run state to a file and back; published checkpoints.

A checkpoint is a dict with the published keys `epoch` (the last one finished), `model` (a list of
state dicts), `best_rsum`, `opt` (argparse.Namespace) and `Eiters`; ours add `vocab` and `run` (what
an exact resume needs).
"""

import argparse
import contextlib
import glob
import inspect
import math
import numbers
import os
import pickle
import re
import shutil
import tempfile
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

import options
from bert import CONFIG, EncoderTextBert, WordPieces, complete_config, infer_config
from chan import CHAN
from gsmn import GSMN
from model import SCAN
from pfan import PFAN, PFANWhole
from util.cli import InputError
from vocab import UNICODE, Vocabulary, deserialize_vocab

# Their arguments are options of the same names.
MODELS = {"scan": SCAN, "gsmn": GSMN, "pfan": PFAN, "pfan_whole": PFANWhole, "chan": CHAN}

# The parts of a model in the order of the published list of state dicts.
PARTS = {
    "scan": ("img_enc", "txt_enc"),
    "gsmn": ("img_enc", "txt_enc", "visual_graph", "textual_graph"),
    "pfan": ("img_enc", "txt_enc"),
    "pfan_whole": ("img_enc", "txt_enc"),
    "chan": ("img_enc", "txt_enc", "sim_enc", "criterion"),
}

PIECES = "bert.embeddings.word_embeddings.weight"  # in place of embed.weight

# GSMN's convolutions under the names of its later revision.
RENAMED = {"vGNN.": "graph_convolution_1.", "tGNN.": "graph_convolution_3."}

# What published files hold beside tensors. Nothing here runs code of the file's choosing.
SAFE = [argparse.Namespace, np.dtype, np.float64, np.float32, np.int64]
SAFE += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
# numpy's rebuilder of scalars, under the names that numpy 1 and numpy 2 gave its module.
SAFE += [
    (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
]


def build_model(opt: argparse.Namespace, vocab_size: int) -> nn.Module:
    """The model that the options describe, freshly initialised from torch's random state."""
    kind = MODELS[opt.model]
    takes = set()  # its own arguments, and those that it passes on to what it is derived from
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        takes |= inspect.signature(base).parameters.keys()
    names = takes & options.defaults(opt.model).keys()
    given = {name: getattr(opt, name) for name in names}
    if opt.text_enc_type == "bert":
        try:
            given["text_encoder"] = EncoderTextBert(opt.bert_config, opt.embed_size, opt.no_txtnorm)
        except InputError:  # the library is not there
            raise
        except Exception as error:  # the library checks with errors of its own
            raise InputError(f"BERT's configuration {opt.bert_config}: {error}") from None
    try:
        return kind(vocab_size, **given)
    except ValueError as error:  # an unknown variant, named by the model
        raise InputError(f"--{str(error).removeprefix('unknown ')}") from None


def state_dicts(model: nn.Module, system: str) -> list[dict]:
    """The model's weights as the published list of state dicts."""
    return [getattr(model, part).state_dict() for part in PARTS[system]]


def load_weights(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Copy a checkpoint's weights into the model; a clear InputError where they do not fit."""
    parts = PARTS[checkpoint["opt"].model]
    for name, state in zip(parts, checkpoint["model"], strict=True):
        part = getattr(model, name)
        own = part.state_dict()
        # PyTorch 0.3 had no 0-d tensors: its scalar of a weight norm has one element.
        state = {
            key: x.reshape(own[key].shape)
            if key in own and x.numel() == own[key].numel() == 1
            else x
            for key, x in state.items()
        }
        wrong = [f"no {key}" for key in own if key not in state]
        wrong += [f"unknown {key}" for key in state if key not in own]
        wrong += [
            f"{key} {tuple(state[key].shape)} where {tuple(own[key].shape)} is expected"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        if wrong:
            raise InputError(
                f"{path}: its weights ({name}) do not fit the options: {'; '.join(wrong[:3])}"
                f"{' ...' if len(wrong) > 3 else ''}; give the options it was trained with"
            )
        part.load_state_dict(state)


def recognise(states: list[dict]) -> str:
    """The system a list of state dicts belongs to."""
    if len(states) == 4:
        return "gsmn" if any(key.startswith("graph_") for key in states[2]) else "chan"
    if "position_embedding.weight" in states[0]:
        return "pfan_whole" if "fc_whole.weight" in states[0] else "pfan"
    return "scan"


def read_architecture(states: list[dict]) -> dict:
    """The options that the names and shapes of the weights tell."""
    image, text, *graphs = states
    weight = image.get("fc.weight", image.get("fc.weight_v"))
    known = {
        "img_dim": weight.shape[1],
        "embed_size": weight.shape[0],
        "precomp_enc_type": "weight_norm" if "fc.weight_v" in image else "basic",
    }
    if PIECES in text:
        known |= {"text_enc_type": "bert", "bert_config": infer_config(text)}
    else:
        layers = [key for key in text if key.startswith("rnn.weight_ih") and "reverse" not in key]
        known |= {"word_dim": text["embed.weight"].shape[1], "num_layers": len(layers)}
        known |= {"bi_gru": "rnn.weight_ih_l0_reverse" in text, "text_enc_type": "bigru"}
    if "position_embedding.weight" in image:
        rows, known["position_embed_size"] = image["position_embedding.weight"].shape
        known["split_size"] = math.isqrt(rows - 1)
        known["img_dim"] -= known["position_embed_size"]
        if "fc_whole.weight" not in image:
            known["position"] = "attention" if "fc_att.weight" in image else "only"
    if recognise(states) == "chan":
        known.pop("bi_gru", None)
        known["precomp_enc_type"] = "basic"
        if any(name.startswith("feedforward.") for name in image):
            mlp = "feedforward.mlp.c_fc.weight" in image
            known["precomp_enc_type"] = "transformer" if mlp else "selfattention"
    elif graphs:
        conv = graphs[1]["graph_convolution_3.conv_weights.0.weight"]
        known["feat_dim"] = known["num_block"] = conv.shape[1]
        known["out_dim"], known["hid_dim"] = graphs[1]["out_2.weight_v"].shape
    return known


def load(path: str, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint, ours or published (zip or legacy serialisation, Python 2 or 3).

    Options that the file lacks come from the shapes of its weights, then from the paper's defaults.
    Nothing is unpickled but tensors and plain values. Raises FileNotFoundError or InputError.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        foreign = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise InputError(
                f"{path}: refused, it would run code or load objects that no checkpoint of this "
                f"field holds ({foreign[1]}); get the file from its authors"
            ) from None
        raise InputError(
            f"{path}: not a checkpoint, or a damaged one ({type(error).__name__}); copy it again"
        ) from None
    check_contents(checkpoint, path)
    checkpoint["model"] = [
        OrderedDict(
            (re.sub(r"^[vt]GNN\.", lambda m: RENAMED[m[0]], key), x)
            for key, x in state.items()
            if key != "bert.embeddings.position_ids"  # 0, 1, ...: stored by transformers once
        )
        for state in checkpoint["model"]
    ]
    system = recognise(checkpoint["model"])
    if system != "scan" and "run" not in checkpoint:
        checkpoint["epoch"] = checkpoint.get("epoch", 0) - 1  # published: how many are finished
    filled = options.defaults(system)
    stored = {name: x for name, x in vars(checkpoint["opt"]).items() if x is not None}
    for name in filled.keys() & stored.keys():
        if isinstance(stored[name], str) != isinstance(filled[name], str):
            raise InputError(
                f"{path}: its option {name} is {stored[name]!r}, expected such as {filled[name]!r}"
            )
    try:
        architecture = read_architecture(checkpoint["model"])
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: a checkpoint of {system} without all its weights, or with odd ones "
            f"({type(error).__name__}: {error}); copy it again"
        ) from None
    config = stored.get("bert_config", dict.fromkeys(CONFIG, 0))
    if (
        not isinstance(config, dict)
        or config.keys() != set(CONFIG)
        or not all(isinstance(x, (int, float, str)) for x in config.values())
    ):
        raise InputError(f"{path}: its bert_config is {config!r}, expected {', '.join(CONFIG)}")
    sure = {"model": system, "text_enc_type": architecture["text_enc_type"]}
    filled |= architecture | stored | sure
    checkpoint["opt"] = argparse.Namespace(**filled)
    return checkpoint


def check_contents(checkpoint: dict, path: str) -> None:
    """Refuse what is not a published-style dict of state dicts and options."""
    what = None
    if not isinstance(checkpoint, dict) or not {"model", "opt"} <= checkpoint.keys():
        what = "a dict with 'model' and 'opt'"
    elif not isinstance(checkpoint["opt"], argparse.Namespace):
        what = "'opt' to be an argparse.Namespace"
    else:
        states = checkpoint["model"]
        if not isinstance(states, (list, tuple)) or len(states) not in (2, 4):
            what = "'model' to be a list of two or four state dicts"
        elif not all(
            isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())
            for state in states
        ):
            what = "dicts of tensors in 'model'"
        elif not {"fc.weight", "fc.weight_v"} & states[0].keys() or (
            not {"embed.weight", PIECES} & states[1].keys() and len(states) == 2
        ):
            what = "weights named fc.weight and embed.weight in the first two state dicts"
        elif not isinstance(checkpoint.get("epoch", -1), numbers.Integral):
            what = "'epoch' to be a number"
    if what:
        raise InputError(f"{path}: not a checkpoint of this family: expected {what}")


def vocab_file(opt: argparse.Namespace, folder: str) -> str:
    """The vocabulary file in a folder: {data_name}_vocab.json.

    The whole-image variant of PFAN has its own, {data_name}_sent_vocab.json, where there is one.
    CHAN's is coco_precomp_vocab.json or f30k_precomp_vocab.json, unless there is one of that name.
    """
    path = os.path.join(folder, f"{opt.data_name}_vocab.json")
    sent = os.path.join(folder, f"{opt.data_name}_sent_vocab.json")
    own = opt.model == "pfan_whole" and (os.path.isfile(sent) or not os.path.isfile(path))
    if opt.model == "chan" and not os.path.isfile(path):
        kind = "coco" if "coco" in opt.data_name else "f30k"
        shared = os.path.join(folder, f"{kind}_precomp_vocab.json")
        return shared if os.path.isfile(shared) else path
    return sent if own else path


def as_read(vocab: Vocabulary, opt: argparse.Namespace) -> Vocabulary:
    """The vocabulary as the system reads words, as published.

    PFAN's whole-image variant takes unknown words for <pad>; CHAN has a word more, <mask>, and so
    has any system that was trained with --drop. Words of a published vocabulary are lowered as
    bytes by all but CHAN, which is a program for Python 3.
    """
    if opt.model == "chan" and vocab.tokenizer is None:
        vocab.lower = UNICODE
    if opt.model == "chan" or opt.drop:
        vocab.add_word(vocab.mask)
    vocab.unknown = "<pad>" if opt.model == "pfan_whole" else "<unk>"
    return vocab


def find_vocab(
    checkpoint: dict, path: str, vocab_path: str | os.PathLike | None = None
) -> Vocabulary | WordPieces:
    """The vocabulary a checkpoint was trained with.

    Looked for in the checkpoint itself, at `vocab_path` (a folder or a file), in the folder that
    its options name, from here and from the project. A checkpoint belongs to its vocabulary: raises
    InputError where one at `vocab_path` differs from the checkpoint's own, or has not as many words
    as the word embedding has rows. BERT's pieces, if they are not in the checkpoint, are looked for
    at `vocab_path`, then at `bert_path` of its options.
    """
    opt = checkpoint["opt"]
    own, stored = None, checkpoint.get("vocab")
    if opt.text_enc_type == "bert":
        rows = len(checkpoint["model"][1][PIECES])
        return find_pieces(stored, path, vocab_path, opt.bert_path, rows)
    if stored is None and isinstance(getattr(opt, "word2idx", None), dict):
        stored = {"word2idx": opt.word2idx}  # published CHAN, if it started from word vectors
    if stored is not None:
        own = vocab = as_read(Vocabulary.from_state_dict(stored, path), opt)
        source = path
    if own is None or vocab_path:
        here = os.path.dirname(os.path.abspath(__file__))
        places = [opt.vocab_path, os.path.join(here, opt.vocab_path)]
        places = [os.fspath(vocab_path)] if vocab_path else places
        files = [p if p.endswith(".json") else vocab_file(opt, p) for p in places]
        source = next((file for file in files if os.path.isfile(file)), files[0])
        vocab = as_read(deserialize_vocab(source), opt)
        if own is not None and own.mask in own.word2idx:  # once trained with --drop
            vocab.add_word(vocab.mask)
    rows = checkpoint["model"][1]["embed.weight"].shape[0]
    if len(vocab) != rows:
        raise InputError(
            f"{source}: {len(vocab)} words, but {path} was trained with {rows}; give --vocab_path "
            "the folder of the vocabulary file that the checkpoint came with"
        )
    if own is not None and vocab.word2idx != own.word2idx:
        raise InputError(
            f"{source}: not the vocabulary that {path} was trained with, the word ids differ; "
            "give --vocab_path the folder of the vocabulary that the checkpoint came with"
        )
    return own or vocab


def find_pieces(
    stored: dict | None, path: str, vocab_path: str | os.PathLike | None, bert_path: str, rows: int
) -> WordPieces:
    """The WordPiece tokens of a checkpoint whose BERT has so many rows for them.

    If it does not hold them, as published ones do not: those of the BERT at `vocab_path`, or else
    at `bert_path`.
    """
    if stored is not None:
        if vocab_path:
            print(f"notice: {path} holds its own WordPiece tokens, {vocab_path} is not read")
        text = stored.get("tokenizer_json") if isinstance(stored, dict) else None
        return WordPieces(text if isinstance(text, str) else "", path).check_rows(rows, path)
    source = os.fspath(vocab_path or bert_path)
    pieces = WordPieces.read(source)
    if len(pieces) != rows:
        raise InputError(
            f"{source}: {len(pieces)} WordPiece tokens, but {path} was trained with {rows}; give "
            "--vocab_path the folder of the BERT that it started from"
        )
    return pieces


def find_bert_config(checkpoint: dict, path: str, source: str | os.PathLike | None = None) -> dict:
    """The configuration of a checkpoint's BERT.

    Ours hold it. For a published one it is that of the BERT at `source`, or else at `bert_path` of
    its options; see complete_config.
    """
    opt = checkpoint["opt"]
    if opt.bert_config.keys() == set(CONFIG):
        return opt.bert_config
    return complete_config(opt.bert_config, os.fspath(source or opt.bert_path), path)


def load_model(
    path: str, vocab_path: str | os.PathLike | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Vocabulary | WordPieces, argparse.Namespace]:
    """A checkpoint's model with its weights, on the device; its vocabulary; its options.

    Raises FileNotFoundError or InputError; see load, find_vocab and find_bert_config.
    """
    checkpoint = load(path)
    vocab = find_vocab(checkpoint, path, vocab_path)
    if checkpoint["opt"].text_enc_type == "bert":
        checkpoint["opt"].bert_config = find_bert_config(checkpoint, path, vocab_path)
    model = build_model(checkpoint["opt"], len(vocab))
    load_weights(model, checkpoint, path)
    return model.to(device), vocab, checkpoint["opt"]


def save(state: dict, directory: str, name: str, is_best: bool = False) -> None:
    """Write `directory/name`, and `model_best.pth.tar` if it is the best: beside, then renamed.

    A run killed while it writes leaves the old files whole. The best is renamed first: a run that
    dies between the two resumes from the older checkpoint and comes to the same best again.
    """
    path = os.path.join(directory, name)
    best = os.path.join(directory, "model_best.pth.tar")
    try:
        with open(f"{path}.part", "wb") as part:
            torch.save(state, part)
            part.flush()
            os.fsync(part.fileno())
        if is_best:
            shutil.copyfile(f"{path}.part", f"{best}.part")
            os.replace(f"{best}.part", best)
        os.replace(f"{path}.part", path)
    except BaseException:  # a full disk, a second Ctrl-C: leave no half file
        for part in (f"{path}.part", f"{best}.part"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)
        raise


def prepare(directory: str, patterns: tuple[str, ...] = ()) -> None:
    """Make an output folder, see that it can be written, and move an earlier run's files aside.

    Files that match a pattern go to `directory/earlier_K`, so that a run started twice into one
    folder loses nothing.
    """
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass
    old = [path for pattern in patterns for path in glob.glob(os.path.join(directory, pattern))]
    if old:
        k = 1
        while os.path.exists(aside := os.path.join(directory, f"earlier_{k}")):
            k += 1
        os.makedirs(aside)
        for path in old:
            os.replace(path, os.path.join(aside, os.path.basename(path)))
        print(f"notice: {directory} holds an earlier run: {len(old)} files moved to {aside}")
