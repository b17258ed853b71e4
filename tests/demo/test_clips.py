from dataclasses import replace

import numpy as np
import pytest

from swim_fast.data.source.masks import decode_segmentation
from swim_fast.data.source.records import RecordFile
from swim_fast.data.source.tags import strip_tags
from swim_fast.data.video.reader import FrameReader
from swim_fast.demo.clips import encode_annotations, mix_up_masks, render, write_demo_data, write_video
from swim_fast.demo.drawing import COLOURS, SHADES, SHAPES, SUPERSAMPLING, background, sprite
from swim_fast.demo.scenes import (
    DIRECTIONS,
    NOUNS,
    SIZES,
    STATES,
    ClipOptions,
    Item,
    Scene,
    is_held_out,
    random_scene,
)
from swim_fast.options import Decoding

SEED = 11


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demo_data(
        tmp_path_factory.mktemp("demo"), seed=SEED, train_clips=6, heldout_clips=3, workers=2, progress=False
    )


def item(noun="box", start=(70.0, 56.0), end=None, radius=30.0, tilt=0.0, direction=""):
    return Item(noun, "shines", "big", direction, radius, tilt, start, end or start)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_whatever_the_workers(data, tmp_path):
    again = write_demo_data(tmp_path, seed=SEED, train_clips=6, heldout_clips=3, workers=1, progress=False)
    assert contents(again.folder) == contents(data.folder)
    assert len(contents(data.folder)) == 6 + 3 + 3


def test_other_seed_other_scenes():
    assert random_scene(1, "train", 0) != random_scene(2, "train", 0)
    assert random_scene(1, "train", 0) != random_scene(1, "train", 1)


def test_held_out_scenes_show_sets_of_nouns_that_training_never_does():
    def sets(split):
        return {frozenset(i.noun for i in random_scene(SEED, split, number).items) for number in range(80)}

    train, heldout = sets("train"), sets("heldout")
    assert not train & heldout
    assert all(map(is_held_out, heldout))
    for nouns in heldout:  # every noun, and every two of them, are known
        assert all(any(nouns - {noun} <= other for other in train) for noun in nouns)


def test_attributes_are_balanced():
    items = [i for number in range(300) for i in random_scene(SEED, "train", number).items]
    for values, attribute in ((NOUNS, "noun"), (STATES, "state"), (SIZES, "size"), (DIRECTIONS, "direction")):
        shares = [np.mean([getattr(i, attribute) == value for i in items]) for value in values]
        assert min(shares) > 0.75 / len(list(values)), (attribute, shares)


def test_objects_stay_in_the_picture_and_in_sight():
    options = ClipOptions()
    for number in range(10):
        scene = random_scene(SEED, "heldout", number, options)
        assert len({i.noun for i in scene.items}) == len({i.state for i in scene.items}) == len(scene.items) == 3
        assert all(
            i.radius <= value <= extent - i.radius
            for i in scene.items
            for point in (i.start, i.end)
            for value, extent in zip(point, (options.width, options.height), strict=True)
        )
        _, masks = render(scene, options)
        silhouettes = [render(replace(scene, items=(i,)), options)[1][:, 0] for i in scene.items]
        for index, whole in enumerate(silhouettes):
            assert (masks[:, index] <= whole).all()
            assert masks[:, index].sum() > 0.3 * whole.sum()


def test_directions_are_those_of_the_path():
    for number in range(30):
        for i in random_scene(SEED, "train", number).items:
            moved = np.sign(np.subtract(i.end, i.start).round(6))
            assert tuple(moved) == DIRECTIONS[i.direction]


def test_mask_is_where_the_object_changed_the_picture():
    scene = Scene((item("heart", start=(50.3, 50.7), end=(90.1, 70.2), direction="down"),), (0,), 5)
    options = ClipOptions()
    frames, masks = render(scene, options)
    size = (options.width * SUPERSAMPLING, options.height * SUPERSAMPLING)
    empty = background(options.width, options.height, np.random.default_rng(5)).resize(size, 2).reduce(SUPERSAMPLING)
    difference = np.abs(frames.astype(int) - np.asarray(empty).astype(int)).max(-1)
    assert difference[masks[:, 0]].min() > 0
    assert (difference[~masks[:, 0]] > 0).sum() < 0.35 * masks.sum()  # only pixels covered by less than a half
    assert masks.sum(axis=(1, 2, 3)).std() < 10  # the object does not change its size on the way


def test_mask_of_a_box_is_exact_to_the_pixel():
    """An upright box spans 1.7 × 1.6 radii: with radius 20 around (60, 52), x from 43 to 77 and y from 36 to 68."""
    _, masks = render(Scene((item("box", start=(60.0, 52.0), radius=20.0),), (0,), 0))
    rows, columns = np.flatnonzero(masks[0, 0].any(1)), np.flatnonzero(masks[0, 0].any(0))
    assert abs(rows[0] - 36) <= 1 and abs(rows[-1] - 67) <= 1
    assert abs(columns[0] - 43) <= 1 and abs(columns[-1] - 76) <= 1
    assert masks[0, 0].sum() == len(rows) * len(columns)


def test_later_items_hide_earlier_ones():
    below, above = item("ball", radius=30.0), item("box", radius=20.0)
    _, masks = render(Scene((below, above), (0,), 0))
    _, alone = render(Scene((above,), (0,), 0))
    assert not (masks[:, 0] & masks[:, 1]).any()
    assert (masks[:, 1] == alone[:, 0]).all()
    _, whole = render(Scene((below,), (0,), 0))
    assert (masks[:, 0] == whole[:, 0] & ~alone[:, 0]).mean() > 0.999  # they may differ along the common edge


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_is_drawn_in_its_own_colour(noun):
    for shade in SHADES:
        colours, silhouette = sprite(noun, shade, 24.0, 10.0)
        inside = np.asarray(silhouette) > 0
        assert 0.15 < inside.mean() < 0.85 and not inside[0].any() and not inside[:, -1].any()
        mean = np.median(np.asarray(colours)[inside], axis=0)
        hues = {n: np.subtract(c, np.mean(c)) for n, c in COLOURS.items()}
        likeness = {n: hue @ (mean - mean.mean()) / np.linalg.norm(hue) for n, hue in hues.items()}
        assert max(likeness, key=likeness.get) == noun
    light, dark = (np.asarray(sprite(noun, shade, 24.0, 0.0)[0]).mean() for shade in ("light", "dark"))
    assert light > dark + 40


def test_nouns_differ_in_shape():
    shapes = [np.asarray(sprite(noun, "light", 24.0, 0.0)[1]) > 0 for noun in SHAPES]
    for i, one in enumerate(shapes):
        for other in shapes[i + 1 :]:
            assert (one & other).sum() < 0.93 * (one | other).sum()


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_videos_decode_to_what_was_drawn(data, reader):
    scene = random_scene(SEED, "train", 2)
    frames, _ = render(scene)
    path = data.folder / "clips" / "train_00002.mp4"
    with FrameReader(Decoding(reader=reader)) as decoder:
        info = decoder.info(path)
        decoded = decoder.frames(path, range(info.num_frames))
    assert (info.num_frames, info.fps, info.height, info.width) == (4, 2.0, 112, 140)
    error = np.abs(decoded.astype(int) - frames.astype(int)).mean(axis=(1, 2, 3))
    assert error.max() < 8
    other = np.abs(decoded[0].astype(int) - frames[-1].astype(int)).mean()
    assert other > error[0]  # and not any frame will do


def test_videos_are_h264(data):
    import av

    with av.open(str(data.folder / "clips" / "heldout_00000.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_annotations_are_the_drawn_masks(data):
    options = ClipOptions()
    for split, path in (("train", data.train), ("heldout", data.heldout)):
        file = RecordFile(path)
        for record in map(file.__getitem__, range(len(file))):
            number = int(record.name.split("_")[1])
            scene = random_scene(SEED, split, number)
            _, masks = render(scene)
            nouns = [turn.text[a:b] for turn in map(clean, record.turns) for a, b in turn.spans]
            assert len(nouns) == len(record.objects) > 0
            for noun, frames in zip(nouns, record.objects, strict=True):
                index = [i.noun for i in scene.items].index(noun)
                assert set(frames) <= set(scene.annotated) and frames
                for frame, segmentation in frames.items():
                    decoded = decode_segmentation(segmentation, options.height, options.width)
                    assert (decoded == masks[frame, index]).all()
                    assert decoded[14::28, 14::28].any()


class clean:
    """A turn's text without tags, and where the nouns are."""

    def __init__(self, turn):
        self.text, self.spans = strip_tags(turn.text)


def test_records_are_valid_and_say_what_is_to_be_seen(data):
    train, heldout = RecordFile(data.train), RecordFile(data.heldout)
    assert 12 <= len(train) <= 18 and len(heldout) == 9
    for file, tags in ((train, 2), (heldout, 1)):
        for record in map(file.__getitem__, range(len(file))):
            assert record.kind == "video" and record.media.is_file()
            question, answer = record.turns  # one of each: no answer may be inferred from another
            assert question.text.startswith("<video>\n") and len(record.objects) == tags
            split, number = record.name.split("_")[:2]
            scene = {i.noun: i for i in random_scene(SEED, split, int(number)).items}
            about = clean(question)
            ((a, b),) = about.spans
            noun = about.text[a:b]
            assert clean(answer).text == f"The {noun} {scene[noun].state}."


def test_frames_show_the_state():
    """A box that shines is light throughout, one that blinks light in the even frames."""
    for state, shades in STATES.items():
        frames, masks = render(Scene((replace(item(), state=state),), (0, 1, 2, 3), 0))
        seen = [frame[mask].mean() for frame, mask in zip(frames, masks[:, 0], strict=True)]
        expected = [np.asarray(sprite("box", shade, 30.0, 0.0)[0].reduce(4))[20:40, 20:40].mean() for shade in SHADES]
        light = [shades[t % 2] == "light" for t in range(4)]
        assert [value > np.mean(expected) for value in seen] == light, state


def test_wrong_masks_are_those_of_another_object_of_the_clip(data):
    train, wrong = RecordFile(data.train), RecordFile(data.wrong_masks)
    own = {record.name: record for record in map(train.__getitem__, range(len(train)))}
    assert len(wrong) == len(train)
    for record in map(wrong.__getitem__, range(len(wrong))):
        assert record.turns == own[record.name].turns and record.objects[0] == record.objects[1]
        clip = record.name.rsplit("_", 1)[0]
        others = [o.objects[0] for name, o in own.items() if name != record.name and name.startswith(f"{clip}_")]
        assert record.objects[0] in others and record.objects[0] != own[record.name].objects[0]
    assert mix_up_masks([{"annotation": [1]}]) == []  # there is no other


def test_hidden_objects_are_not_annotated():
    scene = Scene((item("box", radius=15.0), item("ball", radius=30.0)), (0, 2), 0)
    _, masks = render(scene)
    hidden, seen = encode_annotations(scene, masks)
    assert hidden == {} and set(seen) == {"0", "2"}


def test_an_object_too_small_to_point_at_is_not_annotated():
    """A box of 14 pixels between the centres of the 28-pixel squares covers none of them."""
    scene = Scene((item("box", start=(84.0, 84.0), radius=8.0),), (0,), 0)
    _, masks = render(scene)
    assert masks.any() and encode_annotations(scene, masks) == [{}]
    assert encode_annotations(scene, masks, ClipOptions(cell=8)) != [{}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 139}, "clips of 139x112 pixels: H.264 wants an even width and height"),
        ({"height": 102}, "clips of 140x102 pixels: both must be at least 104"),
        ({"annotated": 5}, "annotated is 5; it must lie between 1 and num_frames, 4"),
        ({"min_objects": 4}, "min_objects 4 and max_objects 3 must be in order and lie between 2 and 3"),
        ({"max_objects": 7}, "min_objects 3 and max_objects 7 must be in order"),
    ],
)
def test_options_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        ClipOptions(**values)


def test_a_crowd_is_refused(monkeypatch):
    monkeypatch.setattr("swim_fast.demo.scenes.SIZES", {"small": (40.0, 40.0), "big": (44.0, 44.0)})
    with pytest.raises(ValueError, match="3 objects find no place in clips of 176x176 pixels"):
        random_scene(0, "train", 0, ClipOptions(width=176, height=176))


def test_odd_sizes_of_clip(tmp_path):
    frames = np.full((5, 50, 38, 3), 200, np.uint8)
    write_video(tmp_path / "a.mp4", frames)
    with FrameReader(Decoding(reader="pyav")) as decoder:
        assert np.abs(decoder.frames(tmp_path / "a.mp4", [4])[0].astype(int) - 200).max() < 4
