"""The parts of Vision Mamba: patches to tokens, the norm, the bidirectional mixer, and a block of both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vim import VimConfig
from .selective_scan import ScanStream, selective_scan


def _drop_path(hidden_states: Tensor, rate: float, training: bool) -> Tensor:
    """Zero whole samples with probability `rate` and scale the others up."""
    if rate == 0.0 or not training:
        return hidden_states
    keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= rate
    return hidden_states * (keep / (1 - rate)).to(hidden_states.dtype)


class VimRMSNorm(nn.Module):
    """RMS norm without bias: statistics in float32, the result in the type of the weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis of `(batch, tokens, hidden_size)`."""
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)


class VimPatchEmbeddings(nn.Module):
    """Pixels to patch tokens in raster order."""

    def __init__(self, config: VimConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(batch, channels, height, width)` to `(batch, patches, hidden_size)`."""
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).mT


class VimConvolution(nn.Conv1d):
    """Depthwise convolution over the tokens up to each one, or from it on if `backwards`."""

    def __init__(self, channels: int, kernel: int, bias: bool, backwards: bool):
        super().__init__(channels, channels, kernel, groups=channels, bias=bias)
        self.backwards = backwards

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(batch, tokens, channels)` in and out."""
        # A 2-d convolution of one row takes the channels-last layout as it is; conv1d is ten times slower on a CPU.
        row = hidden_states.mT.unsqueeze(2)
        weight = (self.weight.flip(-1) if self.backwards else self.weight).unsqueeze(2)
        padding = self.kernel_size[0] - 1
        mixed = F.conv2d(row, weight, self.bias, padding=(0, padding), groups=self.groups).squeeze(2).mT
        return mixed[:, padding:] if self.backwards else mixed[:, : hidden_states.shape[1]]


def _projection(in_features: int, out_features: int, bias: bool, init_scale: float = 1.0) -> nn.Linear:
    """A linear layer of the mixer. It starts uniform within `init_scale / sqrt(in_features)`, its bias at zero."""
    linear = nn.Linear(in_features, out_features, bias)
    # Not a class of its own: tools that swap or quantise linear layers go by their type.
    linear.init_scale = init_scale
    return linear


class VimTimeStep(nn.Module):
    """The bias of the step sizes, which the scan adds in float32 whatever the type of `dt_proj`.

    With `init_steps` the projection and its bias start with step sizes between `time_step_min` and `time_step_max`.
    """

    def __init__(self, dt_proj: nn.Linear, init_steps: bool):
        super().__init__()
        self.bias = dt_proj.bias
        dt_proj.bias = None
        dt_proj.init_steps = self.init_steps = init_steps


def _take_official_names(mixer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded: the bias of the step sizes is that of `dt_proj` in official files."""
    for suffix in ("", "_b"):
        official = f"{prefix}dt_proj{suffix}.bias"
        if official in state:
            state[f"{prefix}time_step{suffix}.bias"] = state.pop(official)


class VimMixer(nn.Module):
    """The bidirectional Mamba mixer (Algorithm 1 of the paper).

    Its projections are shared; convolution, selection and scan are there per direction.

    Parameters carry the official names, apart from the bias of the step sizes; those of the backward direction end in
    `_b`.
    """

    def __init__(self, config: VimConfig):
        super().__init__()
        inner, rank, states = config.intermediate_size, int(config.time_step_rank), config.state_size
        self.divide_output = config.divide_output
        self.selection_sizes = [rank, states, states]
        self.in_proj = _projection(config.hidden_size, 2 * inner, config.use_bias)
        for suffix in ("", "_b"):
            conv = VimConvolution(inner, config.conv_kernel, config.use_conv_bias, backwards=bool(suffix))
            setattr(self, f"conv1d{suffix}", conv)
            setattr(self, f"x_proj{suffix}", _projection(inner, rank + 2 * states, bias=False))
            dt_proj = _projection(rank, inner, bias=True)
            setattr(self, f"dt_proj{suffix}", dt_proj)
            setattr(self, f"time_step{suffix}", VimTimeStep(dt_proj, config.symmetric_dt_init or not suffix))
            setattr(self, f"A{suffix}_log", nn.Parameter(torch.empty(inner, states)))
            setattr(self, f"D{suffix}", nn.Parameter(torch.empty(inner)))
        # One residual branch per block: its last projection is scaled down by the depth.
        scale = config.num_hidden_layers**-0.5
        self.out_proj = _projection(inner, config.hidden_size, config.use_bias, init_scale=scale)
        gamma = config.layer_scale_init_value
        self.gamma = None if gamma is None else nn.Parameter(torch.full((config.hidden_size,), float(gamma)))
        self.register_load_state_dict_pre_hook(_take_official_names)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        direction_gates: Tensor | None = None,
        feature: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens along the sequence, in both directions.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Normalised tokens.
            token_mask (`Tensor` of shape `(batch, tokens)`, *optional*):
                Factors on the tokens before and after the convolution; 0 hides a token from its neighbours.
            direction_gates (`Tensor` of shape `(batch, 2)`, *optional*):
                Factors on the forward and the backward output.
            feature (`str`, *optional*):
                Also return `"B"`, `"C"` `(batch, tokens, states)` or `"delta"` (the step size before bias and
                softplus, `(batch, tokens, inner)`): the mean of the two directions, in sequence order.

        Returns:
            `tuple[Tensor, Tensor | None]`: The output `(batch, tokens, hidden_size)` and the feature, if asked for.
        """
        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        y, streams = self._scan(u, token_mask, direction_gates)
        return self._output(y, z), self._feature(streams, feature)

    def _scan(
        self, u: Tensor, token_mask: Tensor | None, direction_gates: Tensor | None
    ) -> tuple[Tensor, list[ScanStream]]:
        """Both directions of all images: the sum of their outputs, and what was scanned."""
        if token_mask is not None:
            token_mask = token_mask.unsqueeze(-1).to(u.dtype)
            u = u * token_mask
        streams = [self._stream(u, suffix, token_mask) for suffix in ("", "_b")]
        forward_y, backward_y = selective_scan(*streams)
        if direction_gates is not None:
            gates = direction_gates.to(u.dtype).unsqueeze(-1).unsqueeze(-1)
            forward_y, backward_y = forward_y * gates[:, 0], backward_y * gates[:, 1]
        return forward_y + backward_y, streams

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate the sum of the directions and project it back."""
        output = self.out_proj(y * F.silu(z))
        if self.divide_output:
            output = output * 0.5
        return output if self.gamma is None else output * self.gamma

    def _stream(self, u: Tensor, suffix: str, token_mask: Tensor | None) -> ScanStream:
        """Convolution and selection of one direction, in sequence order; only the scan itself runs backwards."""
        x = F.silu(getattr(self, f"conv1d{suffix}")(u))
        if token_mask is not None:
            x = x * token_mask
        low_rank, B, C = getattr(self, f"x_proj{suffix}")(x).split(self.selection_sizes, dim=-1)
        dt, dt_bias = getattr(self, f"dt_proj{suffix}")(low_rank), getattr(self, f"time_step{suffix}").bias
        A = -torch.exp(getattr(self, f"A{suffix}_log").float())
        return ScanStream(x, dt, A, B, C, getattr(self, f"D{suffix}"), dt_bias, reverse=bool(suffix))

    def _feature(self, streams: list[ScanStream], name: str | None) -> Tensor | None:
        if name is None:
            return None
        both = [stream.dt if name == "delta" else getattr(stream, name) for stream in streams]
        return (both[0] + both[1]) * (0.5 if self.divide_output else 1.0)


class VimBlock(GradientCheckpointingLayer):
    """One block on the plain residual stream: `x + drop_path(mixer(norm(x)))`."""

    mixer_class: type[VimMixer] = VimMixer

    def __init__(self, config: VimConfig, drop_path_rate: float):
        super().__init__()
        self.norm = VimRMSNorm(config.hidden_size, config.layer_norm_eps)
        self.mixer = self.mixer_class(config)
        self.drop_path_rate = drop_path_rate

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None, feature: str | None = None, **mixing: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the block.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, hidden_size)`):
                Residual stream; any number of tokens.
            token_mask (`Tensor` of shape `(batch, tokens)`, *optional*):
                See [`VimMixer`].
            feature (`str`, *optional*):
                `"hidden"` also returns the mixer's output before the addition; others, see [`VimMixer`].
            mixing (`dict`, *optional*):
                Further arguments of the mixer.

        Returns:
            `tuple[Tensor, Tensor | None]`: The new residual stream, and what the mixer returned beside its output, or
            the feature.
        """
        selection = None if feature == "hidden" else feature
        mixed, value = self.mixer(self.norm(hidden_states), token_mask, feature=selection, **mixing)
        mixed = mixed.to(hidden_states.dtype)
        stream = hidden_states + _drop_path(mixed, self.drop_path_rate, self.training)
        return stream, mixed if feature == "hidden" else value


__all__ = [
    "VimBlock",
    "VimConvolution",
    "VimMixer",
    "VimPatchEmbeddings",
    "VimRMSNorm",
    "VimTimeStep",
]
