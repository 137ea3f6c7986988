"""Model cards: rendered from `hub_cards/model_card.md`, written beside a model, extended with results later."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_effml.methods import VIM, Method, get_method

from .privacy import scrub, scrub_command
from .results import CardResult, arguments_table, merge_into_text, results_table, set_model_index


__all__ = ["CARD_NAME", "CardResult", "add_results", "render_model_card", "set_model_id", "write_model_card"]

CARD_NAME = "README.md"


def render_model_card(
    folder: str | Path,
    model_id: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    method: str | None = None,
    summary: str | None = None,
    results: Sequence[CardResult] = (),
    evaluated_on: str | None = None,
    command: Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = "apache-2.0",
    limits: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> ModelCard:
    """Renders the card of a saved model. Only what is known appears on it.

    Args:
        folder (`str` or `Path`):
            The folder the model was saved in; its files decide how the model is loaded.
        model_id (`str`, *optional*):
            Hub id the model goes to. Defaults to the name of the folder, until a push knows better.
        config (`Mapping`, *optional*):
            The model's configuration. Defaults to the folder's `config.json`.
        method (`str`, *optional*):
            Keyword of the method, see [`~hf_effml.methods.get_method`]. Gives the card its tags and citation.
        summary (`str`, *optional*):
            The card's first sentence. Defaults to one made from the model's class and the method.
        results (`Sequence[CardResult]`, *optional*, defaults to `()`):
            Rows of the results table.
        evaluated_on (`str`, *optional*):
            Name of the data the results were measured on. Without it nothing goes into `model-index`.
        command (`Sequence[str]`, *optional*):
            Command line that made the model, as in `sys.argv`; tokens and absolute paths are taken out.
        arguments (`Mapping`, *optional*):
            Arguments that differ from the defaults; tokens and absolute paths are taken out.
        base_model (`str`, *optional*):
            Hub id of the starting point. A local folder is left out. Defaults to the one that a token router names.
        datasets (`Sequence[str]`, *optional*, defaults to `()`):
            Hub ids of the training data.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            License of the weights; `None` leaves it out.
        limits (`Sequence[str]`, *optional*, defaults to `()`):
            Sentences on what the model is not good for, in addition to those that follow from the rest.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Further tags.

    Returns:
        `huggingface_hub.ModelCard`: the card.
    """
    folder = Path(folder)
    config = _read_config(folder) if config is None else config
    model_id = model_id or folder.resolve().name
    title = model_id.split("/")[-1]
    papers = _papers(method)
    base_model = base_model or _token_router(config).get("base_model_name_or_path")
    base_model = base_model if is_hub_id(base_model) else None
    evaluated_on = scrub(evaluated_on)
    data = ModelCardData(
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag=_pipeline_tag(config),
        base_model=base_model,
        datasets=list(datasets) or None,
        license=license,
        tags=[*(papers[0].tags if papers else ()), *tags, *(f"arxiv:{paper.paper}" for paper in papers)],
    )
    set_model_index(data, title, results, evaluated_on)
    return ModelCard.from_template(
        data,
        template_str=resources.files("hf_effml.hub_cards").joinpath("model_card.md").read_text(encoding="utf-8"),
        title=title,
        model_id=model_id,
        summary=summary or _first_sentence(title, config, papers[0] if papers else None),
        auto_class=_auto_class(config),
        remote_code=_remote_code(config),
        takes_pictures=_takes_pictures(folder, config),
        tokenizer=_where_the_tokenizer_is(folder, config),
        routes_tokens=bool(_token_router(config)),
        is_distilled=_is_distilled(config),
        results_table=results_table(results),
        evaluated_on=evaluated_on,
        command=scrub_command(command) if command else None,
        arguments_table=arguments_table(arguments or {}),
        base_model=base_model,
        limits=[*limits, *_default_limits(config, results, evaluated_on)],
        versions=_versions(),
        citations="\n\n".join(paper.citation for paper in papers),
    )


def write_model_card(folder: str | Path, model_id: str | None = None, **facts: Any) -> Path:
    """Writes the card of a saved model into its folder, in place of one that is there.

    Args:
        folder (`str` or `Path`):
            The folder the model was saved in.
        model_id (`str`, *optional*):
            Hub id the model goes to. Defaults to the name of the folder.
        facts (`dict`, *optional*):
            Keyword arguments of [`render_model_card`].

    Returns:
        `Path`: the file written.

    Example:

    ```python
    >>> from hf_effml.hub import CardResult, write_model_card

    >>> accuracy = CardResult("Accuracy", 0.93, starting_point=0.95, metric="accuracy")
    >>> write_model_card("my-vim", method="rmeeto", results=[accuracy], evaluated_on="digits")  # doctest: +SKIP
    ```
    """
    path = Path(folder) / CARD_NAME
    render_model_card(folder, model_id, **facts).save(path)
    return path


def add_results(folder: str | Path, results: Sequence[CardResult], evaluated_on: str) -> Path:
    """Adds results to the card in a folder, or renews them, and leaves everything else on it as it is.

    Args:
        folder (`str` or `Path`):
            A model folder with its card.
        results (`Sequence[CardResult]`):
            Rows to add. A row whose name is in the table already replaces that one.
        evaluated_on (`str`):
            Name of the data the results were measured on.

    Returns:
        `Path`: the card.
    """
    path = Path(folder) / CARD_NAME
    if not path.exists():
        raise FileNotFoundError(f"There is no card in `{folder}`. Write one first with `write_model_card`.")
    card = ModelCard.load(path)
    set_model_index(card.data, card.data.model_name or Path(folder).resolve().name, results, evaluated_on)
    card.text = merge_into_text(card.text, results, evaluated_on)
    card.save(path)
    return path


def set_model_id(folder: str | Path, model_id: str) -> None:
    """Makes the snippet on a folder's card load `model_id`. A card without our snippet stays as it is.

    Args:
        folder (`str` or `Path`):
            A folder of a model or a distilled data set with its card.
        model_id (`str`):
            The Hub id the folder is pushed to.
    """
    path = Path(folder) / CARD_NAME
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'^(model|dataset)_id = ".*"$', rf'\1_id = "{model_id}"', text, flags=re.M)
    path.write_text(text, encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def is_hub_id(name: str | None) -> bool:
    """Says whether a name can be one on the Hub: no path, and no folder of this machine.

    Args:
        name (`str` or `None`):
            The name.

    Returns:
        `bool`: the answer.
    """
    return name is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()


def _papers(method: str | None) -> list[Method]:
    """The paper of the method and, for what builds on Vim, Vim's."""
    if method is None:
        return []
    own = get_method(method)
    return [own, VIM] if "vision-mamba" in own.tags and own != VIM else [own]


def _architecture(config: Mapping[str, Any]) -> str | None:
    return (config.get("architectures") or [None])[0]


def _pipeline_tag(config: Mapping[str, Any]) -> str | None:
    tasks = {"AutoModelForImageClassification": "image-classification", "AutoModelForCausalLM": "text-generation"}
    return tasks.get(_auto_class(config))


def _is_router_alone(config: Mapping[str, Any]) -> bool:
    """Whether a folder holds a token router without the language model it works in."""
    return config.get("model_type") == "token_router"


def _is_distilled(config: Mapping[str, Any]) -> bool:
    """Whether the model is a synthetic data set."""
    return config.get("model_type") == "distilled_dataset"


def _token_router(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a token router, alone or in that of a full checkpoint; empty where there is none."""
    return config if _is_router_alone(config) else config.get("token_router") or {}


def _where_the_tokenizer_is(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The expression that names it in the snippet; `None` for what generates no text."""
    if _pipeline_tag(config) != "text-generation":
        return None
    if _is_router_alone(config):
        return "model.config.base_model_name_or_path"
    if _token_router(config) and not any((folder / f"tokenizer{end}.json").exists() for end in ("", "_config")):
        return 'model.config.token_router["base_model_name_or_path"]'
    return f"model_id{_remote_code(config)}"


def _remote_code(config: Mapping[str, Any]) -> str:
    """What loading needs where this package is not installed."""
    return ", trust_remote_code=True" if config.get("auto_map") else ""


def _takes_pictures(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether an image-classification pipeline can be built from the folder; it feeds three channels."""
    has_processor = any((folder / f"{kind}_config.json").exists() for kind in ("preprocessor", "processor"))
    return _pipeline_tag(config) == "image-classification" and has_processor and config.get("num_channels", 3) == 3


def _auto_class(config: Mapping[str, Any]) -> str:
    """The Auto class that loads the model."""
    if _is_router_alone(config):
        return "AutoModelForCausalLM"
    task = re.search(r"For[A-Z]\w+$", _architecture(config) or "")
    return f"AutoModel{task.group()}" if task else "AutoModel"


def _first_sentence(title: str, config: Mapping[str, Any], method: Method | None) -> str:
    architecture = _architecture(config)
    sentence = f"`{title}` is a model" if architecture is None else f"`{title}` is a `{architecture}`"
    if _is_distilled(config):
        sentence += f", a distilled data set as a model ({_images(config)}),"
    if method is None:
        return f"{sentence} made with `hf_effml`."
    return f"{sentence} made with [{method.name}]({method.url}): {method.summary[0].lower()}{method.summary[1:]}"


def _default_limits(config: Mapping[str, Any], results: Sequence[CardResult], evaluated_on: str | None) -> list[str]:
    limits = _limits_of_routing(config)
    if _is_distilled(config):
        return [
            *limits,
            "It is no classifier: its parameters are images, soft labels and a step size that networks are trained "
            "with.",
            "It is the state of a distillation, to go on from. To share the images, publish them as a data set with "
            "`trainer.save_dataset()` or `save_distilled_dataset` of `hf_effml`.",
            "Synthetic images start from real ones and may show traces of them; the terms of the real data apply.",
            *([f"The results above hold for {evaluated_on}."] if results and evaluated_on else []),
        ]
    if _pipeline_tag(config) == "image-classification" and config.get("id2label"):
        classes = len(config["id2label"])
        limits.append(f"It knows the {classes} classes of its training data only; any picture gets one of them.")
    if results and evaluated_on:
        limits.append(f"The results above hold for {evaluated_on} and say little about other data.")
    size = "prompt length" if _pipeline_tag(config) == "text-generation" else "input size"
    return [*limits, f"Speed depends on device, batch and {size}: measure it where the model will run."]


def _images(config: Mapping[str, Any]) -> str:
    """How many synthetic images there are."""
    classes, per_class = len(config.get("id2label") or (0, 1)), config.get("images_per_class", 1)
    return f"{classes * per_class:,} images of {classes} classes"


def _limits_of_routing(config: Mapping[str, Any]) -> list[str]:
    router = _token_router(config)
    if not router:
        return []
    limits = [
        "Routing is not causal: which blocks a token skips depends on the whole prompt. Score what follows a routed "
        "prompt, with `score_continuations` or `score_multiple_choice` of `hf_effml`. Perplexity over all positions "
        "of a routed text means nothing.",
        "It saves computation and cache for prompts. Memory for weights stays what it was, and generated tokens gain "
        "little.",
    ]
    if router.get("min_tokens"):
        limits.append(f"Prompts of less than {router['min_tokens']} tokens run dense.")
    if _is_router_alone(config):
        limits.append("The router fits the base model it was trained on, and no other.")
    return limits


def _versions() -> str:
    packages = ("hf-effml", "transformers", "torch", "accelerate", "huggingface-hub", "safetensors")
    found = [f"{name} {metadata.version(name)}" for name in packages]
    return ", ".join([*found, "Python {}.{}.{}".format(*sys.version_info)])
