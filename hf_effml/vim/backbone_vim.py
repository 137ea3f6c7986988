"""Vision Mamba as a backbone for dense tasks."""

from typing import Any

from torch import Tensor
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from .configuration_vim import VimConfig
from .modeling_vim import VimEncoder
from .vim_run import VimRun


class VimBackbone(BackboneMixin, VimEncoder):
    r"""Vision Mamba as a backbone for dense tasks.

    Its feature maps are the residual stream after chosen blocks, class token left out.

    Works in `UperNetForSemanticSegmentation` and everything else that takes a `backbone_config`.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import VimBackbone, VimConfig
    >>> config = VimConfig(
    ...     image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, out_features=["stage1", "stage2"]
    ... )
    >>> maps = VimBackbone(config)(torch.zeros(1, 3, 32, 32)).feature_maps
    >>> [tuple(map_.shape) for map_ in maps]
    [(1, 32, 4, 4), (1, 32, 4, 4)]

    ```
    """

    has_attentions = False

    def __init__(self, config: VimConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """Compute feature maps; images of any size are accepted.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`):
                Normalised images.
            output_hidden_states (`bool`, *optional*):
                Also return the tokens after every block.
            return_dict (`bool`, *optional*):
                `False` returns a plain tuple.

        Returns:
            `BackboneOutput`: `feature_maps`, one `(batch, hidden_size, rows, columns)` tensor per entry of
            `out_features`.
        """
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        stream, class_positions = self._embed(pixel_values, interpolate_pos_encoding=True)
        grid, run = self._grid(pixel_values), self.begin_run(stream, class_positions)
        all_states, maps = [stream], []
        for index, stage in enumerate(self.stage_names):
            if index:
                stream = run.step(index - 1, self.layers[index - 1], stream)
                all_states.append(stream)
            if stage in self.out_features:
                maps.append(self._patches(run, stream).mT.unflatten(2, grid).to(self.dtype))
        output = BackboneOutput(feature_maps=tuple(maps), hidden_states=tuple(all_states) if keep_all else None)
        return output if self._as_dict(return_dict) else output.to_tuple()

    def _patches(self, run: VimRun, stream: Tensor) -> Tensor:
        """Every patch at its original place, `(batch, patches, hidden_size)`."""
        rows = [row for row in range(stream.shape[1]) if row not in run.class_positions]
        return stream[:, rows]


__all__ = ["VimBackbone"]
