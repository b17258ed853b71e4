"""Samples packed into one sequence: each is to the model what it is alone."""

import copy
import pickle

import pytest
import torch
from PIL import Image

from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.positions import PositionIds
from swim_fast.data.source.errors import DataError
from swim_fast.modeling.packed import accept_packed_batches
from swim_fast.modeling.positions import set_position_rule
from tests.data.batch.test_collation import inputs_of
from tests.data.conftest import box, builder_of, rle

H, W = 64, 96


@pytest.fixture(scope="module")
def builders(processor):
    made = {softmax: builder_of(processor, max_frames=8, softmax=softmax) for softmax in ("causal", "full")}
    yield made
    for builder in made.values():
        builder.reader.close()


@pytest.fixture
def records(make_record, clip, tmp_path):
    """Dense and sparse video of 1, 2, 4 and half a frame per second, text, image; with masks and without."""
    Image.new("RGB", (120, 60), (200, 30, 30)).save(tmp_path / "a.png")
    first, second = rle(box(H, W, 0, 20, 0, 30)), rle(box(H, W, 30, 60, 50, 90))
    image_mask = rle(box(60, 120, 10, 50, 10, 50))
    objects = ({3: first, 2: second},)
    videos = [
        make_record(f"{'What? ' * n}A <ins>dog</ins>?", "Yes.", kind="video", media=clip(count, fps), objects=objects)
        for n, (count, fps) in enumerate([(6, 1), (61, 1), (6, 2), (61, 2), (6, 4), (61, 4), (4, 0.5)])
    ]
    return [
        make_record("Which of the two cups moves first?", "The blue cup moves first, then the white cup."),
        *videos[:4],
        make_record("A <ins>cup</ins>?", "No.", kind="image", media=tmp_path / "a.png", objects=({0: image_mask},)),
        make_record("What?", "This.", kind="video", media=clip(5, 1)),
        make_record("What?", "This."),
        *videos[4:],
    ]


@pytest.fixture
def samples(builders, records):
    return [builders["causal"](record) for record in records]


@pytest.fixture(params=["pretraining", "library"])
def rule(request):
    return request.param


@pytest.fixture
def pack(processor, model, rule):
    """A collator that packs, as it comes out of a worker process."""
    return pickle.loads(pickle.dumps(Collator(processor, PositionIds(model.config, rule), pack=True)))


@pytest.fixture
def packable(model, rule):
    model = copy.deepcopy(model)
    accept_packed_batches(model)
    return set_position_rule(model, rule)


def bounds(batch):
    ends = batch["cu_seq_lens_q"].tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def test_tokens_lie_one_behind_the_other(samples, pack, processor):
    error = DataError("is broken", source="file.jsonl", record=7)
    batch = pack([*samples[:2], error, *samples[2:]])
    lengths = [len(sample.inputs["input_ids"]) for sample in samples]
    assert [end - start for start, end in bounds(batch)] == lengths and len(set(lengths)) > 5
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and "attention_mask" not in batch
    for sample, (start, end) in zip(samples, bounds(batch), strict=True):
        for key in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(batch[key][0, start:end], sample.inputs[key])
        assert batch["labels"][0, start] == -100
        assert torch.equal(batch["labels"][0, start + 1 : end], sample.inputs["labels"][1:])
    padded = Collator(processor)([*samples[:2], error, *samples[2:]])
    for key in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw"):
        assert torch.equal(batch[key], padded[key])
    assert list(batch["second_per_grid_ts"]) == list(padded["second_per_grid_ts"])
    for key in ("samples", "problems", "notes"):
        assert batch[key] == padded[key]


def test_no_sample_predicts_the_next_ones_first_token(samples, pack):
    for sample in samples:
        sample.inputs["labels"] = sample.inputs["input_ids"].clone()
    labels = pack(samples)["labels"][0]
    assert (labels == -100).sum() == len(samples)
    assert all(sample.inputs["labels"][0] != -100 for sample in samples)  # those of the samples are theirs


def test_positions_are_those_the_model_finds_by_itself(samples, pack, processor, packable):
    """By value, of each sample alone and of the padded batch; what the language model is handed is the truth."""
    seen = []
    packable.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    batch, alone = pack(samples), Collator(processor)
    with torch.no_grad():
        packable(**inputs_of(batch))
        packable(**inputs_of(alone(samples)))
        for sample in samples:
            packable(**inputs_of(alone([sample])))
    packed, padded, *singles = seen
    assert packed.shape == (4, 1, batch["input_ids"].shape[1])
    intervals = set()
    for number, (start, end) in enumerate(bounds(batch)):
        text, own = packed[0, 0, start:end], packed[1:, 0, start:end]
        assert torch.equal(text, torch.arange(end - start))
        expected = singles[number]  # None: the model counts the tokens
        assert torch.equal(own, text.expand(3, -1) if expected is None else expected[:, 0])
        assert torch.equal(own, padded[:, number, : end - start])
        time = own[0][samples[number].inputs["mm_token_type_ids"] == 2]
        intervals |= set(time.diff().tolist())
    assert intervals >= {0, 2, 4, 8}  # under a second, one, two, four


def test_the_rule_matters_for_long_clips(samples, processor, model):
    """By value: the first text behind each video, past its last moment or past its grid."""
    found = {rule: PositionIds(model.config, rule) for rule in ("pretraining", "library")}
    for sample in samples:
        ours, library = (positions(sample.inputs)[1] for positions in found.values())
        visual = sample.inputs["mm_token_type_ids"].nonzero().flatten()
        if len(visual) == 0:
            assert torch.equal(ours, library)
            continue
        behind = visual[-1] + 1
        grid = sample.inputs["video_grid_thw" if 2 in sample.inputs["mm_token_type_ids"] else "image_grid_thw"][0]
        assert library[behind] - library[visual[0]] == max(grid[1:]) // 2
        assert ours[behind] - ours[visual[0]] == max(max(grid[1:]) // 2, ours[visual[-1]] - ours[visual[0]] + 1)


@pytest.mark.parametrize("softmax", ["causal", "full"])
def test_queries_move_with_their_sample(builders, records, pack, processor, softmax):
    samples = [builders[softmax](record) for record in records]
    batch, padded = pack(samples), Collator(processor)(samples)
    queries, expected = batch["noun_queries"], padded["noun_queries"]
    assert queries.ranges == ("causal" if softmax == "causal" else "any") and len(queries) == 8
    queries.check(*batch["input_ids"].shape)
    assert not queries.sequence.any()
    start = batch["cu_seq_lens_q"].long()[:-1][expected.sequence]
    for name in ("position", "key_start", "key_end"):
        assert torch.equal(getattr(queries, name), getattr(expected, name) + start)
    assert torch.equal(queries.key_set, expected.key_set)
    (place,) = torch.nonzero(expected.key_sets >= 0, as_tuple=True)[:1]
    sets = expected.key_sets.clone()
    sets[sets >= 0] += start[place]
    assert torch.equal(queries.key_sets, sets)
    decode = processor.tokenizer.decode
    assert {decode(batch["input_ids"][0, position]) for position in queries.position} == {" dog", " cup"}
    for name in ("row", "start", "height", "width", "mask"):
        assert torch.equal(getattr(batch["mask_targets"], name), getattr(padded["mask_targets"], name))
    masks = zip(batch["mask_targets"].masks, padded["mask_targets"].masks, strict=True)
    assert all(torch.equal(one, other) for one, other in masks)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_answers_as_to_each_sample_alone(samples, pack, processor, packable, attention):
    packable.set_attn_implementation(attention)
    batch = pack(samples)
    with torch.no_grad():
        logits = packable(**inputs_of(batch)).logits[0]
        for sample, (start, end) in zip(samples, bounds(batch), strict=True):
            alone = packable(**inputs_of(Collator(processor)([sample]))).logits[0]
            torch.testing.assert_close(logits[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [[], [DataError("is broken", source="a.jsonl", record=1)]])
def test_placeholder_batch(pack, packable, items):
    batch = pack(items)
    assert batch["input_ids"].shape == (1, 1) and (batch["labels"] == -100).all()
    assert batch["cu_seq_lens_q"].tolist() == [0, 1] and batch["max_length_q"] == 1
    assert len(batch["noun_queries"]) == len(batch["mask_targets"]) == 0
    assert batch["samples"] == batch["notes"] == []
    assert batch["problems"] == [str(item) for item in items]
    batch["noun_queries"].check(*batch["input_ids"].shape)
    logits = packable(**inputs_of(batch)).logits
    logits.sum().backward()
    assert logits.shape[:2] == batch["input_ids"].shape


def test_models_that_only_count_their_tokens():
    from transformers import LlamaConfig

    inputs = {"input_ids": torch.zeros(3).long(), "mm_token_type_ids": torch.zeros(3).long()}
    assert PositionIds(LlamaConfig())(inputs).tolist() == [[0, 1, 2]]
