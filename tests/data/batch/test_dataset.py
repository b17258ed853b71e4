import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from swim_fast.data.batch.collation import Collator
from swim_fast.data.batch.dataset import MixtureSampler, SwimDataset
from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.errors import DataError, RecordsChangedError
from swim_fast.errors import OptionError, ProcessorError
from swim_fast.options import Sampling, Source
from tests.data.conftest import box, rle

H, W = 64, 96


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def text_entry(number):
    turns = [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": f"text {number}", "conversations": turns}


@pytest.fixture
def texts(tmp_path):
    """texts(count): path of a file of that many records without video."""
    return lambda count, name="text": write(tmp_path / f"{name}{count}.jsonl", map(text_entry, range(count)))


def identity(record):
    return record


def test_items_run_through_all_sources(texts):
    sources = [Source(path=texts(3)), Source(path=texts(5), limit=2, name="few"), Source(path=texts(4), limit=9)]
    dataset = SwimDataset(sources, identity)
    assert len(dataset) == 9
    assert dataset.lengths == [3, 2, 4]
    assert dataset.names == ["text3.jsonl", "few", "text4.jsonl"]
    assert [dataset.locate(i) for i in range(9)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)] + [
        (2, i) for i in range(4)
    ]
    assert [dataset[i].name for i in range(9)] == [f"text {i}" for i in (0, 1, 2, 0, 1, 0, 1, 2, 3)]
    for index in (-1, 9):
        with pytest.raises(IndexError, match=f"item {index} of a dataset of 9"):
            dataset[index]


def test_media_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**text_entry(0), "video": "clip.mp4"}])
    assert SwimDataset([Source(path=path)], identity)[0].media == tmp_path / "clip.mp4"
    assert SwimDataset([Source(path=path, media="/media")], identity)[0].media.as_posix() == "/media/clip.mp4"


def test_every_source_has_its_own_excerpt_and_pixels(tmp_path, clip, processor):
    """The same file three times: as it is, as text of one exchange, and with smaller frames."""
    turns = [{"from": "human", "value": "<video>\nA <ins>dog</ins>?"}, {"from": "gpt", "value": "Yes."}]
    turns += [{"from": "human", "value": "And the <ins>dog</ins>?"}, {"from": "gpt", "value": "Too."}]
    mask = rle(box(H, W, 0, 20, 0, 30))
    entry = {"video": str(clip(6)), "conversations": turns, "annotation": [{"2": mask}, {"3": mask}]}
    path = write(tmp_path / "a.jsonl", [entry])
    sources = [
        Source(path=path),
        Source(path=path, use_tags=False, turns=1),
        Source(path=path, max_pixels=28 * 28, min_pixels=28 * 28),
    ]
    dataset = SwimDataset(sources, SampleBuilder(processor, Sampling(max_frames=4)))
    whole, text, small = (dataset[i] for i in range(3))
    assert [len(sample.masks) for sample in (whole, text, small)] == [2, 0, 2] and text.rows == []
    assert [sample.inputs["video_grid_thw"].tolist() for sample in (whole, text, small)] == [
        [[2, 4, 6]],
        [[2, 4, 6]],
        [[2, 2, 2]],
    ]
    decode = processor.tokenizer.decode
    assert decode(text.inputs["input_ids"]).endswith("A dog?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n")
    first, _, third = dataset.builders
    assert first is dataset.builder and third.reader is first.reader and third.sampling.max_frames == 4
    assert first.sampling.max_pixels is None
    dataset.builder.reader.close()


def test_pixels_of_a_source_that_contradict_the_others(texts, processor):
    builder = SampleBuilder(processor, Sampling(max_pixels=2000))
    with pytest.raises(OptionError, match="text1.jsonl: min_pixels 3000 is above max_pixels 2000"):
        SwimDataset([Source(path=texts(1), min_pixels=3000)], builder)
    with pytest.raises(
        ProcessorError, match="text1.jsonl: min_pixels .* is above max_pixels 700, one of which is Qwen"
    ):
        SwimDataset([Source(path=texts(1), max_pixels=700)], builder)


def test_bad_data_comes_back_as_an_error(tmp_path, texts):
    def refuse(record):
        raise DataError("no", key="video")

    path = write(tmp_path / "a.jsonl", [text_entry(0), {"id": "x", "conversations": []}])
    bad_record = SwimDataset([Source(path=path)], identity)[1]
    assert isinstance(bad_record, DataError)
    assert str(bad_record).startswith(f"{path}, record 1 (x), conversations: is missing or empty")
    assert str(SwimDataset([Source(path=path)], refuse)[0]) == f"{path}, record 0, video: no"


def test_bugs_still_raise(texts):
    def bug(record):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        SwimDataset([Source(path=texts(1))], bug)[0]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match="weight is .*; (it must be positive|expected a finite number)"):
        Source(path="a.json", weight=weight)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="limit is 0; it must be positive"):
        Source(path="a.json", limit=0)
    with pytest.raises(ValueError, match="no data: name at least one file"):
        SwimDataset([], identity)
    with pytest.raises(DataError, match="missing.json"):
        SwimDataset([Source(path=str(tmp_path / "missing.json"))], identity)


@pytest.fixture
def mixture(texts):
    weights = {10: 0.5, 7: 1.0, 4: 2.5, 1: 0.2}
    return SwimDataset([Source(path=texts(count), weight=weight) for count, weight in weights.items()], identity)


def test_mixture_weights(mixture):
    sampler = MixtureSampler(mixture, seed=0)
    items = list(sampler)
    assert len(items) == len(sampler) == 5 + 7 + 10 + 1
    counts = [Counter(mixture.locate(item)[1] for item in items if mixture.locate(item)[0] == s) for s in range(4)]
    assert [sum(count.values()) for count in counts] == [5, 7, 10, 1]
    assert set(counts[0].values()) == {1}  # half of the file, nothing twice
    assert counts[1] == dict.fromkeys(range(7), 1)
    assert sorted(counts[2].values()) == [2, 2, 3, 3]
    assert items != sorted(items)
    assert len({mixture.locate(item)[0] for item in items[:8]}) > 1  # shuffled together


def test_mixture_is_determined_by_seed_and_epoch(mixture):
    sampler = MixtureSampler(mixture, seed=1)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert list(sampler) == orders[-1]
    halves = [{item for item in order if item < 10} for order in orders]
    assert len(set(map(tuple, orders))) == 4
    assert len(set(map(frozenset, halves))) > 1  # another half each epoch
    assert {len(order) for order in orders} == {len(sampler)}

    torch.manual_seed(7)  # whatever else is drawn
    again = MixtureSampler(mixture, seed=1)
    again.set_epoch(2)
    assert list(again) == orders[2]
    other = MixtureSampler(mixture, seed=2)
    assert all(list(other) != order for order in orders)


def test_mixture_leaves_the_global_random_state_alone(mixture):
    state = torch.get_rng_state()
    list(MixtureSampler(mixture, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def clips_one_broken_in_ten(tmp_path, clip):
    """20 annotated video records, every tenth of a clip that is no video."""
    (tmp_path / "broken.mp4").write_bytes(clip(6).read_bytes()[:300])
    mask = rle(box(H, W, 0, 20, 0, 30))
    entries = []
    for number in range(20):
        turns = [{"from": "human", "value": "<video>\nA <ins>dog</ins>?"}, {"from": "gpt", "value": "Yes."}]
        media = tmp_path / "broken.mp4" if number % 10 == 3 else clip(6)
        entries.append({"id": f"v{number}", "video": str(media), "conversations": turns, "annotation": [{"2": mask}]})
    return write(tmp_path / "videos.jsonl", entries)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_broken_clips_in_worker_processes(clips_one_broken_in_ten, processor, context):
    dataset = SwimDataset([Source(path=clips_one_broken_in_ten)], SampleBuilder(processor, Sampling(max_frames=4)))
    assert isinstance(dataset[0], Sample)  # the parent's decoder is running when the workers start
    loader = DataLoader(
        dataset, batch_size=4, num_workers=2, collate_fn=Collator(processor), multiprocessing_context=context
    )
    batches = list(loader)
    assert [len(batch["samples"]) for batch in batches] == [3, 4, 4, 3, 4]
    assert [len(batch["noun_queries"]) for batch in batches] == [3, 4, 4, 3, 4]
    problems = [problem for batch in batches for problem in batch["problems"]]
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{clips_one_broken_in_ten}, record {number} (v{number}), video" for number in (3, 13)
    ]
    names = [name for batch in batches for name in batch["samples"]]
    assert names == [f"{clips_one_broken_in_ten}:{n} (v{n})" for n in range(20) if n % 10 != 3]
    alone = Collator(processor)([dataset[8], dataset[9], dataset[10], dataset[11]])
    for key in ("input_ids", "labels", "pixel_values_videos"):
        assert torch.equal(alone[key], batches[2][key])
    dataset.builder.reader.close()


@pytest.mark.parametrize("change", ["written", "removed"])
def test_a_records_file_that_changes_ends_the_run_with_one_line(tmp_path, processor, change):
    """As a bad record, it would cost the run every record that is left."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    path = Path(write(tmp_path / "text.jsonl", [{"conversations": turns}] * 60))
    dataset = SwimDataset([Source(path=str(path))], SampleBuilder(processor))
    batches = iter(DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=Collator(processor)))
    next(batches)
    path.write_text(path.read_text() + "\n") if change == "written" else path.unlink()
    with pytest.raises(RecordsChangedError) as caught:
        list(batches)
    reason = "the file was changed while it was in use" if change == "written" else "cannot be read any longer: No such"
    assert str(caught.value).startswith(f"{path}: {reason}") and str(caught.value).endswith("; start again")
    assert "\n" not in str(caught.value)
