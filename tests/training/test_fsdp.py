"""Runs divided by FSDP2 are the runs of one rank; what of it does not work is refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from swim_fast.config import ConfigError, RunConfig, load_config
from swim_fast.demo.tiny_model import build_model, train_tokenizer
from swim_fast.training.arguments import build_arguments
from swim_fast.training.fsdp import check_ranks, choose_layers
from tests.training.conftest import ROOT, SEED, TEXTS, history, launch, run_command, run_here, weights

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}, "optim": "adamw_torch"}
FEW = {"learning_rate": 1e-3, "max_steps": 4, "seed": SEED, "optim": "adamw_torch"}


def run_divided(*words, ranks: int = 2) -> str:
    return run_command([*launch(ranks), str(ROOT / "tests/helpers/fsdp_on_cpu.py"), *map(str, words)])


def assert_same_logs(one, other, *, rel):
    for mine, theirs in zip(one, other, strict=True):
        for key in ("loss", "text_loss", "mask_loss", "grad_norm", "pairs_per_step", "skipped"):
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=rel), key


@pytest.fixture
def runs(write_config, unlike):
    """Configurations of one run, on one rank and divided, which ends with its best (here the worse) checkpoint."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_same_loss", "greater_is_better": True}
    often = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    data = {"train": [{"path": str(unlike)}], "eval": {"same": {"path": str(unlike), "limit": 3}}}
    training = {**FEW, **best, **often, "gradient_checkpointing": True}

    def write(name, **more):
        return write_config(name, data=data, training={**training, **more})

    return write


def test_a_divided_run_is_that_of_one_rank_resumes_exactly_and_ends_with_the_best(runs):
    """Text against video and image, tag against none, nothing against something; everything is trained."""
    one, two = runs("one", gradient_accumulation_steps=2), runs("two", **FSDP)
    again = runs("again", **FSDP, resume_from_checkpoint=str(two.with_suffix("") / "checkpoint-2"))
    run_here(one)
    run_divided(two, again)
    one, two, again = (path.with_suffix("") for path in (one, two, again))
    assert_same_logs(history(one), history(two), rel=1e-5)
    mine, other = (json.loads((folder / "all_results.json").read_text()) for folder in (one, two))
    for key in ("loss", "text_loss", "mask_loss", "pairs"):
        assert mine[f"eval_same_{key}"] == pytest.approx(other[f"eval_same_{key}"], rel=1e-5), key

    # plain checkpoints with the published names, the tied head once
    assert weights(two).keys() == weights(one).keys() and "lm_head.weight" not in weights(two)
    model = AutoModelForImageTextToText.from_pretrained(two, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert AutoConfig.from_pretrained(two).architectures == ["Qwen2_5_VLForConditionalGeneration"]
    for name, value in weights(one / "checkpoint-4").items():
        trained = weights(two / "checkpoint-4")[name]
        assert (value - trained).norm() <= 1e-4 * max(value.norm().item(), 1), name

    # the best one at the end
    assert json.loads((two / "trainer_state.json").read_text())["best_global_step"] == 2
    for name, value in weights(two / "checkpoint-2").items():
        assert torch.equal(value, weights(two)[name]) and not torch.equal(value, weights(one / "checkpoint-4")[name])

    # from the second step on, the same bits
    saved = sorted(path.name for path in (two / "checkpoint-2").glob("*.bin"))
    assert saved == ["optimizer.bin", "training_args.bin"]  # and no second file of weights
    assert json.loads((two / "checkpoint-2" / "layout.json").read_text())["fsdp"] is True
    assert [log["loss"] for log in history(again)] == [log["loss"] for log in history(two)]
    for name, value in weights(two / "checkpoint-4").items():
        assert torch.equal(value, weights(again / "checkpoint-4")[name]), name


@pytest.mark.slow
def test_four_ranks_go_on_from_a_checkpoint_of_two(runs):
    two = runs("two", **FSDP)
    run_divided(two)
    folder = two.with_suffix("")
    four = runs("four", **FSDP, per_device_train_batch_size=1, resume_from_checkpoint=str(folder / "checkpoint-2"))
    run_divided(four, ranks=4)
    assert_same_logs(history(folder), history(four.with_suffix("")), rel=1e-4)


@pytest.mark.slow
def test_every_family_has_the_gradients_of_one_rank(tmp_path):
    run_command([*launch(2), str(ROOT / "tests/families/fsdp_ranks.py"), str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"Qwen2.5-VL", "LLaVA-OneVision", "InternVL"} <= found.keys()
    assert {name: difference for name, difference in found.items() if not difference <= 1e-5} == {}


@pytest.mark.slow
@pytest.mark.needs("peft")
def test_adapters_of_a_divided_model_are_trained_and_loaded(runs, write_config):
    lora = {"lora": {"rank": 4}, "freeze": []}

    def write(name, **more):
        return write_config(name, model=lora, training={**FEW, "save_strategy": "steps", "save_steps": 2, **more})

    one, two = write("one", gradient_accumulation_steps=2), write("two", **FSDP)
    again = write("again", **FSDP, resume_from_checkpoint=str(two.with_suffix("") / "checkpoint-2"))
    run_here(one)
    run_divided(two, again)
    one, two, again = (path.with_suffix("") for path in (one, two, again))
    assert_same_logs(history(one), history(two), rel=1e-5)
    mine, other, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two, again))
    assert mine.keys() == other.keys() and all("lora_" in name for name in mine)
    assert all(torch.equal(value, resumed[name]) for name, value in other.items())
    assert weights(one).keys() == weights(two).keys()


def build(tree=None, **training):
    output = {"output_dir": "runs/none", "report_to": "none", "use_cpu": True}
    return build_arguments(RunConfig.model_validate({**(tree or {}), "training": {**output, **training}}))


MODEL = {"model": {"path": "none"}, "data": {"train": [{"path": "none"}]}}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"fsdp_config": {"version": 1}}, r"fsdp_config\.version is 1: .* write 2"),
        ({"fsdp_config": {"fsdp_version": 1}}, r"fsdp_config\.version is 1"),
        ({"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "no weights that from_pretrained can load"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "set training.gradient_checkpointing instead"),
        ({"fsdp_config": {"cpu_offload": True}}, "zero3_offload.json"),
        ({"fsdp": "full_shard offload"}, "training.fsdp is 'full_shard offload'.*zero3_offload.json"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, "prepared without weights"),
        ({"fsdp_config": "absent.json"}, "is 'absent.json', which cannot be read"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "both divide the model among the ranks: remove one"),
    ],
)
def test_what_does_not_work_is_refused_by_name(training, message):
    with pytest.raises(ConfigError, match=message):
        build(MODEL, **{"fsdp": True, **training})


def test_qlora_is_refused():
    tree = {**MODEL, "model": {"path": "none", "lora": {"quantize": "nf4"}}}
    with pytest.raises(ConfigError, match="nf4 keeps the weights whole on every GPU, which training.fsdp divides"):
        build(tree, fsdp=True)


def test_ranks_that_would_be_copies_are_refused(write_config):
    with pytest.raises(ConfigError, match="there is one: start several with torchrun"):
        run_here(write_config(training=FSDP))
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ConfigError, match=r"needs GPUs: on the CPU accelerate would copy .* \(DDP\)"):
        check_ranks(SimpleNamespace(fsdp=True, world_size=2, distributed_state=state))


def test_fsdp_is_switched_on_and_off_by_a_bool(write_config):
    assert build_arguments(load_config(write_config(), ["training.fsdp=true"])).fsdp_plugin_args["fsdp_version"] == 2
    assert not build_arguments(load_config(write_config(), ["training.fsdp=false"])).fsdp


def test_the_layers_of_decoder_and_vision_tower_are_gathered_each_as_one():
    model = build_model(train_tokenizer(TEXTS * 3, 300), seed=0)
    model._no_split_modules = {*model._no_split_modules, "SomeOther"}  # of a part that this model has not
    args = build(MODEL, fsdp=True)
    choose_layers(args, model)
    names = "Qwen2_5_VLDecoderLayer,Qwen2_5_VLVisionBlock"
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == names
    args = build(MODEL, fsdp=True, fsdp_config={"transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer"]})
    choose_layers(args, model)
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "Qwen2_5_VLDecoderLayer"
