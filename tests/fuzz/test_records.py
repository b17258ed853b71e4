"""Mutated records: each becomes a sample or a DataError in bounded time, and check, length and training agree on it."""

import itertools
import json
import random
import time

import pytest
from PIL import Image
from pycocotools import mask as coco

from swim_fast.data.batch.dataset import SwimDataset
from swim_fast.data.batch.lengths import sample_lengths
from swim_fast.data.check import check_file
from swim_fast.data.sample.builder import Sample
from swim_fast.data.source.errors import DataError
from swim_fast.jobs import Check
from swim_fast.options import Source
from tests.data.conftest import box, builder_of, clip, processor, rle, tokenizer  # noqa: F401 (fixtures)

H, W, FRAMES = 64, 96, 12
CASES = 300
PER_FILE = 100
SECONDS = 5.0  # of processor time for one record, so that a busy machine fails nothing; decoding has its own limit
LONGEST = 3_000_000  # bytes of a record
OPTIONS = {"max_frames": 4, "max_tokens": 400}


@pytest.fixture
def bases(tmp_path, clip):  # noqa: F811
    """Sound records of every shape."""
    Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes(clip(FRAMES).read_bytes())
    mask = box(H, W, 5, 30, 10, 60)
    code = coco.encode(mask.copy(order="F"))
    compressed = {"size": [H, W], "counts": code["counts"].decode()}
    polygons = [[10, 5, 60, 5, 60, 30, 10, 30], [70.5, 40, 80, 40.5, 75, 50]]
    asked = [{"from": "human", "value": "<video>\nWhat does the <ins>dog</ins> do?"}]
    turns = [*asked, {"from": "gpt", "value": "The <ins>dog</ins> runs."}]
    chat = [{"role": "user", "content": "A <ins>dog</ins>?"}, {"role": "assistant", "content": "Yes."}]
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "A <ins>dog</ins>?"}]
    two = [{"3": {"segmentation": compressed}, "5": None}, {"3": rle(mask), "8": {"segmentation": polygons}}]
    return [
        {"index": "a", "video": "a.mp4", "conversations": turns, "annotation": two},
        {"id": 3, "video": "a.mp4", "conversations": turns, "annotation": two, "height": H, "width": W},
        {"video": ["a.mp4"], "conversations": turns, "masks": [{"1": polygons}, {}], "height": H // 2, "width": W // 2},
        {
            "image": "a.png",
            "conversations": [{"from": "user", "value": "A <ins>dog</ins>?"}, turns[1]],
            "masks": [compressed, rle(mask)],
        },
        {
            "messages": chat,
            "videos": ["a.mp4"],
            "annotation": [{"0": {"segmentation": compressed, "bbox": [1, 2, 3, 4]}}],
        },
        {
            "messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": parts}, chat[1]],
            "annotation": [{"11": compressed}],
        },
        {"query": "<image>What?", "response": "That.", "history": [["a", "b"]], "system": "Hm.", "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}] * 3},
    ]


DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**9,
    -(2**63),
    10**30,
    10**3_000,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "a.png",
    "a.mp4",
    "missing.mp4",
    ".",
    "/dev/null",
    "\ud800",
    "\0",
    "\x1b[31m\x07",
    "ü🐶\u2028",
    "x" * 5_000,
    "a/" * 3_000,
    "04000",
    "<region>",
    "human",
    "assistant",
    "system",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"bbox": [1, 2, 3, 4]},
    {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": [H, W], "counts": [H * W]},
    [[0.1, 0.1, 0.9, 0.1, 0.5, 0.9]],
    [[0, 0, W, H] * 6_000],
    [[1, 1, 2, 1, 2, 2]] * 10_001,
    DEEP,
]
WORDS = [
    "<ins>",
    "</ins>",
    "<ins>cat</ins>",
    "<video>",
    "<image>",
    "<region>",
    "<object1><region>",
    "<|im_end|>",
    "\0",
    "\ud83d",
    "\x1b[2J",
    "🐶",
    " " * 20_000,
    "\n",
    "<ins> </ins>",
    "~",
    "\\",
]
KEYS = [
    "video",
    "image",
    "videos",
    "images",
    "conversations",
    "messages",
    "annotation",
    "masks",
    "segmentation",
    "segmentaton",
    "size",
    "counts",
    "from",
    "value",
    "role",
    "content",
    "height",
    "width",
    "bbox",
    "audio",
    "video_path",
    "0",
    "99",
    "-1",
    "³",
    "system",
    "loss",
    "\ud800",
    "\x1b",
]


def places(node):
    """Yield every container of a record with each of its keys."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def copied(value):
    """Return a copy in which no part is shared: a change of one place changes no other, and growth stays bounded."""
    return json.loads(json.dumps(value))


def mutate(entry, rng: random.Random) -> bytes:
    """Return the line of a record with a few things wrong."""
    entry = copied(entry)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = list(itertools.islice(places(entry), 400))
        if not found or len(repr(entry)) > LONGEST:  # a few changes more would fill the memory
            break
        node, key = rng.choice(found)
        value = node[key]
        kind = rng.randrange(9)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice([*KEYS, key[:-1], key + "s", key.upper()])] = node.pop(key)
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(KEYS)] = copied(rng.choice(found)[0])
        elif kind == 3 and isinstance(node, list):
            times = rng.choice((1, 2, 300 if len(repr(value)) < 1_000 else 1))
            node[key:key] = copied([value] * times)
        elif kind == 4 and isinstance(value, int | float):
            seventh = value / 7 if abs(value) <= 1e308 else 0.5
            node[key] = rng.choice((-value, value + 1, value - 1, value * 10**6, seventh, str(value)))
        elif kind in (4, 5) and isinstance(value, str):
            at = rng.randrange(len(value) + 1)
            node[key] = rng.choice(
                (value[:at], value[:at] + rng.choice(WORDS) + value[at:], (value * 50)[:LONGEST], value[::-1])
            )
        elif kind == 6:
            node[key] = rng.choice(([value], {"segmentation": value}, {"path": value}, [value, copied(value)]))
        else:
            node[key] = copied(rng.choice(VALUES))
    line = json.dumps(entry).encode()[:LONGEST]
    kind, at = rng.randrange(12), rng.randrange(len(line))
    if kind == 0:
        line = line[:at]
    elif kind == 1:
        line = line[:at] + bytes([rng.choice((0, 27, 34, 92, 123, 125, 128, 255))]) + line[at + 1 :]
    elif kind == 2:
        line = line.replace(b"{", b'{"video": "b.mp4", ', 1)
    return line if line.strip() else b"{}"


@pytest.fixture(scope="module")
def builder(processor):  # noqa: F811
    builder = builder_of(processor, **OPTIONS)
    yield builder
    builder.reader.close()


def test_a_mutation_depends_on_its_seed_alone(bases):
    before = json.dumps(VALUES)
    for seed in range(CASES):
        mutate(bases[seed % len(bases)], random.Random(seed))
    assert json.dumps(VALUES) == before


def test_copies_share_no_part():
    one, other = copied([[1]] * 2)
    one.append(2)
    assert other == [1]


def pytest_generate_tests(metafunc):
    if "seeds" not in metafunc.fixturenames:
        return
    cases = metafunc.config.getoption("--fuzz-cases", None) or CASES
    metafunc.parametrize("seeds", [range(at, min(at + PER_FILE, cases)) for at in range(0, cases, PER_FILE)], ids=str)


def test_mutated_records_are_samples_or_data_errors_and_all_judges_agree(
    seeds, bases, builder, processor, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))
    sound = json.dumps(bases[0]).encode()
    lines = [sound, *(mutate(bases[seed % len(bases)], random.Random(seed)) for seed in seeds), sound]
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\n".join(lines))
    dataset = SwimDataset([Source(path=str(path))], builder)
    assert len(dataset) == len(lines)
    trained, messages = [], []
    for index in range(len(lines)):
        begin = time.process_time()
        item = dataset[index]
        seconds = time.process_time() - begin
        assert seconds < SECONDS, f"seed {seeds.start + index - 1}: {seconds:.1f} s: {item}"
        assert isinstance(item, Sample | DataError)
        trained.append(isinstance(item, Sample))
        messages.append(item.name if trained[-1] else str(item))
        assert messages[-1].isprintable() and len(messages[-1]) < 1500, f"seed {seeds.start + index - 1}"
    report = check_file(Check(file=str(path), workers=0, **OPTIONS), processor, progress=False)
    assert str(report).encode() and json.dumps(report.as_dict())
    problems = {problem.record: str(problem) for problem in report.problems}
    measured = (sample_lengths(dataset, workers=0) > 0).tolist()
    for index, used in enumerate(trained):
        about = f"seed {seeds.start + index - 1}: {messages[index]} | {problems.get(index)} | {lines[index][:2000]}"
        assert used == (index not in problems) == measured[index], about
    assert trained[0] and trained[-1] and (len(seeds) < 50 or 0 < sum(trained[1:-1]) < len(seeds))
