"""Clips as decord, torchcodec and PyAV decode them: frames by the index in which they are displayed.

Each library is imported where it is used: the decoding process imports the one that it was asked for.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator

import numpy as np

from swim_fast.data.video.containers import Broken, end_of_edit_list, refuse_avi, refuse_mpeg_stream


class DecordClip:
    """decord 0.6, made exact by decoding from the start; frames in between are decoded but not converted.

    Its `get_batch` seeks, and returns wrong frames, silently, wherever frames displayed before a key frame are coded
    after it (open GOPs: x265's default, x264's `open-gop`), since it numbers key frames in coding order; nothing in
    its interface tells such files apart. For clips of many minutes torchcodec and PyAV, which seek exactly, are faster.
    """

    def __init__(self, path: str):
        refuse_mpeg_stream(path, "decord")
        self._path = path
        self._open()
        times = self._video.get_frame_timestamp(range(len(self._video)))[:, 0]
        self._timeless = bool((times < -1e9).any())
        # Frames that an edit list hides, before 0 or behind its end, are counted by decord but never delivered.
        hidden = (times < -1e-4) | (times > end_of_edit_list(path) - 1e-4)
        self.num_frames = len(times) if self._timeless else len(times) - int(hidden.sum())
        self.fps = float(self._video.get_avg_fps())
        self._keys = sorted({0, *map(int, self._video.get_key_indices())})
        self._first = self._next()
        self.height, self.width = self._first.shape[:2]
        if self._timeless:
            self._check_last()

    def _check_last(self) -> None:
        """Raise `Broken` if the clip may have fewer frames than packets: decord then repeats the last one."""
        if self.num_frames > 1:
            self._walk_to(self.num_frames - 2)
            if np.array_equal(self._next(), self._next()):
                raise Broken("decord cannot count the frames of this clip without times; use reader pyav")

    def _open(self) -> None:
        import decord

        self._video = decord.VideoReader(self._path, num_threads=1)
        self._position = 0

    def _next(self) -> np.ndarray:
        try:
            frame = self._video.next().asnumpy()
        except StopIteration:
            raise Broken(f"frame {self._position} could not be decoded") from None
        self._position += 1
        height, width, _ = frame.shape
        # Narrow frames come as their padded memory, [height, width, 4], when a row is padded to 4 bytes a pixel.
        return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)

    def _walk_to(self, index: int) -> None:
        """Make `index` the next frame. decord skips without seeking as long as no key frame lies between.

        It skips by time: where times are missing, it lands anywhere.
        """
        if index < self._position:
            self._open()
        while self._position < index:
            following = bisect.bisect_right(self._keys, self._position)
            last = self._keys[following] - 1 if following < len(self._keys) else index
            if not self._timeless and min(index, last) > self._position:
                self._position = min(index, last)
                self._video.seek_accurate(self._position)
            else:
                self._next()

    def read(self, indices: list[int], out: np.ndarray) -> None:
        for slot, index in zip(out, indices, strict=True):
            if index == 0:
                slot[:] = self._first
            else:
                self._walk_to(index)
                slot[:] = self._next()

    def in_a_row(self, wanted: set[int]) -> Iterator[np.ndarray | None]:
        """Yield the wanted frames, and None for the others, as the decoder gives them from the start.

        decord repeats the last frame for what its decoder does not give, so their number is PyAV's where it is there.
        """
        self._open()
        try:
            counted = PyAVClip(self._path).in_a_row(set())
        except ImportError:
            counted = range(self.num_frames)
        for index, _ in enumerate(counted):
            frame = self._next() if index < self.num_frames else None
            yield frame if index in wanted else None

    def stock_batch(self, indices: list[int]) -> np.ndarray | None:
        """Return what decord's own `get_batch` gives; None for a clip that it cannot read, such as a narrow one."""
        import decord

        self._open()
        try:
            return self._video.get_batch(indices).asnumpy()
        except decord.DECORDError:
            return None
        finally:
            self._open()


class TorchCodecClip:
    """torchcodec with its exact index (one pass over the packets)."""

    def __init__(self, path: str):
        from torchcodec.decoders import VideoDecoder

        refuse_mpeg_stream(path, "torchcodec")
        refuse_avi(path)
        end_of_edit_list(path)
        self._video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        self.num_frames = len(self._video)
        self.fps = float(self._video.metadata.average_fps or 0)
        first = self._video.get_frame_at(0)
        if abs(first.pts_seconds - float(self._video.metadata.begin_stream_seconds_from_content or 0)) > 1e-4:
            raise Broken("torchcodec cannot number the frames of a clip cut inside an open GOP; use reader pyav")
        self.height, self.width = first.data.shape[:2]  # the header's size is the one before rotation

    def read(self, indices: list[int], out: np.ndarray) -> None:
        frames = self._video.get_frames_at(indices)
        if (frames.pts_seconds.diff() <= 0).any():
            raise Broken("torchcodec gave one frame for two indices; use reader pyav")
        out[:] = frames.data.numpy()

    def in_a_row(self, wanted: set[int]) -> Iterator[np.ndarray | None]:
        """As `DecordClip.in_a_row`; each frame is later than the one before, or it is one that was given twice."""
        last = -math.inf
        for index in range(self.num_frames):
            frame = self._video.get_frame_at(index)
            if frame.pts_seconds <= last:
                return
            last = frame.pts_seconds
            yield frame.data.numpy() if index in wanted else None


class PyAVClip:
    """PyAV: one pass over the packets lists the presentation times, frames are then recognised by their time."""

    _container = None

    def __init__(self, path: str):
        import av

        self._av, self._path = av, path
        self._open()
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in self._container.demux(self._stream)
            if packet.size
        ]
        times = sorted(pts for pts, _, _, hidden in packets if not hidden and pts is not None)
        self.num_frames = sum(not hidden for *_, hidden in packets)
        # Frames have times of their own, by which they are found, where the container keeps those of presentation:
        # FFmpeg invents them elsewhere. Without, frames can only be counted from the start.
        keeps = re.match("mov,|matroska,|mpeg", self._container.format.name)
        self._times = times if keeps and len(set(times)) == self.num_frames else None
        self._keys = sorted(
            (pts, pts if dts is None else dts) for pts, dts, is_key, _ in packets if is_key and pts is not None
        )
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        self._open()
        first = next(self._decoded(), None)
        if first is None:
            raise Broken("no frame could be decoded")
        self.height, self.width = self._upright(first).shape[:2]
        if self._times is not None and first.pts != self._times[0]:
            self._times = None  # it starts with frames that lean on ones cut away
        if self._times is None:
            self.num_frames = 1 + sum(1 for _ in self._decoded())

    def _open(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._av.open(self._path, metadata_errors="replace")
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise Broken("the file has no video stream")
        self._stream.codec_context.thread_count = 1

    def __del__(self):
        if self._container is not None:  # it and its streams refer to each other: the collector comes late
            self._container.close()

    def _decoded(self) -> Iterator:
        return self._container.decode(self._stream)

    @staticmethod
    def _upright(frame) -> np.ndarray:
        return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)

    def read(self, indices: list[int], out: np.ndarray) -> None:
        for slot, (index, frame) in zip(out, self._wanted(indices), strict=True):
            image = self._upright(frame)
            if image.shape != slot.shape:
                raise Broken(f"frame {index} is {image.shape[:2]}, the first is {slot.shape[:2]} (height, width)")
            slot[:] = image

    def in_a_row(self, wanted: set[int]) -> Iterator[np.ndarray | None]:
        """As `DecordClip.in_a_row`."""
        self._open()
        for index, frame in enumerate(self._decoded()):
            yield self._upright(frame) if index in wanted else None

    def _wanted(self, indices: list[int]) -> Iterator:
        """Yield (index, decoded frame) for sorted, distinct frame indices."""
        if self._times is None:
            self._open()
            wanted = set(indices)
            for index, frame in enumerate(self._decoded()):
                if index in wanted:
                    yield index, frame
                    wanted.remove(index)
                    if not wanted:
                        return
            raise Broken(f"frame {min(wanted)} could not be decoded")
        reached, frames = -1, None
        for index in indices:
            time = self._times[index]
            key = bisect.bisect_right(self._keys, (time, math.inf)) - 1
            frame = self._frame_at(time, frames) if frames is not None and key <= reached else None
            start = key
            while frame is None:
                frames = self._from_key(start)
                frame = self._frame_at(time, frames)
                if frame is None and start <= 0:
                    raise Broken(f"frame {index} could not be decoded")
                start //= 2  # some containers seek by decoding time and arrive late: start further back
            reached = key
            yield index, frame

    @staticmethod
    def _frame_at(time: int, frames: Iterator):
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        return frame if frame is not None and frame.pts == time else None

    def _from_key(self, key: int) -> Iterator:
        if key <= 0:
            self._open()
        else:
            self._container.seek(self._keys[key][1], stream=self._stream)
        return self._decoded()
