"""Damaged clips: each gives frames or a DataError, and neither processes nor descriptors are left behind."""

import os
import random
from pathlib import Path

import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import FrameReader
from swim_fast.errors import MissingLibraryError
from swim_fast.options import Decoding
from tests.data.video.test_reader import ffmpeg_for_torchcodec  # noqa: F401 (fixture)
from tests.helpers.clips import numbered_frames, write_clip

CASES = 200
CODECS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx-vp9"}


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut a clip short, flip some of its bytes or of its header, or cut a part out."""
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[: rng.randrange(64)] + data[rng.randrange(64, 512) :]
    if kind == 2:
        return data[:at] + data[at + rng.randrange(1, 2000) :]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 5, 50))):
        flipped[rng.randrange(rng.choice((200, len(data))))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def held() -> tuple[int, list[str]]:
    """Return the number of open descriptors and the child processes of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), children


@pytest.mark.parametrize("name", ["decord", "torchcodec", "pyav"])
def test_damaged_clips_give_frames_or_data_errors(name, ffmpeg_for_torchcodec, request, tmp_path):  # noqa: F811
    frames = numbered_frames(20)
    clips = {s: write_clip(tmp_path / f"whole.{s}", frames, codec=c).read_bytes() for s, c in CODECS.items()}
    before, refused = held(), 0
    cases = request.config.getoption("--fuzz-cases") or CASES
    with FrameReader(Decoding(reader=name, decode_timeout=20.0)) as reader:
        try:
            reader.info(tmp_path / "whole.mp4")
        except MissingLibraryError as error:
            if name != "torchcodec":
                raise
            pytest.skip(f"torchcodec is not tested: {error}")
        for seed in range(cases):
            rng = random.Random(seed)
            suffix = rng.choice(list(clips))
            path = tmp_path / f"damaged.{suffix}"
            path.write_bytes(damage(clips[suffix], rng))
            try:
                info = reader.info(path)
                indices = sorted({0, info.num_frames // 2, info.num_frames - 1})
                found = reader.frames(path, indices)
                assert found.shape == (len(indices), info.height, info.width, 3), f"seed {seed}"
            except DataError as error:
                refused += 1
                assert "\n" not in str(error) and str(path) in str(error), f"seed {seed}"
    assert held() == before
    assert 0 < refused < cases
