"""Ctrl-C and SIGTERM: handlers in the main thread, none in another one."""

import os
import signal
import threading

import pytest

import train
from tests.conftest import read_log, train_args
from util.signals import Stop, StopSignal

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list:
    return [signal.getsignal(number) for number in BOTH]


def in_a_thread(function) -> list:
    """What a function in a thread raises or returns."""
    found = []

    def call():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_stops_at_the_next_check_or_at_once(number):
    before = handlers()
    stop = StopSignal()
    try:
        os.kill(os.getpid(), number)
        with pytest.raises(Stop):
            stop.check()
    finally:
        stop.restore()
    assert handlers() == before and stop.received == number
    stop = StopSignal()
    try:
        with pytest.raises(Stop), stop:
            os.kill(os.getpid(), number)
            signal.pause()
    finally:
        stop.restore()
    assert handlers() == before


@pytest.mark.parametrize("first", BOTH)
def test_another_sigterm_does_not_interrupt_the_save_but_ctrl_c_does(first):
    stop = StopSignal()
    try:
        os.kill(os.getpid(), first)
        with pytest.raises(Stop):
            stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        stop.restore()
    assert stop.received == first


def test_a_thread_leaves_the_signals_to_the_main_thread():
    def use():
        before = handlers()
        stop = StopSignal()
        assert handlers() == before
        stop.check()
        with stop:
            pass
        stop.restore()
        return handlers() == before and stop.received is None

    assert in_a_thread(use) == [True]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_in_a_thread(tiny, workers):
    before = handlers()
    args = train_args(num_epochs=2, workers=workers)
    assert in_a_thread(lambda: train.main(args)) == [None]
    assert handlers() == before
    assert [line["epoch"] for line in read_log("run")] == [0, 1]
