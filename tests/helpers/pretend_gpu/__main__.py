"""Run a command on the pretend GPU: `python -m tests.helpers.pretend_gpu COMMAND…`."""

import os
import sys
import tempfile
from pathlib import Path

from tests.helpers.pretend_gpu import build

if __name__ == "__main__":
    # Kept for the next command: a folder of this user's own.
    folder = Path(tempfile.gettempdir()) / f"swim-fast-pretend-gpu-{os.getuid()}"
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | build(folder))
