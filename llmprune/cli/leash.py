"""The end of a worker that a search has started: when the search's own, however that comes."""

from __future__ import annotations

import os
import signal
import sys
import threading


def end_with_stdin() -> None:
    """Interrupt this process, as Ctrl-C does, once its stdin ends: whoever holds the other end has let go, or died.

    A terminal's Ctrl-C reaches a search alone, since its workers are sessions of their own: each is interrupted once,
    and gives its trial back.
    """
    # A shell that starts a job in the background has it, and all that it starts, ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
