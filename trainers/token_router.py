"""FTP's training: a router of 450 parameters learns which tokens a frozen language model can spare."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hf_effml.token_router.modeling_token_router import TokenRouterModel
from hf_effml.token_router.patching import RoutingHook, copy_config, disable_routing, find_decoder, is_patched
from hf_effml.token_router.router_losses import (
    router_distillation_loss,
    router_guide_loss,
    router_hidden_state_loss,
    router_sparsity_loss,
)
from hf_effml.token_router.routing_state import RoutingState

from .arguments import EffMLTrainingArguments
from .base import EffMLTrainer


@dataclass
class TokenRouterTrainingArguments(EffMLTrainingArguments):
    """How to train a token router.

    The paper (https://huggingface.co/papers/2412.11494) names the three losses and trains on Alpaca with batches of
    one; their weights, the learning rate and the number of steps are ours. So is `continuation_share`: the paper seems
    to route all tokens in training, while in use only prompts are routed.

    Args:
        distillation (`str`, *optional*, defaults to `"kl"`):
            What the routed model is compared with the dense one by: `"kl"` the predictions, `"hidden"` the last hidden
            states.
        distillation_weight (`float`, *optional*, defaults to 1.0):
            Weight of that comparison.
        sparsity_weight (`float`, *optional*, defaults to 1.0):
            Weight of the loss that makes the router's own decisions skip what the schedule requires. It counts
            missing sparsity only, as in the paper, and with `selection="threshold"` excess as well.
        guide_weight (`float`, *optional*, defaults to 0.3):
            Weight of the static router's decisions at the beginning; it falls to 0 in a line.
        continuation_share (`float`, *optional*, defaults to 0.25):
            Share at the end of each text that is not routed but follows its prompt as generated tokens would, and on
            which alone predictions are compared. Texts with a `completion_mask` have their own ends. With 0 all tokens
            are routed and compared.
    """

    distillation: Literal["kl", "hidden"] = field(
        default="kl", metadata={"help": "Compare predictions, or the last hidden states."}
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of that comparison."})
    sparsity_weight: float = field(default=1.0, metadata={"help": "Weight of the required sparsity."})
    guide_weight: float = field(
        default=0.3, metadata={"help": "Weight of the static router's decisions at first; falls to 0."}
    )
    continuation_share: float = field(
        default=0.25,
        metadata={"help": "Share of a text that follows the routed prompt; it is compared."},
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    max_steps: int = field(default=1000, metadata={"help": "Steps; -1 goes by epochs."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Texts per device and step."})
    # `completion_mask` is no argument of any model.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it off."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self) -> None:
        for name in ("distillation_weight", "sparsity_weight", "guide_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative; got {getattr(self, name)}. 0 switches it off.")
        if not 0 <= self.continuation_share < 1:
            raise ValueError(
                f"`continuation_share` must be at least 0 and less than 1; got {self.continuation_share}. 0 routes "
                "all tokens."
            )
        super().__post_init__()
        # Batches hold no labels.
        self.label_names: list[str] | None = []


class TokenRouterTrainer(EffMLTrainer):
    """Trains the token router of a frozen language model (https://huggingface.co/papers/2412.11494).

    A step runs the model twice: dense, as the teacher, and with every block weighed by its decisions. Only the router
    learns, and checkpoints hold only the router, unless the model is a PEFT model with
    `modules_to_save=["token_router"]`, which learns its adapters as well, or a full checkpoint. Batches hold
    `input_ids`, `attention_mask` and maybe `completion_mask`; labels are not used.

    Training logs the terms of the loss as they enter it, the share of tokens that skipped a block and that of every
    block. Evaluations run as users do, decisions hard and skipped tokens not computed, and report the distance from
    the dense model as the loss.

    Args:
        model ([`TokenRouterModel`] or `PeftModel` or `PreTrainedModel`):
            A language model with a router, whose `router_type` is `"one_pass"` or `"dynamic"`.
        args ([`TokenRouterTrainingArguments`]):
            How to train.
        kwargs (`dict`, *optional*):
            As for [`~transformers.Trainer`].

    Raises:
        TypeError: If `args` or the model is of another kind.
        ValueError: If there is nothing to train.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import TokenRouterConfig, TokenRouterModel, TokenRouterTrainer, TokenRouterTrainingArguments

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    >>> model = TokenRouterModel(LlamaForCausalLM(LlamaConfig(**shape)), TokenRouterConfig(target_sparsity=0.3))
    >>> args = TokenRouterTrainingArguments("my-router", max_steps=2, report_to="none")
    >>> trainer = TokenRouterTrainer(model, args, train_dataset=[{"input_ids": list(range(50))}] * 2)
    >>> trainer.train().global_step  # doctest: +SKIP
    2
    ```
    """

    _name = "FTP"
    _paper = "2412.11494"

    def __init__(self, model: nn.Module, args: TokenRouterTrainingArguments | None = None, **kwargs: Any):
        if not isinstance(args, TokenRouterTrainingArguments):
            raise TypeError(f"`args` must be `TokenRouterTrainingArguments`; got a `{type(args).__name__}`.")
        hook = _check_model(model)
        super().__init__(model, args, **kwargs)
        # The loss is a mean over the batch, whatever the language model does with its own.
        self.model_accepts_loss_kwargs = False
        # Evaluations have a loss although batches have no labels.
        self.can_return_loss = True
        self._hook = hook
        if hook.config.base_model_name_or_path:
            self.card_facts["base_model"] = hook.config.base_model_name_or_path

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the mean loss of a batch; in evaluation it is the distance from the dense model.

        Arguments and result are those of [`~transformers.Trainer.compute_loss`], outputs those of the routed model.
        """
        texts: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        real = texts.get("attention_mask", torch.ones_like(texts["input_ids"])).bool()
        generated = self._generated(inputs, real)
        texts["use_cache"] = False
        texts["output_hidden_states"] = self.args.distillation == "hidden"
        with torch.no_grad(), self._teaching(model):
            dense = model(**texts)
        outputs = model(**texts, generated=generated)
        counted = real if generated is None else _predicts(generated, real)
        terms = {"distill": self.args.distillation_weight * self._distance(dense, outputs, counted)}
        if model.training:
            state = cast(RoutingState, self._hook.latest)
            terms |= self._steering(state)
            self._remember(terms, state)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _generated(self, inputs: dict[str, Any], real: Tensor) -> Tensor | None:
        """Tokens that follow their prompt."""
        if "completion_mask" in inputs:
            return inputs["completion_mask"].bool() & real
        if self.args.continuation_share == 0:
            return None
        newest_first = real.flip(-1).cumsum(-1).flip(-1)
        return real & (newest_first <= (self.args.continuation_share * real.sum(-1, keepdim=True)).floor())

    @contextmanager
    def _teaching(self, model: nn.Module) -> Iterator[None]:
        """The model as its own teacher: dense, without adapters, and without dropout."""
        inner = self.accelerator.unwrap_model(model)
        training = inner.training
        inner.eval()
        with disable_routing(inner), getattr(inner, "disable_adapter", nullcontext)():
            try:
                yield
            finally:
                inner.train(training)

    def _distance(self, dense: Any, outputs: Any, counted: Tensor) -> Tensor:
        if self.args.distillation == "hidden":
            return router_hidden_state_loss(dense.hidden_states[-1], outputs.hidden_states[-1], counted)
        return router_distillation_loss(dense.logits, outputs.logits, counted)

    def _steering(self, state: RoutingState) -> dict[str, Tensor]:
        """The losses on the router's decisions themselves."""
        config, blocks = state.config, sorted(state.logits)
        logits = torch.stack([state.logits[block] for block in blocks])
        required = [state.schedule[block] for block in blocks]
        two_sided = config.selection == "threshold"
        static = RoutingState(
            copy_config(config, router_type="static", selection="budget"),
            state.router,
            state.prompt,
            state.prompt_lengths,
        )
        static_keep = torch.stack([static.plans[block].keep for block in blocks])
        fading = self.args.guide_weight * max(0.0, 1 - self.state.global_step / max(self.state.max_steps, 1))
        return {
            "sparsity": self.args.sparsity_weight * router_sparsity_loss(logits, state.prompt, required, two_sided),
            "guide": fading * router_guide_loss(logits, static_keep, state.prompt),
        }

    def _remember(self, terms: dict[str, Tensor], state: RoutingState) -> None:
        """Adds what the log will average."""
        kept = (state.keep_masks() & state.prompt).flatten(1).sum(-1)
        skipped = 1 - kept / state.prompt.sum().clamp(min=1)
        values = {f"loss_{name}": term for name, term in terms.items()} | {"sparsity/achieved": skipped.mean()}
        values |= {f"sparsity/block_{block}": share for block, share in enumerate(skipped)}
        self.average_in_log(values)


def _predicts(generated: Tensor, real: Tensor) -> Tensor:
    """Positions whose prediction is of a generated token: one to the left, and within the text."""
    return generated.roll(-1, dims=1).index_fill(1, torch.tensor([-1], device=generated.device), False) & real


def _check_model(model: nn.Module) -> RoutingHook:
    """Finds the router, freezes everything else unless PEFT has, and checks that there is something to learn."""
    decoder = find_decoder(model)
    if not is_patched(decoder):
        raise TypeError(
            f"The model must have a token router; got a bare `{type(model).__name__}`. Wrap it: "
            "`TokenRouterModel(model, TokenRouterConfig(target_sparsity=0.3))`."
        )
    hook = decoder.token_routing_hook
    config = hook.config
    if not config.is_learned:
        raise ValueError(
            f'`router_type="{config.router_type}"` has nothing to train; it works as it is. Choose "one_pass" or '
            '"dynamic".'
        )
    if not any(config.schedule):
        raise ValueError(
            f"No block skips any token with `target_sparsity={config.target_sparsity}` and "
            f"`sparsity_schedule={config.sparsity_schedule}`: the router would get no gradient. Raise "
            "`target_sparsity`."
        )
    if hasattr(model, "peft_config"):
        if not any(parameter.requires_grad for parameter in decoder.token_router.parameters()):
            raise ValueError(
                'PEFT has frozen the router. Add `modules_to_save=["token_router"]` to its configuration.'
            )
        return hook
    if not isinstance(model, TokenRouterModel) and not model.config.model_type.startswith("token_router"):
        raise TypeError(
            f"A patched `{type(model).__name__}` would be saved without its router's configuration. Wrap it: "
            "`TokenRouterModel(model)`."
        )
    model.requires_grad_(False)
    decoder.token_router.requires_grad_(True)
    return hook
