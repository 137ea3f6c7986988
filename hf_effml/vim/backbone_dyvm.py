"""Dynamic Vision Mamba as a backbone for dense tasks."""

from typing import cast

from torch import Tensor, nn

from .backbone_vim import VimBackbone
from .dyvm_run import DyVMRun
from .modeling_dyvm import DyVMEncoder
from .token_reduction import take_rows
from .vim_run import VimRun


class _GridRun(DyVMRun):
    """Remembers the patches that are dropped, as they were."""

    dropped: Tensor | None = None

    def step(self, block: int, layer: nn.Module, stream: Tensor) -> Tensor:
        if self.prunes(block):
            self.dropped = self.patches(stream)
        return super().step(block, layer, stream)

    def patches(self, stream: Tensor) -> Tensor:
        """Every patch at its original place, `(batch, patches, hidden_size)`; a dropped one as it was."""
        tokens = take_rows(stream, self.layout.patch_rows)
        if self.dropped is None:
            return tokens
        return self.dropped.scatter(1, self.layout.positions.unsqueeze(2).expand_as(tokens), tokens)


class DyVMBackbone(DyVMEncoder, VimBackbone):
    r"""Dynamic Vision Mamba as a backbone for dense tasks (https://huggingface.co/papers/2504.04787).

    Its feature maps are the residual stream after chosen blocks, class token left out.

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
    run_class = _GridRun

    def _patches(self, run: VimRun, stream: Tensor) -> Tensor:
        return cast(_GridRun, run).patches(stream)


__all__ = ["DyVMBackbone"]
