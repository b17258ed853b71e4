import contextlib
import importlib.util
import os

import pytest

from tests.helpers.pretend_gpu import is_running

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; a name that is no folder fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where kernels, model and trainer run")
    parser.addoption("--ignore-values", action="store_true", help="forgive wrong values: kernels of a pretend GPU")


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it where results are to repeat
    elif not is_running():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite means the CPU, also on a machine with a GPU


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    if not pyfuncitem.config.getoption("--ignore-values"):
        return (yield)
    from tests.helpers.pretend_gpu.values import CpuValues

    with CpuValues() if is_running() else contextlib.nullcontext(), contextlib.suppress(AssertionError):
        yield
    return True


@pytest.fixture(scope="session")
def device(request):
    """The device of `--device`."""
    import torch

    return torch.device(request.config.getoption("--device"))


def pytest_collection_modifyitems(config, items):
    unfit, why = ("interpreter", "interpreter only") if config.getoption("--device") == "cuda" else ("cuda", "no GPU")
    for item in items:
        if config.getoption("--ignore-values") and item.get_closest_marker("real_values"):
            item.add_marker(pytest.mark.skip(reason="needs real values"))
        if item.get_closest_marker(unfit):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(tryfirst=True)  # before fixtures that import the package
def pytest_runtest_setup(item):
    for name in (name for marker in item.iter_markers("needs") for name in marker.args):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        if name == "peft":
            from swim_fast.modeling.adapters import get_peft_refusal

            if refusal := get_peft_refusal():
                pytest.skip(refusal)
