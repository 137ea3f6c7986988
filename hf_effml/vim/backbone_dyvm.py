"""Dynamic Vision Mamba as a backbone for dense tasks."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BackboneOutput

from .backbone_vim import VimBackbone
from .modeling_dyvm import DyVMEncoder
from .token_reduction import take_rows
from .token_selection import TokenLayout


class DyVMBackbone(DyVMEncoder, VimBackbone):
    r"""
    Dynamic Vision Mamba as a backbone for dense tasks (https://huggingface.co/papers/2504.04787): the residual stream
    after chosen blocks as feature maps, class token left out.

    A token that was dropped keeps its last value in all later maps. Tokens go back to the grid only where a map is
    taken.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml import DyVMBackbone, DyVMConfig
    >>> config = DyVMConfig(
    ...     image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, out_features=["stage1", "stage3"]
    ... )
    >>> maps = DyVMBackbone(config).eval()(torch.zeros(1, 3, 32, 32)).feature_maps
    >>> [tuple(map_.shape) for map_ in maps]
    [(1, 32, 4, 4), (1, 32, 4, 4)]

    ```
    """

    _plain_class = VimBackbone

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """
        Compute feature maps; images of any size are accepted.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`): Normalised images.
            output_hidden_states (`bool`, *optional*): Also return the tokens after every block.
            return_dict (`bool`, *optional*): `False` returns a plain tuple.

        Returns:
            `BackboneOutput`: `feature_maps`, one `(batch, hidden_size, rows, columns)` tensor per entry of
            `out_features`.
        """
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        stream, _ = self._embed(pixel_values, interpolate_pos_encoding=True)
        grid, run = self._grid(pixel_values), self._begin(stream)
        all_states, maps = [stream], []
        tokens = None
        for index, stage in enumerate(self.stage_names):
            if index:
                if self.pruning and run.prunes(index - 1):
                    tokens = _full_grid(stream, run.layout, tokens)
                layer = self.layers[index - 1]
                stream = run.step(index - 1, layer, stream) if self.pruning else layer(stream)[0]
                all_states.append(stream)
            if stage in self.out_features:
                map_ = _full_grid(stream, run.layout, tokens)
                maps.append(map_.mT.unflatten(2, grid).to(self.dtype))
        output = BackboneOutput(feature_maps=tuple(maps), hidden_states=tuple(all_states) if keep_all else None)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


def _full_grid(stream: Tensor, layout: TokenLayout, before: Tensor | None) -> Tensor:
    """The patch tokens at their original places `(batch, patches, hidden_size)`; what is gone as it was `before`."""
    tokens = take_rows(stream, layout.patch_rows)
    if before is None:
        return tokens
    return before.scatter(1, layout.positions.unsqueeze(2).expand_as(tokens), tokens)


__all__ = ["DyVMBackbone"]
