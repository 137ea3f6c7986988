"""The seven methods as plain data: what each does, its paper, its classes and its command."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One paper and where to find it in this package.

    Args:
        key (`str`):
            Keyword on the command line.
        name (`str`):
            Name the paper gives its method.
        title (`str`):
            Title of the paper.
        paper (`str`):
            Its arXiv id; `https://huggingface.co/papers/<id>` is its page.
        authors (`str`):
            Authors in BibTeX form.
        year (`int`):
            Year of the first version.
        summary (`str`):
            What the method does, in one sentence.
        tags (`tuple[str, ...]`):
            Tags of its models and data sets on the Hub, without the paper's.
        classes (`tuple[str, ...]`, *optional*, defaults to `()`):
            Public names of `hf_effml` to start from. Empty while the method is not in this package yet.
        builds_on (`tuple[str, ...]`, *optional*, defaults to `()`):
            Keywords of what it stands on; cards cite those papers too.
    """

    key: str
    name: str
    title: str
    paper: str
    authors: str
    year: int
    summary: str
    tags: tuple[str, ...]
    classes: tuple[str, ...] = ()
    builds_on: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        """Whether this version of the package contains the method."""
        return bool(self.classes)

    @property
    def url(self) -> str:
        """The paper's page on the Hub."""
        return f"https://huggingface.co/papers/{self.paper}"

    @property
    def citation(self) -> str:
        """The paper as a BibTeX entry."""
        return (
            f"@misc{{{self.key.replace('-', '_')}{self.year},\n"
            f"  title = {{{self.title}}},\n"
            f"  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n"
            f"  eprint = {{{self.paper}}},\n"
            f"  archivePrefix = {{arXiv}},\n"
            f"  url = {{{self.url}}},\n"
            "}"
        )


METHODS = (
    Method(
        key="dyvm",
        name="DyVM",
        title="Dynamic Vision Mamba",
        paper="2504.04787",
        authors="Wu, Mengxuan and Li, Zekai and Liang, Zhiyuan and others",
        year=2025,
        summary="Drops the least useful patch tokens of a Vision Mamba and skips whole scans, image by image.",
        tags=("vision-mamba", "dyvm", "token-pruning", "image-classification"),
        classes=("DyVMForImageClassification", "DyVMTrainer", "DyVMConfig"),
        builds_on=("vim",),
    ),
    Method(
        key="rmeeto",
        name="R-MeeTo",
        title="Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training",
        paper="2412.12496",
        authors="Shi, Mingjia and Zhou, Yuhao and others",
        year=2024,
        summary="Merges similar tokens inside a trained Vision Mamba and re-trains it for minutes.",
        tags=("vision-mamba", "rmeeto", "token-merging", "image-classification"),
        classes=("RMeeToVimForImageClassification", "RMeeToTrainer", "apply_token_merging"),
        builds_on=("vim",),
    ),
    Method(
        key="token-router",
        name="FTP",
        title="FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing",
        paper="2412.11494",
        authors="Li, Zekai and Zheng, Jintu and others",
        year=2024,
        summary="Lets unimportant tokens bypass whole decoder blocks of a frozen language model.",
        tags=("token-router", "ftp", "token-pruning", "text-generation"),
        classes=("TokenRouterModel", "TokenRouterTrainer", "apply_token_router"),
    ),
    Method(
        key="edf",
        name="EDF",
        title="Emphasizing Discriminative Features for Dataset Distillation in Complex Scenarios",
        paper="2410.17193",
        authors="Wang, Kai and Li, Zekai and others",
        year=2024,
        summary="Distils complex images, the gradient on what tells classes apart; with the Comp-DD benchmark.",
        tags=("dataset-distillation", "edf", "comp-dd"),
        classes=("EDFTrainer", "DistilledDatasetModel", "evaluate_distilled"),
        builds_on=("mtt", "datm"),
    ),
    Method(
        key="pad",
        name="PAD",
        title="Prioritize Alignment in Dataset Distillation",
        paper="2408.03360",
        authors="Li, Zekai and Guo, Ziyao and others",
        year=2024,
        summary="Distils a data set from experts on data of fitting difficulty, matching deep layers only.",
        tags=("dataset-distillation", "pad"),
        classes=("PADTrainer", "DistilledDatasetModel", "DataCurriculum"),
        builds_on=("mtt", "datm"),
    ),
    Method(
        key="mmfl",
        name="MMFL",
        title="Towards Optimal Heterogeneous Client Sampling in Multi-Model Federated Learning",
        paper="2504.05138",
        authors=(
            "Zhang, Haoran and Gong, Zejun and Li, Zekai and Siew, Marie and Joe-Wong, Carlee and El-Azouzi, Rachid"
        ),
        year=2025,
        summary="Chooses which client trains which of several models so that the updates vary least.",
        tags=("federated-learning", "mmfl"),
    ),
    Method(
        key="isqa",
        name="ISQA",
        title="ISQA: Informative Factuality Feedback for Scientific Summarization",
        paper="2404.13246",
        authors="Li, Zekai and Qin, Yanxia and Liu, Qian and Kan, Min-Yen",
        year=2024,
        summary="Refines summaries of papers with what questions about them show to be fact or not.",
        tags=("summarization", "isqa", "factuality"),
    ),
)

# What the seven stand on.
VIM = Method(
    key="vim",
    name="Vim",
    title="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    paper="2401.09417",
    authors="Zhu, Lianghui and Liao, Bencheng and others",
    year=2024,
    summary="An image backbone of bidirectional state-space blocks, without attention.",
    tags=("vision-mamba", "image-classification"),
    classes=("VimForImageClassification", "VimModel", "VimBackbone", "VimTrainer"),
)
FOUNDATIONS = (
    VIM,
    Method(
        key="mtt",
        name="MTT",
        title="Dataset Distillation by Matching Training Trajectories",
        paper="2203.11932",
        authors="Cazenavette, George and Wang, Tongzhou and Torralba, Antonio and Efros, Alexei A. and Zhu, Jun-Yan",
        year=2022,
        summary="Makes a student that trains on synthetic images go where experts went.",
        tags=("dataset-distillation",),
    ),
    Method(
        key="datm",
        name="DATM",
        title="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
        paper="2310.05773",
        authors="Guo, Ziyao and Wang, Kai and Cazenavette, George and Li, Hui and Zhang, Kaipeng and You, Yang",
        year=2023,
        summary="Matches trajectories from their easy beginning on, with soft labels that are learned.",
        tags=("dataset-distillation",),
        builds_on=("mtt",),
    ),
)


def get_method(key: str) -> Method:
    """Finds a method, or what one stands on, by its keyword.

    Args:
        key (`str`):
            One of the `key`s of `METHODS` or `FOUNDATIONS`.

    Returns:
        `Method`: the entry.

    Example:

    ```python
    >>> from hf_effml.methods import get_method

    >>> get_method("rmeeto").paper
    '2412.12496'
    ```
    """
    for method in (*METHODS, *FOUNDATIONS):
        if method.key == key:
            return method
    raise ValueError(f"`{key}` is no method; choose one of {', '.join(m.key for m in (*METHODS, *FOUNDATIONS))}.")


def get_papers(key: str | None) -> list[Method]:
    """Lists what to cite for a method: its own paper first, then those it stands on.

    Args:
        key (`str`, *optional*):
            Keyword of the method.

    Returns:
        `list[Method]`: the papers; empty without a method.
    """
    if key is None:
        return []
    own = get_method(key)
    return [own, *(get_method(other) for other in own.builds_on)]
