"""Long calls into other languages, beside a main thread that heeds signals.

    call --in_background--> a daemon thread --> Future --result()--> the main thread, interruptible while it waits

Python runs a signal's handler between two instructions of its main thread, so a call into Rust or C++ that takes
minutes delays Ctrl-C by minutes. A main thread that waits for a future is woken. A daemon thread does not hold up the
end of the process, as those of `concurrent.futures` do.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_background(call: Callable[[], Result]) -> Future[Result]:
    """Start a call in a thread of its own, which dies with the process; returns its future result or exception."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
