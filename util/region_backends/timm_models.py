"""Networks of `timm`, by a name of its list or from a folder in the form of the hub.

Shapes: B pictures, T tokens, F numbers per token, h x v cells of the feature map.
"""

import os

import torch
from torch import Tensor, nn

from util.cli import InputError
from util.hub import offline
from util.json_file import fault_of, read_json, shown_value
from util.region_backends.grid import BICUBIC, BILINEAR, GridExtractor, Net
from util.region_backends.weights import hub_folder, read_state, sha256

# Arguments with which a settings file could make timm load other files, in timm's own way.
LOADS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
FILES = ("model.safetensors", "pytorch_model.bin")


def open_backend(settings: dict, device: torch.device, download: bool) -> GridExtractor:
    """The extractor with the network of a folder (config.json, model.safetensors), or of a name."""
    name = settings.get("weights")
    if not name:
        raise InputError(
            "the backend timm needs --weights: a folder, or a name such as resnet50.a1_in1k"
        )
    try:
        import timm
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision of another torch
        raise InputError(
            "the backend timm needs timm and torchvision: pip install timm torchvision"
        ) from None
    listed = None if os.path.isdir(name) else timm.get_pretrained_cfg(name, allow_unregistered=True)
    wanted = name
    if listed is not None:
        # The hub has the networks of the list under timm/.
        wanted = listed.hf_hub_id or name
        if wanted.endswith("/"):
            wanted += f"{listed.architecture}.{listed.tag}" if listed.tag else listed.architecture
    folder = hub_folder(wanted, download, "timm")
    module, preprocessing = load(timm, folder)
    _, height, width = preprocessing["input_size"]
    net = Net(
        module,
        lambda x: to_map(module, module.forward_features(x)),
        (height, width),
        tuple(255 * x for x in preprocessing["mean"]),
        tuple(255 * x for x in preprocessing["std"]),
        BICUBIC if preprocessing["interpolation"] == "bicubic" else BILINEAR,
        folder if os.path.isdir(name) else name,
        sha256(folder),
    )
    return GridExtractor(settings, net, device)


def load(timm, folder: str) -> tuple[nn.Module, dict]:
    """The network in a folder, and how it wants its pictures."""
    path = os.path.join(folder, "config.json")
    try:
        config = read_json(path)
        architecture, more = config["architecture"], dict(config.get("model_args") or {})
        given = config.get("pretrained_cfg") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected timm's settings with 'architecture' ({type(error).__name__})"
        ) from None
    # hf-hub:NAME would be fetched, a local-dir: read in timm's own way.
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise InputError(f"{path}: architecture {shown_value(architecture)} is none of timm")
    for name in LOADS:
        more.pop(name, None)
    more.setdefault("num_classes", config.get("num_classes", 1000))
    files = [os.path.join(folder, x) for x in FILES if os.path.isfile(os.path.join(folder, x))]
    if not files:
        raise InputError(f"{folder}: no {' or '.join(FILES)}")
    try:
        with offline():
            module = timm.create_model(architecture, pretrained=False, **more)
        module.load_state_dict(read_state(files[0]))
        preprocessing = timm.data.resolve_data_config(pretrained_cfg=given, model=module)
    except InputError:
        raise
    except Exception as error:  # the library raises errors of many types
        raise InputError(f"{folder}: not {architecture} of timm ({fault_of(error)})") from None
    return module, preprocessing


def to_map(module: nn.Module, x: Tensor) -> Tensor:
    """The feature maps (B, F, h, v) of what a network of timm gives."""
    if x.dim() == 4:
        last = getattr(module, "output_fmt", None)
        if str(last).endswith("NHWC") or x.shape[1] != module.num_features == x.shape[3]:
            x = x.permute(0, 3, 1, 2)  # (B, F, h, v)
        return x
    if x.dim() != 3:
        raise InputError(f"the network gives an array of shape {tuple(x.shape)}, not a feature map")
    patches = x[:, getattr(module, "num_prefix_tokens", 0) :]  # (B, T, F)
    embedding = getattr(module, "patch_embed", None)
    height, width = getattr(embedding, "grid_size", None) or (round(patches.shape[1] ** 0.5),) * 2
    if height * width != patches.shape[1]:
        raise InputError(f"the network gives {patches.shape[1]} tokens, which is no square grid")
    return patches.transpose(1, 2).unflatten(2, (height, width))  # (B, F, h, v)
