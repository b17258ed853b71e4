"""Position ids of a sample as its model would number it, without the model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.data.source.errors import ProcessorError
from swim_fast.position_ids import rope_index_function


class PositionIds:
    """Position ids of one sample; picklable, so that it can work in worker processes.

    They are computed by the function that numbers unpacked samples in the model, see `swim_fast.position_ids`.

    Args:
        config: the model's configuration.
        rule: `pretraining` or `library`, as for the model.

    Raises:
        ProcessorError: the model does not number its tokens in this way.
    """

    def __init__(self, config: Any, rule: str = "pretraining"):
        from transformers import MODEL_MAPPING

        model_class = MODEL_MAPPING[type(config)]
        if not hasattr(model_class, "get_rope_index"):
            raise ProcessorError(f"{model_class.__name__} has no get_rope_index, so its samples cannot be packed")
        # Only the configuration: the method reads nothing else, and workers should carry no weights.
        self._model = model_class.__new__(model_class)
        nn.Module.__init__(self._model)
        self._model.config = config
        self._compute = rope_index_function(self._model, rule)

    @classmethod
    def find(cls, config: Any, rule: str = "pretraining") -> PositionIds | None:
        """Return the position ids of a model, None if it does not number its tokens in this way."""
        try:
            return cls(config, rule)
        except ProcessorError:
            return None

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return int64 [4, L]: the position in the text, by which sequences are told apart, and time, height and width.

        Args:
            inputs: one sample of L tokens: `input_ids` and `mm_token_type_ids` [L], and the processor's tensors.
        """
        ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
        about = {key: value.tolist() if key == "second_per_grid_ts" else value for key, value in inputs.items()}
        visual = {key: about[key] for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if key in about}
        positions, _ = self._compute(self._model, ids[None], types[None], **visual)
        return torch.cat((torch.arange(len(ids))[None], positions[:, 0]))
