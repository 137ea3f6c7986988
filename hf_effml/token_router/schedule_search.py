"""Which share of the tokens each block should skip: a genetic search."""

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_effml.utils.files import remove_leftovers, write_json

from .block_influence import block_influence, check_windows, evaluation_mode
from .configuration_token_router import MAX_SPARSITY, TokenRouterConfig
from .continuations import continuation_logits, cross_entropy, divergence
from .patching import copy_config, disable_routing, find_decoder, is_patched


logger = logging.get_logger(__name__)

_ROUTER_TYPES = ("static", "dynamic", "one_pass", "random")
_FITNESS = ("kl", "cross_entropy")
# Individuals that compete to become a parent.
_TOURNAMENT = 3
# Bytes of teacher predictions from which on they are kept in half precision.
_LARGE = 2**28
# Fields of a configuration that change what a schedule is worth.
_CONFIG_FIELDS = (
    "target_sparsity",
    "num_protected_first",
    "num_protected_last",
    "kv_policy",
    "skip_unit",
    "score_mode",
    "score_window",
    "normalize_scores",
    "always_keep_first",
    "always_keep_last",
    "min_tokens",
    "random_seed",
    "num_hidden_layers",
)


def project_schedule(
    values: Sequence[float], target: float, protected: Iterable[int] = (), max_sparsity: float = MAX_SPARSITY
) -> list[float]:
    """Finds the schedule of a given mean that is nearest to some values.

    Args:
        values (`Sequence[float]`):
            Wanted sparsity of each block; any numbers.
        target (`float`):
            Mean that the schedule has to have, over all blocks.
        protected (`Iterable[int]`, *optional*, defaults to none):
            Blocks whose sparsity is 0.
        max_sparsity (`float`, *optional*, defaults to 0.95):
            Most that a block may skip.

    Returns:
        `list[float]`: shares from 0 to `max_sparsity`.

    Raises:
        ValueError: If there is no such schedule.

    Example:

    ```python
    >>> from hf_effml import project_schedule

    >>> project_schedule([0.0, 0.5, 0.5, 2.0], target=0.5, protected=[0])
    [0.0, 0.525, 0.525, 0.95]

    ```
    """
    blocked = set(protected)
    _check_projection(values, target, blocked, max_sparsity)
    wanted = [float(value) for block, value in enumerate(values) if block not in blocked]
    total = target * len(values)

    def clipped(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), float(max_sparsity)) for value in wanted]

    # All are shifted alike and clipped. Their sum rises with the shift, straight between the points where one of them
    # meets a bound.
    bends = sorted(bound - value for value in wanted for bound in (0.0, max_sparsity))
    above = bisect_left(bends, total, key=lambda shift: sum(clipped(shift)))
    if 0 < above < len(bends):
        low, high = (sum(clipped(bends[index])) for index in (above - 1, above))
        shift = bends[above - 1] + (bends[above] - bends[above - 1]) * (total - low) / (high - low)
    else:
        shift = bends[min(above, len(bends) - 1)] if bends else 0.0
    shares = iter(clipped(shift))
    return [0.0 if block in blocked else next(shares) for block in range(len(values))]


def _check_projection(values: Sequence[float], target: float, blocked: set[int], max_sparsity: float) -> None:
    blocks = len(values)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"`values` must be finite numbers, one per block; got {list(values)}.")
    if not 0 < max_sparsity < 1:
        raise ValueError(f"`max_sparsity` must be above 0 and less than 1; got {max_sparsity}.")
    wrong = sorted(block for block in blocked if not 0 <= block < blocks)
    if wrong:
        raise ValueError(f"`protected` must name blocks from 0 to {blocks - 1}; got {wrong[0]}.")
    most = max_sparsity * (blocks - len(blocked)) / max(blocks, 1)
    if not 0 <= target <= most + 1e-9:
        raise ValueError(
            f"`target` must be at least 0 and at most {max_sparsity} * {blocks - len(blocked)} / {blocks} = "
            f"{most:.4g}, which {len(blocked)} protected of {blocks} blocks leave; got {target}. Lower it, or protect "
            "fewer blocks."
        )


@dataclass(frozen=True)
class ScheduleSearchResult:
    """What [`search_sparsity_schedule`] found.

    Args:
        schedule (`list[float]`):
            The best schedule: for `sparsity_schedule` of a [`TokenRouterConfig`].
        fitness (`float`):
            Its fitness; lower is better.
        history (`list[float]`):
            The best fitness among the schedules to start with, and after every generation.
        evaluations (`int`):
            Schedules whose fitness was needed, each once.
    """

    schedule: list[float]
    fitness: float
    history: list[float]
    evaluations: int


def search_sparsity_schedule(
    model: nn.Module,
    windows: Tensor | None = None,
    prompt_length: int | None = None,
    *,
    population: int = 24,
    generations: int = 20,
    elite: int = 4,
    mutation_rate: float = 0.3,
    mutation_scale: float = 0.1,
    patience: int | None = 5,
    seed: int = 0,
    router_type: str = "static",
    fitness: str | Callable[[Any, TokenRouterConfig], float] = "kl",
    batch_size: int = 8,
    checkpoint: str | Path | None = None,
    apply: bool = True,
) -> ScheduleSearchResult:
    """Searches how many tokens each block should skip, as in FTP (https://huggingface.co/papers/2412.11494).

    A genetic algorithm over schedules whose mean is the model's `target_sparsity` and which leave its protected blocks
    alone, from a uniform one, one from block influence, a triangular one and random ones. Each is tried with budget
    selection and costs one pass of the windows, in which the tokens after the prompts are processed everywhere. The
    paper searches with the static router, trains the router, and searches again with `router_type="one_pass"`.

    Args:
        model (`nn.Module`):
            A model with a token router: patched, or a [`TokenRouterModel`].
        windows (`Tensor` of shape `(windows, tokens)`, *optional*):
            Token ids of texts, without padding. Not needed where `fitness` is a function.
        prompt_length (`int`, *optional*):
            Tokens of each window that are its prompt, which is routed.
        population (`int`, *optional*, defaults to 24):
            Schedules per generation.
        generations (`int`, *optional*, defaults to 20):
            Generations after the first; each evaluates up to `population - elite` new ones.
        elite (`int`, *optional*, defaults to 4):
            Best schedules that live on unchanged.
        mutation_rate (`float`, *optional*, defaults to 0.3):
            Probability that a block's share is changed.
        mutation_scale (`float`, *optional*, defaults to 0.1):
            Standard deviation of the change.
        patience (`int`, *optional*, defaults to 5):
            Stop after so many generations that found nothing better; never if `None`.
        seed (`int`, *optional*, defaults to 0):
            Of everything random; the same one gives the same result.
        router_type (`str`, *optional*, defaults to `"static"`):
            Router to try schedules with, see [`TokenRouterConfig`].
        fitness (`str` or `Callable`, *optional*, defaults to `"kl"`):
            What to minimise on the tokens after the prompts: `"kl"`, divergence from the dense model, or
            `"cross_entropy"`; or a function of the model and the [`TokenRouterConfig`] to call it with.
        batch_size (`int`, *optional*, defaults to 8):
            Windows at a time.
        checkpoint (`str` or `Path`, *optional*):
            JSON file that is written after every evaluation. The same call goes on from it; only `generations`,
            `patience` and `batch_size` may have changed.
        apply (`bool`, *optional*, defaults to `True`):
            Write the best schedule into the model's configuration.

    Returns:
        [`ScheduleSearchResult`]: the best schedule, and how it was found.

    Raises:
        RuntimeError: If the model has no token router.
        TypeError: If an argument has the wrong type, or `fitness` returns no number.
        ValueError: If an argument is impossible, or `checkpoint` was written with other ones.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_effml import TokenRouterConfig, TokenRouterModel, search_sparsity_schedule

    >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    >>> base, windows = LlamaForCausalLM(LlamaConfig(**shape)), torch.arange(120).view(4, 30) % 50
    >>> model = TokenRouterModel(base, TokenRouterConfig(target_sparsity=0.3, min_tokens=0))
    >>> result = search_sparsity_schedule(model, windows, 20, population=6, generations=2)
    >>> result.fitness <= result.history[0], model.config.sparsity_schedule == result.schedule
    (True, True)

    ```
    """
    settings = SearchSettings(population, generations, elite, mutation_rate, mutation_scale, patience, seed)
    own = _config_of(model)
    config = _search_config(own, router_type)
    trial = _Trial(model, config, windows, prompt_length, fitness, batch_size)
    arguments = settings.fixed() | trial.arguments()
    memory = _Memory(None if checkpoint is None else Path(checkpoint), arguments)
    total = population + generations * (population - elite)
    with evaluation_mode(model), logging.tqdm(total=total, desc="Searching a schedule", unit="schedule") as bar:
        if memory.influence is None and windows is not None:
            memory.influence = block_influence(model, windows, batch_size)
            memory.write()
        starts = _starts(config, memory.influence)
        result = _evolve(settings, config, starts, lambda schedule: memory.recall(schedule, trial), bar)
    logger.info(f"Best schedule after {result.evaluations} evaluations: {result.schedule}, {result.fitness:.4g}.")
    if apply:
        own.sparsity_schedule = list(result.schedule)
    return result


def _config_of(model: nn.Module) -> TokenRouterConfig:
    decoder = find_decoder(model)
    if not is_patched(decoder):
        raise RuntimeError(
            "This model has no token router whose schedule could be searched. Patch it with "
            "`apply_token_router(model, TokenRouterConfig(target_sparsity=...))`, or make a `TokenRouterModel` of it."
        )
    return decoder.token_routing_hook.config


def _search_config(config: TokenRouterConfig, router_type: str) -> TokenRouterConfig:
    """What schedules are tried with: exact budgets, so that none wins by skipping less."""
    if router_type not in _ROUTER_TYPES:
        raise ValueError(f"`router_type` must be one of {', '.join(_ROUTER_TYPES)}; got {router_type!r}.")
    if config.target_sparsity == 0:
        raise ValueError(
            "`target_sparsity` of the model's token router is 0: no block skips anything, so there is no schedule to "
            "search. Set it to the share of tokens to skip."
        )
    return copy_config(
        config, router_type=router_type, selection="budget", decode_policy="keep", sparsity_schedule=None
    )


@dataclass(frozen=True)
class SearchSettings:
    """How the genetic algorithm works; see [`search_sparsity_schedule`]. Programs make it before they train anything.

    Raises:
        TypeError: If a number of something is none.
        ValueError: If a value is impossible.
    """

    population: int = 24
    generations: int = 20
    elite: int = 4
    mutation_rate: float = 0.3
    mutation_scale: float = 0.1
    patience: int | None = 5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"population": 2, "generations": 0, "elite": 1, "patience": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be a whole number; got {value!r}.")
            if value < bound:
                raise ValueError(f"`{name}` must be at least {bound}; got {value}.")
        if self.elite >= self.population:
            raise ValueError(
                f"`elite` must leave room for new schedules in a `population` of {self.population}; got {self.elite}. "
                "Lower it."
            )
        if not 0 < self.mutation_rate <= 1:
            raise ValueError(f"`mutation_rate` must be above 0 and at most 1; got {self.mutation_rate}.")
        if not self.mutation_scale > 0:
            raise ValueError(f"`mutation_scale` must be above 0; got {self.mutation_scale}.")

    def fixed(self) -> dict[str, Any]:
        """What may not change while a search goes on."""
        names = ("population", "elite", "mutation_rate", "mutation_scale", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class _Trial:
    """Computes the fitness of one schedule."""

    model: Any
    config: TokenRouterConfig
    windows: Any
    prompt_length: Any
    fitness: str | Callable[[Any, TokenRouterConfig], float]
    batch_size: int

    def __post_init__(self) -> None:
        if not callable(self.fitness) and self.fitness not in _FITNESS:
            raise ValueError(
                f"`fitness` must be one of {', '.join(_FITNESS)}, or a function of a model and a `TokenRouterConfig` "
                f"for anything else, such as the accuracy in a task; got {self.fitness!r}."
            )
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {self.batch_size}.")
        if self.windows is not None:
            check_windows(self.windows, "windows")
        if not callable(self.fitness):
            self._check_prompts()

    def _check_prompts(self) -> None:
        length, windows, shortest = self.prompt_length, self.windows, self.config.min_tokens
        for name, value in (("windows", windows), ("prompt_length", length)):
            if value is None:
                raise ValueError(f'`{name}` must be given for `fitness="{self.fitness}"`.')
        if not 0 < length < windows.shape[1]:
            raise ValueError(
                f"`prompt_length` must be above 0 and below the {windows.shape[1]} tokens of a window, the rest of "
                f"which is scored; got {length}."
            )
        if length < shortest:
            raise ValueError(
                f"`prompt_length` must be at least {shortest}: `min_tokens` of the model's token router lets shorter "
                f"prompts run dense; got {length}. Use longer prompts, or lower `min_tokens`."
            )

    def __call__(self, schedule: list[float]) -> float:
        config = copy_config(self.config, sparsity_schedule=schedule)
        value = self.fitness(self.model, config) if callable(self.fitness) else self._score(config)
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"`fitness` must return a number, lower for better; got {value!r}.") from None
        # A schedule that breaks the model is no reason to end the search.
        return math.inf if math.isnan(value) else value

    @torch.no_grad()
    def _score(self, config: TokenRouterConfig) -> float:
        targets = self.windows[:, self.prompt_length :].split(self.batch_size)
        logits = self._logits(token_router_config=config)
        if self.fitness == "kl":
            values = [divergence(*pair).sum() for pair in zip(self._teacher, logits, strict=True)]
        else:
            values = [cross_entropy(*pair).sum() for pair in zip(logits, targets, strict=True)]
        return torch.stack(values).cpu().double().sum().item() / sum(map(Tensor.numel, targets))

    @cached_property
    def _teacher(self) -> list[Tensor]:
        """Log-probabilities of the dense model, batch by batch."""
        kept: list[Tensor] = []
        with disable_routing(self.model):
            for logits in self._logits():
                size = 4 * logits[0].numel() * len(self.windows)
                dtype = torch.float32 if size <= _LARGE else torch.float16
                kept.append(logits.float().log_softmax(-1).to(dtype))
        return kept

    def _logits(self, **routing: Any) -> Iterator[Tensor]:
        return continuation_logits(self.model, self.windows, self.prompt_length, self.batch_size, **routing)

    def arguments(self) -> dict[str, Any]:
        """What the fitness of a schedule depends on, for a checkpoint."""
        name = self.fitness
        if callable(name):
            name = f"function {getattr(name, '__qualname__', type(name).__qualname__)}"
        windows = self.windows
        if windows is not None:
            content = windows.to("cpu", torch.int64).contiguous().numpy().tobytes()
            windows = hashlib.sha256(repr(tuple(windows.shape)).encode() + content).hexdigest()
        fields = {field: getattr(self.config, field) for field in _CONFIG_FIELDS}
        return {
            "fitness": name,
            "router_type": self.config.router_type,
            "prompt_length": self.prompt_length,
            "windows": windows,
            **fields,
            "model": _fingerprint(find_decoder(self.model), self.config.is_learned),
        }


def _fingerprint(decoder: nn.Module, with_router: bool) -> str:
    """Tells weights apart by a few numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in decoder.named_parameters():
        if with_router or not name.startswith("token_router."):
            some = [] if parameter.is_meta else parameter.detach().flatten()[:16].float().tolist()
            digest.update(repr((name, tuple(parameter.shape), some)).encode())
    return digest.hexdigest()


@dataclass
class _Memory:
    """Remembers the fitness of every schedule, also in a file.

    A search is decided by its seed and these numbers, so that one which starts again takes the same way through them.
    """

    path: Path | None
    arguments: dict[str, Any]
    influence: list[float] | None = None
    known: dict[tuple[float, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        remove_leftovers(self.path.parent, of=self.path.name)
        try:
            content = json.loads(self.path.read_text())
            then, self.influence = content["arguments"], content["block_influence"]
            self.known = {tuple(one["schedule"]): one["fitness"] for one in content["evaluated"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"`checkpoint` must be a file that `search_sparsity_schedule` wrote, or a new one; got `{self.path}`. "
                "Delete it, or name another one."
            ) from None
        for name, now in self.arguments.items():
            if then.get(name) != now:
                hashed = name in ("windows", "model")
                values = "was another one" if hashed else f"was {then.get(name)!r} and is {now!r} now"
                raise ValueError(
                    f"`checkpoint` belongs to a search with other arguments: `{name}` {values} (`{self.path}`). Use "
                    "the same, or name another file."
                )

    def recall(self, schedule: list[float], compute: Callable[[list[float]], float]) -> float:
        key = tuple(schedule)
        if key not in self.known:
            self.known[key] = compute(schedule)
            self.write()
        return self.known[key]

    def write(self) -> None:
        if self.path is None:
            return
        evaluated = [{"schedule": list(key), "fitness": value} for key, value in self.known.items()]
        content = {"arguments": self.arguments, "block_influence": self.influence, "evaluated": evaluated}
        write_json(self.path, content, indent=None)


def _starts(config: TokenRouterConfig, influence: list[float] | None) -> list[list[float]]:
    """Schedules that a person would try."""
    blocks = config.num_hidden_layers or 0
    first, routed = config.num_protected_first, blocks - config.num_protected_first - config.num_protected_last
    weights = [[1.0] * routed]
    if influence is not None:
        weights.append([1 / max(share, 1e-3) for share in influence[first : first + routed]])
    weights.append([float(min(index + 1, routed - index)) for index in range(routed)])
    padded = [[0.0] * first + middle + [0.0] * config.num_protected_last for middle in weights]
    return [[share * config.target_sparsity * blocks / sum(values) for share in values] for values in padded]


def _evolve(
    settings: SearchSettings,
    config: TokenRouterConfig,
    starts: list[list[float]],
    evaluate: Callable[[list[float]], float],
    bar: Any,
) -> ScheduleSearchResult:
    """The genetic algorithm. Individuals are pairs of fitness and schedule."""
    generator = torch.Generator().manual_seed(settings.seed)
    blocks = len(config.schedule)
    protected = [*range(config.num_protected_first), *range(blocks - config.num_protected_last, blocks)]
    used: set[tuple[float, ...]] = set()

    def judge(values: list[float]) -> tuple[float, list[float]]:
        schedule = project_schedule(values, config.target_sparsity, protected)
        used.add(tuple(schedule))
        result = evaluate(schedule), schedule
        bar.update()
        return result

    noise = torch.rand(settings.population, blocks, generator=generator, dtype=torch.float64, device="cpu")
    first = [*starts, *(noise * MAX_SPARSITY).tolist()][: settings.population]
    individuals = sorted((judge(values) for values in first), key=_fitness)
    history = [individuals[0][0]]
    for _ in range(settings.generations):
        bar.set_postfix(best=f"{history[-1]:.4g}", refresh=False)
        children = [_child(individuals, settings, generator) for _ in range(settings.population - settings.elite)]
        individuals = sorted([*individuals[: settings.elite], *map(judge, children)], key=_fitness)
        history.append(individuals[0][0])
        patience = settings.patience
        if patience is not None and len(history) > patience and history[-1] == history[-1 - patience]:
            break
    best, schedule = individuals[0]
    if math.isinf(best):
        raise ValueError("`fitness` gave no schedule a finite value. Check the model's outputs, or the function.")
    return ScheduleSearchResult(schedule, best, history, len(used))


def _fitness(individual: tuple[float, list[float]]) -> float:
    return individual[0]


def _child(
    individuals: list[tuple[float, list[float]]], settings: SearchSettings, generator: torch.Generator
) -> list[float]:
    """Two winners of tournaments are mixed block by block, then some of the shares are changed."""
    rivals = torch.randint(len(individuals), (2, _TOURNAMENT), generator=generator, device="cpu")
    # They are sorted: the lower index wins.
    parents = [individuals[index][1] for index in rivals.min(1).values.tolist()]
    mother, father = torch.tensor(parents, dtype=torch.float64, device="cpu")
    random = torch.rand(2, len(mother), generator=generator, dtype=torch.float64, device="cpu")
    change = torch.randn(len(mother), generator=generator, dtype=torch.float64, device="cpu")
    mixed = torch.where(random[0] < 0.5, mother, father)
    return (mixed + change * settings.mutation_scale * (random[1] < settings.mutation_rate)).tolist()
