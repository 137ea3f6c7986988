"""Training of a Vision Mamba (https://huggingface.co/papers/2401.09417)."""

from dataclasses import dataclass, field

from .vision import VisionTrainer, VisionTrainingArguments


@dataclass
class VimTrainingArguments(VisionTrainingArguments):
    """How to train a Vim.

    The defaults are those of Vim-tiny on ImageNet (global batch of 1024, so 128 on each of 8 devices): 300 epochs, of
    which 5 of warm-up, no gradient clipping, float32. The learning rate goes with the global batch: 5e-4 per 512
    images for tiny, 1e-3 for small (which has a weight decay of 0.05). The paper's cool-down epochs and threefold
    repeated augmentation are left out. Weight decay spares what the model's `no_weight_decay()` names.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate, for the global batch."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    num_train_epochs: float = field(default=300, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device and step."})
    warmup_steps: float = field(default=0.0167, metadata={"help": "Steps of warm-up, or their share if below 1."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip at; 0 for none."})


class VimTrainer(VisionTrainer):
    """Trains a [`VimForImageClassification`], or any other image classifier of this package.

    Example:

    ```python
    >>> from hf_effml import VimConfig, VimForImageClassification, VimTrainer, VimTrainingArguments
    >>> from hf_effml import load_image_data, vim_image_processor

    >>> processor = vim_image_processor(16, crop_share=1.0)
    >>> data = load_image_data("digits", processor)
    >>> model = VimForImageClassification(
    ...     VimConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_labels=10)
    ... )
    >>> args = VimTrainingArguments("my-vim", max_steps=2, per_device_train_batch_size=8, report_to="none")
    >>> trainer = VimTrainer(model, args, train_dataset=data.train, processing_class=processor)
    >>> trainer.train().global_step  # doctest: +SKIP
    2
    ```
    """

    _name = "Vim"
    _paper = "2401.09417"
    _tags = ("vision-mamba",)
