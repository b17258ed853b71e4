"""Lengths of samples, found without decoding: those of the samples that are built, kept, and measured when needed."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from swim_fast.data.batch import lengths
from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.batch.lengths import sample_lengths
from swim_fast.data.sample.builder import Sample, SampleBuilder
from swim_fast.data.source.cache import cache_folder
from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import FrameReader
from swim_fast.options import Source
from tests.data.conftest import builder_of

SIZES = [(64, 96), (75, 101), (180, 120), (30, 300)]  # height, width
COUNTS = [1, 2, 5, 12, 61]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))


def turns(question, answer="Yes."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def entries(clip, tmp_path):
    """Clips of odd sizes and numbers of frames, images, text, tags and annotations."""
    found = []
    for number, count in enumerate(COUNTS):
        height, width = SIZES[number % len(SIZES)]
        media = str(clip(count, (1, 4, 30)[number % 3], height, width))
        annotation = [{str(count - 1): None, "0": {"size": [height, width], "counts": [height * width]}}]
        found.append({"video": media, "conversations": turns("<video>\nWhat is it?", "It is " * number + "a dog.")})
        found.append(
            {"video": media, "conversations": turns("The <ins>dog</ins> 🐶 in <video>"), "annotation": annotation}
        )
    for number, (height, width) in enumerate([*SIZES, (3000, 40)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
        found.append({"image": str(tmp_path / f"{number}.png"), "conversations": turns("<image>What?")})
    found.append({"conversations": turns("Löwenbändiger, two\n\nlines") * 2})
    return found


@pytest.fixture
def dataset(processor, tmp_path):
    """dataset(entries, source=…, **options) of entries written to a file."""
    made = []

    def make(entries, source=None, processor=processor, **options):
        path = tmp_path / "records.jsonl"
        text = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        builder = builder_of(processor, **options)
        made.append(SwimDataset([Source(path=str(path), **(source or {}))], builder))
        return made[-1]

    yield make
    for each in made:
        each.builder.reader.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_frames": 7},
        {"max_frames": 40, "max_tokens": 75},
        {"max_tokens": 52},
        {"max_pixels": 5000},
        {"min_pixels": 20000},
        {"min_pixels": 3000, "max_pixels": 9000, "reader": "pyav", "softmax": "full"},
        {"fps": 1.5},
        {"fps": 8, "total_pixels": 40_000},
        {"total_pixels": 28 * 28 * 60, "max_tokens": 70},
    ],
    ids=str,
)
def test_length_is_that_of_the_sample(dataset, entries, options, monkeypatch):
    data = dataset(entries, **options)
    items = [data[number] for number in range(len(data))]
    expected = [len(item.inputs["input_ids"]) if isinstance(item, Sample) else 0 for item in items]
    if "max_tokens" in options:
        assert any(item.notes for item in items if isinstance(item, Sample))
        assert expected.count(0) > 0
    else:
        assert all(expected)
    assert len(set(expected)) > 5

    def decode(*_):
        raise AssertionError("frames were asked for")

    monkeypatch.setattr(FrameReader, "frames", decode)
    found = sample_lengths(data)
    assert found.dtype == np.int64 and found.tolist() == expected


def test_total_pixels_of_the_processor(dataset, entries, processor):
    """A processor that bounds the pixels of all frames together; its own count of patches does not."""
    other = pickle.loads(pickle.dumps(processor))
    other.video_processor.cap_pixels_per_frame = True
    other.video_processor.max_video_tokens = 20
    data = dataset(entries, processor=other, min_pixels=28 * 28, max_pixels=28 * 28 * 20)
    found = sample_lengths(data)
    assert found.tolist() == [len(data[number].inputs["input_ids"]) for number in range(len(data))]
    plain = sample_lengths(dataset(entries, min_pixels=28 * 28, max_pixels=28 * 28 * 20))
    assert (found < plain).any()


def test_bad_records_have_length_0_and_are_counted(dataset, entries, caplog, tmp_path):
    bad = [
        {"video": "missing.mp4", "conversations": turns("What?")},
        "{no json",
        {"conversations": []},
        {**entries[1], "annotation": [{"999": None}]},
        {"conversations": turns("a <|im_end|>")},
    ]
    data = dataset([entries[0], *bad, entries[-1]])
    found = sample_lengths(data)
    assert (found == 0).tolist() == [isinstance(data[number], DataError) for number in range(len(data))]
    assert (found == 0).sum() == len(bad)
    assert "5 of 7 records cannot be used" in caplog.text and "swim-fast data check" in caplog.text


@pytest.fixture
def measured(monkeypatch):
    """The records that were measured."""
    seen, measure = [], SampleBuilder.length

    def length(self, record):
        seen.append(record.number)
        return measure(self, record)

    monkeypatch.setattr(SampleBuilder, "length", length)
    return lambda: [seen.pop(0) for _ in range(len(seen))]


def test_lengths_are_kept(dataset, entries, measured, clip, tmp_path):
    broken = tmp_path / "late.mp4"
    entries = [*entries[:5], {"video": str(broken), "conversations": turns("What?")}]
    first = sample_lengths(dataset(entries))
    assert measured() == list(range(6)) and first[5] == 0
    assert sample_lengths(dataset(entries, query_position="predictor")).tolist() == first.tolist()
    assert measured() == [5]  # whatever was wrong with it may be mended
    broken.write_bytes(clip(5).read_bytes())
    mended = sample_lengths(dataset(entries))
    assert measured() == [5] and mended[5] > 0 and mended[:5].tolist() == first[:5].tolist()

    assert sample_lengths(dataset(entries, max_frames=2)).tolist() != mended.tolist()
    assert measured() == list(range(6))
    sample_lengths(dataset(entries, source={"media": str(tmp_path / "elsewhere")}))
    assert measured() == list(range(6))
    assert sample_lengths(dataset(entries)).tolist() == mended.tolist() and measured() == []
    assert len(list(cache_folder("lengths").iterdir())) == 3

    path = tmp_path / "records.jsonl"
    os.utime(path, ns=(0, 0))
    assert sample_lengths(dataset(entries)).tolist() == mended.tolist()
    assert measured() == list(range(6))
    (kept,) = cache_folder("lengths").iterdir()  # those of the file as it was are gone
    kept.write_bytes(kept.read_bytes()[:50])
    assert sample_lengths(dataset(entries)).tolist() == mended.tolist()


def test_options_of_a_source_have_lengths_of_their_own(dataset, entries, measured):
    """Those of one file are not taken for those of another choice of its records, turns or pixels."""
    whole = sample_lengths(dataset(entries))
    assert measured() == list(range(len(entries)))
    for source in ({"use_tags": False}, {"turns": 1}, {"max_pixels": 5000}, {"max_pixels": 5000, "turns": 1}):
        data = dataset(entries, source=source)
        found = sample_lengths(data)
        assert measured() == list(range(len(entries)))
        assert found.tolist() == [len(data[number].inputs["input_ids"]) for number in range(len(data))]
        assert (found == whole).all() == (source == {"use_tags": False})
        assert sample_lengths(dataset(entries, source=source)).tolist() == found.tolist() and measured() == []
    assert sample_lengths(dataset(entries, max_pixels=5000)).tolist() != whole.tolist()
    assert measured() == []  # as if all files had those limits


def test_two_choices_of_one_file_in_a_mixture(dataset, entries, processor, tmp_path):
    path = dataset(entries).sources[0].path
    sources = [Source(path=path), Source(path=path, turns=1), Source(path=path, max_pixels=5000, limit=3)]
    data = SwimDataset(sources, SampleBuilder(processor))
    assert sample_lengths(data).tolist() == [len(data[number].inputs["input_ids"]) for number in range(len(data))]
    data.builder.reader.close()


def test_a_part_of_the_samples(dataset, entries, measured):
    """Evenly spread ones, of which the whole makes use; so do sources that take a part of the file."""
    data = dataset(entries)
    part = sample_lengths(data, limit=4)
    assert measured() == [0, 5, 10, 15]
    whole = sample_lengths(data)
    assert len(measured()) == len(entries) - 4
    assert part.tolist() == whole[[0, 5, 10, 15]].tolist()
    assert sample_lengths(dataset(entries, source={"limit": 3}), limit=9).tolist() == whole[:3].tolist()
    assert measured() == []


def test_lengths_that_cannot_be_kept(dataset, entries, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "file"))
    assert (sample_lengths(dataset(entries[-1:])) > 0).all()
    assert "are not kept" in caplog.text and "set SWIM_FAST_CACHE to a writable folder" in caplog.text


def test_worker_processes(dataset, entries, monkeypatch):
    """In the order of the records, and saved on the way."""
    expected = sample_lengths(dataset(entries)).tolist()
    monkeypatch.setattr(lengths, "CHUNK", 3)
    monkeypatch.setattr(lengths, "SAVE_SECONDS", 0.0)
    saved = []
    monkeypatch.setattr(lengths, "save_arrays", lambda path, **arrays: saved.append((arrays["lengths"] >= 0).sum()))
    monkeypatch.setenv("SWIM_FAST_CACHE", os.environ["SWIM_FAST_CACHE"] + "2")
    data = dataset(entries)
    assert sample_lengths(data, workers=2).tolist() == expected
    assert saved == [3, 6, 9, 12, 15, 16, 16]


def test_one_rank_measures_for_all(dataset, entries, monkeypatch):
    """The others wait, and are told every minute that there is more to wait for."""
    expected = sample_lengths(dataset(entries)).tolist()
    monkeypatch.setenv("SWIM_FAST_CACHE", os.environ["SWIM_FAST_CACHE"] + "2")
    monkeypatch.setattr(lengths, "CHUNK", 5)
    monkeypatch.setattr(lengths, "SAVE_SECONDS", 0.0)
    sent, rank = [], 0

    def broadcast(objects):
        if rank == 0:
            sent.append(list(objects))
        else:
            objects[:] = sent.pop(0)

    distributed = lengths.torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    assert sample_lengths(dataset(entries), workers=0).tolist() == expected
    assert len(sent) == 5 and sent[:4] == [[None]] * 4
    rank = 1
    monkeypatch.setattr(lengths, "_lengths", None)  # whoever measured here would fail
    assert sample_lengths(dataset(entries)).tolist() == expected and not sent


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: {**kept, "lengths": np.where(np.arange(len(kept["lengths"])) == 1, -7, kept["lengths"])},
        lambda kept: {**kept, "lengths": kept["lengths"] + (1 << 40)},
        lambda kept: {**kept, "lengths": np.full(len(kept["lengths"]), np.nan)},
        lambda kept: {**kept, "lengths": kept["lengths"][:-1]},
        lambda kept: {**kept, "clips": kept["clips"] + 1000},
        lambda kept: {**kept, "stamps": kept["stamps"][:0]},
        lambda kept: {"lengths": kept["lengths"]},
        lambda kept: {**kept, "paths": kept["paths"][:-3]},
    ],
)
def test_kept_lengths_that_cannot_be_true_are_measured_anew(dataset, entries, spoil, measured):
    expected = sample_lengths(dataset(entries)).tolist()
    (path,) = cache_folder("lengths").iterdir()
    np.savez(path, **spoil(dict(np.load(path))))
    measured()
    assert sample_lengths(dataset(entries)).tolist() == expected and measured()
    assert sample_lengths(dataset(entries)).tolist() == expected and not measured()


def test_one_flipped_bit_is_noticed(dataset, entries, measured):
    expected = sample_lengths(dataset(entries)).tolist()
    (path,) = cache_folder("lengths").iterdir()
    data = bytearray(path.read_bytes())
    data[data.index(np.array(expected[:3]).tobytes())] ^= 1
    path.write_bytes(data)
    measured()
    assert sample_lengths(dataset(entries)).tolist() == expected and len(measured()) == len(entries)


def test_a_clip_that_is_replaced_under_its_name_is_measured_anew(dataset, clip, tmp_path, measured):
    for name, count in (("a", 2), ("b", 12)):
        (tmp_path / f"{name}.mp4").write_bytes(clip(count).read_bytes())
    entries = [{"video": f"{name}.mp4", "conversations": turns("What?")} for name in "aba"]
    before = sample_lengths(dataset(entries))
    measured()
    (tmp_path / "a.mp4").write_bytes(clip(12).read_bytes())
    after = sample_lengths(dataset(entries))
    assert measured() == [0, 2] and after.tolist() == [before[1]] * 3
    assert sample_lengths(dataset(entries)).tolist() == after.tolist() and measured() == []
