"""Folders of token routers on the Hub: a router alone, and a language model with one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_effml.hub import ModelFolder
from hf_effml.hub.model_folder import is_hub_id


__all__ = ["KINDS", "FullCheckpointFolder", "RouterFolder"]

_REPORT = "print(model.routing_report)"


class FullCheckpointFolder(ModelFolder):
    """A language model that has its router within. Arguments are those of [`~hf_effml.hub.ModelFolder`]."""

    def __init__(self, folder: Path, **facts: Any):
        super().__init__(folder, **facts)
        self.base_model = self.base_model or self.router.get("base_model_name_or_path")

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By the router's configuration within the model's."""
        return bool(config.get("token_router")) and config.get("model_type") != "token_router"

    @property
    def router(self) -> Mapping[str, Any]:
        """The router's configuration."""
        return self.config.get("token_router") or {}

    def snippet(self) -> str:
        """Generates text and prints what was skipped."""
        if any((self.folder / f"tokenizer{end}.json").exists() for end in ("", "_config")):
            return self.text_snippet("model_id" + self.remote_code, _REPORT)
        return self.text_snippet('model.config.token_router["base_model_name_or_path"]', _REPORT)

    def limits(self) -> list[str]:
        """What routing cannot do, before what holds for every model."""
        short = self.router.get("min_tokens")
        return [
            "Routing is not causal: which blocks a token skips depends on the whole prompt. Score what follows a "
            "routed prompt, with `score_continuations` or `score_multiple_choice` of `hf_effml`. Perplexity over all "
            "positions of a routed text means nothing.",
            "It saves computation and cache for prompts. Memory for weights stays what it was, and generated tokens "
            "gain little.",
            *([f"Prompts of less than {short} tokens run dense."] if short else []),
            *super().limits(),
        ]


class RouterFolder(FullCheckpointFolder):
    """A router without the language model it works in. Arguments are those of [`~hf_effml.hub.ModelFolder`]."""

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """By the type of the model."""
        return config.get("model_type") == "token_router"

    @property
    def router(self) -> Mapping[str, Any]:
        """The router's configuration."""
        return self.config

    @property
    def auto_class(self) -> str:
        """Base model and router load in one."""
        return "AutoModelForCausalLM"

    def snippet(self) -> str:
        """Generates text with the base model's tokenizer."""
        return self.text_snippet("model.config.base_model_name_or_path", _REPORT)

    @property
    def shows_output(self) -> bool:
        """Whether the base model is here, too."""
        return self.base_model is not None and self.runs_here(Path(self.base_model))

    def limits(self) -> list[str]:
        """A router belongs to one model."""
        return ["The router fits the base model it was trained on, and no other.", *super().limits()]

    def remarks(self, files: Sequence[str]) -> list[str]:
        """The base model is loaded by its name, so it must be on the Hub."""
        base_model = self.config.get("base_model_name_or_path")
        # A folder of this machine is often named from where its router was made.
        if is_hub_id(base_model) and not (self.folder.resolve().parent / str(base_model)).exists():
            return super().remarks(files)
        return [
            *super().remarks(files),
            f"the router's base model `{base_model}` is not one on the Hub: push that first and write its id into "
            "`base_model_name_or_path` of `config.json`, or push both in one with `model.to_full_checkpoint()`",
        ]


KINDS = (RouterFolder, FullCheckpointFolder)
