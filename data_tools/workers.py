"""How worker processes of the data tools live and end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time


def start_worker(parent: int) -> None:
    """To be run first in each worker: one thread of its own, a quiet end on Ctrl-C, and no life without its
    parent (a pid)."""
    # One thread, also for a torch that is imported already.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from each worker; the parent reports
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever, since it holds the other end of its own
    queue."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
