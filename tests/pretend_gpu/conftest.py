"""Tests on the pretend GPU, in a process of their own.

python -m tests.helpers.pretend_gpu pytest tests/pretend_gpu
"""

from tests.helpers.pretend_gpu import is_running

if not is_running():
    collect_ignore_glob = ["test_*.py"]
