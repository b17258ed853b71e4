import pickle

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, SiglipImageProcessor
from transformers.video_utils import VideoMetadata

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Sample
from swim_fast.data.sample.conversation import Conversation
from swim_fast.data.sample.encoding import Encoder
from swim_fast.data.source.errors import DataError
from swim_fast.data.video.reader import MediaInfo
from swim_fast.errors import ProcessorError
from swim_fast.families.layout import Clip
from swim_fast.families.patches import PackedFrames, PatchLayout
from swim_fast.families.sizes import PixelLimits
from swim_fast.options import Sampling

LIMITS = {"shortest_edge": 20 * 28 * 28, "longest_edge": 40 * 28 * 28}  # pixels of a frame or image
OTHER = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # as Qwen3-VL's
TEXT = "<|im_start|>user\n<|vision_start|><|{}_pad|><|vision_end|>Where is the dog?<|im_end|>\n<|im_start|>assistant\n"


IMAGE = Clip([0], 1.0, 1, 91, 130)


def conversation_about(kind):
    text, token = TEXT.format(kind), f"<|{kind}_pad|>"
    return Conversation(text, (), (), (), (text.index(token), text.index(token) + len(token)))


def random_frames(count, height, width):
    return np.random.default_rng(count + height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def planes(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


@pytest.mark.parametrize("options", [{}, OTHER, {"merge_size": 1}, {"resample": 2}])
@pytest.mark.parametrize("shape", [(6, 90, 150), (2, 301, 97), (4, 140, 168), (1, 55, 333)])
def test_patches_are_those_of_the_processor(shape, options):
    frames, video = random_frames(*shape), shape[0] > 1
    processor = (Qwen2VLVideoProcessor if video else Qwen2VLImageProcessor)(**options)
    layout = PatchLayout.from_processor(processor)
    about = {"size": LIMITS, "input_data_format": "channels_first", "return_tensors": "pt"}
    if video:
        wanted = processor([planes(frames)], **about, do_sample_frames=False, cap_pixels_per_frame=False)
        wanted, grid = wanted["pixel_values_videos"], wanted["video_grid_thw"]
    else:
        wanted = processor([planes(frames)[0]], **about)
        wanted, grid = wanted["pixel_values"], wanted["image_grid_thw"]
    size = PixelLimits(layout.factor, *LIMITS.values()).size(*shape)
    packed = PackedFrames.of(np.stack([layout.resize(frame, size) for frame in frames]), layout)
    assert grid.tolist() == [list(layout.grid(*packed.sizes[0]))]
    assert torch.equal(packed.patches(), wanted)
    assert torch.equal(packed.patches(torch.bfloat16), wanted.bfloat16())
    assert packed.data.numel() <= wanted.numel() and packed.data.element_size() == 1


class Flipped(Qwen2VLImageProcessor):
    def patchify(self, images, *args, **kwargs):
        return super().patchify(images.flip(-1), *args, **kwargs)


@pytest.mark.parametrize(
    "processor, reason",
    [
        (Flipped(), "Flipped makes other patches than Qwen2-VL's"),
        (Qwen2VLImageProcessor(do_normalize=False), "Qwen2VLImageProcessor .* do_normalize"),
        (Qwen2VLImageProcessor(do_resize=False), "Qwen2VLImageProcessor .* do_resize"),
        (SiglipImageProcessor(), "SiglipImageProcessor .* patch_size, merge_size, temporal_patch_size"),
    ],
)
def test_other_patches_are_refused(processor, reason):
    with pytest.raises(ProcessorError, match=reason):
        PatchLayout.from_processor(processor)


@pytest.mark.parametrize("cap", [None, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 30)])
def test_encoding_is_that_of_the_processor(processor, sampling, cap, monkeypatch):
    if cap is not None:  # else as the installed release has it
        monkeypatch.setattr(processor.video_processor, "cap_pixels_per_frame", cap)
    monkeypatch.setattr(processor.video_processor, "max_video_tokens", 60)
    frames, fps = random_frames(6, 150, 220), 24.0
    indices, info = [0, 12, 24, 36, 48, 60], MediaInfo(72, fps, 150, 220)
    conversation = conversation_about("video")
    encode = Encoder(processor, sampling)
    found = encode.video(conversation, frames, indices, info)
    limits = {}
    if sampling.max_pixels is not None:
        limits["size"] = {"shortest_edge": sampling.min_pixels, "longest_edge": sampling.max_pixels}
    metadata = VideoMetadata(total_num_frames=72, fps=fps, duration=3.0, frames_indices=indices)
    about = {"input_data_format": "channels_first", "do_sample_frames": False, "video_metadata": [metadata]}
    wanted = processor(
        text=[conversation.text],
        videos=[planes(frames)],
        videos_kwargs={**limits, **about},
        text_kwargs={"return_mm_token_type_ids": True, "return_offsets_mapping": True, "add_special_tokens": False},
        return_tensors="pt",
    )
    for key in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(found.inputs[key], wanted[key][0])
    assert torch.equal(found.offsets, wanted["offset_mapping"][0])
    assert torch.equal(found.inputs["video_grid_thw"], wanted["video_grid_thw"])
    assert torch.equal(found.inputs["pixel_values_videos"].patches(), wanted["pixel_values_videos"])
    assert found.inputs["second_per_grid_ts"].tolist() == pytest.approx(
        [float(seconds) for seconds in wanted["second_per_grid_ts"]]
    )
    clip = Clip(indices, fps, 72, 150, 220)
    text = len(encode.text_offsets(conversation))
    assert len(found) == encode.count("video", conversation, text, clip)
    assert found.cells.flatten().tolist() == found.visual().tolist()
    resized = np.stack([encode.resizer("video", clip)(frame) for frame in frames])
    again = encode.video(conversation, resized, indices, info)
    assert torch.equal(again.inputs["pixel_values_videos"].data, found.inputs["pixel_values_videos"].data)


def test_encoding_of_an_image_is_that_of_the_processor(processor):
    pixels, conversation = random_frames(1, 91, 130)[0], conversation_about("image")
    encode = Encoder(processor, Sampling())
    found = encode.image(conversation, pixels)
    wanted = processor(text=[conversation.text], images=[planes(pixels[None])[0]], return_tensors="pt")
    assert torch.equal(found.inputs["input_ids"], wanted["input_ids"][0])
    assert torch.equal(found.inputs["image_grid_thw"], wanted["image_grid_thw"])
    assert torch.equal(found.inputs["pixel_values"].patches(), wanted["pixel_values"])
    assert len(found) == encode.count("image", conversation, len(encode.text_offsets(conversation)), IMAGE)


def test_an_extreme_shape_is_the_records_fault(processor):
    encode = Encoder(processor, Sampling())
    with pytest.raises(DataError, match="the model's processor refuses the record: absolute aspect ratio"):
        encode.count("video", conversation_about("video"), 1, Clip([0, 1], 1.0, 2, 4, 1000))
    with pytest.raises(DataError, match="absolute aspect ratio"):
        encode.count("image", conversation_about("image"), 1, Clip([0], 1.0, 1, 1000, 4))


def test_frames_of_a_batch_become_patches_where_the_model_is(processor):
    """Of several sizes, through a pickle, in the model's dtype; without `frames` the batch holds them already."""
    encode, conversation = Encoder(processor, Sampling()), conversation_about("video")
    samples = []
    for count, height, width in ((2, 60, 90), (4, 150, 100)):
        info = MediaInfo(count, 2.0, height, width)
        encoding = encode.video(conversation, random_frames(count, height, width), range(count), info)
        samples.append(Sample("", encoding.inputs))
    patches = torch.cat([sample.inputs["pixel_values_videos"].patches() for sample in samples])
    batch = pickle.loads(pickle.dumps(Collator(processor, frames=True)))(samples)
    frames = batch["pixel_values_videos"]
    assert isinstance(frames, PackedFrames) and len(frames) == len(patches) == batch["video_grid_thw"].prod(1).sum()
    assert torch.equal(pickle.loads(pickle.dumps(frames)).patches(), patches)
    assert torch.equal(model_inputs(batch, "cpu", torch.bfloat16)["pixel_values_videos"], patches.bfloat16())
    assert torch.equal(model_inputs(batch)["pixel_values_videos"], patches)
    assert torch.equal(Collator(processor)(samples)["pixel_values_videos"], patches)
