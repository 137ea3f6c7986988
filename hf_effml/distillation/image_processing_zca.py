"""ZCA whitening as an image processor: made from training images, saved with its matrices, and invertible."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .image_pixels import images_to_pixels


ZCA_WEIGHTS_NAME = "zca.safetensors"
_SETTINGS_NAME = "preprocessor_config.json"
_MATRICES = ("inverse", "matrix", "mean")
_CHUNK = 1024
_MOST_PIXELS = 2**15
# What transformers writes into the saved file or passes on beside our own settings.
_FOREIGN_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ZCAImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings of [`ZCAImageProcessor`] that can be changed while it is loaded."""

    resize_mode: str
    num_channels: int
    do_whiten: bool
    epsilon: float


class ZCAImageProcessor(BaseImageProcessor):
    r"""Makes pixels in [0, 1] of images and whitens them: `(x - mean) U (S + epsilon)^(-1/2) U^T`.

    `U S U^T` is the covariance of the training images, as in the experiments of trajectory matching
    (https://huggingface.co/papers/2203.11932). With `do_whiten=False` it subtracts a mean and divides by a standard
    deviation per channel instead.

    Make one with [`~ZCAImageProcessor.from_images`]. What it learned from the images is saved with it.

    Args:
        size (`int`, `tuple[int, int]` or `dict`, *optional*):
            Height and width of the pixels. If unset, that of the images it is fitted to.
        resize_mode (`str`, *optional*, defaults to `"crop"`):
            How images of another shape get there: `"crop"` cuts the largest piece of the right shape out of the
            centre, `"squash"` changes the aspect ratio. Both resize with an antialiased bilinear filter.
        num_channels (`int`, *optional*, defaults to 3):
            3 for colours, 1 for grey.
        do_whiten (`bool`, *optional*, defaults to `True`):
            Whether to whiten; otherwise normalise per channel.
        epsilon (`float`, *optional*, defaults to 0.1):
            What is added to the variances; a smaller one amplifies fine detail and noise.
        image_mean, image_std (`float` or `list[float]`, *optional*):
            For `do_whiten=False`, one per channel; those of the images it is fitted to if unset.

    Example:

    ```python
    >>> import torch
    >>> from hf_effml.distillation.image_processing_zca import ZCAImageProcessor

    >>> images = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> processor = ZCAImageProcessor.from_images(images)
    >>> whitened = processor(images)["pixel_values"]
    >>> whitened.shape, torch.allclose(processor.unwhiten(whitened), images, atol=1e-5)
    (torch.Size([50, 3, 4, 4]), True)

    ```
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = ZCAImagesKwargs

    def __init__(
        self,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        resize_mode: Literal["crop", "squash"] = "crop",
        num_channels: int = 3,
        do_whiten: bool = True,
        epsilon: float = 0.1,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        **kwargs: Any,
    ):
        unknown = kwargs.keys() - _FOREIGN_KEYS
        if unknown:
            raise TypeError(f"A `ZCAImageProcessor` has no setting `{'`, `'.join(sorted(unknown))}`.")
        super().__init__(**kwargs)
        if resize_mode not in ("crop", "squash"):
            raise ValueError(f'`resize_mode` must be "crop" or "squash"; got {resize_mode!r}.')
        if num_channels not in (1, 3):
            raise ValueError(f"`num_channels` must be 1 or 3; got {num_channels}.")
        if not isinstance(do_whiten, bool):
            raise ValueError(f"`do_whiten` must be true or false; got {do_whiten!r}.")
        if not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
            raise ValueError(f"`epsilon` must be positive, or directions without variance blow up; got {epsilon!r}.")
        if (image_mean is None) != (image_std is None):
            raise ValueError("Give both `image_mean` and `image_std`, or neither to take those of the images.")
        self.size = _size_dict(size)
        self.resize_mode, self.num_channels, self.epsilon = resize_mode, num_channels, epsilon
        self.do_whiten = do_whiten
        self.image_mean = _per_channel("image_mean", image_mean, num_channels)
        self.image_std = _per_channel("image_std", image_std, num_channels)
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"`image_std` must be positive; got {image_std}.")
        self._learns_statistics = image_mean is None
        self._matrices: dict[str, Tensor] = {}
        self._digest = ""

    @classmethod
    def from_images(cls, images: Any, device: str | torch.device = "cpu", **settings: Any) -> "ZCAImageProcessor":
        """Makes a processor and fits it to images.

        Args:
            images, device: See [`~ZCAImageProcessor.fit`].
            settings: See the class.

        Returns:
            [`ZCAImageProcessor`]
        """
        return cls(**settings).fit(images, device)

    def fit(self, images: Any, device: str | torch.device = "cpu") -> "ZCAImageProcessor":
        """Learns from training images what whitening (or normalisation) needs; takes their size if it has none yet.

        Fitting again forgets what was learned before; `image_mean` and `image_std` that were given stay.

        Args:
            images: Training images, see [`~ZCAImageProcessor.to_pixels`]. All of them are held in memory.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where to compute. Time grows with the third power of the number of values in an image: seconds at 32
                pixels, many minutes on a CPU at 64.

        Returns:
            [`ZCAImageProcessor`]: itself.

        Raises:
            ValueError: If there are fewer than two images.
        """
        pixels = self.to_pixels(images)
        if len(pixels) < 2:
            raise ValueError(f"Whitening needs at least two images; got {len(pixels)}.")
        self.size = {"height": pixels.shape[2], "width": pixels.shape[3]}
        if self.do_whiten:
            self._set_matrices(_whitening(pixels, self.epsilon, torch.device(device)))
        elif self._learns_statistics:
            flat = pixels.transpose(0, 1).flatten(1)
            # Rounded: the same images must give the same settings wherever they are added up.
            self.image_mean = [round(channel.double().mean().item(), 6) for channel in flat]
            self.image_std = [round(channel.double().std().item(), 6) or 1.0 for channel in flat]
        return self

    def to_pixels(self, images: Any) -> Tensor:
        """Makes pixels in [0, 1] of images, in the wanted size and number of channels.

        Args:
            images: One image or any iterable of them, of any kind; see [`images_to_pixels`].

        Returns:
            `Tensor` of shape `(images, channels, height, width)`: the pixels, float32.

        Raises:
            ValueError: If there are no images, or they differ in size while `size` is unset, or cannot be read.
        """
        return images_to_pixels(images, self.num_channels, self.image_size, self.resize_mode)

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Makes the input of a model of images; calling the processor does the same.

        Args:
            images: See [`~ZCAImageProcessor.to_pixels`].
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"np"` returns NumPy arrays.

        Returns:
            `BatchFeature`: with `pixel_values` of shape `(images, channels, height, width)`, float32.

        Raises:
            RuntimeError: If it was not fitted yet.
        """
        return BatchFeature({"pixel_values": self.whiten(self.to_pixels(images))}, tensor_type=return_tensors)

    def whiten(self, pixels: Tensor) -> Tensor:
        """Whitens (or normalises) pixels in [0, 1]; differentiable.

        Args:
            pixels (`Tensor` of shape `(..., channels, height, width)`):
                Pixels of the fitted size.

        Returns:
            `Tensor` of the same shape.

        Raises:
            RuntimeError: If it was not fitted yet.
            ValueError: If the pixels have another shape.
        """
        self._check(pixels)
        if self.do_whiten:
            mean, matrix = (self._matrices[name].to(pixels) for name in ("mean", "matrix"))
            return _in_chunks(pixels, lambda flat: (flat - mean) @ matrix)
        mean, std = self._statistics(pixels)
        return (pixels - mean) / std

    def unwhiten(self, pixel_values: Tensor, clip: bool = False) -> Tensor:
        """Undoes whitening (or normalisation); differentiable.

        Args:
            pixel_values (`Tensor` of shape `(..., channels, height, width)`):
                What a model takes.
            clip (`bool`, *optional*, defaults to `False`):
                Cut off at 0 and 1, as a picture needs it. Synthetic images often leave that range.

        Returns:
            `Tensor` of the same shape: pixels, in [0, 1] where they come from images.

        Raises:
            RuntimeError: If it was not fitted yet.
            ValueError: If the values have another shape.
        """
        self._check(pixel_values)
        if self.do_whiten:
            mean, inverse = (self._matrices[name].to(pixel_values) for name in ("mean", "inverse"))
            pixels = _in_chunks(pixel_values, lambda flat: flat @ inverse + mean)
        else:
            mean, std = self._statistics(pixel_values)
            pixels = pixel_values * std + mean
        return pixels.clamp(0, 1) if clip else pixels

    @property
    def is_fitted(self) -> bool:
        """Whether it has all it needs to preprocess images."""
        return bool(self._matrices) if self.do_whiten else self.image_mean is not None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the pixels, if known."""
        return None if self.size is None else (self.size["height"], self.size["width"])

    @property
    def matrices(self) -> dict[str, Tensor]:
        """`mean` `(values,)`, `matrix` and `inverse` `(values, values)`; empty if it does not whiten."""
        return dict(self._matrices)

    @property
    def fingerprint(self) -> str:
        """A short text that differs where any setting or matrix does: equal ones preprocess equally."""
        settings = {name: value for name, value in self._settings().items() if value is not None}
        text = json.dumps({**settings, "matrices": self._digest if self.do_whiten else ""}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; the matrices stand in a file of their own."""
        settings = {**self._settings(), "image_processor_type": type(self).__name__}
        auto_map = getattr(self, "auto_map", None)
        return {**settings, "auto_map": auto_map} if auto_map else settings

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves the settings as `preprocessor_config.json` and the matrices beside it as `zca.safetensors`.

        Args:
            save_directory (`str` or `Path`):
                Folder to write.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Also push it, as `push_to_hub` does.
            kwargs: Arguments of `push_to_hub`; `repo_id` is the name of the folder if unset.

        Returns:
            `list[str]`: The files written.

        Raises:
            RuntimeError: If it was not fitted yet.
        """
        self._check_fitted()
        files = super().save_pretrained(save_directory)
        if self.do_whiten:
            file = Path(save_directory) / ZCA_WEIGHTS_NAME
            with _replacing(file) as unfinished:
                save_file(self._matrices, unfinished, metadata={"format": "pt"})
            files.append(str(file))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).resolve().name), **kwargs)
        return files

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Writes the settings in one go.

        Args:
            json_file_path (`str` or `Path`):
                The file.
        """
        with _replacing(Path(json_file_path)) as unfinished:
            unfinished.write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a processor of its settings.

        Args:
            image_processor_dict (`dict[str, Any]`):
                The settings, as `to_dict` has them.
            kwargs: Settings in place of those.

        Returns:
            [`ZCAImageProcessor`]

        Raises:
            ValueError: If they are no settings of such a processor.
        """
        if not isinstance(image_processor_dict, dict):
            raise ValueError(
                f"`{_SETTINGS_NAME}` must map names of settings to values; got a "
                f"{type(image_processor_dict).__name__}. Load or save the processor again."
            )
        return super().from_dict(image_processor_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a processor from a folder, or from a model repository on the Hub or in the local cache.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                The folder, its `preprocessor_config.json`, or the id.
            kwargs: As for any image processor: `revision`, `token`, `local_files_only`, ...

        Returns:
            [`ZCAImageProcessor`]

        Raises:
            OSError: If there is none, or its matrices are missing.
            ValueError: If the matrices are for images of another size, not complete or not finite.
        """
        where = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, UnicodeDecodeError) as error:
            # A file that is there and cannot be read is another matter than none.
            if (
                isinstance(error.__context__, ValueError)
                or Path(pretrained_model_name_or_path, _SETTINGS_NAME).is_file()
            ):
                raise ValueError(f"{error} Load or save the processor again.") from error
            raise
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if processor.do_whiten:
            path = Path(pretrained_model_name_or_path)
            source = str(path.parent if path.is_file() else pretrained_model_name_or_path)
            try:
                file = cached_file(source, ZCA_WEIGHTS_NAME, **where)
            except OSError as error:
                raise OSError(f"`{source}` says that it whitens and has no `{ZCA_WEIGHTS_NAME}`: {error}") from error
            matrices = _read_matrices(Path(file))
            processor._check_size(len(matrices["mean"]), pretrained_model_name_or_path)
            processor._set_matrices(matrices)
        return loaded

    def _settings(self) -> dict[str, Any]:
        settings = {"size": self.size, "resize_mode": self.resize_mode, "num_channels": self.num_channels}
        settings["do_whiten"] = self.do_whiten
        if self.do_whiten:
            return {**settings, "epsilon": self.epsilon}
        return {**settings, "image_mean": self.image_mean, "image_std": self.image_std}

    def _set_matrices(self, matrices: dict[str, Tensor]) -> None:
        self._matrices = {name: matrices[name].contiguous() for name in _MATRICES}
        digest = hashlib.blake2b(digest_size=16)
        for value in self._matrices.values():
            digest.update(value.numpy())
        self._digest = digest.hexdigest()

    def _check_size(self, found: int, source: Any) -> None:
        values = self.num_channels * math.prod(self.image_size or ())
        if found != values:
            raise ValueError(
                f"The matrices of {source} are for images of {found} values; {self.num_channels} channels of "
                f"{self.image_size} pixels have {values}. Fit a new processor for another size."
            )

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise RuntimeError(
                "This processor has not seen training images yet. Call `fit(images)`, use "
                "`ZCAImageProcessor.from_images(images)` or load a saved one."
            )

    def _check(self, pixels: Tensor) -> None:
        self._check_fitted()
        wanted = (self.num_channels, *(self.image_size or (None, None)))
        given = tuple(pixels.shape[-3:])
        if len(given) != 3 or any(want not in (None, have) for want, have in zip(wanted, given, strict=True)):
            raise ValueError(f"Pixels must have the shape (..., channels, height, width) {wanted}; got {given}.")

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        return mean, std


def _size_dict(size: Any) -> dict[str, int] | None:
    if size is None:
        return None
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= _MOST_PIXELS for side in sides):
        raise ValueError(
            f"`size` must be one positive number of pixels up to {_MOST_PIXELS}, or (height, width); got {size!r}."
        )
    return {"height": sides[0], "width": sides[1]}


def _per_channel(name: str, value: Any, channels: int) -> list[float] | None:
    if value is None:
        return None
    given = list(value) if isinstance(value, (list, tuple)) else [value] * channels
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in given):
        raise ValueError(f"`{name}` must be finite numbers; got {value!r}.")
    if len(given) != channels:
        raise ValueError(f"`{name}` must have one number per channel, {channels}; got {len(given)}.")
    return [float(number) for number in given]


def _read_matrices(path: Path) -> dict[str, Tensor]:
    """All three, of shapes that fit together and finite."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`{path}` is damaged, or no safetensors file: {error}. Load or save the processor again."
        ) from error
    missing = [name for name in _MATRICES if name not in found]
    if missing:
        raise ValueError(
            f"`{path}` has no tensor `{'`, `'.join(missing)}`, which whitening needs; it holds "
            f"{', '.join(sorted(found)) or 'none'}. Load or save the processor again."
        )
    values = found["mean"].numel()
    for name in _MATRICES:
        shape, wanted = tuple(found[name].shape), (values,) if name == "mean" else (values, values)
        if shape != wanted or found[name].dtype != torch.float32:
            raise ValueError(
                f"`{name}` in `{path}` must be float32 of shape {wanted}; got {found[name].dtype} of shape {shape}. "
                "Load or save the processor again."
            )
        if not found[name].isfinite().all():
            raise ValueError(
                f"`{name}` in `{path}` holds values that are not finite: all images would become NaN. Load or save "
                "the processor again."
            )
    return found


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Written beside and renamed, as `hf_effml.utils.files` does, which does not go along with a saved processor."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _whitening(pixels: Tensor, epsilon: float, device: torch.device) -> dict[str, Tensor]:
    """The matrices, from the covariance in float64; never more than a chunk of the images in that precision."""
    chunks = pixels.flatten(1).split(_CHUNK)
    total = sum(chunk.to(device, torch.float64).sum(0) for chunk in chunks)
    mean = total / len(pixels)
    covariance = torch.zeros(mean.numel(), mean.numel(), dtype=torch.float64, device=device)
    for chunk in logging.tqdm(chunks, desc="Covariance of the images", unit="chunk", leave=False, delay=2):
        centred = chunk.to(device, torch.float64) - mean
        covariance.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(covariance / (len(pixels) - 1))
    # Rounding makes some of the smallest variances negative.
    spread = (values.clamp(min=0) + epsilon).sqrt()
    matrices = {
        "matrix": (vectors / spread) @ vectors.T,
        "inverse": (vectors * spread) @ vectors.T,
        "mean": mean,
    }
    return {name: value.to("cpu", torch.float32) for name, value in matrices.items()}


def _in_chunks(images: Tensor, function: Any) -> Tensor:
    """Applies a function of flat images, a chunk at a time."""
    chunks = images.reshape(-1, images.shape[-3:].numel()).split(_CHUNK)
    bar = logging.tqdm(chunks, desc="Whitening", unit="chunk", leave=False, delay=2)
    return torch.cat([function(chunk) for chunk in bar]).view(images.shape)


__all__ = ["ZCA_WEIGHTS_NAME", "ZCAImageProcessor"]
