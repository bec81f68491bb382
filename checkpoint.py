"""Options to a model; model and run state to a file and back; published checkpoints.

A checkpoint is a dict with the published keys `epoch` (the last one finished), `model` (a list of
state dicts), `best_rsum`, `opt` (argparse.Namespace) and `Eiters`; ours add `vocab` and `run` (the
rest of what an exact resume needs). `opt.model` of ours says which system wrote it.
"""

import argparse
import glob
import os
import pickle
import re
import tempfile

import torch
from torch import Tensor, nn

import options
import published
import systems
from bert import CONFIG, PIECES, EncoderTextBert, WordPieces, complete_config, source_of
from published import SAFE
from util import checkpoint_files
from util.checkpoint_saving import SaveError, save  # noqa: F401  (the programs save through here)
from util.cli import InputError
from util.file_kinds import kind_of
from util.json_file import fault_of
from util.pickle_scan import check_torch_file
from util.state_checks import STEPS, counting_parameters, shown, without_numbers
from vocab import Vocabulary, deserialize_vocab, existing_file

# What runs of ours with --drop did before there were these options. They go on so.
EARLIER_DROP = {"drop_in_place": True, "keep_short_batch": True}


def build_model(opt: argparse.Namespace, vocab_size: int) -> nn.Module:
    """The model that the options describe, freshly initialised from torch's random state."""
    text_encoder = None
    if opt.text_enc_type == "bert":
        try:
            text_encoder = EncoderTextBert(opt.bert_config, opt.embed_size, opt.no_txtnorm)
        except InputError:  # the library is not there
            raise
        except Exception as error:  # the library checks with errors of its own
            raise InputError(f"BERT's configuration: {fault_of(error)}") from None
    system = systems.of(opt)
    try:
        model = system.build(opt, vocab_size, text_encoder)
    except ValueError as error:  # an unknown variant, named by the model
        raise InputError(f"--{str(error).removeprefix('unknown ')}") from None
    if text_encoder is not None and all(module is not text_encoder for module in model.modules()):
        raise InputError(f"--text_enc_type bert: {system.name} takes no text encoder but its own")
    # A checkpoint holds the parts only: other weights would be lost.
    lost = {name for name in model.state_dict() if name.partition(".")[0] not in system.parts}
    if lost:
        raise InputError(
            f"{system.name}: weights outside of its parts {', '.join(system.parts)}, such as "
            f"{min(lost)}, would not be saved; name their modules in `parts` of its System"
        )
    return model


def state_dicts(model: nn.Module, opt: argparse.Namespace) -> list[dict]:
    """The model's weights as the published list of state dicts."""
    return [getattr(model, part).state_dict() for part in systems.of(opt).parts]


def load_weights(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Copy a checkpoint's weights into the model; a clear InputError where they do not fit."""
    for part, state in fitting_weights(model, checkpoint, path):
        part.load_state_dict(state)


def fitting_weights(
    model: nn.Module, checkpoint: dict, path: str
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The parts of a model, each with the weights that a checkpoint has for it.

    Raises InputError where names or shapes do not fit.
    """
    parts = systems.of(checkpoint["opt"]).parts
    found = []
    for name, state in zip(parts, checkpoint["model"], strict=True):
        part = getattr(model, name)
        own = part.state_dict()
        if not any("module" in key.split(".") for key in own):
            state = published.unwrap_inside(state)
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
        wrong += [
            f"{key} of dtype {state[key].dtype} where {own[key].dtype} is expected"
            for key in own
            if key in state and state[key].is_floating_point() != own[key].is_floating_point()
        ]
        if wrong:
            advice = "give the options it was trained with"
            if "run" not in checkpoint and any(key not in own for key in state):
                advice = f"is it of another program than {', '.join(systems.SYSTEMS)}?"
            raise InputError(
                f"{path}: its weights ({name}) do not fit the options: {'; '.join(wrong[:3])}"
                f"{' ...' if len(wrong) > 3 else ''}; {advice}"
            )
        found.append((part, state))
    return found


def check_sizes(checkpoint: dict, path: str, vocab_size: int) -> None:
    """Raise InputError unless the weights are those of the model that the options describe.

    That model is not built: options may ask for a billion layers. It has no numbers here, and no
    more parameters are made than the file could fill.
    """
    opt, states = checkpoint["opt"], checkpoint["model"]
    try:
        with (
            torch.random.fork_rng(devices=[]),
            without_numbers(),
            counting_parameters(2 * sum(map(len, states)) + 100),
        ):
            model = build_model(opt, vocab_size)
    except InputError as error:
        raise InputError(f"{path}: its options and its weights disagree: {error}") from None
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        if "meta" in str(error):  # a system's own code may want numbers, and its model is small
            return
        said = fault_of(error)
        raise InputError(
            f"{path}: its options describe no model that can be built ({said})"
        ) from None
    fitting_weights(model, checkpoint, path)


def read(path: str, device: str | torch.device = "cpu") -> dict:
    """What a checkpoint file holds, ours or published. Raises FileNotFoundError or InputError.

    Nothing is unpickled except tensors and plain values. `opt` is a Namespace, and weights have
    their own names, whatever program wrote them; see published.clean.
    """
    if os.path.isdir(path):
        raise FileNotFoundError(
            f"{path}: a folder; give a checkpoint in it, e.g. model_best.pth.tar"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    checkpoint_files.check_whole(path)
    try:
        check_torch_file(path)
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        foreign = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise InputError(
                f"{path}: refused, it would run code or load objects that no checkpoint of this "
                f"field holds ({foreign[1][:100]}); get the file from its authors"
            ) from None
        reason = fault_of(error) if isinstance(error, ValueError) else type(error).__name__
        kind = kind_of(path)
        said = "copy it again" if not kind or "torch.save" in kind else f"it is {kind}"
        raise InputError(f"{path}: not a checkpoint, or a damaged one ({reason}); {said}") from None
    return published.clean(checkpoint, path)


def load(path: str, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint, ours or published (zip or legacy serialisation, Python 2 or 3).

    Options that do not fit their flags, which no model needs, are left out; `unfit` holds them.
    Ours say which system wrote them. Published ones do not: they are detected by their weights,
    and options that they lack come from the shapes of the weights, then from the paper's defaults.
    Raises FileNotFoundError or InputError.
    """
    checkpoint = read(path, device)
    stored = {name: x for name, x in vars(checkpoint["opt"]).items() if x is not None}
    states, known = checkpoint["model"], {}
    if "model" in stored:
        if not isinstance(stored["model"], str) or len(stored["model"]) > 100:
            raise InputError(f"{path}: its option model is {shown(stored['model'])}, no system")
        try:
            system = systems.of(checkpoint["opt"])
        except InputError as error:
            raise InputError(f"{path}: {error}; is it of a newer version, or a fork?") from None
        if len(states) != len(system.parts):
            raise InputError(
                f"{path}: {len(states)} state dicts, expected those of {system.name}: "
                f"{', '.join(system.parts)}"
            )
    else:
        # Position ids 0, 1, ... were once stored by transformers.
        for state in states:
            state.pop("bert.embeddings.position_ids", None)
        states = [published.unwrap_inside(state) for state in states]
        system, known = published.detect(states, stored, path)
        states = system.rename(states)
        if system.counts_epochs and "run" not in checkpoint:
            checkpoint["epoch"] = checkpoint.get("epoch", 0) - 1  # Q39
    if "run" in checkpoint and stored.get("drop") is True:  # ours
        known |= EARLIER_DROP
    checkpoint["model"] = states
    filled = options.defaults(system.name)
    needed = options.model_options()
    stored, checkpoint["unfit"] = published.fit_options(stored, filled, needed, path)
    config = stored.get("bert_config", dict.fromkeys(CONFIG, 0))
    if (
        not isinstance(config, dict)
        or config.keys() != set(CONFIG)
        or not all(isinstance(x, (int, float, str)) for x in config.values())
    ):
        raise InputError(
            f"{path}: its bert_config is {shown(config)}, expected {', '.join(CONFIG)}"
        )
    if not STEPS.holds(stored.get("vocab_size", 0)):
        raise InputError(f"{path}: its option vocab_size is {shown(stored['vocab_size'])}")
    filled |= known | stored | {"model": system.name}
    names = {name for state in states for name in state}
    if {PIECES, "embed.weight"} & names:  # the weights tell it for sure
        filled["text_enc_type"] = "bert" if PIECES in names else "bigru"
    checkpoint["opt"] = argparse.Namespace(**filled)
    return checkpoint


def word_rows(checkpoint: dict) -> int | None:
    """How many words (or pieces of words) the text encoder has rows for, if it is one of ours."""
    for state in checkpoint["model"]:
        for name in (PIECES, "embed.weight"):
            if name in state and state[name].ndim:
                return len(state[name])
    return None


def find_vocab(
    checkpoint: dict, path: str, vocab_path: str | os.PathLike | None = None
) -> Vocabulary | WordPieces:
    """The vocabulary that a checkpoint was trained with.

    It is looked for in the checkpoint itself, at `vocab_path` (a folder or a file), and in the
    folder that its options name, seen from the current folder and from the project's. A checkpoint
    belongs to its vocabulary (Q24): raises InputError if one at `vocab_path` differs from the
    checkpoint's own, or has not as many words as the word embedding has rows. BERT's pieces, if
    they are not in the checkpoint, are looked for at `vocab_path`, then at `bert_path` of its
    options.
    """
    opt, rows = checkpoint["opt"], word_rows(checkpoint)
    own, stored, system = None, checkpoint.get("vocab"), systems.of(opt)
    if opt.text_enc_type == "bert":
        return find_pieces(stored, path, vocab_path, opt.bert_path, rows)
    if stored is None and isinstance(getattr(opt, "word2idx", None), dict):
        stored = {"word2idx": opt.word2idx}  # published CHAN, if it started from word vectors
    if stored is not None:
        own = vocab = system.vocabulary(Vocabulary.from_state_dict(stored, path), opt)
        source = path
    if own is None or vocab_path:
        here = os.path.dirname(os.path.abspath(__file__))
        places = [opt.vocab_path, os.path.join(here, opt.vocab_path)]
        places = [vocab_path] if vocab_path else places
        files = [vocab_file(place, opt) for place in places]
        source = next((file for file in files if os.path.isfile(file)), files[0])
        vocab = system.vocabulary(deserialize_vocab(source), opt)
        if own is not None and own.mask in own.word2idx:  # once trained with --drop
            vocab.add_word(vocab.mask)
    if rows is not None and len(vocab) != rows:
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


def vocab_file(vocab_path: str | os.PathLike, opt: argparse.Namespace) -> str:
    """The vocabulary file that a --vocab_path names: a folder, or the file, JSON or pickled.

    In a folder it is that of the data set and the system of the options.
    """
    path = os.path.expanduser(vocab_path)
    if not (os.path.isfile(path) or path.endswith((".json", ".pkl"))):
        path = systems.of(opt).vocab_file(path, opt.data_name)
    return existing_file(path)


def find_pieces(
    stored: dict | None, path: str, vocab_path: str | os.PathLike | None, bert_path: str, rows: int
) -> WordPieces:
    """The WordPiece tokens of a checkpoint whose BERT has `rows` rows for them.

    Published checkpoints do not hold them: then they are those of the BERT at `vocab_path`, or else
    in the folder `bert_path`; see source_of.
    """
    if stored is not None:
        if vocab_path:
            print(f"notice: {path} holds its own WordPiece tokens, {vocab_path} is not read")
        text = stored.get("tokenizer_json") if isinstance(stored, dict) else None
        return WordPieces(text if isinstance(text, str) else "", path).check_rows(rows, path)
    source = source_of(vocab_path, bert_path, path)
    pieces = WordPieces.read(source)
    if len(pieces) != rows:
        raise InputError(
            f"{source}: {len(pieces)} WordPiece tokens, but {path} was trained with {rows}; give "
            "--vocab_path the folder of the BERT that it started from"
        )
    return pieces


def find_bert_config(checkpoint: dict, path: str, source: str | os.PathLike | None = None) -> dict:
    """The configuration of a checkpoint's BERT.

    Our checkpoints hold it. For a published one it is that of the BERT at `source`, or else in the
    folder that `bert_path` of its options names; see source_of and complete_config.
    """
    opt = checkpoint["opt"]
    if opt.bert_config.keys() == set(CONFIG):
        return opt.bert_config
    return complete_config(opt.bert_config, source_of(source, opt.bert_path, path), path)


def load_model(
    path: str, vocab_path: str | os.PathLike | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Vocabulary | WordPieces, argparse.Namespace]:
    """A checkpoint's model with its weights, on the device; its vocabulary; its options.

    Raises FileNotFoundError or InputError; see load, find_vocab and find_bert_config.
    """
    checkpoint = load(path)
    vocab = find_vocab(checkpoint, path, vocab_path)
    vocab.max_words = checkpoint["opt"].max_words
    if checkpoint["opt"].text_enc_type == "bert":
        checkpoint["opt"].bert_config = find_bert_config(checkpoint, path, vocab_path)
    check_sizes(checkpoint, path, len(vocab))
    model = build_model(checkpoint["opt"], len(vocab))
    load_weights(model, checkpoint, path)
    return model.to(device), vocab, checkpoint["opt"]


def prepare(directory: str, patterns: tuple[str, ...] = ()) -> None:
    """Make an output folder, see that it can be written, and move an earlier run's files aside.

    Files that match a pattern go to `directory/earlier_K`, so that a run started twice into one
    folder loses nothing.
    """
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass
    checkpoint_files.remove_parts(directory)
    folder = glob.escape(directory)  # its name may hold [, * and ?
    old = [path for pattern in patterns for path in glob.glob(os.path.join(folder, pattern))]
    if old:
        k = 1
        while os.path.exists(aside := os.path.join(directory, f"earlier_{k}")):
            k += 1
        os.makedirs(aside)
        for path in old:
            os.replace(path, os.path.join(aside, os.path.basename(path)))
        print(f"notice: {directory} holds an earlier run: {len(old)} files moved to {aside}")
