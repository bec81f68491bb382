"""Find, check and read the weights of networks; nothing in them is run."""

import hashlib
import os
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from util.cli import InputError
from util.state_checks import without_numbers

PATTERNS = ("*.json", "*.safetensors")  # what is fetched from the hub: nothing that could be run


def sha256(path: str) -> str:
    """The SHA-256 of a file, or of the weights and settings in a folder."""
    names = [path]
    if os.path.isdir(path):
        ends = (".safetensors", ".bin", "config.json")
        names = [os.path.join(path, x) for x in sorted(os.listdir(path)) if x.endswith(ends)]
    digest = hashlib.sha256()
    for name in names:
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hub_folder(name: str, download: bool, backend: str) -> str:
    """The folder of weights: `name` itself, or where the hub's library keeps those of that name."""
    if os.path.isdir(name):
        return os.path.abspath(name)
    if os.path.exists(name) or name.startswith((".", "/", "~", os.sep)):
        raise InputError(
            f"--weights {name}: no such folder; the backend {backend} reads a folder with "
            "config.json and model.safetensors, or a name of the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=list(PATTERNS), local_files_only=not download)
    except ImportError:
        raise InputError(
            f"--weights {name}: names need huggingface_hub: pip install huggingface_hub"
        ) from None
    except Exception as error:  # of the network, the hub and the library, of many types
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said = said if download else "it is not on this machine; extract with it once"
        raise InputError(
            f"--weights {name}: no such folder here, and it cannot be had from the hub ({said})"
        ) from None


def read_state(path: str) -> dict[str, Tensor]:
    """The weights in a file of torch.save or of safetensors, by name."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path}: needs safetensors: pip install safetensors") from None
    except Exception as error:  # of torch, pickle, zip and safetensors, of many types
        refused = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than weights, and nothing in it is run" if refused else "damaged?"
        raise InputError(f"{path}: not a file of weights that can be read ({why})") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"{path}: expected a state dict: tensors by name")
    return {name.removeprefix("module."): x for name, x in state.items()}


def build_fitting(
    path: str, state: dict[str, Tensor], builders: dict[str, Callable[[], nn.Module]]
) -> nn.Module:
    """The network, of those that may be built, whose weights have these names and shapes."""
    shapes = {name: x.shape for name, x in state.items()}
    for build in builders.values():
        with without_numbers():
            expected = {name: x.shape for name, x in build().state_dict().items()}
        if expected == shapes:
            module = build()
            module.load_state_dict(state)
            return module
    raise InputError(f"{path}: the weights of none of {', '.join(builders)}")
