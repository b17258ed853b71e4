"""Waiting times that a server asks for, and options outside their range."""

import email.utils
import time

import pytest

from swim_fast.llm.endpoint import retry_after
from swim_fast.options import Endpoint


def test_retry_after():
    assert retry_after({}) is None
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({"retry-after": "0.5"}) == 0.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({"retry-after": email.utils.formatdate(time.time() + 30)}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": email.utils.formatdate(time.time() - 30)}) == 0.0


@pytest.mark.parametrize(
    "option", [{"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"backoff": -1.0}, {"retries": -1}]
)
def test_options_outside_their_range(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        Endpoint(model="m", **option)
