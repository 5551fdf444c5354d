"""train/preflight.py without its look at weights, shards and network: the stand-in has none. The command line
is real."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import whole_preflight  # noqa: E402

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    whole_preflight.run = lambda recipe, seconds, faults_to: 0
    sys.exit(whole_preflight.main())
