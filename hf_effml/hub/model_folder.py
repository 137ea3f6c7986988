"""A saved model as a kind of folder: its snippet, its facts and its limits, as far as no subject knows better."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCardData

from hf_effml.methods import Method, get_papers
from hf_effml.utils.report import CardResult, as_code, markdown_table
from hf_effml.utils.sources.split_files import recorded_name

from .kinds import FolderKind, installed_versions, read_config
from .privacy import scrub, scrub_command
from .results import arguments_table, read_results, results_section, set_model_index
from .training_log import CURVE_NAME, duration, log_table


__all__ = ["ModelFolder", "is_hub_id"]

_TASKS = {"AutoModelForImageClassification": "image-classification", "AutoModelForCausalLM": "text-generation"}
_MAX_CLASSES = 20
# What is loaded in a second, also where there is no accelerator.
_MAX_BYTES_TO_RUN = 2**28


class ModelFolder(FolderKind):
    """A model, or what a subclass makes of one. Only what is known appears on its card.

    Args:
        folder (`Path`):
            The folder the model was saved in; its files decide how the model is loaded.
        config (`Mapping`, *optional*):
            The model's configuration. Defaults to the folder's `config.json`.
        method (`str`, *optional*):
            Keyword of the method, see [`~hf_effml.methods.get_method`]. Gives the card its tags and citations.
        summary (`str`, *optional*):
            The card's first sentence. Defaults to one made from the model's class and the method.
        results (`Sequence[CardResult]`, *optional*):
            What was measured, kept in `results.json` when the card is written. Defaults to what is kept there.
        evaluated_on (`str`, *optional*):
            Name of the data the results were measured on. Without it nothing goes into `model-index`.
        command (`Sequence[str]`, *optional*):
            Command line that made the model, as in `sys.argv`; tokens and absolute paths are taken out.
        arguments (`Mapping`, *optional*):
            Arguments that differ from the defaults; tokens and absolute paths are taken out.
        base_model (`str`, *optional*):
            What the model was made from: a Hub id, or the name of a local folder, which is shown without a link.
        datasets (`Sequence[str]`, *optional*, defaults to `()`):
            Hub ids of the training data. Defaults to that of `data`.
        data (`Mapping`, *optional*):
            The data in words: `name`, `hub_id`, `splits` (numbers of examples by name) and what else is known.
        history (`Sequence[Mapping]`, *optional*, defaults to `()`):
            The log of the training, as `trainer.state.log_history`.
        license (`str`, *optional*):
            License of the weights, a keyword of the Hub. None is named unless it is given.
        limits (`Sequence[str]`, *optional*, defaults to `()`):
            Sentences on what the model is not good for, in addition to those that follow from the rest.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Further tags.
    """

    noun = "model"
    template = "model_card.md"
    # What programs here start from: a model of its own.
    left_out: ClassVar[Sequence[str]] = ("start/*",)

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any] | None = None,
        method: str | None = None,
        summary: str | None = None,
        results: Sequence[CardResult] | None = None,
        evaluated_on: str | None = None,
        command: Sequence[str] | None = None,
        arguments: Mapping[str, Any] | None = None,
        base_model: str | None = None,
        datasets: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        license: str | None = None,
        limits: Sequence[str] = (),
        tags: Sequence[str] = (),
    ):
        super().__init__(folder)
        self.config: Mapping[str, Any] = read_config(folder) if config is None else config
        self.papers = get_papers(method)
        self.results, self.evaluated_on = results, scrub(evaluated_on)
        self.base_model = base_model
        self._summary, self._command, self._arguments = summary, command, arguments or {}
        self._datasets, self._data, self.history = datasets, scrub(data or {}), history
        self._license, self._limits, self._tags = license, limits, tags

    @classmethod
    def recognises(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Every folder that nobody else knows is a model."""
        return True

    def metadata(self, name: str) -> ModelCardData:
        """The card's metadata, with the results in its `model-index`."""
        data = ModelCardData(
            library_name="peft" if (self.folder / "adapter_config.json").exists() else "transformers",
            pipeline_tag=self.task,
            base_model=self.base_model if is_hub_id(self.base_model) else None,
            datasets=list(self._datasets) or ([self._data["hub_id"]] if self._data.get("hub_id") else None),
            license=self._license,
            tags=[
                *(self.papers[0].tags if self.papers else ()),
                *self._tags,
                *(f"arxiv:{paper.paper}" for paper in self.papers),
            ]
            or None,
        )
        set_model_index(data, name, self.entries)
        return data

    def values(self, repo_id: str) -> dict[str, Any]:
        """What the template shows."""
        base_model, linked = self.base_model, is_hub_id(self.base_model)
        return {
            "summary": self._summary or self.summary(repo_id.split("/")[-1]),
            "remote_code": self.remote_code,
            "details": markdown_table(["", ""], [[name, value] for name, value in self.details().items()]),
            "results": results_section(self.entries),
            "data": markdown_table(["", ""], [[name, value] for name, value in self._data_rows().items()]),
            "base_model": base_model if linked else as_code(Path(str(scrub(base_model))).name) if base_model else None,
            "base_model_is_linked": linked,
            "command": " ".join(scrub_command(self._command).splitlines()) if self._command else None,
            "arguments_table": arguments_table(self._arguments),
            "took": duration(self.history),
            "log": log_table(self.history),
            "curve": self.if_there(CURVE_NAME) if self.history else None,
            "limits": [*self._limits, *self.limits()],
            "versions": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
            "citations": "\n\n".join(paper.citation for paper in self.papers),
        }

    @property
    def unknown_sections(self) -> set[str]:
        """How a model was made is known to whoever made it."""
        return set() if self._command or self._arguments or self._data or self.history else {"training"}

    def remarks(self, files: Sequence[str]) -> list[str]:
        """A model needs a configuration and safetensors weights."""
        remarks = []
        if not {"config.json", "adapter_config.json"} & set(files):
            remarks.append("no `config.json`: write the folder with `save_pretrained`")
        if not any(name.endswith(".safetensors") for name in files):
            remarks.append("no `.safetensors` weights: write the folder with `save_pretrained`")
        return remarks

    # What subjects know better

    def summary(self, title: str) -> str:
        """The first sentence.

        Args:
            title (`str`):
                The model's name.

        Returns:
            `str`: Markdown.
        """
        made_with: Method | None = self.papers[0] if self.papers else None
        what = f"a `{self.architecture}`" if self.architecture else "a model"
        sentence = f"{as_code(title)} is {what}{self.described()}"
        if made_with is None:
            return f"{sentence} made with `hf_effml`."
        about = f"{made_with.summary[0].lower()}{made_with.summary[1:]}"
        return f"{sentence} made with [{made_with.name}]({made_with.url}): {about}"

    def described(self) -> str:
        """What the first sentence adds to the model's class."""
        return ""

    def snippet(self) -> str:
        """Code that uses the model called `model_id` and prints something."""
        if self.task == "image-classification" and self._takes_pictures:
            height, width = self.image_size or (224, 224)
            return (
                "from PIL import Image\nfrom transformers import pipeline\n\n"
                f'classifier = pipeline("image-classification", model=model_id{self.remote_code})\n'
                f'image = Image.new("RGB", ({width}, {height}), "gray")  # or the path of a picture of yours\n'
                "print(classifier(image, top_k=2))"
            )
        if self.task == "text-generation":
            return self.text_snippet("model_id" + self.remote_code)
        return (
            f"from transformers import {self.auto_class}\n\n"
            f"model = {self.auto_class}.from_pretrained(model_id{self.remote_code})\n"
            'print(f"{model.num_parameters():,} parameters")'
        )

    def text_snippet(self, tokenizer: str, report: str = "") -> str:
        """Code that generates text.

        Args:
            tokenizer (`str`):
                Arguments that load the tokenizer.
            report (`str`, *optional*, defaults to `""`):
                A last line.

        Returns:
            `str`: the code.
        """
        lines = [
            f"from transformers import {self.auto_class}, AutoTokenizer\n",
            f"model = {self.auto_class}.from_pretrained(model_id{self.remote_code})",
            f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
            'prompt = tokenizer("The lighthouse stood on a rock, and nobody had climbed it for years. " * 10, '
            'return_tensors="pt")',
            "output = model.generate(**prompt, max_new_tokens=20)",
            "print(tokenizer.decode(output[0, -20:]))",
            report,
        ]
        return "\n".join(line for line in lines if line)

    @property
    def shows_output(self) -> bool:
        """Whether the snippet runs in seconds here, so that the card can show what it prints."""
        if self.task == "text-generation" and not any(self.folder.glob("tokenizer*.json")):
            return False
        return self.runs_here(self.folder)

    def runs_here(self, folder: Path) -> bool:
        """Whether a model is here and small enough to be loaded for its card.

        Args:
            folder (`Path`):
                The folder of the model.

        Returns:
            `bool`: the answer.
        """
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return 0 < size < _MAX_BYTES_TO_RUN

    def details(self) -> dict[str, str]:
        """What the model is, in numbers."""
        found = {}
        if self.image_size:
            channels = self.config.get("num_channels", 3)
            found["Images"] = f"{channels} x {self.image_size[0]} x {self.image_size[1]} values"
        if self.task == "image-classification" and self.config.get("id2label"):
            labels = list(self.config["id2label"].values())
            more = f", ... ({len(labels)} in all)" if len(labels) > _MAX_CLASSES else ""
            found["Classes"] = ", ".join(map(as_code, labels[:_MAX_CLASSES])) + more
        parameters = self._count_parameters()
        return found | ({"Parameters": f"{parameters:,}"} if parameters else {})

    def limits(self) -> list[str]:
        """What the model is not good for, as far as it follows from what it is."""
        limits = []
        if self.task == "image-classification" and self.config.get("id2label"):
            classes = len(self.config["id2label"])
            limits.append(f"It knows the {classes} classes of its training data only; any picture gets one of them.")
        if self.entries and self.evaluated_on:
            limits.append(
                f"The results above hold for {' '.join(self.evaluated_on.split())} and say little about other data."
            )
        size = "prompt length" if self.task == "text-generation" else "input size"
        return [*limits, f"Speed depends on device, batch and {size}: measure it where the model will run."]

    # What its files say

    @property
    def entries(self) -> list[Mapping[str, Any]]:
        """The results, as given or as kept."""
        if self.results is None:
            return read_results(self.folder)
        return [
            {
                "name": result.name,
                "value": result.value,
                "starting_point": result.starting_point,
                "metric": result.metric,
                "evaluated_on": self.evaluated_on,
            }
            for result in self.results
        ]

    @property
    def architecture(self) -> str | None:
        """Name of the model's class."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    @property
    def auto_class(self) -> str:
        """The Auto class that loads the model."""
        task = re.search(r"For[A-Z]\w+$", self.architecture or "")
        return f"AutoModel{task.group()}" if task else "AutoModel"

    @property
    def task(self) -> str | None:
        """The Hub's name of what the model does."""
        return _TASKS.get(self.auto_class)

    @property
    def remote_code(self) -> str:
        """What loading needs where this package is not installed."""
        return ", trust_remote_code=True" if self.config.get("auto_map") else ""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of its images."""
        size = self.config.get("image_size")
        return (size, size) if isinstance(size, int) else tuple(size) if size else None

    @property
    def _takes_pictures(self) -> bool:
        """Whether an image-classification pipeline can be built from the folder; it feeds three channels."""
        has_processor = any((self.folder / f"{kind}_config.json").exists() for kind in ("preprocessor", "processor"))
        return has_processor and self.config.get("num_channels", 3) == 3

    def _count_parameters(self) -> int | None:
        from safetensors import SafetensorError, safe_open

        total = 0
        for path in self.folder.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - it is no mapping
                        size = 1
                        for length in file.get_slice(name).get_shape():
                            size *= length
                        total += size
            except SafetensorError:
                return None
        return total or None

    def _data_rows(self) -> dict[str, str]:
        data = self._data
        rows = {}
        if data.get("hub_id"):
            rows["Name"] = f"[`{recorded_name(data)}`](https://huggingface.co/datasets/{data['hub_id']})"
        elif data.get("name"):
            rows["Name"] = as_code(data["name"])
        rows |= {f"{str(name).capitalize()} examples": f"{n:,}" for name, n in (data.get("splits") or {}).items()}
        others = {name: value for name, value in data.items() if name not in ("name", "hub_id", "splits")}
        return rows | {name.replace("_", " ").capitalize(): str(value) for name, value in others.items()}


def is_hub_id(name: str | None) -> bool:
    """Says whether a name can be one on the Hub: no path, and no folder of this machine.

    Args:
        name (`str` or `None`):
            The name.

    Returns:
        `bool`: the answer.
    """
    return name is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()
