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

# The model that DyVM and R-MeeTo start from; not one of the seven.
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


def get_method(key: str) -> Method:
    """Finds a method, or Vim, by its keyword.

    Args:
        key (`str`):
            One of the `key`s of `METHODS`, or `"vim"`.

    Returns:
        `Method`: the entry.

    Example:

    ```python
    >>> from hf_effml.methods import get_method

    >>> get_method("rmeeto").paper
    '2412.12496'
    ```
    """
    for method in (*METHODS, VIM):
        if method.key == key:
            return method
    raise ValueError(f"`{key}` is no method; choose one of {', '.join(m.key for m in (*METHODS, VIM))}.")
