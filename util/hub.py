"""Use the libraries of the Hugging Face hub on local folders, without a request to the hub."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While it is open, the library of the hub asks no server for anything.

    The settings in a folder can name models, adapters and kernels of the hub, which the libraries
    would fetch: a file must not choose a network request.
    """
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
