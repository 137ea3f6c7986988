"""Every configuration with wrong, huge and strange values, the model it makes, one forward pass with labels."""

import random
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common.model_cases import CONVNET, SET, VIMS, text_inputs
from common.model_cases import Case as ModelCase

import hf_effml
from fuzz.outcomes import Case
from helpers import tiny_language_model


VALUES = [
    None,
    True,
    0,
    1,
    2,
    3,
    -1,
    2**31,
    2**63,
    -(2**63),
    0.0,
    0.5,
    1e-30,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
]
VALUES += [
    "8",
    "auto",
    "none",
    [],
    [1],
    [2, 4],
    [0.5, 0.4],
    [[0.0, 1.0]],
    ["x"],
    {},
    {"a": 1},
    {"0": "cat"},
    (8, 8),
    b"x",
]
LABELS: list[Any] = [[0, 1], [0, 751], [-100, 1], [-100, -100], [True, False], [0.5, 1.0], [[0.5, 0.5], [1.0, 0.0]]]
LABELS += [[[1, 0], [1, 1]], [[float("nan"), 1.0], [0.0, 1.0]], [[1, 2, 3], [1, 2, 3]], [], [[]], 1, [2**40, 0]]
# Above these, building or running would take long without being wrong.
MOST_WEIGHTS, MOST_PATCHES = 10**6, 500


def cases(generator: random.Random, folder: Path) -> Iterator[Case]:
    models = [*VIMS, CONVNET, SET]
    while True:
        if generator.random() < 0.2:
            config = hf_effml.TokenRouterConfig(target_sparsity=0.4, min_tokens=0)
            changes = _changes(generator, config)
            yield Case(f"TokenRouterConfig {changes}", partial(_route, changes))
            continue
        case, how = generator.choice(models), generator.choice(["made", "made", "assigned"])
        changes = _changes(generator, case.config())
        for name in ("problem_type", "num_labels", "id2label"):
            if how == "assigned":  # transformers' own fields, which it sets
                changes.pop(name, None)
        labels = generator.choice([None, *LABELS]) if case.labels is not None else None
        text = f"{case.model_class.__name__} of {changes} {how}, labels {labels}"
        yield Case(text, partial(_build, case, changes, how, labels))


def _changes(generator: random.Random, config: Any) -> dict[str, Any]:
    names = [] if config.model_type == "token_router" else ["problem_type", "num_labels", "id2label", "unknown"]
    for base in type(config).__mro__:
        if base.__module__.startswith("hf_effml"):
            names += sorted(vars(base).get("__annotations__", {}))
    # The common cases set the last.
    names = [name for name in names if not name.startswith("_") and name not in ("model_type", "student")]
    chosen = generator.sample(names, generator.choice([0, 1, 1, 1, 2, 3]))
    return {name: generator.choice(VALUES) for name in chosen}


def _build(case: ModelCase, changes: dict[str, Any], how: str, labels: Any) -> Any:
    config = case.config(**({} if how == "assigned" else changes))
    if how == "assigned":
        for name, value in changes.items():
            setattr(config, name, value)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in case.model_class(config).parameters())
    if weights > MOST_WEIGHTS or getattr(config, "num_patches", 0) > MOST_PATCHES:
        return None
    model = case.model_class(config).eval()
    if case is SET:
        return [model.images, model.labels, model.lr]
    given = {} if labels is None else {"labels": torch.tensor(labels)}
    with torch.no_grad():
        return dict(model(**case.inputs(model), **given))


@cache
def _language_model() -> Any:
    return tiny_language_model()


def _route(changes: dict[str, Any]) -> Any:
    config = hf_effml.TokenRouterConfig(**({"target_sparsity": 0.4, "min_tokens": 0} | changes))
    model = hf_effml.apply_token_router(_language_model(), config)
    try:
        with torch.no_grad():
            return model(**text_inputs(model)).logits
    finally:
        hf_effml.remove_token_router(model)
