"""Comparisons of a clip's index with its frames in a row, and of decord's own numbering with the displayed frames."""

import av
import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.data.video import crosscheck
from swim_fast.data.video.reader import FrameReader
from tests.data.video.test_displayed_frames import CLIPS, edited
from tests.data.video.test_reader import CLIPS as MORE_CLIPS
from tests.data.video.test_reader import ffmpeg_for_torchcodec, reader  # noqa: F401 (fixtures)
from tests.helpers.clips import numbered_frames, write_clip

WRITERS = {name: write for name, (write, *_) in {**CLIPS, **MORE_CLIPS}.items()}


def uncoded(path, at=25):
    """A clip with a packet of MPEG-4 whose picture is marked as not coded: decoders pass over it without a word."""
    whole = write_clip(path.with_name(f"whole{path.suffix}"), numbered_frames(50), codec="mpeg4", options={"g": "10"})
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number == at:
                bits = f"{int.from_bytes(bytes(packet)[4:8], 'big'):032b}"
                assert bits.startswith("01")  # a P picture; then ones up to a 0, a marker, 4 bits of time, a marker
                coded = bits.index("0", 2) + 1 + 1 + 4 + 1
                assert bits[coded - 1 : coded + 1] == "11"
                empty = av.Packet(
                    bytes(packet)[:4] + int(bits[:coded] + "0".ljust(32 - coded, "1"), 2).to_bytes(4, "big")
                )
                empty.pts, empty.dts, empty.duration = packet.pts, packet.dts, packet.duration
                empty.time_base, packet = packet.time_base, empty
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_sound_clips_agree_with_their_index(reader, tmp_path, name):  # noqa: F811
    path = WRITERS[name](tmp_path / name)
    try:
        reader.info(path)
    except DataError:
        pytest.skip("the reader refuses it")
    assert reader.compare(path)


def test_a_packet_without_a_picture_is_told(reader, tmp_path):  # noqa: F811
    path = uncoded(tmp_path / "uncoded.mp4")
    assert reader.info(path).num_frames == 50
    with pytest.raises(DataError, match=r"uncoded.mp4: .*(claims 50 frames, but .* gives 49|no more frames left)"):
        reader.compare(path)


class Clip:
    """Ten frames, of which `read` gives those of `given`."""

    num_frames, height, width = 10, 48, 64

    def __init__(self, given=range(10), row=10):
        self.given, self.row = given, row

    def read(self, indices, out):
        out[:] = numbered_frames(10)[[self.given[index] for index in indices]]

    def in_a_row(self, wanted):
        yield from (frame if i in wanted else None for i, frame in enumerate(numbered_frames(self.row)))


def test_another_count_or_frame_is_refused_and_too_little_time_compares_a_part():
    assert crosscheck.compare_in_a_row(Clip(), 60.0) is True
    for row in (9, 11):
        with pytest.raises(crosscheck.Broken, match=f"claims 10 frames, but decoding it in a row gives {row}"):
            crosscheck.compare_in_a_row(Clip(row=row), 60.0)
    shifted = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    with pytest.raises(crosscheck.Broken, match="frame 6 differs"):
        crosscheck.compare_in_a_row(Clip(shifted), 60.0)
    assert crosscheck.compare_in_a_row(Clip(shifted), 0.0) is False


def test_decords_own_numbering_is_compared_with_the_displayed_frames(tmp_path):
    """Hidden leading frames shift it behind the first key frame; open GOPs around each."""
    with FrameReader() as decord:
        lead = edited(tmp_path / "lead.mp4", 5)
        assert decord.stock_differences(lead, [0, 3, 20, 44]) == [20, 44]
        assert decord.stock_differences(edited(tmp_path / "end.mp4", 0, 3.0), [0, 3, 20, 29]) == []
        opened = MORE_CLIPS["hevc_open_gop.mkv"][0](tmp_path / "open.mkv")
        assert decord.stock_differences(opened, [0, 3, 24, 48]) == [24]
