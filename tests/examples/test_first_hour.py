"""The commands of examples/first_hour.md run in order, on three clips as DAVIS has them."""

import json

import numpy as np
import pytest
from PIL import Image

from swim_fast.cli import main
from swim_fast.demo.run import run_demo
from tests.docs.pages import ROOT, blocks, commands

PAGE = ROOT / "examples/first_hour.md"
CLIPS = {"yard": "red box", "street": "green car", "park": "blue kite"}


def write_davis(root):
    """Write clips of four frames with one moving object each: JPEGs, and PNGs with a palette."""
    for clip, colour in zip(CLIPS, ((220, 40, 40), (40, 200, 60), (60, 60, 220)), strict=True):
        frames, masks = root / "JPEGImages/480p" / clip, root / "Annotations/480p" / clip
        frames.mkdir(parents=True), masks.mkdir(parents=True)
        for i in range(4):
            mask = np.zeros((96, 128), np.uint8)
            mask[30:70, 10 + 15 * i : 50 + 15 * i] = 1
            picture = np.where(mask[..., None] == 1, np.uint8(colour), np.uint8(90))
            Image.fromarray(picture).save(frames / f"{i:05d}.jpg")
            numbers = Image.fromarray(mask, "P")
            numbers.putpalette([0, 0, 0, 128, 0, 0])
            numbers.save(masks / f"{i:05d}.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")  # an untrained model answers anything
def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWIM_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = ["training.max_steps=2", "training.eval_steps=2", "training.per_device_train_batch_size=2"]
    run_demo("configs/demo.yaml", [*short, "training.dataloader_num_workers=0"], train_clips=8, heldout_clips=2)
    write_davis(tmp_path / "mine/DAVIS")
    names = {clip: {"1": name} for clip, name in CLIPS.items()}
    (tmp_path / "mine/names.json").write_text(json.dumps(names), encoding="utf-8")

    typed = [words for block in blocks("bash", pages=[PAGE]) for words in commands(block)]
    assert len(typed) == 8
    for words in typed:
        assert words[0] == "swim-fast"
        assert main(words[1:]) == 0, (words, capsys.readouterr())
    assert len((tmp_path / "mine/train.jsonl").read_text().splitlines()) == len(CLIPS)
    for made in ("record.html", "heart.png", "report.html"):
        assert (tmp_path / "mine" / made).stat().st_size > 1000
    assert list((tmp_path / "mine/words").iterdir())
