"""The tiny checkpoint."""

from tests.training.conftest import checkpoint  # noqa: F401
