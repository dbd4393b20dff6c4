"""Long calls into other languages, in a thread, so that the main thread still reacts to signals.

    call --in_background--> a daemon thread --> Future --result_of--> the main thread, interruptible while it waits

Python runs a signal's handler between two instructions of its main thread, so a call into Rust or C++ that takes
minutes delays Ctrl-C by minutes. A signal wakes a main thread that waits for a future. A daemon thread does not delay
the end of the process; a thread of `concurrent.futures` would.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


LOOK_UP_EVERY_S = 1.0

_idle: SimpleQueue[SimpleQueue] = SimpleQueue()
"""The queues of threads that wait for a call. A new thread for each call would take more memory."""


def in_background(call: Callable[[], Result]) -> Future[Result]:
    """Start a call in a thread that dies with the process; returns the future of its result or exception."""
    future: Future[Result] = Future()
    try:
        calls = _idle.get_nowait()
    except Empty:
        calls = SimpleQueue()
        threading.Thread(target=_work, args=(calls,), daemon=True).start()
    calls.put((call, future))
    return future


def result_of(future: Future[Result]) -> Result:
    """Wait for a call in short waits, because a signal just before a wait begins does not end that wait."""
    while not future.done():
        wait([future], timeout=LOOK_UP_EVERY_S)
    return future.result()


def _work(calls: SimpleQueue) -> None:
    while True:
        call, future = calls.get()
        try:
            result, error = call(), None
        except BaseException as raised:
            result, error = None, raised

        # Become idle before the caller gets the result, so that its next call finds this thread.
        _idle.put(calls)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        del call, future, result, error  # hold nothing while the thread waits
