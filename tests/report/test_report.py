"""The page of a run: what it holds, what it refuses, and that it works in a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from swim_fast.config import DataConfig, ModelConfig, RunConfig
from swim_fast.errors import OptionError
from swim_fast.options import AttentionLoss, Source
from swim_fast.report.run import write_report
from swim_fast.viz.run_report import LONGER_SIDE, ClipView, RunView, Word, write_run_page
from tests.training.conftest import TEXTS, record, square_clip, write_records

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u2028&amp;"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of a random checkpoint, `one` and `two`, whose held-out record has a hostile name."""
    from swim_fast.demo.tiny_model import ModelSize, build_checkpoint

    folder = tmp_path_factory.mktemp("report")
    entry = record("clip.mp4", square_clip(folder / "clip.mp4", 0)) | {"index": HOSTILE}
    write_records(folder / "heldout.jsonl", [entry, entry | {"video": "gone.mp4", "index": "gone"}])
    size = ModelSize(
        hidden_size=64, intermediate_size=64, num_layers=3, vision_hidden_size=32, vision_intermediate_size=32
    )
    build_checkpoint(folder / "one", TEXTS * 3, seed=0, vocab_size=300, size=size)
    config = RunConfig(
        model=ModelConfig(path="start"),
        data=DataConfig(max_frames=4, eval={"heldout": Source(path=str(folder / "heldout.jsonl"))}),
        attention_loss=AttentionLoss(layers=[1, 2]),
    )
    (folder / "one/config.yaml").write_text(config.as_yaml())
    log = [{"step": 5, "text_loss": 2.5, "learning_rate": 1e-3}, {"step": 10, "eval_heldout_soft_iou": 0.375}]
    (folder / "one/trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "one/skipped-rank0.jsonl").write_text(json.dumps({"source": "a.jsonl", "reason": HOSTILE}) + "\n")
    shutil.copytree(folder / "one", folder / "two")
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Path:
    return write_report([folder / "one", folder / "two"], clips=2, max_new_tokens=4)


def test_page_lies_beside_the_run_and_escapes_what_records_say(folder, page):
    text = page.read_text()
    assert page == folder / "one/report.html"
    assert "window.hacked=1" in text and "<script>window" not in text and "<img src=x" not in text
    assert "\u2028" not in text.partition('id="clips">')[2]
    assert not re.search(r"(?:src|href)=\"?https?:", text)


def clip_view(masks: list) -> ClipView:
    """A clip whose texts are hostile, with masks by tag and frame."""
    frame, count = np.zeros((28, 28, 3), np.uint8), len(masks[0])
    word = Word("dog", (0, 3), False, 0, 0)
    about = [frame] * count, [HOSTILE] * count, list(range(count)), masks, [word], (0, 3), (3, 4)
    maps = {HOSTILE: np.ones((1, count, 2, 2), np.float32)}
    return ClipView(HOSTILE, HOSTILE, *about, answers={"a": HOSTILE}, maps={"a": maps})


def test_json_of_the_page_cannot_end_its_script(tmp_path):
    clip = clip_view([[np.ones((28, 28), np.uint8)]])
    text = write_run_page(tmp_path / "page.html", [RunView("a")], [clip], [HOSTILE]).read_text()
    script = text.partition('id="clips">')[2].partition("</script>")[0]
    (data,) = json.loads(script)
    assert data["labels"] == [HOSTILE] and list(data["runs"]["a"]) == [HOSTILE]
    assert "\u2028" not in script and "<script>window" not in text


@pytest.mark.parametrize(
    ("seen", "first"),
    [([[1, 1]], 0), ([[None, 0, 1, 1]], 2), ([[None, None, None], [None, 1, 1]], 1), ([[None, None]], 0)],
)
def test_slider_starts_where_an_object_is_seen(tmp_path, seen, first):
    masks = [[None if value is None else np.full((28, 28), value, np.uint8) for value in row] for row in seen]
    text = write_run_page(tmp_path / "page.html", [RunView("a")], [clip_view(masks)], []).read_text()
    assert f'max="{len(seen[0]) - 1}" value="{first}"' in text


def test_what_cannot_be_shown_is_named_and_the_rest_is_shown(folder, page, tmp_path):
    text = page.read_text()
    assert "heldout, record 1 is not shown" in text and "gone.mp4" in text
    assert 'data-clip="0"' in text and 'data-clip="1"' not in text
    assert "0.375" in text and "Text loss" in text

    shutil.copytree(folder / "one", tmp_path / "bare")
    for name in ("config.json", "trainer_state.json"):
        (tmp_path / "bare" / name).unlink()
    text = write_report([tmp_path / "bare"], tmp_path / "bare.html").read_text()
    assert "There is no checkpoint" in text and "no curves" in text and "attention_loss.layers" in text

    config = (folder / "one/config.yaml").read_text().replace("heldout.jsonl", "moved.jsonl")
    shutil.copytree(folder / "one", tmp_path / "moved")
    (tmp_path / "moved/config.yaml").write_text(config)
    assert "The set heldout cannot be read" in write_report([tmp_path / "moved"]).read_text()


def test_changed_settings_come_first(page):
    before, _, after = page.read_text().partition("Settings at their defaults")
    assert "<code>data.max_frames</code>" in before and "<code>data.decode_timeout</code>" not in before
    assert "<code>data.decode_timeout</code>" in after


def test_folder_without_a_run_and_a_run_given_twice_are_refused(folder, tmp_path):
    with pytest.raises(OptionError, match="is no output folder of swim-fast train: it has no config.yaml"):
        write_report([tmp_path])
    with pytest.raises(OptionError, match="given twice"):
        write_report([folder / "one", folder / "one"])


def test_of_many_frames_one_of_each_patch_is_shown_the_annotated_one(folder, monkeypatch):
    import contextlib

    from swim_fast.data.sample.builder import SampleBuilder
    from swim_fast.data.source.records import RecordFile
    from swim_fast.inference.loading import load_processor
    from swim_fast.options import Sampling
    from swim_fast.report import gallery

    record = RecordFile(folder / "heldout.jsonl")[0]
    builder = SampleBuilder(load_processor(folder / "one"), Sampling(max_frames=4))
    with contextlib.closing(builder.reader):
        assert list(builder.plan(record).frames) == [0, 2, 3, 4] and set(record.objects[0]) == {0, 2, 4}
        everything = gallery._view_clip("a", record, builder)
        monkeypatch.setattr(gallery, "MAX_FRAMES", 2)
        part = gallery._view_clip("a", record, builder)
    assert everything.patches == [0, 0, 1, 1] and part.patches == [0, 1]
    assert [[label.split()[1] for label in view.labels] for view in (everything, part)] == [list("0234"), list("04")]


def test_large_maps_are_drawn_coarser():
    from swim_fast.viz.run_report import _grid

    maps = np.zeros((3, 2, 24, 32), np.float32)
    maps[:, :, :, 16:] = 1
    grid = _grid(maps, maps.size // 4)
    assert (grid["h"], grid["w"]) == (12, 16) and len(grid["bytes"]) * 3 // 4 <= maps.size // 4
    assert (_grid(maps, maps.size)["h"], _grid(maps, maps.size)["w"]) == (24, 32)


def test_map_of_a_layer_is_the_fused_map_of_that_layer_alone(folder):
    import contextlib

    from swim_fast.data.sample.builder import SampleBuilder
    from swim_fast.inference.loading import load_checkpoint
    from swim_fast.inference.noun_maps import compute_layer_maps, compute_noun_maps
    from swim_fast.inference.prompt import encode_question, find_noun

    model, processor = load_checkpoint(folder / "one", device="cpu")
    builder, question = SampleBuilder(processor), "What does the square do?"
    with contextlib.closing(builder.reader):
        prompt = encode_question(builder, folder / "clip.mp4", "video", question, [find_noun(question, "square")])
    found = compute_layer_maps(model, processor, prompt.encoding, AttentionLoss(layers=[1, 2]))
    assert list(found) == ["fused", "layer 1", "layer 2"]
    for layer in (1, 2):
        alone = compute_noun_maps(model, processor, prompt.encoding, AttentionLoss(layers=[layer]))
        np.testing.assert_array_equal(found[f"layer {layer}"], alone)
    assert np.abs(found["layer 1"] - found["layer 2"]).max() > 0.01


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1240, "light"), (390, "dark")])
def test_words_slider_and_layers_change_the_picture(page, browser, width, scheme):
    complaints, requests = [], []
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_timeout(200)

    def picture() -> list[str]:
        return tab.evaluate("[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())")

    first = picture()
    assert len(first) == 2 and first[0] == first[1]  # the runs are copies of each other
    number = tab.locator("[data-word][aria-pressed=false]").first.get_attribute("data-word")
    word = tab.locator(f"[data-word='{number}']").first
    word.focus()
    tab.keyboard.press("Enter")
    assert word.get_attribute("aria-pressed") == "true" and tab.locator("[aria-pressed=true]").count() == 1
    second = picture()
    tab.locator("input[type=range]").focus()
    tab.keyboard.press("ArrowRight")
    third = picture()
    tab.locator("select").select_option("layer 2")
    fourth = picture()
    assert len({first[0], second[0], third[0], fourth[0]}) == 4
    assert tab.locator("output").inner_text().startswith("frame ")
    canvas = tab.locator("canvas").first
    assert max(canvas.evaluate("c => [c.width, c.height]")) <= LONGER_SIDE

    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)")
    assert tab.evaluate("window.hacked") is None and complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    tab.close()
