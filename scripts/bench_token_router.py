"""Measures what token routing gains and costs: prompts, decoding and cache beside the dense model and other pruners.

Every routed run includes its router, scores and index work. Routing is checked first: skipping must equal the same
decisions computed densely and multiplied, and a schedule of zeros must equal the model without a router bit by bit.

Example: `hf-effml bench token-router --batch_sizes 1 4 --tokens 1024`
"""

import sys
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_effml import TokenRouterConfig, TokenRouterModel
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.token_router.benchmarks import (
    bench_choosing,
    bench_decoding,
    bench_prompts,
    bench_zero_schedule,
    new_report,
)
from hf_effml.utils.benchmark import describe_run


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


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    if args.quick:
        args.tokens, args.hidden_size, args.num_hidden_layers = 48, 64, 8
    report = new_report(args.tokens)
    prompts, decoding, choosing = report.parts
    how = {"rounds": args.rounds, "threads": args.threads}
    report.facts["run"] = describe_run(seed=args.seed, device=args.device, **how)
    names = ("tokens", "hidden_size", "num_hidden_layers", "dtype", "quick")
    report.facts["settings"] = {name: getattr(args, name) for name in names}
    model, generator = make_model(args), torch.Generator().manual_seed(args.seed)
    with torch.inference_mode():
        for batch in args.batch_sizes:
            given = torch.randint(model.model.config.vocab_size, (batch, args.tokens), generator=generator)
            given = given.to(args.device)
            bench_zero_schedule(prompts, model, given, **how)
            for sparsity in args.sparsities:
                tolerance = 1e-4 if args.dtype == "float32" else 2e-2
                bench_prompts(prompts, model, given, sparsity, tolerance=tolerance, **how)
                bench_decoding(decoding, model, given, sparsity, args.decode_steps, **how)
                bench_choosing(choosing, model, given, sparsity, **how)
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


def make_model(args: BenchArguments) -> TokenRouterModel:
    """A model with random weights, whose router skips nothing.

    Args:
        args (`BenchArguments`):
            Its sizes.

    Returns:
        [`TokenRouterModel`]
    """
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


if __name__ == "__main__":
    sys.exit(run_script(main))
