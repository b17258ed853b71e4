import os
import re
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from PIL import Image

from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import FrameReader, MediaInfo
from swim_fast.options import Decoding
from tests.helpers.clips import numbered_frame, numbered_frames, read_number, write_clip

B_FRAMES = {"bf": "3", "g": "12"}


@pytest.fixture(scope="session")
def ffmpeg_for_torchcodec(tmp_path_factory):
    """Let torchcodec find FFmpeg: the system's, or else the one inside the wheel of PyAV under its official names."""
    wheel = Path(av.__file__).parent.parent / "av.libs"
    folder = tmp_path_factory.mktemp("ffmpeg")
    for library in wheel.glob("lib*.so.*"):
        if match := re.match(r"(lib(?:av|sw)\w+)-[0-9a-f]+\.so\.(\d+)", library.name):
            (folder / "{}.so.{}".format(*match.groups())).symlink_to(library)
    path = os.pathsep.join(filter(None, (os.environ.get("LD_LIBRARY_PATH"), str(folder), str(wheel))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", path)
        yield


@pytest.fixture(scope="module", params=get_args(Decoding.model_fields["reader"].annotation))
def reader(request, ffmpeg_for_torchcodec, tmp_path_factory):
    with FrameReader(Decoding(reader=request.param)) as reader:
        try:
            reader.info(write_clip(tmp_path_factory.mktemp("probe") / "probe.mp4", numbered_frames(1)))
        except ImportError as error:
            if request.param != "torchcodec":
                raise
            pytest.skip(f"torchcodec is not tested: {error}")
        yield reader


def _edit_list_clip(path):
    """A clip of which an edit list hides the first 5 of 60 frames, as cutting by stream copy leaves them."""
    write_clip(path.with_name("whole.mp4"), numbered_frames(60), options={"bf": "3", "g": "20"})
    with av.open(str(path.with_name("whole.mp4"))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = 5 * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    return path


# name -> (function that writes the clip, numbers its frames show, frames per second)
CLIPS = {
    "b_frames.mp4": (lambda p: write_clip(p, numbered_frames(50), options=B_FRAMES), range(50), 10),
    "open_gop.mp4": (
        lambda p: write_clip(p, numbered_frames(90), options={**B_FRAMES, "x264-params": "open-gop=1:scenecut=0"}),
        range(90),
        10,
    ),
    "hevc_open_gop.mkv": (
        lambda p: write_clip(
            p, numbered_frames(50), codec="libx265", options={"x265-params": "log-level=none:keyint=9"}
        ),
        range(50),
        10,
    ),
    "one_gop.mp4": (lambda p: write_clip(p, numbered_frames(200), 30, options={"bf": "3", "g": "250"}), range(200), 30),
    "one_frame.mp4": (lambda p: write_clip(p, numbered_frames(1)), range(1), 10),
    "two_frames.mp4": (lambda p: write_clip(p, numbered_frames(2)), range(2), 10),
    "three_frames.mp4": (lambda p: write_clip(p, numbered_frames(3)), range(3), 10),
    "odd_size.mp4": (lambda p: write_clip(p, numbered_frames(20, 35, 51), options=B_FRAMES), range(20), 10),
    "narrow.mp4": (lambda p: write_clip(p, numbered_frames(20, 48, 48), options=B_FRAMES), range(20), 10),
    "tiny.mp4": (lambda p: write_clip(p, numbered_frames(20, 24, 16), options=B_FRAMES), range(20), 10),
    "starts_late.mp4": (
        lambda p: write_clip(p, numbered_frames(30), times=5 + np.arange(30) / 10, options=B_FRAMES),
        range(30),
        10,
    ),
    "edit_list.mp4": (_edit_list_clip, range(5, 60), 10),
    "ntsc.mp4": (lambda p: write_clip(p, numbered_frames(40), 30000 / 1001, options=B_FRAMES), range(40), 29.97),
    "vp9.webm": (lambda p: write_clip(p, numbered_frames(30), codec="libvpx-vp9", options={"g": "8"}), range(30), 10),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder, written = tmp_path_factory.mktemp("clips"), {}

    def get(name):
        if name not in written:
            written[name] = CLIPS[name][0](folder / name)
        return written[name]

    return get


@pytest.mark.parametrize("name", ["open_gop.mp4", "hevc_open_gop.mkv"])
def test_the_open_gop_clips_are_what_they_are_called(name, clip):
    """Some frame is coded after a key frame and shown before it."""
    with av.open(str(clip(name))) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    times = [time for time, _ in packets]
    assert any(is_key and min(times[place:]) < time for place, (time, is_key) in enumerate(packets) if place)


@pytest.mark.parametrize("name", CLIPS)
def test_every_reader_returns_exactly_the_frames_asked_for(reader, clip, name):
    path, numbers = clip(name), CLIPS[name][1]
    info = reader.info(path)
    assert info.num_frames == len(numbers)
    assert info.fps == pytest.approx(CLIPS[name][2], rel=1e-3)
    count, last = len(numbers), len(numbers) - 1
    requests = [[last], range(count), range(0, count, 7), [last, 0, last // 2, 0], range(last, max(-1, last - 5), -1)]
    rng = np.random.default_rng(0)
    requests += [rng.integers(0, count, 6).tolist() for _ in range(6)]
    for indices in requests:
        frames = reader.frames(path, indices)
        assert frames.shape == (len(indices), info.height, info.width, 3) and frames.dtype == np.uint8
        assert [read_number(frame) for frame in frames] == [numbers[index] for index in indices]


def test_frames_are_rgb_and_close_to_what_was_encoded(reader, clip):
    frames = reader.frames(clip("b_frames.mp4"), range(50))
    error = np.abs(frames.astype(int) - numbered_frames(50).astype(int))
    # 4:2:0 coding blurs colour at the edges of the squares; exchanged channels would be off by 20 on average.
    assert error.mean() < 3
    assert np.median(error) <= 2


def test_variable_frame_rate(reader, tmp_path):
    gaps = np.random.default_rng(3).uniform(0.02, 0.5, 40)
    path = write_clip(tmp_path / "vfr.mp4", numbered_frames(40), times=np.cumsum(gaps), options=B_FRAMES)
    info = reader.info(path)
    assert info.num_frames == 40
    assert info.fps == pytest.approx(39 / gaps[1:].sum(), rel=0.1)
    indices = [0, 1, 7, 8, 9, 20, 33, 39]
    assert [read_number(frame) for frame in reader.frames(path, indices)] == indices


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_clips_come_upright(reader, tmp_path, rotation):
    frames = numbered_frames(12)
    path = write_clip(tmp_path / "rotated.mp4", frames, options=B_FRAMES, rotation=rotation)
    upright = np.rot90(frames, -rotation // 90, axes=(1, 2))
    info = reader.info(path)
    assert (info.height, info.width) == upright.shape[1:3]
    decoded = reader.frames(path, [0, 5, 11])
    assert np.abs(decoded.astype(int) - upright[[0, 5, 11]].astype(int)).mean() < 3


@pytest.mark.parametrize("suffix, codec", [("ts", "libx264"), ("mpg", "mpeg2video")])
def test_mpeg_streams_are_exact_or_refused(reader, tmp_path, suffix, codec):
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, numbered_frames(150), 25, codec=codec, options={"bf": "2", "g": "12"})
    if reader.reader == "pyav":
        for index in range(149, 0, -5):  # one at a time: some seeks arrive behind the frame
            assert read_number(reader.frames(path, [index])[0]) == index
    else:
        with pytest.raises(DataError, match="cannot number the frames of an MPEG stream; use reader pyav"):
            reader.info(path)


def test_an_answer_larger_than_the_pipe(reader, tmp_path):
    path = write_clip(tmp_path / "large.mp4", numbered_frames(8, 480, 640), options={"preset": "ultrafast"})
    frames = reader.frames(path, range(8))
    assert frames.nbytes > 7e6
    assert [read_number(frame) for frame in frames] == list(range(8))


def _broken_clips(folder):
    """name -> (path, what the message must say)"""
    whole = write_clip(folder / "whole.mp4", numbered_frames(40, 96, 128), options=B_FRAMES).read_bytes()
    (folder / "cut_off.mp4").write_bytes(whole[: len(whole) // 2])  # the index is at the end
    (folder / "junk.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    damaged = bytearray(whole)
    data = damaged.index(b"mdat")
    for place in np.random.default_rng(1).integers(data + 1000, damaged.index(b"moov"), 300):
        damaged[place] ^= 0xFF
    (folder / "damaged.mp4").write_bytes(damaged)
    with av.open(str(folder / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    (folder / "folder").mkdir()
    messages = {"missing.mp4": "no such file; check the record and the media folder", "folder": "holds no images"}
    names = ["cut_off.mp4", "junk.mp4", "empty.mp4", "text.mp4", "damaged.mp4", "sound.m4a", "missing.mp4", "folder"]
    return {name: (folder / name, messages.get(name, "")) for name in names}


def test_broken_clips_are_errors_that_name_them_and_the_next_clip_works(reader, clip, tmp_path, capfd):
    for name, (path, message) in _broken_clips(tmp_path).items():
        with pytest.raises(DataError) as caught:
            reader.info(path)
            reader.frames(path, range(40))
        assert f"video {path}: " in str(caught.value) and message in str(caught.value), name
        assert "\n" not in str(caught.value)
        if not message and name != "sound.m4a":
            assert "check that the file is whole, re-encode it, or try another reader" in str(caught.value)
        child = reader._child.process.pid
        assert read_number(reader.frames(clip("b_frames.mp4"), [17])[0]) == 17
        assert reader._child.process.pid == child, "an ordinary error does not cost the child"
    assert capfd.readouterr().err == "", "codecs' messages belong into the error, not on the terminal"


def test_what_the_codec_printed_is_in_the_error(tmp_path):
    path, _ = _broken_clips(tmp_path)["cut_off.mp4"]
    with (
        FrameReader(Decoding(reader="decord")) as reader,
        pytest.raises(DataError, match=r"decoder's output: .*moov atom not found"),
    ):
        reader.info(path)


def test_frames_of_a_clip_that_was_cut_off_are_right_or_an_error(reader, tmp_path):
    """The index comes first here, so that the clip opens; no frame may be made up for the missing ones."""
    write_clip(tmp_path / "whole.mp4", numbered_frames(60, 96, 128), options=B_FRAMES)
    with av.open(str(tmp_path / "whole.mp4")) as source:
        with av.open(str(tmp_path / "first.mp4"), "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    data = (tmp_path / "first.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    failures = 0
    for index in range(60):
        try:
            frame = reader.frames(tmp_path / "cut.mp4", [index])[0]
        except DataError:
            failures += 1
        else:
            assert read_number(frame) == index
    assert failures >= 20


@pytest.mark.parametrize("index", [-1, 50, 10**12])
def test_frame_numbers_past_the_end(reader, clip, index):
    path = clip("b_frames.mp4")
    with pytest.raises(DataError) as caught:
        reader.frames(path, [3, index])
    assert f"frame number {index} is past the end: the clip has 50 frames, 0 to 49" in str(caught.value)
    assert str(path) in str(caught.value) and "do the annotations belong to this file?" in str(caught.value)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="reader is 'opencv'; choose one of: decord, torchcodec, pyav"):
        FrameReader(Decoding(reader="opencv"))
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="decode_timeout is .*; (it must be positive|expected a finite number)"):
            FrameReader(Decoding(decode_timeout=timeout))
    with pytest.raises(ValueError, match="kind is 'audio': it must be 'video' or 'image'"):
        FrameReader().info("clip.mp4", kind="audio")
    with pytest.raises(ValueError, match="non-empty list of frame indices"):
        FrameReader().frames("clip.mp4", [])


@pytest.fixture(scope="module")
def image_reader():
    with FrameReader(Decoding(reader="pyav")) as reader:
        yield reader


def test_folder_of_frames_in_natural_order(image_reader, tmp_path):
    for number in range(12):
        Image.fromarray(numbered_frame(number)).save(tmp_path / f"frame{number}.png")  # frame10 sorts before frame2
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame0.png").write_bytes(b"left there by a Mac")
    assert image_reader.info(tmp_path) == MediaInfo(num_frames=12, fps=1.0, height=48, width=64)
    frames = image_reader.frames(tmp_path, [11, 2, 10, 2])
    np.testing.assert_array_equal(frames, [numbered_frame(number) for number in (11, 2, 10, 2)])
    with pytest.raises(DataError, match="frame number 12 is past the end: the clip has 12 frames, 0 to 11"):
        image_reader.frames(tmp_path, [12])


def test_folder_with_a_frame_of_another_size_or_broken(image_reader, tmp_path):
    Image.fromarray(numbered_frame(0)).save(tmp_path / "0.png")
    Image.fromarray(numbered_frame(1, 24, 32)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    with pytest.raises(DataError, match=r"1.png is \(24, 32\), the first frame is \(48, 64\) \(height, width\)"):
        image_reader.frames(tmp_path, [0, 1])
    with pytest.raises(DataError, match="cannot be decoded .*truncated"):
        image_reader.frames(tmp_path, [0, 2])


def test_images_of_every_mode_come_as_rgb(image_reader, tmp_path):
    frame = numbered_frame(77)
    for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.fromarray(frame).convert(mode).save(path)
        assert image_reader.info(path, kind="image") == MediaInfo(1, 1.0, 48, 64)
        image = image_reader.frames(path, [0, 0], kind="image")
        assert image.shape == (2, 48, 64, 3)
        assert mode == "1" or read_number(image[1]) == 77
    with pytest.raises(DataError, match="frame number 1 is past the end: the clip has 1 frames"):
        image_reader.frames(path, [1], kind="image")


def test_exif_orientation_is_applied(image_reader, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(numbered_frame(5)).save(tmp_path / "turned.png", exif=exif)
    frame = image_reader.frames(tmp_path / "turned.png", [0], kind="image")[0]
    np.testing.assert_array_equal(frame, np.rot90(numbered_frame(5), -1))


def test_broken_images(image_reader, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="image .*deep.png: deep.png has more than 8 bits per channel; convert it"):
        image_reader.info(tmp_path / "deep.png", kind="image")
    (tmp_path / "junk.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="image .*junk.png: cannot be decoded"):
        image_reader.info(tmp_path / "junk.png", kind="image")
    with pytest.raises(DataError, match="image .*none.png: no such file"):
        image_reader.info(tmp_path / "none.png", kind="image")
