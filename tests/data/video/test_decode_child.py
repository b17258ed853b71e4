"""The child process of `FrameReader`: what happens when it hangs, crashes, does not start, or loses its parent."""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from importlib.util import find_spec

import pytest

from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import FrameReader
from swim_fast.options import Decoding
from tests.helpers.clips import numbered_frames, read_number, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(
        tmp_path_factory.mktemp("clips") / "clip.mp4", numbered_frames(50), options={"bf": "3", "g": "12"}
    )


@contextlib.contextmanager
def _silent_fifo(folder):
    """A named pipe with a writer that never writes: whoever reads it hangs."""
    path = folder / "hangs.mp4"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    try:
        yield path
    finally:
        os.close(writer)


def _is_gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_a_hanging_decoder_is_stopped_and_replaced(name, clip, tmp_path):
    with _silent_fifo(tmp_path) as path, FrameReader(Decoding(reader=name, decode_timeout=1.0)) as reader:
        reader.info(clip)
        child = reader._child.process.pid
        start = time.monotonic()
        with pytest.raises(DataError, match="took longer than the limit of 1 s and was stopped; check") as error:
            reader.info(path)
        assert str(path) in str(error.value)
        assert ("use reader torchcodec or pyav, which are faster" in str(error.value)) == (name == "decord")
        assert 0.9 < time.monotonic() - start < 4
        assert _is_gone(child)
        assert read_number(reader.frames(clip, [31])[0]) == 31


def test_a_child_that_no_longer_runs_is_stopped_and_replaced(clip):
    with FrameReader(Decoding(reader="decord", decode_timeout=1.0)) as reader:
        reader.info(clip)
        child = reader._child.process.pid
        os.kill(child, signal.SIGSTOP)
        with pytest.raises(DataError, match="took longer than the limit of 1 s"):
            reader.frames(clip, [3])
        assert _is_gone(child)
        assert read_number(reader.frames(clip, [3])[0]) == 3


def test_a_crashing_decoder_is_an_error_of_the_clip(clip, tmp_path):
    with _silent_fifo(tmp_path) as path, FrameReader(Decoding(reader="pyav", decode_timeout=30.0)) as reader:
        reader.info(clip)
        crash = threading.Timer(0.5, os.kill, (reader._child.process.pid, signal.SIGSEGV))
        crash.start()
        with pytest.raises(DataError, match=r"it crashed the pyav decoder \(exit status -11\)") as caught:
            reader.info(path)
        assert str(path) in str(caught.value)
        assert read_number(reader.frames(clip, [9])[0]) == 9


@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_clips_that_were_read_are_closed(name, clip, tmp_path):
    with FrameReader(Decoding(reader=name)) as reader:
        counts = set()
        for number in range(8):
            reader.frames(shutil.copy(clip, tmp_path / f"{number}.mp4"), [9, 31])
            counts.add(len(os.listdir(f"/proc/{reader._child.process.pid}/fd")))
    assert len(counts) == 1


def test_a_child_that_died_idle_is_replaced_unnoticed(clip):
    with FrameReader(Decoding(reader="decord")) as reader:
        reader.info(clip)
        os.kill(reader._child.process.pid, signal.SIGKILL)
        reader._child.process.wait()
        assert reader.info(clip).num_frames == 50


def test_interrupting_the_child_does_nothing(clip):
    with FrameReader(Decoding(reader="decord")) as reader:
        reader.info(clip)
        child = reader._child.process.pid
        os.kill(child, signal.SIGINT)
        assert reader.info(clip).num_frames == 50
        assert reader._child.process.pid == child


def test_an_interrupted_request_does_not_leave_its_answer_to_the_next(clip, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with _silent_fifo(tmp_path) as path, FrameReader(Decoding(reader="pyav")) as reader:
            reader.info(clip)
            child = reader._child.process.pid
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                reader.info(path)
            assert _is_gone(child)
            assert reader.info(clip).num_frames == 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_the_child_ends_with_the_reader(clip):
    with FrameReader(Decoding(reader="decord")) as reader:
        reader.info(clip)
        child = reader._child.process.pid
    assert _is_gone(child)
    reader.close()  # twice is harmless
    reader.info(clip)  # and the reader can be used again
    child = reader._child.process.pid
    del reader
    assert _is_gone(child)


@pytest.mark.parametrize("hanging", [False, True])
def test_the_child_ends_with_its_parent(hanging, clip, tmp_path):
    """Also when the parent is killed outright, and the child is inside the decoder."""
    script = """
        import sys, threading, time
        from swim_fast.data.video.reader import FrameReader
        from swim_fast.options import Decoding
        reader = FrameReader(Decoding(reader="pyav", decode_timeout=0.5 if len(sys.argv) > 2 else 60))
        reader.info(sys.argv[1])
        print(reader._child.process.pid, flush=True)
        if len(sys.argv) > 2:
            reader._child.ask({"op": "info", "path": sys.argv[2], "kind": "video", "seconds": 0.5}, 1000)
        time.sleep(1000)
    """
    with _silent_fifo(tmp_path) as path:
        command = [sys.executable, "-c", textwrap.dedent(script), str(clip)] + [str(path)] * hanging
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
            child = int(parent.stdout.readline())
            time.sleep(0.3)
            assert not _is_gone(child, seconds=0.1)
            parent.kill()
        assert _is_gone(child, seconds=15)


def test_pickled_readers_start_their_own_child(clip):
    with FrameReader(Decoding(reader="pyav", decode_timeout=7.0)) as reader:
        reader.info(clip)
        with pickle.loads(pickle.dumps(reader)) as copy:
            assert (copy.reader, copy.timeout) == ("pyav", 7.0)
            assert copy.info(clip) == reader.info(clip)
            assert copy._child.process.pid != reader._child.process.pid


def test_a_reader_in_use_survives_a_fork(clip):
    with FrameReader(Decoding(reader="decord")) as reader:
        reader.info(clip)
        child = reader._child.process.pid

        def work(answers):
            numbers = [read_number(frame) for frame in reader.frames(clip, [4, 40])]
            answers.send((numbers, reader._child.process.pid))

        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        numbers, other = ours.recv()
        process.join()
        assert numbers == [4, 40] and other != child
        assert _is_gone(other)
        assert [read_number(frame) for frame in reader.frames(clip, [5])] == [5]
        assert reader._child.process.pid == child


class _Frames:
    def __init__(self, path):
        self.path, self.reader = path, FrameReader(Decoding(reader="decord"))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return read_number(self.reader.frames(self.path, [index])[0]), os.getpid(), self.reader._child.process.pid


def test_works_in_daemonic_data_loader_workers(clip):
    from torch.utils.data import DataLoader

    dataset = _Frames(clip)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    numbers, workers, children = zip(*loader, strict=True)
    assert list(numbers) == list(range(6))
    assert len(set(workers)) == len(set(children)) == 2 and os.getpid() not in workers
    assert all(map(_is_gone, set(children)))


def _fake_package(folder, monkeypatch, name, source):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("name, package", [("decord", "decord"), ("torchcodec", "torchcodec"), ("pyav", "av")])
def test_a_reader_that_is_not_installed_is_no_fault_of_the_clip(name, package, tmp_path, monkeypatch, clip):
    _fake_package(tmp_path, monkeypatch, package, f'raise ModuleNotFoundError("No module named {package}")')
    message = rf"reader {name} cannot be imported \(.*\): pip install {package} \(swim-fast doctor"
    with pytest.raises(ImportError, match=message):
        FrameReader(Decoding(reader=name)).info(clip)


def test_torchcodec_without_ffmpeg_says_so(tmp_path, monkeypatch, clip):
    _fake_package(tmp_path, monkeypatch, "torchcodec", "")
    (tmp_path / "torchcodec" / "decoders.py").write_text(
        "def VideoDecoder(source):\n    raise RuntimeError('Could not load libtorchcodec. Likely causes: …')\n"
    )
    with pytest.raises(ImportError, match="torchcodec finds no shared FFmpeg libraries .* install FFmpeg, or choose"):
        FrameReader(Decoding(reader="torchcodec")).info(clip)


def test_torchcodec_says_the_same_as_the_fake_where_ffmpeg_is_really_missing(monkeypatch, clip):
    """Guards the text by which the case is recognised."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nonexistent")
    try:
        info = FrameReader(Decoding(reader="torchcodec")).info(clip)
    except ImportError as error:
        assert "no shared FFmpeg libraries" in str(error) or find_spec("torchcodec") is None
    else:
        assert info.num_frames == 50  # the system has FFmpeg


def test_a_child_that_does_not_start_says_why(tmp_path, monkeypatch, clip):
    _fake_package(tmp_path, monkeypatch, "decord", "import os, sys; print('no room', file=sys.stderr); os._exit(3)")
    with pytest.raises(RuntimeError, match="decoding process of reader decord ended .*no room"):
        FrameReader(Decoding(reader="decord")).info(clip)


def test_what_libraries_print_does_not_disturb_the_answers(tmp_path, monkeypatch, clip, capfd):
    source = "import os; os.write(1, b'hello ' * 50_000); os.write(2, b'noise ' * 50_000); raise ImportError('gone')"
    _fake_package(tmp_path, monkeypatch, "decord", source)
    with pytest.raises(ImportError, match=r"cannot be imported \(gone\)"):
        FrameReader(Decoding(reader="decord")).info(clip)
    assert capfd.readouterr() == ("", "")


def test_the_decoding_process_loads_nothing_heavy():
    code = "import sys, swim_fast.data.video.decode_child; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"torch", "decord", "av", "torchcodec", "PIL", "transformers"} & set(loaded.stdout.split())
