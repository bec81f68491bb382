"""Checks of what a checkpoint holds, before anything is computed with it.

A file can hold any tensor and any value, from a stranger or after damage. torch believes them: its
fused optimizers read past the end of a state that is too short, and a tensor of a few bytes can say
that it has 10^12 numbers. All functions raise InputError with a line that names the value.
"""

import contextlib
import numbers
import os
import reprlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from util.cli import InputError

LONGEST_TEXT = 1000  # characters of an option
_LONGEST_NAME, _MOST_WEIGHTS = 200, 5000  # BERT has 200 weights
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}


class Range(NamedTuple):
    """The numbers that a value may be, of a kind (int, float or bool)."""

    kind: type
    low: float = 0
    high: float = 1

    def __str__(self) -> str:
        if self.kind is bool:
            return "True or False"
        whole = "a whole number" if self.kind is int else "a number"
        return f"{whole} from {self.low:,} to {self.high:,}"

    def holds(self, x) -> bool:
        if isinstance(x, bool) or self.kind is bool:
            return isinstance(x, bool) and self.kind is bool
        kind = numbers.Integral if self.kind is int else numbers.Real
        return isinstance(x, kind) and self.low <= x <= self.high  # not NaN


EPOCHS, STEPS, RSUM = Range(int, 0, 10**6), Range(int, 0, 10**12), Range(float, -1, 600)
# What the place of a run is made of, in a checkpoint's `run`.
PLACE = {
    "epoch": EPOCHS,
    "batch": Range(int, 0, 10**8),
    "loss_sum": Range(float, -(10**15), 10**15),
    "loss_count": STEPS,
    "Eiters": STEPS,
    "val_due": Range(bool),
    "best_rsum": RSUM,
}
# The published keys of a checkpoint that say it; they may be missing.
PUBLISHED_PLACE = {"epoch": Range(int, -1, 10**6), "Eiters": STEPS, "best_rsum": RSUM}

# What the optimizers of this project keep for a parameter.
_KEPT = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
}
_NOT_NEGATIVE = {"step", "exp_avg_sq"}


def shown(x) -> str:
    """A value of a file for a message: a short one as it is, of all others the kind.

    repr() of a list in a file may be endless: it may hold the same list many times, in each of them
    the same next one, and so on.
    """
    if x is None or isinstance(x, (bool, float, str)):
        return reprlib.repr(x)
    if isinstance(x, int):
        return str(x) if x.bit_length() < 100 else f"a number of {x.bit_length()} bits"
    if isinstance(x, (list, tuple, dict, set)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"a {type(x).__name__}"


class Unfilled(TorchFunctionMode):
    """Skips what fills a tensor: the functions of torch.nn.init, and methods of the same names."""

    FILLING = {name for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", None) in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Models built in this block have shapes, but no numbers: they stand on "meta".

    There, torch would import its compiler to draw random numbers, which takes seconds.
    """
    with torch.device("meta"), Unfilled():
        yield


@contextlib.contextmanager
def counting_parameters(most: int) -> Iterator[None]:
    """Raise InputError if a model is built that has more parameters."""
    left = most

    def count(*_) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError("the options ask for more layers than the weights have")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_values(values: Mapping, schema: dict[str, Range], optional: bool = False) -> None:
    """Raise InputError unless each number of a schema is there (or is not, if `optional`)."""
    for name, expected in schema.items():
        if name not in values:
            if optional:
                continue
            raise InputError(f"no {name}, expected {expected}")
        if not expected.holds(values[name]):
            raise InputError(f"{name} is {shown(values[name])}, expected {expected}")


def tensor_fault(x) -> str | None:
    """Why a value is no ordinary tensor of numbers in main memory; None: it is one."""
    if not isinstance(x, Tensor):
        return f"is {shown(x)}, expected a tensor"
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.layout != torch.strided:
        return "is a sparse, nested or other special tensor"
    if x.device.type == "meta":
        return "is a tensor without numbers (of the meta device)"
    if x.is_quantized or x.dtype not in _FLOATS | _INTEGERS:
        return f"has the dtype {str(x.dtype).removeprefix('torch.')}, expected plain numbers"
    reach = 0  # of the dimensions so far: the place of their last number
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return "repeats its numbers: several of them lie in one place"
        reach += stride * max(size - 1, 0)
    return None


def _is_finite(x: Tensor) -> bool:
    return x.dtype not in _FLOATS or bool(x.isfinite().all())


def check_weights(states: list[dict[str, Tensor]], path: str) -> None:
    """Raise InputError unless the weights of a file are ordinary finite tensors with short names.

    Those of an old file may claim more numbers than it holds: they would be what is in the memory.
    """
    if sum(map(len, states)) > _MOST_WEIGHTS:
        raise InputError(f"{path}: more than {_MOST_WEIGHTS} weights")
    stored = {}
    for state in states:
        for name, x in state.items():
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise InputError(f"{path}: {shown(name)} is no name of a weight")
            fault = tensor_fault(x)
            if fault:
                raise InputError(f"{path}: its weight {name} {fault}")
            stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    if sum(stored.values()) > os.path.getsize(path):
        raise InputError(f"{path}: its weights have more bytes than the file; copy it again")
    for state in states:
        for name, x in state.items():
            if not _is_finite(x):
                said = "holds NaN or Inf; are the weights those of a run that diverged?"
                raise InputError(f"{path}: its weight {name} {said}")


def check_like(x, own: Tensor, name: str) -> None:
    """Raise InputError unless x is an ordinary, finite tensor that can take the place of own."""
    fault = tensor_fault(x)
    if fault:
        raise InputError(f"{name} {fault}")
    if x.shape != own.shape or x.dtype != own.dtype:
        expected = f"{tuple(own.shape)} {own.dtype}"
        raise InputError(f"{name} is {tuple(x.shape)} {x.dtype}, expected {expected}")
    if x.stride() != own.stride() and not x.is_contiguous():
        raise InputError(f"{name} does not lie in memory as it is read")
    if not _is_finite(x):
        raise InputError(f"{name} holds NaN or Inf")


def module_state(saved, module: nn.Module, name: str) -> dict[str, Tensor]:
    """The saved state of a module, checked."""
    own = module.state_dict()
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise InputError(
            f"{name} is {shown(saved)}, expected a dict with {', '.join(own) or 'no keys'}"
        )
    for key in own:
        check_like(saved[key], own[key], f"{name}: {key}")
    return saved


def optimizer_state(saved, optimizer: torch.optim.Optimizer) -> dict:
    """The saved state of an optimizer, checked, as its load_state_dict takes it.

    Of the groups only numbers are taken: how a step is computed (`fused` and other switches), and
    which parameters a group has, is what the new optimizer says.
    """
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        raise InputError(f"optimizer is {shown(saved)}, expected a dict with state, param_groups")
    own = optimizer.state_dict()
    groups, state = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        expected = f"a list of {len(own['param_groups'])}"
        raise InputError(f"optimizer: param_groups is {shown(groups)}, expected {expected}")
    groups = [_group(x, y) for x, y in zip(groups, own["param_groups"], strict=True)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(state, dict) or not all(
        type(k) is int and 0 <= k < len(parameters) for k in state
    ):
        expected = f"a dict with keys from 0 to {len(parameters) - 1}"
        raise InputError(f"optimizer: state is {shown(state)}, expected {expected}")
    seen = set()
    for k, kept in state.items():
        _check_kept(kept, parameters[k], _KEPT.get(type(optimizer)), f"optimizer: state {k}", seen)
    return {"state": state, "param_groups": groups}


def _group(saved, own: dict) -> dict:
    """A group of parameters with the saved numbers, checked: rates, decays and the like."""
    parameters = saved.get("params") if isinstance(saved, dict) else None
    if (
        not isinstance(parameters, list)
        or not all(type(k) is int for k in parameters)
        or parameters != own["params"]
    ):
        raise InputError("optimizer: a group has other parameters than those of the model")
    group = dict(own)
    for name in own.keys() & saved.keys() - {"params"}:
        x, found = own[name], saved[name]
        if isinstance(x, tuple):  # the betas
            fits = isinstance(found, (tuple, list)) and len(found) == len(x)
            fits = fits and all(map(Range(float, 0, 1).holds, found))
            found = tuple(found) if fits else found
        elif isinstance(x, (int, float)) and not isinstance(x, bool):
            fits = Range(float, 0, 10**6).holds(found)
        else:
            continue
        if not fits:
            raise InputError(f"optimizer: {name} is {shown(found)}, expected such as {x}")
        group[name] = found
    return group


def _check_kept(kept, parameter: Tensor, names: set | None, where: str, seen: set[int]) -> None:
    """Check what an optimizer keeps for one parameter; `seen` are the storages of the others."""
    if not isinstance(kept, dict) or (names is not None and kept.keys() != names):
        expected = f"a dict with {', '.join(sorted(names))}" if names else "a dict"
        raise InputError(f"{where} is {shown(kept)}, expected {expected}")
    for name, x in kept.items():
        said = f"{where}: {shown(name)}"
        if name == "step":
            check_like(x, torch.zeros(()), said)
        elif names is not None:
            check_like(x, parameter, said)
        elif tensor_fault(x):  # an optimizer of another system, whose state is not known here
            raise InputError(f"{said} {tensor_fault(x)}")
        if name in _NOT_NEGATIVE and x.numel() and x.min() < 0:
            raise InputError(f"{said} has negative numbers")
        if x.numel() and x.untyped_storage().data_ptr() in seen:
            raise InputError(f"{said} lies in the memory of another one")
        seen.add(x.untyped_storage().data_ptr())
