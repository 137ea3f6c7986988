"""Measures what token routing gains and costs: prompts, decoding and cache beside the dense model and other pruners.

Every routed run includes its router, scores and index work. Routing is checked first: skipping must equal the same
decisions computed densely and multiplied, and a schedule of zeros must equal the model without a router bit by bit.

Example: `hf-effml bench token-router --batch_sizes 1 4 --tokens 1024`
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor

    from hf_effml import TokenRouterConfig, TokenRouterModel


@dataclass
class BenchArguments:
    """What to measure, and where."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Batch sizes."})
    tokens: int = field(default=1024, metadata={"help": "Tokens of a prompt."})
    sparsities: list[float] = field(
        default_factory=lambda: [0.22, 0.4, 0.6], metadata={"help": "Shares of the tokens that skip a block."}
    )
    hidden_size: int = field(default=512, metadata={"help": "Width of the model; 64 channels per head."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Blocks, of which the first and the last stay dense."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    decode_steps: int = field(default=16, metadata={"help": "Tokens to generate when decoding is timed."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=5, metadata={"help": "Interleaved rounds; medians of them are shown."})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu or cuda."})
    seed: int = field(default=0, metadata={"help": "Of weights and prompts."})
    output_dir: str = field(default="effml-bench", metadata={"help": "Folder for bench_token_router.json and .md."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes, to see it run; the numbers mean nothing."})

    def __post_init__(self) -> None:
        if min(*self.batch_sizes, self.threads, self.rounds, self.decode_steps) < 1:
            raise ValueError("`batch_sizes`, `threads`, `rounds` and `decode_steps` must be at least 1.")
        if self.num_hidden_layers < 4:
            raise ValueError(f"`num_hidden_layers` must be at least 4; got {self.num_hidden_layers}.")


DENSE, PLAIN, ZERO, FREE = "dense", "no router", "schedule of zeros", "skipping for free"
SHORTGPT, GATE = "ShortGPT, blocks removed", "computed, then multiplied"
LEARNED = {"one_pass": "one-pass router", "dynamic": "dynamic router", "static": "static router"}
KEEP = "one-pass router, K/V kept"


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    import torch

    from hf_effml.utils.benchmark import describe_run, markdown_table, one_line, write_report

    if args.quick:
        args.tokens, args.hidden_size, args.num_hidden_layers = 48, 64, 8
    run = describe_run(seed=args.seed, rounds=args.rounds, threads=args.threads, device=args.device)
    model, generator = _model(args), torch.Generator().manual_seed(args.seed)
    prompts, steps, parts = [], [], []
    with torch.inference_mode():
        for batch in args.batch_sizes:
            given = torch.randint(model.model.config.vocab_size, (batch, args.tokens), generator=generator)
            given = given.to(args.device)
            prompts += _bench_zero(args, model, given)
            for sparsity in args.sparsities:
                prompts += _bench_prompt(args, model, given, sparsity)
                steps += _bench_decoding(args, model, given, sparsity)
                parts.append(_bench_choosing(args, model, given, sparsity))
    results: dict[str, object] = {
        "run": run,
        "settings": {
            key: getattr(args, key) for key in ("tokens", "hidden_size", "num_hidden_layers", "dtype", "quick")
        },
        "prompts": prompts,
        "decoding": steps,
        "choosing": parts,
    }
    tables = [
        f"## Prompts of {args.tokens} tokens\n\n{markdown_table(prompts)}",
        f"## Decoding after them\n\n{markdown_table(steps)}",
        f"## Router, scores and index work\n\n{markdown_table(parts)}",
        one_line(run),
    ]
    print("\n\n".join(tables))
    print(f"\nWrote {write_report(args.output_dir, 'bench_token_router', results, tables)}")
    return results


def _model(args: BenchArguments) -> "TokenRouterModel":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_effml import TokenRouterConfig, TokenRouterModel

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 43 // 16,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(args.hidden_size // 64, 1),
        max_position_embeddings=2 * args.tokens,
        attn_implementation=args.attn_implementation,
    )
    base = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    return TokenRouterModel(base, TokenRouterConfig(target_sparsity=0.0, num_protected_last=1, min_tokens=0))


def _config(model: "TokenRouterModel", sparsity: float, **changes: Any) -> "TokenRouterConfig":
    from hf_effml.token_router.patching import copy_config

    return copy_config(model.config, target_sparsity=sparsity, **changes)


def _prompt(model: Any, given: "Tensor", config: Any = None, use_cache: bool = True) -> "Tensor":
    options = {} if config is None else {"token_router_config": config}
    return model(given, use_cache=use_cache, logits_to_keep=1, **options).logits


def _dense(model: "TokenRouterModel", given: "Tensor") -> "Tensor":
    with model.disable_routing():
        return _prompt(model.model, given)


def _bench_zero(args: BenchArguments, model: "TokenRouterModel", given: "Tensor") -> list[dict[str, Any]]:
    """A router that skips nothing, beside the model without one."""
    import copy

    from hf_effml import remove_token_router
    from hf_effml.utils.benchmark import compare

    # With the same weights: at another place in memory they can round differently.
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = remove_token_router(copy.deepcopy(model.model, weights))
    functions = {PLAIN: partial(_prompt, plain, given), ZERO: partial(_prompt, model, given)}
    timings = compare(functions, [[PLAIN, ZERO]], rounds=args.rounds, threads=args.threads, tolerance=0.0)
    rows = []
    for name, timing in timings.items():
        rows.append(
            {"batch": len(given), "sparsity": 0.0, "model": name}
            | timing.as_row()
            | {"faster_than_dense": round(timings[PLAIN].speedup(timing), 3), "bound": 1.0, "kv": "100%"}
        )
    return rows


def _bench_prompt(
    args: BenchArguments, model: "TokenRouterModel", given: "Tensor", sparsity: float
) -> list[dict[str, Any]]:
    from hf_effml.utils.benchmark import check_agreement, compare

    configs = {name: _config(model, sparsity, router_type=kind) for kind, name in LEARNED.items()}
    if "flash" not in args.attn_implementation:
        configs[KEEP] = _config(model, sparsity, kv_policy="keep")
    functions: dict[str, Callable] = {DENSE: partial(_dense, model, given)}
    functions |= {name: partial(_prompt, model, given, config) for name, config in configs.items()}
    one_pass = configs[LEARNED["one_pass"]]
    works: dict[str, float] = {DENSE: 1.0}
    caches: dict[str, float | None] = {DENSE: 1.0}
    for name, config in configs.items():
        functions[name]()
        works[name], caches[name] = model.routing_report.flop_ratio, _cache_share(model, given, config)
    functions[GATE] = partial(_multiplied, model, given, one_pass)
    works[GATE], caches[GATE] = 1.0, None
    functions[FREE] = partial(_for_free, model, given, one_pass)
    works[FREE], caches[FREE] = works[LEARNED["static"]], None
    pruned, removed = _shortgpt(model, sparsity)
    functions[SHORTGPT] = partial(_prompt, pruned, given)
    works[SHORTGPT] = caches[SHORTGPT] = 1 - removed / args.num_hidden_layers
    check_agreement(
        {LEARNED["one_pass"]: functions[LEARNED["one_pass"]](), GATE: functions[GATE]()},
        tolerance=1e-4 if args.dtype == "float32" else 2e-2,
    )
    timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    rows = []
    for name, timing in timings.items():
        row = {"batch": len(given), "sparsity": sparsity, "model": name} | timing.as_row()
        row["faster_than_dense"] = round(timings[DENSE].speedup(timing), 3)
        row["bound"] = round(1 / works[name], 3)
        share = caches[name]
        row["kv"] = None if share is None else f"{share:.1%}"
        rows.append(row)
    return rows


def _multiplied(model: "TokenRouterModel", given: "Tensor", config: Any) -> "Tensor":
    from hf_effml.token_router.baselines import gate_multiply

    with gate_multiply(model):
        return _prompt(model, given, config, use_cache=False)


def _for_free(model: "TokenRouterModel", given: "Tensor", config: Any) -> "Tensor":
    """The blocks alone on as many tokens as each of them processes, cut off at the end: no choosing, no moving."""
    import torch
    from transformers import DynamicCache

    from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT

    decoder, kept = model.decoder, [round((1 - share) * given.shape[1]) for share in config.schedule]
    hidden = decoder.embed_tokens(given)
    rotary = decoder.rotary_emb(hidden, torch.arange(given.shape[1], device=given.device).unsqueeze(0))
    cache = DynamicCache(config=model.model.config)
    mask = None
    if model.model.config._attn_implementation == "eager":
        columns = torch.arange(given.shape[1], device=given.device)
        mask = torch.zeros_like(columns[:, None] + columns, dtype=hidden.dtype)
        mask = mask.masked_fill(columns > columns[:, None], torch.finfo(hidden.dtype).min)[None, None]
    for block, count in zip(decoder.layers, kept, strict=True):
        some = tuple(part[:, :count] for part in rotary)
        own = None if mask is None else mask[..., :count, :count]
        done = block(hidden[:, :count], attention_mask=own, position_embeddings=some, **{CACHE_ARGUMENT: cache})
        hidden = torch.cat([done, hidden[:, count:]], dim=1)
    return model.model.lm_head(decoder.norm(hidden)[:, -1:])


def _shortgpt(model: "TokenRouterModel", sparsity: float) -> "tuple[Any, int]":
    """As many blocks removed as come nearest to the share; which ones makes no difference to the time."""
    from hf_effml import remove_blocks

    blocks = len(model.config.schedule)
    count = max(1, round(sparsity * blocks))
    return remove_blocks(model.model, range(1, 1 + count)), count


def _cache_share(model: "TokenRouterModel", given: "Tensor", config: Any) -> float:
    """Bytes that the cache really holds, over those of a dense run."""
    from transformers import DynamicCache

    from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT

    sizes = []
    for chosen in (config, model.config):
        cache = DynamicCache(config=model.model.config)
        model(given, token_router_config=chosen, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    return sizes[0] / sizes[1]


def _bench_decoding(
    args: BenchArguments, model: "TokenRouterModel", given: "Tensor", sparsity: float
) -> list[dict[str, Any]]:
    """Steps on the cache of a prompt; the cache is cut back after each round."""
    from transformers import DynamicCache

    from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT
    from hf_effml.utils.benchmark import compare

    shares = _stepped(model, sparsity)
    configs = {
        DENSE: model.config,
        "every token processed": _config(model, sparsity, decode_policy="keep"),
        "blocks over 50 % skipped": _config(model, sparsity, sparsity_schedule=shares),
    }
    functions = {}
    for name, config in configs.items():
        cache = DynamicCache(config=model.model.config)
        model(given, token_router_config=config, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        functions[name] = partial(_decode, model, given[:, -1:], cache, config, args.decode_steps)
    timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    rows = []
    for name, timing in timings.items():
        row = {"batch": len(given), "sparsity": sparsity, "model": name}
        row |= {key: round(value / args.decode_steps, 3) for key, value in timing.as_row().items()}
        rows.append(row | {"faster_than_dense": round(timings[DENSE].speedup(timing), 3)})
    return rows


def _stepped(model: "TokenRouterModel", sparsity: float) -> list[float]:
    """A schedule of the same mean in which some blocks skip nearly everything and one what is left."""
    schedule, left = [0.0] * len(model.config.schedule), sparsity * len(model.config.schedule)
    for block in range(1, len(schedule) - 1):
        schedule[block] = round(min(0.9, left), 9)
        left -= schedule[block]
    return schedule


def _decode(model: "TokenRouterModel", token: "Tensor", cache: Any, config: Any, steps: int) -> "Tensor":
    from hf_effml.token_router.token_skip_layer import CACHE_ARGUMENT

    for _ in range(steps):
        logits = model(token, token_router_config=config, **{CACHE_ARGUMENT: cache}).logits
    cache.crop(-steps)
    return logits


def _bench_choosing(
    args: BenchArguments, model: "TokenRouterModel", given: "Tensor", sparsity: float
) -> dict[str, Any]:
    """What scoring, routing and sorting take of a dense run: the same steps, as often as a routed run makes them."""
    from hf_effml.utils.benchmark import compare

    functions: dict[str, Callable] = {DENSE: partial(_dense, model, given)}
    for kind in ("one_pass", "dynamic"):
        with _recorded() as (scored, states):
            _prompt(model, given, _config(model, sparsity, router_type=kind))
        functions[kind] = partial(_choose, scored, states[0])
    timings = compare(functions, [], rounds=args.rounds, threads=args.threads)
    row: dict[str, Any] = {"batch": len(given), "sparsity": sparsity}
    for kind in ("one_pass", "dynamic"):
        row[f"{kind}_ms"] = round(timings[kind].median, 3)
        row[f"{kind}_share_of_dense"] = f"{1 / timings[DENSE].speedup(timings[kind]):.1%}"
    return row


@contextmanager
def _recorded() -> "Iterator[tuple[list, list]]":
    """Notes the arguments of every scoring, and the states that decide."""
    from unittest import mock

    from hf_effml.token_router import routing_state, token_skip_layer

    scored, states = [], []
    score, start = token_skip_layer.score_tokens, routing_state.RoutingState.__post_init__

    def noting(*arguments: Any) -> Any:
        scored.append(arguments)
        return score(*arguments)

    def starting(state: Any) -> None:
        states.append(state)
        start(state)

    noting_scores = mock.patch.object(token_skip_layer, "score_tokens", noting)
    with noting_scores, mock.patch.object(routing_state.RoutingState, "__post_init__", starting):
        yield scored, states


def _choose(scored: list, state: Any) -> None:
    """All scores, decisions and orders of one routed run."""
    from dataclasses import replace

    from hf_effml.token_router.token_skip_layer import score_tokens

    fresh = replace(state, plans={}, logits={}, scores={})
    scores = iter([score_tokens(*arguments) for arguments in scored])
    for block in range(len(fresh.schedule)):
        plan = fresh.plan_for(block)
        if plan is not None:
            plan.compact()
        if fresh.wants_score(block):
            score = next(scores)
            whole = score if score.shape == fresh.real.shape else score.new_zeros(fresh.real.shape)
            fresh.add_score(block, whole)


if __name__ == "__main__":
    sys.exit(run_script(main))
