"""What the benchmarks of Vim, R-MeeTo and DyVM compare with, and the images they run on."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_effml.utils.imports import require, usable
from hf_effml.vim import vim_blocks
from hf_effml.vim.configuration_vim import VimConfig
from hf_effml.vim.modeling_rmeeto import MergeRun, TokenMerger
from hf_effml.vim.modeling_vim import VimForImageClassification
from hf_effml.vim.selective_scan import ScanStream


def loop_scan(*streams: ScanStream) -> tuple[Tensor, ...]:
    """The scan as mamba-ssm's reference computes it: everything materialised, then a loop that indexes the tokens.

    Args:
        streams ([`ScanStream`]):
            As for [`selective_scan`].

    Returns:
        `tuple[Tensor, ...]`: One output per stream.
    """
    return tuple(_loop_scan(stream) for stream in streams)


def _loop_scan(stream: ScanStream) -> Tensor:
    # As the original: (batch, channels, tokens), and a backward direction is a flipped sequence.
    x, dt, B, C = (
        (tensor.flip(1) if stream.reverse else tensor).mT for tensor in (stream.x, stream.dt, stream.B, stream.C)
    )
    with torch.autocast(x.device.type, enabled=False):
        u, B, C = x.float(), B.float(), C.float()
        dt = F.softplus(dt.float() + stream.dt_bias[:, None].float())
        decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, stream.A))
        update = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
        state, outputs = torch.zeros_like(decay[:, :, 0]), []
        for index in range(u.shape[2]):
            state = decay[:, :, index] * state + update[:, :, index]
            outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, index]))
        y = (torch.stack(outputs, dim=2) + u * stream.D[:, None]).to(x.dtype).mT
    return y.flip(1) if stream.reverse else y


@contextmanager
def scan_replaced_by_loop() -> Iterator[None]:
    """Lets every Vim scan with [`loop_scan`] inside a `with` block."""
    original = vim_blocks.selective_scan
    vim_blocks.selective_scan = loop_scan
    try:
        yield
    finally:
        vim_blocks.selective_scan = original


def with_transformers_mixer(model: VimForImageClassification) -> VimForImageClassification:
    """Puts the same weights into what transformers offers: its mixer once forwards and once on the flipped tokens.

    Args:
        model ([`VimForImageClassification`]):
            The model; it stays as it is.

    Returns:
        [`VimForImageClassification`]: a copy with other mixers.
    """
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = model.config
    mamba = MambaConfig(
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        conv_kernel=config.conv_kernel,
        expand=config.expand,
        time_step_rank=config.time_step_rank,
        num_hidden_layers=1,
    )

    def one_direction(mixer: vim_blocks.VimMixer, mark: str) -> MambaMixer:
        state = mixer.state_dict()
        twin = MambaMixer(mamba, layer_idx=0).eval()
        own = {
            name: name if name.startswith(("in_proj", "out_proj")) else _own_name(name, mark)
            for name in twin.state_dict()
        }
        twin.load_state_dict({name: state[ours] for name, ours in own.items()})
        return twin

    class TwoDirections(nn.Module):
        def __init__(self, mixer: vim_blocks.VimMixer):
            super().__init__()
            self.forwards, self.backwards = one_direction(mixer, ""), one_direction(mixer, "_b")
            self.factor = 0.5 if mixer.divide_output else 1.0

        def forward(self, hidden_states: Tensor, *unused: Any, **options: Any) -> tuple[Tensor, None]:
            both = self.forwards(hidden_states) + self.backwards(hidden_states.flip(1)).flip(1)
            return both * self.factor, None

    twin = deepcopy(model)
    for layer in twin.vim.layers:
        layer.mixer = TwoDirections(layer.mixer).to(model.device)
    return twin


def _own_name(name: str, mark: str) -> str:
    """Names of the backward direction end in `_b`, but for `A_b_log`."""
    if name in ("A_log", "dt_proj.bias"):
        return f"A{mark}_log" if name == "A_log" else f"time_step{mark}.bias"
    module, dot, parameter = name.partition(".")
    return f"{module}{mark}{dot}{parameter}"


def deit_tiny(config: VimConfig, device: str) -> tuple[nn.Module, str]:
    """Makes DeiT-tiny with random weights: timm's where a Vim-tiny is measured, else transformers' at its sizes.

    Args:
        config ([`VimConfig`]):
            The Vim beside it.
        device (`str`):
            Where it goes.

    Returns:
        `tuple[nn.Module, str]`: the model in evaluation mode, and its name.
    """
    if (config.image_size, config.hidden_size) == (224, 192) and usable("timm"):
        timm = require("timm")
        return timm.create_model("deit_tiny_patch16_224").eval().to(device), "DeiT-tiny (timm)"
    from transformers import ViTConfig, ViTForImageClassification

    sizes = ViTConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers // 2,
        num_attention_heads=max(1, config.hidden_size // 64),
        intermediate_size=4 * config.hidden_size,
    )
    return ViTForImageClassification(sizes).eval().to(device), "DeiT-tiny (transformers)"


def ordered_merge_reference(
    metric: Tensor, hidden: Tensor, residual: Tensor, size: Tensor, position: int, r: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """One merging step as the official code does it: the baseline of the benchmarks.

    The two halves of the stream and their sizes are merged separately, and each time the class token is taken out, the
    sources are gathered, reduced with `scatter_reduce`, sorted back into order, and the class token is put back.

    Args:
        metric (`Tensor` of shape `(batch, tokens, features)`):
            What similarity is measured on.
        hidden, residual (`Tensor` of shape `(batch, tokens, channels)`):
            The mixer's output and the residual stream.
        size (`Tensor` of shape `(batch, tokens, 1)`):
            Token sizes.
        position (`int`):
            Where the class token is.
        r (`int`):
            Tokens to remove.

    Returns:
        `tuple[Tensor, Tensor, Tensor, int]`: `hidden`, `residual`, `size` and `position` afterwards.
    """
    batch, tokens, _ = metric.shape
    after = position * (tokens - r) // tokens

    def without_class(x: Tensor) -> Tensor:
        return torch.cat([x[:, :position], x[:, position + 1 :]], dim=1)

    with torch.no_grad():
        unit = without_class(metric / metric.norm(dim=-1, keepdim=True))
        score, best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
        ranking = score.argsort(dim=-1, descending=True).unsqueeze(-1)
        leaving, staying = ranking[:, :r], ranking[:, r:]
        partner = best.unsqueeze(-1).gather(1, leaving)

    def merge(x: Tensor) -> Tensor:
        class_token, x = x[:, position : position + 1], without_class(x)
        sources, destinations = x[:, ::2], x[:, 1::2]
        channels = x.shape[-1]
        kept = sources.gather(1, staying.expand(-1, -1, channels))
        moving = sources.gather(1, leaving.expand(-1, -1, channels))
        destinations = destinations.scatter_reduce(1, partner.expand(-1, -1, channels), moving, reduce="sum")
        odd = torch.arange(1, tokens - 1, 2, device=x.device).view(1, -1, 1).expand(batch, -1, -1)
        order = torch.cat([2 * staying, odd], dim=1).argsort(dim=1)
        x = torch.cat([kept, destinations], dim=1).gather(1, order.expand(-1, -1, channels))
        return torch.cat([x[:, :after], class_token, x[:, after:]], dim=1)

    def weighted_merge(x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = merge(x * size), merge(size)
        return x / total, total

    hidden, total = weighted_merge(hidden)
    residual, total = weighted_merge(residual)
    return hidden, residual, total, after


class NaiveMerger(TokenMerger):
    """Merges by the schedule of its configuration, the way the official code does it."""

    def begin(self, stream: Tensor, class_positions: tuple[int, ...]) -> "_NaiveRun":
        """Starts a forward pass."""
        return _NaiveRun(self.config, stream, class_positions, self.removals(stream.shape[1]))


class FreeRemover(TokenMerger):
    """Cuts off as many tokens as its configuration would merge, at no cost: a bound on what merging can gain."""

    def begin(self, stream: Tensor, class_positions: tuple[int, ...]) -> "_FreeRun":
        """Starts a forward pass."""
        return _FreeRun(self.config, stream, class_positions, self.removals(stream.shape[1]))


class _NaiveRun(MergeRun):
    def reduce(self, block: int, stream: Tensor, feature: Tensor | None) -> Tensor:
        r, sizes = self.removals[block], self.sizes
        if r == 0:
            return stream
        sizes = stream.new_ones(*stream.shape[:2], 1) if sizes is None else sizes
        # The official code merges the mixer's output and the stream before the addition; our blocks have added
        # already, so the first result is for the time it takes, and the second one is the sum of the two.
        (place,) = self.class_positions
        _, merged, self.sizes, place = ordered_merge_reference(feature, feature, stream, sizes, place, r)
        self.class_positions = (place,)
        return merged


class _FreeRun(MergeRun):
    def feature_for(self, block: int) -> None:
        return None

    def reduce(self, block: int, stream: Tensor, feature: Tensor | None) -> Tensor:
        r, tokens = self.removals[block], stream.shape[1]
        if r == 0:
            return stream
        (place,) = self.class_positions
        self.class_positions = (place * (tokens - r) // tokens,)
        return stream[:, : tokens - r]


def natural_images(count: int, side: int, seed: int) -> Tensor:
    """Makes images with the statistics of photographs: amplitudes fall with the frequency, colours go together.

    Args:
        count (`int`):
            Number of images.
        side (`int`):
            Their side in pixels.
        seed (`int`):
            Seed.

    Returns:
        `Tensor` of shape `(count, 3, side, side)`: normalised images.
    """
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, 4, side, side, generator=generator)
    frequency = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side) ** 2).sqrt()
    # The mean of an image varies like its lowest frequency.
    falling = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.clamp(min=1 / side), s=(side, side))
    grey, colour = falling[:, :1], falling[:, 1:]
    images = grey + 0.3 * colour
    return images / images.std()


def selection_task(
    seed: int, train: int = 1600, test: int = 2000
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes images in which few patches matter: all is noise but two patches, at random places, that tell the class.

    Args:
        seed (`int`):
            Of the ten patterns, the places and the noise.
        train (`int`, *optional*, defaults to 1600):
            Number of training images.
        test (`int`, *optional*, defaults to 2000):
            Number of test images.

    Returns:
        `tuple[list[dict], list[dict]]`: training and test images, `pixel_values` `(1, 18, 18)` and `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 9, generator=generator)
    count = train + test
    labels = torch.randint(10, (count,), generator=generator)
    patches = torch.randn(count, 36, 9, generator=generator)
    places = torch.rand(count, 36, generator=generator).argsort(dim=1)[:, :2]
    noise = 0.3 * torch.randn(count, 2, 9, generator=generator)
    patches[torch.arange(count)[:, None], places] = patterns[labels][:, None] + noise
    pixels = patches.view(count, 6, 6, 3, 3).transpose(2, 3).reshape(count, 1, 18, 18)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels.tolist(), strict=True)]
    return rows[:train], rows[train:]


__all__ = [
    "FreeRemover",
    "NaiveMerger",
    "deit_tiny",
    "loop_scan",
    "natural_images",
    "ordered_merge_reference",
    "scan_replaced_by_loop",
    "selection_task",
    "with_transformers_mixer",
]
