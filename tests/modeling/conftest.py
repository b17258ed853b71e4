"""A tiny model with random weights; `stock` is not to be changed, `model` is a copy."""

import copy
import logging

import pytest

from swim_fast.demo.tiny_model import ModelSize, build_model, train_tokenizer
from swim_fast.modeling import text_loss


@pytest.fixture(scope="module")
def stock():
    return build_model(train_tokenizer(["a dog and a cat"] * 4, 300), ModelSize(num_layers=4), seed=0)


@pytest.fixture
def model(stock):
    return copy.deepcopy(stock)


@pytest.fixture
def log(caplog):
    """The log, in which the text loss says its way of computing again."""
    text_loss._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    return caplog
