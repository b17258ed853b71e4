import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from swim_fast.data.source import record_index
from swim_fast.data.source.errors import DataError, RecordsChangedError
from swim_fast.data.source.records import RecordFile
from swim_fast.progress_bar import ProgressBar
from tests.helpers.record_files import make_entries, make_entry, names_of

LAYOUTS = {
    "compact.json": lambda entries: json.dumps(entries, separators=(",", ":"), ensure_ascii=False),
    "default.json": lambda entries: json.dumps(entries),
    "indented.json": lambda entries: json.dumps(entries, indent=2, ensure_ascii=False),
    "tabs.json": lambda entries: json.dumps(entries, indent="\t"),
    "line_each.json": lambda entries: "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n",
    "comma_first.json": lambda entries: "[" + "\n , ".join(map(json.dumps, entries)) + "  ]",
    "trailing_comma.json": lambda entries: "[" + ",".join(map(json.dumps, entries)) + ",\n]",
    "lines.jsonl": lambda entries: "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries),
    "lines.json": lambda entries: "\n".join(map(json.dumps, entries)) + "\n",
    "list.jsonl": lambda entries: json.dumps(entries),
    "blank_lines.jsonl": lambda entries: "\n \n\t\n" + "\n\n  \n".join(map(json.dumps, entries)) + "\n\n",
    "indented_lines.jsonl": lambda entries: "\n".join("   " + json.dumps(entry) + "  " for entry in entries),
}


@pytest.mark.parametrize("byte_order_mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 37, 1 << 24])
def test_every_layout(layout, line_end, byte_order_mark, chunk, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(record_index, "CHUNK_BYTES", chunk)
    entries = make_entries(12 if chunk == 1 else 40)
    text = LAYOUTS[layout](entries).replace("\n", line_end)
    (tmp_path / layout).write_bytes(byte_order_mark + text.encode())
    file = RecordFile(tmp_path / layout)
    assert len(file) == len(entries)
    for number, entry in enumerate(entries):
        assert file._read(number) == entry
        assert file[number].number == number and file[number].name == f"clip_{number}"
    assert not caplog.records, "all of these are sound"


FILES = {
    "empty": (b"", "is empty"),
    "blank": (b"\xef\xbb\xbf \n\t\r\n", "holds nothing but white space"),
    "text": (b"index,video\n1,a.mp4\n", "is neither a JSON list nor JSON lines: no line begins with {"),
    "number": (b"42", "is neither a JSON list nor JSON lines"),
    "binary": (bytes(range(128, 256)) * 10, "is neither a JSON list nor JSON lines"),
    "half a list": (b'[1, 2, "a', "begins like a JSON list but is none, and not of records at that"),
    "UTF-16": (json.dumps([make_entry(0)]).encode("utf-16"), "is not UTF-8 .*; save it as UTF-8"),
    "UTF-16 without mark": (json.dumps([make_entry(0)]).encode("utf-16-le"), "is not UTF-8 .*; save it as UTF-8"),
    "one object": (
        json.dumps(make_entry(0), indent=1).encode(),
        "holds one JSON object over several lines; give a list",
    ),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_records(name, suffix, tmp_path):
    content, message = FILES[name]
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        RecordFile(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"none.json: cannot be opened: No such file"):
        RecordFile(tmp_path / "none.json")
    with pytest.raises((DataError, IsADirectoryError)):
        RecordFile(tmp_path)


def test_an_empty_list_has_no_records(tmp_path):
    (tmp_path / "data.json").write_text(" [\n ] ")
    assert len(RecordFile(tmp_path / "data.json")) == 0


def test_list_elements_that_are_no_objects_are_records_too(tmp_path):
    good = [json.dumps(make_entry(number)) for number in range(3)]
    (tmp_path / "data.json").write_text(f'[null, {good[0]}, 12,"a" ,{good[1]},[1, 2] , {good[2]}, true]')
    file = RecordFile(tmp_path / "data.json")
    assert names_of(file) == [None, "clip_0", None, None, "clip_1", None, "clip_2", None]
    with pytest.raises(DataError, match="record 2: is a JSON int, not an object with conversations"):
        file[2]


DAMAGES = {
    "unknown word": lambda text: text.replace('"video"', "video"),
    "lost opening quote": lambda text: text.replace('"clips', "clips"),
    "lost closing quote": lambda text: text.replace('.mp4"', ".mp4"),
    "lost bracket": lambda text: text.replace('"annotation": [', '"annotation": '),
    "lost last brace": lambda text: text[:-1],
    "one brace too many": lambda text: text + "}",
    "one bracket too many": lambda text: text.replace("[{", "[{]"),
    "unescaped quote": lambda text: text.replace("It is", 'It "is'),
    "two unescaped quotes": lambda text: text.replace("It is", 'It "is"'),
    "raw line end in a string": lambda text: text.replace("It is", "It\nis"),
    "cut in the middle": lambda text: text[: len(text) // 2],
    "cut in a string": lambda text: text[: text.index("clips") + 3],
    "lost comma": lambda text: text.replace(', "conversations', ' "conversations'),
}


@pytest.mark.parametrize("chunk", [64, 1 << 24])
@pytest.mark.parametrize("separators", [",", ",\n", " , "])
@pytest.mark.parametrize("places", [[0], [3], [9], [2, 3], [2, 7], [0, 9]])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_list_elements_cost_themselves_alone(kind, places, separators, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(record_index, "CHUNK_BYTES", chunk)
    texts = [json.dumps(make_entry(number, nested=[{"index": number}, {"a": []}])) for number in range(10)]
    for place in places:
        damaged = DAMAGES[kind](texts[place])
        assert damaged != texts[place]
        texts[place] = damaged
    path = tmp_path / "data.json"
    path.write_text("[" + separators.join(texts) + "]")
    names = names_of(RecordFile(path))
    assert [name for name in names if name] == [f"clip_{number}" for number in range(10) if number not in places]
    assert names.count(None) >= len(places)


def test_a_file_cut_off_by_a_broken_download(tmp_path, caplog):
    text = json.dumps(make_entries(30), indent=1)
    path = tmp_path / "data.json"
    path.write_text(text[: len(text) * 2 // 3])
    with caplog.at_level(logging.WARNING):
        names = names_of(RecordFile(path))
    assert names[:-1] == [f"clip_{number}" for number in range(len(names) - 1)] and 18 <= len(names) <= 21
    assert names[-1] is None
    assert f"data.json is not valid JSON: 1 of its {len(names)} records are malformed" in caplog.text


def test_random_json_is_split_as_the_json_module_splits_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def value(depth):
        kind = rng.integers(0, 7 if depth < 4 else 5)
        if kind == 0:
            return int(rng.integers(-1000, 1000))
        if kind == 1:
            return [None, True, False, 1.5e-7][rng.integers(4)]
        if kind <= 4:
            return "".join(rng.choice(list('ab"\\[]{}:, \n\u2028é🐻'), rng.integers(0, 12)))
        items = [value(depth + 1) for _ in range(rng.integers(0, 5))]
        return items if kind == 5 else {f'k{i}"\\': item for i, item in enumerate(items)}

    for trial in range(60):
        monkeypatch.setattr(record_index, "CHUNK_BYTES", int(rng.choice([1, 5, 64, 1000, 1 << 24])))
        entries = [value(0) for _ in range(rng.integers(0, 12))]
        entries = [entry for entry in entries if not isinstance(entry, str)]  # a bare string may hold a comma
        indent = [None, 1, "\t"][trial % 3]
        path = tmp_path / f"{trial}.json"
        path.write_text(json.dumps(entries, indent=indent, ensure_ascii=bool(trial % 2)), encoding="utf-8")
        raw = path.read_bytes()
        assert [json.loads(raw[start:end]) for start, end in record_index.record_offsets(path)] == entries


@pytest.fixture
def kept_index(tmp_path, monkeypatch):
    """The folder of kept indices, which are kept for files of any size here."""
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record_index, "CACHE_FROM_BYTES", 0)
    return tmp_path / "cache" / "records"


@pytest.fixture
def scans(monkeypatch):
    calls = []
    scan = record_index._scan
    monkeypatch.setattr(record_index, "_scan", lambda path: calls.append(path) or scan(path))
    return calls


def test_the_index_is_kept_and_follows_the_file(tmp_path, kept_index, scans):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(make_entries(5)))
    assert names_of(RecordFile(path)) == [f"clip_{number}" for number in range(5)]
    assert len(scans) == 1
    file = RecordFile(path)
    assert len(scans) == 1 and isinstance(file._offsets, np.memmap)
    (old,) = kept_index.iterdir()

    path.write_text(json.dumps(make_entries(7)))
    with pytest.raises(RecordsChangedError, match="data.json: the file was changed while it was in use; start again"):
        file[2]
    assert len(RecordFile(path)) == 7 and len(scans) == 2
    (new,) = kept_index.iterdir()
    assert new != old, "the outdated index is gone"

    for damage in (b"", new.read_bytes()[:150], b"junk" * 100):
        new.write_bytes(damage)
        assert names_of(RecordFile(path)) == [f"clip_{number}" for number in range(7)]
    assert len(scans) == 5
    assert len(RecordFile(path)) == 7 and len(scans) == 5


def test_small_files_keep_no_index(tmp_path, monkeypatch, scans):
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(make_entries(5)))
    RecordFile(path), RecordFile(path)
    assert len(scans) == 2 and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, kept_index, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = tmp_path / "data.json"
    path.write_text(json.dumps(make_entries(5)))
    assert len(RecordFile(path)) == 5
    assert "is not kept" in caplog.text and "set SWIM_FAST_CACHE to a writable folder" in caplog.text


def _open_at_once(path, barrier, results):
    barrier.wait()
    results.put(names_of(RecordFile(path)))


def test_several_processes_may_index_at_once(tmp_path, kept_index):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, make_entries(50))))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_open_at_once, args=(path, barrier, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[f"clip_{number}" for number in range(50)]] * 6
    for process in processes:
        process.join()
    assert len(list(kept_index.iterdir())) == 1, "one index, nothing temporary"


def test_pickled_without_the_index_and_without_open_files(tmp_path, kept_index):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(make_entries(2000)))
    file = RecordFile(path, "/media")
    file[3]
    assert os.path.realpath(path) not in [os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")]
    pickled = pickle.dumps(file)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert len(copy) == 2000 and copy[1999] == file[1999] and copy[0].media == Path("/media/clips/0.mp4")
    path.write_text(json.dumps(make_entries(3)))
    stale = pickle.loads(pickled)
    with pytest.raises(RecordsChangedError, match="was changed while it was in use"):
        stale[0]


def test_a_progress_bar_for_large_files(tmp_path, monkeypatch):
    shown = []

    class Bar(ProgressBar):
        def __init__(self, *args, **kwargs):
            self.told = (kwargs["desc"], kwargs["total"], kwargs["disable"])
            super().__init__(*args, **{**kwargs, "disable": False})

        def __exit__(self, *exception):
            shown.append((*self.told, self.n))
            super().__exit__(*exception)

    monkeypatch.setattr("swim_fast.progress_bar.ProgressBar", Bar)
    monkeypatch.setattr(record_index, "CHUNK_BYTES", 1000)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(make_entries(30)))
    size = path.stat().st_size
    RecordFile(path)
    monkeypatch.setattr(record_index, "PROGRESS_FROM_BYTES", 0)
    RecordFile(path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    RecordFile(path)
    assert shown == [("indexing data.json", size, disable, size) for disable in (True, False, True)]
