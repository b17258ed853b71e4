"""The model side of every family: maps and gradients against eager attention, and everything that changes a model."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import AutoModelForImageTextToText, Trainer

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.batch.positions import PositionIds
from swim_fast.data.sample.builder import Row, Sample
from swim_fast.families import find_family, get_eligible_layers, get_layout
from swim_fast.families.layout import BatchError
from swim_fast.modeling import attach_noun_attention, detach_noun_attention
from swim_fast.modeling.adapters import add_adapters
from swim_fast.modeling.freezing import PARTS, freeze, get_part_parameters, keep_visual_in_step
from swim_fast.modeling.noun_attention import get_attached_layers
from swim_fast.modeling.prepare import prepare_model, restore_model
from swim_fast.options import Lora
from tests.families.test_data import FAMILY, FPS, encode, kinds_of
from tests.families.tiny import tiny

PIXELS = ("pixel_values", "pixel_values_videos")
# Families whose model takes only videos of one number of frames in a batch.
EQUAL_FRAMES = ("LLaVA-OneVision",)


@pytest.fixture
def model(name):
    return tiny(name).build()


def sample_of(name, kind="video", over="range", **about):
    """A sample whose rows, one for each token of the noun, are read out on all cells of all patches."""
    kind = kind if kind in kinds_of(name) else kinds_of(name)[0]
    encoding, _ = encode(name, kind, **about)
    cells = encoding.cells.flatten()
    cells = cells[cells >= 0]
    rows = [Row(token, 0, token + 1, 0) for token in encoding.noun_tokens(0)]
    return Sample("", encoding.inputs, rows, [cells], over, cells=encoding.cells, grids=encoding.grids)


def text_sample(name):
    ids = torch.tensor(tiny(name).processor.tokenizer("What is the dog doing?")["input_ids"])
    return Sample("", {"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros_like(ids)})


def batch_of(name, model, *samples, pack=False):
    return Collator(tiny(name).processor, PositionIds(model.config), pack=pack)(samples)


def losses_of(model, batch):
    """Text loss and maps of a batch of one prepared model."""
    return model(**model_inputs(batch), labels=batch["labels"], noun_queries=batch["noun_queries"])


@FAMILY
def test_maps_and_gradients_are_those_of_eager_attention(name, model):
    sample = sample_of(name)
    batch = batch_of(name, model, sample)
    inputs = model_inputs(batch)
    positions, keys = [row.position for row in sample.rows], sample.key_sets[0]
    layers = get_eligible_layers(model)
    upstream = torch.randn(len(layers), len(positions), len(keys), generator=torch.Generator().manual_seed(0))

    def gradients(maps):
        model.zero_grad()
        sum((one * up).sum() for one, up in zip(maps, upstream, strict=True)).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = model(**inputs, use_cache=False, output_attentions=True).attentions
    wanted = [plain[layer][0, :, positions][:, :, keys].mean(0) for layer in layers]
    of_eager = gradients(wanted)
    attach_noun_attention(model, layers)
    maps = model(**inputs, noun_queries=batch["noun_queries"], use_cache=False).attentions
    assert len(maps) == len(layers)
    for found, one in zip(maps, wanted, strict=True):
        torch.testing.assert_close(found, one, atol=2e-6, rtol=1e-4)
    found = gradients(maps)
    assert found.keys() == of_eager.keys() and len(found) > 10
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, of_eager[key], atol=2e-5, rtol=2e-3, msg=lambda m, key=key: f"{key}: {m}")
    detach_noun_attention(model)
    assert torch.equal(model(**inputs, use_cache=False).logits, tiny(name).build()(**inputs, use_cache=False).logits)


@torch.no_grad()
def positions_of(model, inputs):
    """The positions that enter the decoder, or None."""
    seen = []
    language_model = model.get_submodule(find_family(model.config).language_model)
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


@FAMILY
def test_positions_outlast_what_trainers_do_to_tensors(name, model):
    """Under DeepSpeed the trainer casts all tensors of floats, also those in lists: 1.278 s would become 1.281 s, and
    the last patch of Qwen2.5-Omni stand at 128 in place of 127."""
    sample, spacing = sample_of(name, frames=[*range(9), 23]), 2 * 23 / 9 / FPS
    inputs, seconds = model_inputs(Collator(tiny(name).processor)([sample])), get_layout(tiny(name).processor).seconds
    config = SimpleNamespace(dtype=lambda: torch.bfloat16)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=config))
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True,
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(state=state),
    )
    trainer._prepare_input = lambda data: Trainer._prepare_input(trainer, data)
    cast = trainer._prepare_input(send_to_device(inputs, "cpu"))
    floats = [key for key, value in cast.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert floats == [key for key in PIXELS if key in inputs]
    assert all(cast[key].dtype == torch.bfloat16 for key in floats)
    if seconds is not None:
        assert list(cast[seconds]) == pytest.approx([spacing])
        inputs[seconds] = torch.tensor([spacing], dtype=torch.float64)
    wanted, found = positions_of(model, inputs), positions_of(model.bfloat16(), cast)
    assert torch.equal(found, wanted) if wanted is not None else found is None


@FAMILY
def test_patches_of_the_tower_are_counted(name, model):
    kind = kinds_of(name)[-1]
    encoding, vision = encode(name, kind)[0], find_family(model.config).vision(model.config)
    (pixels,) = (v for k, v in model_inputs(batch_of(name, model, sample_of(name))).items() if k in PIXELS)
    cells = sum(math.prod(grid) for grid in encoding.grids)
    assert cells * (vision.patches_per_cell or vision.patches_per_token) * vision.patch_values == pixels.numel()


@FAMILY
def test_softmax_over_each_patch(name, model):
    """As the default loss asks for it: each map of a patch sums to one."""
    encoding, _ = encode(name, kinds_of(name)[-1])
    sets = [cells[cells >= 0] for cells in encoding.cells.flatten(1)]
    sets = [keys for keys in sets if len(keys)]
    token = encoding.noun_tokens(0)[0]
    rows = [Row(token, int(keys.min()), int(keys.max()) + 1, i) for i, keys in enumerate(sets)]
    batch = batch_of(name, model, Sample("", encoding.inputs, rows, sets, "set", cells=encoding.cells))
    attach_noun_attention(model)
    (*_, last) = model(**model_inputs(batch), noun_queries=batch["noun_queries"], use_cache=False).attentions
    torch.testing.assert_close(last.sum(1), torch.ones(len(sets)))


@FAMILY
def test_a_rank_with_text_alone_beside_one_with_video(name, model):
    """All trained parameters take part in the step of both, and their losses in one batch are those of each alone."""
    prepare_model(model, frozen=[], ranks=2)
    model.train()
    alone = [losses_of(model, batch_of(name, model, sample)) for sample in (sample_of(name), text_sample(name))]
    for found in alone:
        model.zero_grad()
        (found.loss + sum(one.sum() for one in found.attentions)).backward()
        without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
    both = batch_of(name, model, sample_of(name), text_sample(name))
    found = losses_of(model, both)
    counts = [len(batch_of(name, model, s)["label_positions"]) for s in (sample_of(name), text_sample(name))]
    mean = sum(one.loss * count for one, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(found.loss, mean, atol=1e-5, rtol=1e-4)
    for one, other in zip(found.attentions, alone[0].attentions, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


@FAMILY
def test_two_videos_in_a_batch_and_packed(name, model):
    samples = [sample_of(name), sample_of(name, height=140, width=90)]
    if not find_family(model.config).packable:
        with pytest.raises(ValueError, match="cannot be packed"):
            prepare_model(model, packed=True)
        return
    prepare_model(model, packed=True)
    alone = [losses_of(model, batch_of(name, model, sample)) for sample in samples]
    for pack in (False, True):
        found = losses_of(model, batch_of(name, model, *samples, pack=pack))
        rows = [one.attentions[-1] for one in alone]
        for row, wanted in zip(found.attentions[-1].split([len(r) for r in rows]), rows, strict=True):
            torch.testing.assert_close(row[:, : wanted.shape[1]], wanted, atol=2e-6, rtol=1e-4)


@FAMILY
def test_videos_of_different_numbers_of_frames_in_a_batch(name, model):
    if "video" not in kinds_of(name):
        pytest.skip("takes no video")
    samples = [sample_of(name), sample_of(name, frames=[0, 5])]
    if name in EQUAL_FRAMES:
        with pytest.raises(BatchError, match="pixel_values_videos of .* and .*, and this model takes only equal ones"):
            batch_of(name, model, *samples)
        return
    attach_noun_attention(model)
    alone = [losses_of(model, batch_of(name, model, sample)).attentions[-1] for sample in samples]
    found = losses_of(model, batch_of(name, model, *samples)).attentions[-1]
    for rows, wanted in zip(found.split([len(rows) for rows in alone]), alone, strict=True):
        torch.testing.assert_close(rows[:, : wanted.shape[1]], wanted, atol=2e-6, rtol=1e-4)


@FAMILY
def test_a_prepared_model_is_saved_as_a_stock_one_and_generates(name, model, tmp_path):
    inputs = model_inputs(batch_of(name, model, sample_of(name)))
    wanted = model(**inputs, use_cache=False).logits
    prompt = {key: value[:, :-3] if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    prompt = {key: value for key, value in prompt.items() if key != "position_ids"}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in prompt:
            prompt[key] = prompt[key][:, :-3]
    stock = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    prepare_model(model, position_ids="library")
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), stock)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(loaded) is type(model) and not get_attached_layers(loaded)
    torch.testing.assert_close(loaded(**inputs, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)
    restore_model(model)
    assert torch.equal(model(**inputs, use_cache=False).logits, wanted)


@FAMILY
def test_parts_are_frozen(name, model):
    parts = get_part_parameters(model)
    assert list(parts) == list(PARTS) and all(parts.values())
    everything = [id(p) for part in parts.values() for p in part]
    assert len(set(everything)) == len(everything)
    unused = find_family(model.config).unused(model)
    missed = [key for key, p in model.named_parameters() if id(p) not in set(everything) and not key.startswith(unused)]
    assert missed == []
    batch = batch_of(name, model, sample_of(name))
    for frozen in (["vision_tower", "merger"], ["language_model"], ["vision_tower"]):
        one = copy.deepcopy(model)
        freeze(one, frozen)
        attach_noun_attention(one)
        found = one(**model_inputs(batch), noun_queries=batch["noun_queries"], use_cache=False)
        (found.logits.sum() + sum(m.sum() for m in found.attentions)).backward()
        for part, parameters in get_part_parameters(one).items():
            assert any(p.grad is not None for p in parameters) == (part not in frozen), (frozen, part)


@pytest.mark.needs("peft")
@FAMILY
def test_adapters_lie_in_the_decoder_alone(name, model):
    pytest.importorskip("peft")
    names = {key for key, _ in model.named_parameters()}
    add_adapters(model, Lora(rank=2), [], 0)
    added = {key for key, p in model.named_parameters() if "lora_" in key}
    decoder = find_family(model.config).language_model
    assert added and all(decoder in key for key in added)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == added
    attach_noun_attention(model)
    batch = batch_of(name, model, sample_of(name))
    found = model(**model_inputs(batch), noun_queries=batch["noun_queries"], use_cache=False)
    (found.logits.float().logsumexp(-1).sum() + found.attentions[-1][:, 0].sum()).backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} <= added
    assert len(names) > len(added) / 2


@FAMILY
def test_noun_attention_under_activation_checkpointing(name, model):
    batch = batch_of(name, model, sample_of(name))
    attach_noun_attention(model)
    gradients = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
        maps = one(**model_inputs(batch), noun_queries=batch["noun_queries"], use_cache=False).attentions
        sum(m[:, :2].sum() for m in maps).backward()
        gradients.append({key: p.grad for key, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-3)


@FAMILY
def test_minimal_pass_reaches_all_of_tower_and_mergers(name, model):
    freeze(model, [])
    keep_visual_in_step(model)
    found = model(**model_inputs(batch_of(name, model, text_sample(name))), use_cache=False)
    found.logits.sum().backward()
    parts = get_part_parameters(model)
    trained = [p for part in ("vision_tower", "merger") for p in parts[part] if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
