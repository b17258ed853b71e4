"""The check for GPUs, `python -m swim_fast.gpu_check`; it needs a checkout, for it runs tests and benchmarks."""

import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run `benchmarks.gpu` of the checkout that this package is part of; return its exit code."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "gpu" / "__main__.py").exists():
        print("the GPU check needs a checkout of the repository: run `make gpu-check` in one", file=sys.stderr)
        return 2
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
