"""Position ids of a sample as its model would number it, without the model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.families import find_family
from swim_fast.position_ids import rope_index_function


class PositionIds:
    """Position ids of one sample; picklable, so that it can work in worker processes.

    They are computed by the function that numbers unpacked samples in the model, see `swim_fast.position_ids`.

    Args:
        config: the model's configuration.
        rule: `pretraining` or `library`, as for the model.

    Attributes:
        axes: numbers that the model has of a token: time, height and width, or its place alone.
    """

    def __init__(self, config: Any, rule: str = "pretraining"):
        from transformers import MODEL_MAPPING

        family = find_family(config)
        self.axes = 3 if family is not None and family.numbering else 1
        if self.axes == 1:
            return
        model_class = MODEL_MAPPING[type(config)]
        # Only the configuration: the method reads nothing else, and workers should carry no weights.
        self._model = model_class.__new__(model_class)
        nn.Module.__init__(self._model)
        self._model.config = config
        self._compute = rope_index_function(self._model, rule)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return int64 [4, L]: the position in the text, by which sequences are told apart, and time, height and width.

        With one axis it is the position in the text alone, [1, L].

        Args:
            inputs: one sample of L tokens: `input_ids` and `mm_token_type_ids` [L], and the processor's tensors.
        """
        ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
        if self.axes == 1:
            return torch.arange(len(ids))[None]
        about = {key: value.tolist() if key == "second_per_grid_ts" else value for key, value in inputs.items()}
        visual = {key: about[key] for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if key in about}
        positions, _ = self._compute(self._model, ids[None], types[None], **visual)
        return torch.cat((torch.arange(len(ids))[None], positions[:, 0]))
