"""Checkpoint files of other programs: read safely, cleaned, and recognised by their weights."""

import argparse
import numbers
import pathlib
import re
import types
from collections import OrderedDict

import numpy as np
import torch

import systems
from bert import PIECES
from system import System
from util.cli import InputError
from util.plain_pickle import NUMPY, plain_value
from util.state_checks import LONGEST_TEXT, check_weights, shown, tensor_fault


def _short_range(*bounds: int) -> range:
    """A range that frozenset() can be made of."""
    numbers = range(*bounds)
    if len(numbers) > 10**6:
        raise ValueError("a range of more than 10^6 numbers")
    return numbers


# What files hold besides tensors, and what torch does not know. Nothing here runs code of the
# file's choosing: numpy's objects and paths are rebuilt by stand-ins, and a path becomes its text.
SAFE = [argparse.Namespace, types.SimpleNamespace, np.float64, np.float32, np.int64]
SAFE += [slice, frozenset, (_short_range, "builtins.range")]
SAFE += [(stand_in, name) for name, stand_in in NUMPY.items()]


def _text_of(kind: type[pathlib.PurePath]):
    return lambda *parts: str(kind(*parts))


for _kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
    _names = _kind.__name__, _kind.__name__.removeprefix("Pure")
    _stand_in = _text_of(_kind)
    # Python 3.13 alone says pathlib._local.
    SAFE += [
        (_stand_in, f"{module}.{x}") for module in ("pathlib", "pathlib._local") for x in _names
    ]

# Programs of this field whose checkpoints look like SCAN's: how a name of their weights begins.
RELATIVES = {
    "VSE-infinity on raw images (Chen et al., CVPR 2021)": r"backbone\.",
    "VSRN (Li et al., ICCV 2019)": r"Rs_GCN_\d",
    "IMRAM (Chen et al., CVPR 2020)": r"fc_local\.|gate_(t2i|i2t)\.",
    "SGRAF (Diao et al., AAAI 2021)": r"(SGR|SAF)_module\.|sim_tran(loc|glo)_w\.",
    "CAMERA (Qu et al., SIGIR 2020)": r"agsa\.",
    "PVSE (Song and Soleymani, CVPR 2019)": r"pie_net\.",
    "VSE++ (Faghri et al., BMVC 2018)": r"cnn\.",
}
# Those whose weights have SCAN's names: options that only they have.
RELATIVES_BY_OPTIONS = {
    "VSE++ (Faghri et al., BMVC 2018)": {"measure", "cnn_type", "use_abs"},
    "BFAN (Liu et al., MM 2019)": {"focal_type"},
    "NAAF (Zhang et al., CVPR 2022)": {"thres_safe"},
}


def clean(checkpoint: dict, path: str) -> dict:
    """A checkpoint with `opt` as a Namespace of plain values, and its weights without prefixes.

    Raises InputError for everything but a published-style dict of state dicts and options.
    """
    check_contents(checkpoint, path)
    check_weights(checkpoint["model"], path)
    stored = options_of(checkpoint["opt"])
    checkpoint["opt"] = argparse.Namespace(**{name: plain(x) for name, x in stored.items()})
    for name in {"epoch", "best_rsum", "Eiters"} & checkpoint.keys():
        checkpoint[name] = plain(checkpoint[name])
    checkpoint["model"] = [unwrap(state) for state in checkpoint["model"]]
    return checkpoint


def options_of(opt) -> dict | None:
    """The options by name, whether a namespace or a dict holds them; None: neither."""
    if isinstance(opt, (argparse.Namespace, types.SimpleNamespace)):
        opt = vars(opt)
    return opt if isinstance(opt, dict) and all(isinstance(x, str) for x in opt) else None


def plain(x):
    """An option's value with names for torch's devices and types, and numpy's own arrays.

    A number of numpy, and an array or a tensor of no dimensions, becomes one of Python.
    """
    x = str(x) if isinstance(x, (torch.device, torch.dtype)) else plain_value(x)
    single = isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim == 0
    if isinstance(x, torch.Tensor) and tensor_fault(x):
        single = False
    return x.item() if single or isinstance(x, np.generic) else x


def fit_options(stored: dict, defaults: dict, needed: set[str], path: str) -> tuple[dict, dict]:
    """The options of a file in the types of the defaults, and those that do not fit them.

    Options without a default stay as they are. JSON has whole numbers as floats too, and 0 and 1
    stand for switches. Raises InputError for another type, a negative count, a number that is not
    finite or a long text, if the model needs the option (`needed`).
    """
    found, unfit = {}, {}
    for name, x in stored.items():
        default = defaults.get(name)
        number = isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 2**63
        if isinstance(default, bool):
            fits = isinstance(x, bool) or (number and x in (0, 1))
            x = bool(x) if fits else x
        elif isinstance(default, int):
            fits = number and x >= 0 and x == x // 1
            x = int(x) if fits else x
        elif isinstance(default, float):
            fits = number
        elif isinstance(default, str):
            fits = isinstance(x, str) and len(x) <= LONGEST_TEXT and x.isprintable()
        else:
            fits = True
        (found if fits else unfit)[name] = x
        if name in needed and not fits:
            said = f"its option {name} is {shown(x)}, expected such as {default!r}"
            raise InputError(f"{path}: {said}")
    return found, unfit


def unwrap(state: dict[str, torch.Tensor]) -> OrderedDict:
    """A state dict without `_orig_mod.` of torch.compile and `module.` of DataParallel.

    `module.` may be a name of the model's own, unless all names begin with it.
    """
    state = OrderedDict(
        (re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", name), x) for name, x in state.items()
    )
    while state and all(name.startswith("module.") for name in state):
        state = OrderedDict((name.removeprefix("module."), x) for name, x in state.items())
    return state


def unwrap_inside(state: dict[str, torch.Tensor]) -> OrderedDict:
    """A state dict without the `module.` of a wrapped part of an encoder: fc.module.weight.

    A name of a part is left as it is, unless all names of that part have `module.`.
    """
    state = OrderedDict(state)
    parts = {name[: at.end()] for name in state for at in re.finditer(r"\.(?=module\.)", name)}
    for part in sorted(parts, key=len, reverse=True):
        wrapped = f"{part}module."
        if all(name.startswith(wrapped) for name in state if name.startswith(part)):
            state = OrderedDict(
                (part + name.removeprefix(wrapped) if name.startswith(part) else name, x)
                for name, x in state.items()
            )
    return state


def check_contents(checkpoint: dict, path: str) -> None:
    """Refuse everything but a published-style dict of state dicts and options."""
    what = None
    if not isinstance(checkpoint, dict) or not {"model", "opt"} <= checkpoint.keys():
        what = "a dict with 'model' and 'opt'"
    elif options_of(checkpoint["opt"]) is None:
        what = "'opt' to be an argparse.Namespace or a dict of options"
    elif is_state_dict(checkpoint["model"]) and checkpoint["model"]:
        refuse_relatives([checkpoint["model"]], {}, path)
        what = "'model' to be a list of state dicts, one for each encoder"
    elif not isinstance(checkpoint["model"], (list, tuple)):
        what = "'model' to be a list of state dicts"
    elif not all(map(is_state_dict, checkpoint["model"])):
        what = "dicts of tensors in 'model'"
    elif not isinstance(checkpoint.get("epoch", -1), numbers.Integral):
        what = "'epoch' to be a number"
    if what:
        raise InputError(f"{path}: not a checkpoint of this family: expected {what}")


def is_state_dict(x) -> bool:
    """Whether a value is a dict of tensors by name."""
    return isinstance(x, dict) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in x.items()
    )


def refuse_relatives(states: list[dict], options: dict, path: str) -> None:
    """Raise InputError if a checkpoint is of another program of this field that is known here."""
    names = [name for state in states for name in state]
    found = [
        program
        for program, begin in RELATIVES.items()
        if any(re.search(rf"(^|\.)({begin})", name) for name in names)
    ]
    if "cross_attn" not in options:
        found += [x for x, own in RELATIVES_BY_OPTIONS.items() if own <= options.keys()]
    if found:
        raise InputError(
            f"{path}: a checkpoint of {found[0]}, which this project does not have; it has "
            f"{', '.join(systems.SYSTEMS)}"
        )


def detect(states: list[dict], options: dict, path: str) -> tuple[System, dict]:
    """The system that a published checkpoint's weights belong to, and the options they tell.

    `options` are those of the file. Raises InputError if the weights are of no system here.
    """
    refuse_relatives(states, options, path)
    image, text = (states + [{}, {}])[:2]
    if (
        not {"fc.weight", "fc.weight_v"} & image.keys()
        or not {"embed.weight", PIECES} & text.keys()
    ):
        raise InputError(
            f"{path}: not a checkpoint of this family: expected weights named fc.weight and "
            "embed.weight in the first two state dicts"
        )
    system = next((x for x in systems.SYSTEMS.values() if x.detect(states)), None)
    if system is None:
        raise InputError(
            f"{path}: its {len(states)} state dicts are those of no published system: "
            f"{', '.join(systems.SYSTEMS)}"
        )
    try:
        return system, system.architecture(system.rename(states))
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: a checkpoint of {system.name} without all its weights, or with odd ones "
            f"({type(error).__name__}: {error}); copy it again"
        ) from None
