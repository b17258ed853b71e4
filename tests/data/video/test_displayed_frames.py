"""Which frame is frame i: the i-th that a full decoding by FFmpeg displays, with every reader, or a refusal."""

import struct

import av
import numpy as np
import pytest
from PIL import Image

from swim_fast.data.source.errors import DataError
from tests.data.video.test_reader import ffmpeg_for_torchcodec, reader  # noqa: F401 (fixtures)
from tests.helpers.clips import numbered_frames, read_number, write_clip


def _avi(codec, b_frames):
    options = {"g": "10", "bf": str(b_frames), "b:v": "2M"}
    return lambda path: write_clip(path, numbered_frames(40), codec=codec, options=options)


def edited(path, start=0, seconds=None, edits=1):
    """A clip whose edit list begins `start` frames later and lasts `seconds`; twice that with two edits."""
    data = bytearray(write_clip(path, numbered_frames(50), options={"bf": "2", "g": "12"}).read_bytes())
    scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    at = data.index(b"elst")
    duration, begin = struct.unpack_from(">Ii", data, at + 12)
    entry = struct.pack(
        ">Iii", duration if seconds is None else int(seconds * 1000), begin + start * scale // 10, 65536
    )
    data[at + 12 : at + 24] = entry
    if edits == 2:
        data[at + 8 : at + 12] = struct.pack(">I", 2)
        data[at + 24 : at + 24] = entry
        for box in (b"elst", b"edts", b"trak", b"moov"):
            place = data.rindex(box, 0, at + 4) - 4
            data[place : place + 4] = struct.pack(">I", struct.unpack_from(">I", data, place)[0] + 12)
    path.write_bytes(data)
    return path


def _open_gop_cut(path, codec="libx264"):
    """A clip that starts at a key frame whose leading frames lean on a picture that was cut away."""
    options = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0", "x265-params": "log-level=none:keyint=9"}
    whole = write_clip(path.with_name(f"whole{path.suffix}"), numbered_frames(50), codec=codec, options=options)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream, keys = target.add_stream_from_template(source.streams.video[0]), 0
        for packet in source.demux(video=0):
            keys += packet.size > 0 and packet.is_keyframe
            if packet.size and keys >= 3:
                packet.stream = stream
                target.mux(packet)
    return path


# name -> (function that writes the clip, readers that refuse it)
CLIPS = {
    "h264.avi": (_avi("libx264", 0), {"torchcodec"}),
    "h264_b.avi": (_avi("libx264", 2), {"torchcodec"}),
    "mpeg4.avi": (_avi("mpeg4", 0), {"torchcodec"}),
    "mpeg4_b.avi": (_avi("mpeg4", 2), {"torchcodec"}),
    "mjpeg.avi": (
        lambda path: write_clip(path, numbered_frames(20), codec="mjpeg", pix_fmt="yuvj420p"),
        {"torchcodec"},
    ),
    "trimmed.mp4": (lambda path: edited(path, 0, 3.0), set()),
    "trimmed_both_ends.mp4": (lambda path: edited(path, 5, 2.0), set()),
    "two_edits.mp4": (lambda path: edited(path, 4, 1.5, edits=2), {"decord", "torchcodec"}),
    "open_gop_cut.mkv": (_open_gop_cut, {"torchcodec"}),
    "hevc_open_gop_cut.mkv": (lambda path: _open_gop_cut(path, "libx265"), {"torchcodec"}),
}


def displayed(path) -> list[int]:
    """Numbers shown by the frames of a full decoding."""
    with av.open(str(path)) as container:
        return [read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", CLIPS)
def test_frame_i_is_the_ith_displayed_frame(reader, tmp_path, name):  # noqa: F811
    write, refusing = CLIPS[name]
    path = write(tmp_path / name)
    numbers = displayed(path)
    if reader.reader in refusing:
        with pytest.raises(DataError, match="use reader (decord or )?pyav"):
            reader.info(path)
        return
    assert reader.info(path).num_frames == len(numbers)
    for index, number in enumerate(numbers):
        assert read_number(reader.frames(path, [index])[0]) == number, index
    rng = np.random.default_rng(0)
    for size in (2, 5, 9):
        indices = rng.integers(0, len(numbers), size).tolist()
        assert [read_number(frame) for frame in reader.frames(path, indices)] == [numbers[index] for index in indices]


def test_what_the_clips_hide_is_not_displayed(tmp_path):
    assert displayed(edited(tmp_path / "a.mp4", 0, 3.0)) == list(range(30))
    assert displayed(edited(tmp_path / "b.mp4", 5, 2.0)) == list(range(5, 25))
    assert displayed(_open_gop_cut(tmp_path / "c.mkv"))[0] == 20


def test_a_clip_without_times_that_may_end_early_is_refused_by_decord(reader, tmp_path):  # noqa: F811
    if reader.reader != "decord":
        pytest.skip("decord's check")
    frames = [*numbered_frames(20), *[numbered_frames(1)[0]] * 20]
    path = write_clip(tmp_path / "still.avi", frames, options={"bf": "2"})
    with pytest.raises(DataError, match="cannot count the frames of this clip without times; use reader pyav"):
        reader.info(path)


def test_colons_in_names_and_metadata_in_other_encodings(reader, tmp_path, monkeypatch):  # noqa: F811
    path = write_clip(tmp_path / "plain.mkv", numbered_frames(5), title="x" * 8)
    data = path.read_bytes()
    assert b"x" * 8 in data
    path = tmp_path / "12:30:05.mkv"
    path.write_bytes(data.replace(b"x" * 8, "标题标题".encode("gbk")))
    monkeypatch.chdir(tmp_path)
    for name in (path, path.name):
        assert read_number(reader.frames(name, [3])[0]) == 3


def test_media_under_the_wrong_key_are_told_the_right_one(reader, tmp_path):  # noqa: F811
    Image.new("RGB", (8, 8)).save(tmp_path / "a.PNG")
    path = write_clip(tmp_path / "a.mp4", numbered_frames(2))
    with pytest.raises(DataError, match="it is a picture; name it under the key `image`"):
        reader.info(tmp_path / "a.PNG")
    for video in (path, tmp_path):
        with pytest.raises(DataError, match="it is a video; name it under the key `video`"):
            reader.info(video, "image")
