"""The choice of a backend, the same for every op."""

import importlib
import logging

import pytest

from swim_kernels.runtime import backends

OPS = {
    "noun attention": ("noun_attention", "OP"),
    "noun mass": ("noun_mass", "OP"),
    "grid prediction": ("grid_prediction", "OP"),
    "grid metrics": ("grid_prediction", "METRICS_OP"),
    "mask BCE": ("mask_bce", "OP"),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "backend, device_type, chosen, level, why",
    [
        ("eager", "cpu", "eager", logging.INFO, "asked for"),
        ("torch", "cuda", "torch", logging.INFO, "asked for"),
        ("auto", "cpu", "torch", logging.INFO, "auto, triton needs CUDA"),
        ("auto", "cuda", "torch", logging.WARNING, "auto, slower than triton, which is not available: "),
    ],
)
def test_choice_is_said_once(op, backend, device_type, chosen, level, why, caplog, monkeypatch):
    folder, name = OPS[op]
    dispatch = getattr(importlib.import_module(f"swim_kernels.{folder}.api"), name)
    monkeypatch.setattr(dispatch, "refuse_triton", lambda *_: "no reason")
    backends.log_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger=backends.__name__)
    for _ in range(3):
        assert dispatch.choose(backend, device_type) == chosen
    (record,) = [record for record in caplog.records if record.name == backends.__name__]
    assert record.levelno == level
    assert record.getMessage().startswith(f"{op} on {device_type}: backend {chosen} ({why}")
