"""Handle Ctrl-C and SIGTERM during a long run."""

import signal
import threading

from util import distributed


class Stop(BaseException):
    """Raised between two steps after Ctrl-C or SIGTERM."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a Stop at the next `check`, or immediately within `with`.

    An optimizer step must not be interrupted. A validation changes nothing, so it may stop
    anywhere: it runs within `with`, and a `check` follows it. Several processes all stop at the
    same check. After the first signal, a SIGTERM is ignored, so that none interrupts the save: a
    scheduler may send it to every process of a job, and torchrun sends it on. A second Ctrl-C stops
    at once; several processes ignore it, because torchrun sends that again, too. Outside of the
    main thread, where Python allows no handlers, nothing is changed: signals are then the main
    thread's.
    """

    def __init__(self):
        self.received: int | None = None
        self.at_once = False
        numbers = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()
        self.before = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number, frame):
        several = distributed.world_size() > 1
        for either in self.before:
            waits = several or either == signal.SIGTERM
            signal.signal(either, signal.SIG_IGN if waits else signal.default_int_handler)
        self.received = number
        print(f"\n{signal.Signals(number).name}: stopping after this step ...", flush=True)
        if self.at_once:
            raise Stop

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        self.at_once = False
        if distributed.any_of(self.received is not None):
            raise Stop

    def __enter__(self):
        self.at_once = True

    def __exit__(self, *_):
        self.at_once = False
