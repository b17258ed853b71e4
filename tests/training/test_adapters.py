"""LoRA and QLoRA: the losses they start from, what they train, and the checkpoints they leave."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from swim_fast.config import load_config
from swim_fast.modeling.adapters import add_adapters, build_target_pattern, has_adapters, merge_adapters, read_adapters
from swim_fast.options import Lora
from swim_fast.training.run import build_trainer
from swim_fast.training.step import compute_losses
from tests.training.conftest import history, run, run_here, weights

pytestmark = pytest.mark.needs("peft")

LAYERS = "model.language_model.layers"
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def trainer_of(write_config):
    """trainer_of(model={…}, training={…}): a trainer, and a batch of the first two records."""

    def make(name="run", **sections):
        trainer = build_trainer(load_config(write_config(name, **sections)))
        batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[2]])
        return trainer, batch

    return make


def adapted(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}


def losses(trainer, batch, backward=True):
    """Both losses, the maps, and the gradient of every trained parameter."""
    trainer.model.zero_grad()
    found = compute_losses(trainer.model, batch, trainer.attention_loss)
    text, mask, outputs = found.text, found.mask, found.outputs
    if backward:
        (text + mask).backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return text.detach(), mask.detach(), [m.detach() for m in outputs.attentions], grads


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(trainer_of):
    base, batch = trainer_of("base")
    text, mask, maps, _ = losses(base, batch)
    trainer, _ = trainer_of(model={"lora": {"rank": 4}})
    model = trainer.model
    assert type(model) is type(base.model)
    now_text, now_mask, now_maps, grads = losses(trainer, batch)
    assert torch.equal(text, now_text) and torch.equal(mask, now_mask)
    assert all(torch.equal(a, b) for a, b in zip(maps, now_maps, strict=True)) and mask > 0
    layers = {name for name, m in model.named_modules() if name.startswith(LAYERS)}
    assert adapted(model) == {name for name in layers if name.endswith(DECODER)}
    assert all("lora_" in name for name in grads)
    assert all(grads[name].any() for name in grads if "lora_B" in name)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            ["q_proj", "gate_proj"],
            "model.language_model.layers.{}.self_attn.q_proj model.language_model.layers.{}.mlp.gate_proj",
        ),
        (["layers.1.o_proj"], "model.language_model.layers.1.self_attn.o_proj"),
        (["visual.gate_proj"], "model.visual.blocks.{}.mlp.gate_proj"),
        (["qkv"], "model.visual.blocks.{}.attn.qkv"),
    ],
)
def test_targets_are_names_or_paths_of_linear_layers(trainer_of, targets, expected):
    model = trainer_of()[0].model
    add_adapters(model, Lora(targets=targets), [], seed=0)
    assert adapted(model) == {name.format(layer) for name in expected.split() for layer in range(2)}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "no linear layer is called that; did you mean 'q_proj'"),
        (["model.visual.q_proj"], "no linear layer is called that"),
        (["lm_head"], "'lm_head', whose weight is also that of this model's embeddings"),
    ],
)
def test_unknown_targets_are_refused(trainer_of, targets, message):
    with pytest.raises(ValueError, match=message):
        build_target_pattern(trainer_of()[0].model, targets)


def test_adapters_in_a_frozen_part_are_refused(trainer_of):
    with pytest.raises(ValueError, match="puts adapters into the vision_tower, which model.freeze names"):
        trainer_of(model={"lora": {"targets": ["qkv"]}, "freeze": ["vision_tower"]})


@pytest.mark.parametrize(("lora", "library"), [({}, "peft"), ({"quantize": "nf4"}, "bitsandbytes")])
def test_a_missing_library_is_named_with_its_remedy(trainer_of, monkeypatch, lora, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"needs {library}: pip install 'swim-fast\\[lora\\]'"):
        trainer_of(model={"lora": lora})


def test_checkpointing_gives_the_adapters_the_same_gradients(trainer_of):
    plain, batch = trainer_of("plain", model={"lora": {}})
    truth = losses(plain, batch)
    trainer, _ = trainer_of(model={"lora": {}}, training={"gradient_checkpointing": True})
    trainer.train()  # enables it
    model = trainer.model
    blocks = [*model.model.visual.blocks, *model.model.language_model.layers]
    assert all(block.gradient_checkpointing for block in blocks)
    model.load_state_dict(plain.model.state_dict())
    found = losses(trainer, batch)
    assert torch.equal(truth[0], found[0]) and torch.equal(truth[1], found[1])
    assert all(torch.equal(truth[3][name], found[3][name]) for name in truth[3])


def test_checkpointing_leaves_a_frozen_tower_out_of_backward(trainer_of):
    """Also where its merger is trained."""
    trainer, batch = trainer_of(
        model={"freeze": ["vision_tower"]}, training={"gradient_checkpointing": True, "max_steps": 1}
    )
    trainer.train()
    tracked = []
    visual = trainer.model.model.visual
    visual.blocks[-1].register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))
    grads = losses(trainer, batch)[3]
    assert tracked == [False]
    assert any(grads[name].any() for name in grads if "visual.merger" in name)


def test_run_leaves_adapters_and_a_merged_checkpoint_and_resumes_exactly(write_config, checkpoint, tmp_path):
    config = write_config(
        model={"lora": {"rank": 4, "dropout": 0.1}},
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    )
    run_here(config)
    folder, saved = tmp_path / "run", tmp_path / "run" / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").stat().st_size < (checkpoint / "model.safetensors").stat().st_size / 4
    assert not (saved / "model.safetensors").exists()
    whole, losses_ = load_file(folder / "adapter" / "adapter_model.safetensors"), history(folder)
    merged = weights(folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "adapter")
    run_here(config, resume=True)
    assert [entry["loss"] for entry in history(folder)] == [entry["loss"] for entry in losses_]
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items()) and len(again) == len(whole)
    assert all(torch.equal(weights(folder)[name], value) for name, value in merged.items())

    # the merged checkpoint is a plain one, and says what base and adapters say together
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P; import torch; "
        "f, base = sys.argv[1:]; m, p = M.from_pretrained(f), P.from_pretrained(f); "
        "assert not [n for n in sys.modules if n.startswith(('swim', 'peft'))]; "
        "assert not [n for n, _ in m.named_parameters() if 'lora' in n]; "
        "from peft import PeftModel; b = M.from_pretrained(base); ids = torch.arange(40, 60)[None]; "
        "old = b(input_ids=ids).logits; "
        "a = PeftModel.from_pretrained(b, f + '/adapter'); "
        "new, both = m(input_ids=ids).logits, a(input_ids=ids).logits; "
        "print((new - both).abs().max().item(), (new - old).abs().max().item()); "
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(checkpoint)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference, learnt = map(float, done.stdout.split())
    assert difference < 1e-4 and learnt > 100 * difference

    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(checkpoint)
    trainer = build_trainer(load_config(write_config("other", model={"lora": {"rank": 2}})))
    with pytest.raises(ValueError, match="on other layers or of another rank"):
        read_adapters(trainer.model, folder / "adapter")
    with pytest.raises(ValueError, match="holds no adapters"):
        read_adapters(trainer.model, checkpoint)


ZERO3 = pytest.param("configs/deepspeed/zero3.json", marks=[pytest.mark.slow, pytest.mark.needs("deepspeed")])


@pytest.mark.parametrize("deepspeed", [None, ZERO3])
def test_two_ranks_train_the_adapters_that_one_does(write_config, tmp_path, deepspeed):
    """Checkpointed, over batches with and without video."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    training = {**sgd, "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    lora = {"lora": {"rank": 4}, "freeze": ["vision_tower", "merger"]}
    one = write_config("one", model=lora, training={**training, "gradient_accumulation_steps": 2, "max_steps": 4})
    saving = {"deepspeed": deepspeed, "save_strategy": "steps", "save_steps": 2} if deepspeed else {}
    two = write_config("two", model=lora, training={**training, "max_steps": 4, **saving})
    run_here(one)
    run("train", two, ranks=2)
    if deepspeed:  # from the middle again
        shutil.rmtree(tmp_path / "two" / "checkpoint-4")
        run("train", two, "--resume", ranks=2)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    learnt = [name for name in one if "lora_B" in name]
    truth, found = (torch.cat([tree[name].flatten() for name in learnt]) for tree in (one, two))
    assert truth.norm() > 0 and (found - truth).norm() <= 1e-4 * truth.norm()
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()


def test_adapters_of_a_model_of_16_bits_are_trained_in_fp32(trainer_of):
    trainer, batch = trainer_of(model={"lora": {"rank": 4}, "dtype": "bfloat16"})
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    _, _, _, grads = losses(trainer, batch)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize(("quantize", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantised_base_trains_and_merges_into_the_whole_one(trainer_of, checkpoint, tmp_path, quantize, kind):
    trainer, batch = trainer_of(model={"lora": {"rank": 4, "quantize": quantize}, "dtype": "bfloat16"})
    model = trainer.model
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    assert kinds["model.language_model.layers.0.self_attn.q_proj.base_layer"] == kind
    assert kinds["model.visual.blocks.0.attn.qkv"] == "Linear"
    _, _, _, grads = losses(trainer, batch)
    assert all("lora_" in name and grad.isfinite().all() for name, grad in grads.items()) and has_adapters(model)
    assert any(grad.any() for grad in grads.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())
    trainer.save_model(str(tmp_path / "adapter"))
    merge_adapters(str(checkpoint), tmp_path / "adapter", tmp_path / "merged")
    base, merged = weights(checkpoint), weights(tmp_path / "merged")
    changed = {name for name, value in base.items() if not torch.equal(value, merged[name])}
    assert changed == {
        name for name in base if "visual" not in name and name.endswith(tuple(f"{d}.weight" for d in DECODER))
    }
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
