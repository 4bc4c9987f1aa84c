"""What all tests start from."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell that starts a job in the background has it ignore interrupts, as would all processes that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
