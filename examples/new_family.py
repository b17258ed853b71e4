"""A family of models of one's own: LLaVA-1.5, which takes images and is not among the supported ones.

    python examples/new_family.py

The model is tiny and random, but its classes, processor and data path are the real ones. docs/families.md explains each
part; tests/families holds what a family has to pass.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from swim_fast import Collator, SampleBuilder, attach_noun_attention, mask_alignment_loss
from swim_fast.data.batch.collation import model_inputs
from swim_fast.data.source.records import RecordFile
from swim_fast.demo.tiny_model import train_tokenizer
from swim_fast.families import Clip, Family, Vision, VisualLayout, register_family
from swim_fast.families.layout import shape_only

SIDE, PATCH = 56, 14
TEMPLATE = """{%- for message in messages %}{{ message.role ~ ': ' }}{%- for part in message.content %}
{{- '<image>' if part.type == 'image' else part.text }}{%- endfor %}{{ '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


class SquareLayout(VisualLayout):
    """The middle square of an image, in rows of tokens."""

    kinds = ("image",)

    def view(self, kind: str, height: int, width: int) -> tuple[int, int, int, int]:
        """The processor resizes the shorter side and cuts off the ends of the longer one."""
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return top, top + side, left, left + side

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict:
        """All that the number of tokens depends on is the size of the pixels, which is always the same."""
        return {"pixel_values": shape_only(1, 3, SIDE, SIDE)}

    def grid(self, kind: str, inputs: dict) -> tuple[int, int, int]:
        """One picture of so many rows and columns of tokens."""
        return 1, SIDE // PATCH, SIDE // PATCH


def minimal_pass(model: nn.Module) -> Tensor:
    """Features of an empty image, for batches without one."""
    config, pixels = model.config, torch.zeros(1, 3, SIDE, SIDE, device=model.device)
    about = {"vision_feature_layer": config.vision_feature_layer, "vision_feature_select_strategy": "default"}
    return torch.cat(model.model.get_image_features(pixels, **about).pooler_output)


def vision(config: LlavaConfig) -> Vision:
    """Sizes of the vision tower, for estimates of memory and operations."""
    tower = config.vision_config
    sizes = tower.hidden_size, tower.num_hidden_layers, tower.num_attention_heads, tower.intermediate_size
    return Vision(*sizes, patch_values=3 * tower.patch_size**2, patches_per_token=1)


FAMILY = Family(
    name="LLaVA-1.5",
    model_types=("llava",),
    processors=("LlavaProcessor",),
    layout=SquareLayout,
    language_model="model.language_model",
    visual="model.vision_tower",
    mergers=("model.multi_modal_projector",),
    minimal_pass=minimal_pass,
    vision=vision,
)


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return a tiny model with random weights, and its processor."""
    tokenizer = train_tokenizer(["user: Where is the dog? assistant: The dog is on the left."] * 4, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **size},
        vision_config={"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH, **size},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    picture = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    about = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), LlavaProcessor(picture, tokenizer, chat_template=TEMPLATE, **about)


def write_record(folder: Path) -> Path:
    """Write an image with a bright object in its upper left, and a record that asks about it."""
    pixels, mask = np.full((80, 120, 3), 60, np.uint8), np.zeros((80, 120), np.uint8)
    pixels[10:40, 25:55], mask[10:40, 25:55] = 255, 1
    Image.fromarray(pixels).save(folder / "a.png")
    runs = np.flatnonzero(np.diff(mask.T.flatten(), prepend=0, append=0))
    counts = np.diff([0, *runs, mask.size]).tolist()
    question, answer = "<image>Where is the <ins>dog</ins>?", "On the left."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    annotation = [{"0": {"segmentation": {"size": [80, 120], "counts": counts}}}]
    path = folder / "records.jsonl"
    path.write_text(json.dumps({"image": "a.png", "conversations": turns, "annotation": annotation}) + "\n")
    return path


def main() -> float:
    register_family(FAMILY)
    model, processor = build()
    with tempfile.TemporaryDirectory() as folder:
        samples = [SampleBuilder(processor)(record) for record in RecordFile(write_record(Path(folder)))]
    batch = Collator(processor)(samples)
    print(f"tokens of the image's cells:\n{samples[0].cells[0].numpy()}")
    print(f"tokens of the noun: {batch['noun_queries'].position.tolist()}")
    attach_noun_attention(model)
    outputs = model(**model_inputs(batch), labels=batch["labels"], noun_queries=batch["noun_queries"])
    loss = mask_alignment_loss(outputs.attentions, batch["mask_targets"])
    (outputs.loss + loss).backward()
    print(f"text loss {outputs.loss.item():.3f}, mask loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
