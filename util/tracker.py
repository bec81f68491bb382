"""Mirror the scalars and pictures of a run to Weights & Biases or Trackio.

    pip install wandb      # a web service; with WANDB_MODE=offline it writes to the folder wandb/
    pip install trackio    # keeps all on this machine; `trackio show` opens its page

Both have the same functions. TensorBoard and log.jsonl have all values in any case.
"""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np

from util.cli import InputError, say

# The environment variables that name the project of a tracker; PROJECT if they do not.
PROJECTS = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT"}
PROJECT = "image-text-matching"
RENAMED = {"step": "batch"}  # a published tag, the batch within the epoch; Trackio keeps this name


class NoTracker:
    """Stands in for a tracker where none is wanted."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        pass

    def add_figure(self, tag: str, figure, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class Tracker(NoTracker):
    """A run of a tracker, `module`. It takes what TensorBoard's writer takes.

    A tracker wants all values of a step together, and its steps in order. So what comes for a step
    is sent when a value of another step comes, or at the end. A tracker that fails must not end a
    training of days: that is said once, and it gets nothing more.
    """

    def __init__(self, kind: str, module: ModuleType):
        self.kind, self.module = kind, module
        self.step, self.values = None, {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Take a number (or a tensor of one) for a step."""
        self._add(tag, lambda: float(value), step)

    def add_figure(self, tag: str, figure, step: int) -> None:
        """Take a picture (a Figure of matplotlib, which stays open) for a step."""
        self._add(tag, lambda: self.module.Image(pixels(figure)), step)

    def close(self) -> None:
        """Send what is left, and end the run."""
        self._send()
        self._try(lambda: self.module.finish())
        self.module = None

    def _add(self, tag: str, make: Callable, step: int) -> None:
        if step != self.step:
            self._send()
        self.step = step
        self._try(lambda: self.values.update({RENAMED.get(tag, tag): make()}))

    def _send(self) -> None:
        values, self.values = self.values, {}
        if values:
            self._try(lambda: self.module.log(values, step=self.step))

    def _try(self, call: Callable[[], None]) -> None:
        if self.module is None:  # it has failed, or is closed
            return
        try:
            call()
        except Exception as error:
            self.module = None
            say(
                f"warning: --tracker {self.kind} has failed ({one_line(error)}); the run goes on "
                "without it, and TensorBoard and log.jsonl get all values"
            )


def open_tracker(kind: str | None, name: str, config: dict) -> NoTracker:
    """Start the run `name` of a tracker, 'wandb' or 'trackio', with the options of the training.

    `name` may be a folder. None stands for no tracker: what it gets goes nowhere. Raises InputError
    if the tracker's package is not installed or does not start: training ends before its first
    step then.
    """
    module = load_tracker(kind)
    if module is None:
        return NoTracker()
    # Trackio makes a path of the name: one within its own folder.
    name = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
    try:
        module.init(project=os.environ.get(PROJECTS[kind], PROJECT), name=name, config=dict(config))
    except Exception as error:
        raise InputError(f"--tracker {kind} does not start: {one_line(error)}") from None
    return Tracker(kind, module)


def load_tracker(kind: str | None) -> ModuleType | None:
    """A tracker's package; None: no tracker is wanted. Raises InputError if it is not installed."""
    if kind in (None, "none"):
        return None
    if kind not in PROJECTS:
        raise InputError(f"--tracker {kind}: expected one of {', '.join(PROJECTS)}")
    try:
        module = importlib.import_module(kind)
    except ImportError:
        module = None
    if not hasattr(module, "init"):  # a folder wandb/ of earlier runs can be imported too
        raise InputError(f"--tracker {kind} needs its package: pip install {kind}")
    return module


def one_line(error: Exception) -> str:
    """The error's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def pixels(figure) -> np.ndarray:
    """The picture (H, W, 3) of a Figure, uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
