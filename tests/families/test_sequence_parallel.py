"""Every family whose layers can be shared gives, on several ranks, the maps, losses and gradients of one.

The exchange within an attention is compared with DeepSpeed's.
"""

import json

import pytest

from tests.families.sequence_ranks import MOE
from tests.families.tiny import MAKERS, NEEDS
from tests.training.conftest import launch, run_command

NAMES = ["Qwen2.5-VL", *(name for name in MAKERS if name not in ("Qwen2.5-VL", "Gemma 3", *NEEDS))]


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, ["Qwen2.5-VL", "Qwen3-VL"]),
        pytest.param(2, NAMES, marks=pytest.mark.slow),
        pytest.param(4, NAMES, marks=pytest.mark.slow),
    ],
)
def test_ranks_of_one_sample_are_one_rank(tmp_path, ranks, names):
    run_command([*launch(ranks), "-m", "tests.families.sequence_ranks", str(tmp_path / "errors.json"), *names])
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert {case.split(" sdpa")[0].split(" eager")[0] for case in errors} == set(names)
    for case, (text, maps, grads) in errors.items():
        small = 1e-5 if case.startswith(MOE) else 1e-8
        assert max(text, maps) <= small / 10 and grads <= small, case


@pytest.mark.slow
@pytest.mark.needs("deepspeed")
def test_exchange_gives_the_bits_of_deepspeed(tmp_path):
    """`UlyssesSPAttentionHF` around the same sdpa, and ours in one graph; 4, 2 and 1 key heads, in fp32 and fp64."""
    run_command([*launch(2), "-m", "tests.families.ulysses_ranks", str(tmp_path / "errors.json")])
    for errors in json.loads((tmp_path / "errors.json").read_text()):
        assert len(errors) == 6
        for case, by in errors.items():
            assert by["deepspeed"] == by["compiled"] == 0, case
            assert by["one rank"] <= (1e-6 if "float32" in case else 1e-14), case
