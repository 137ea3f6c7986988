"""Time, memory and exactness of the gradient of trajectory matching, five ways, and of what else happens often.

All ways get the same batches, augmentations and segment. Errors are those against the full unroll in double precision.

Example: `hf-effml bench distillation --syn_steps 20 40`
"""

import sys
from dataclasses import dataclass, field

from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.recipes import read_recipes


@dataclass
class BenchArguments:
    """What to measure. The defaults take some five minutes on one core, most of it for the compiler."""

    hidden_size: int = field(default=32, metadata={"help": "Width of the ConvNet."})
    depth: int = field(default=3, metadata={"help": "Its depth."})
    image_size: int = field(default=16, metadata={"help": "Side of the images."})
    batch_syn: int = field(default=40, metadata={"help": "Synthetic images in a step; all of them."})
    syn_steps: list[int] = field(default_factory=lambda: [20, 40], metadata={"help": "Steps of the unroll."})
    bank_experts: list[int] = field(default_factory=lambda: [2, 16], metadata={"help": "Sizes of banks to read."})
    compile: bool = field(default=True, metadata={"help": "Measure the compiled derivatives too."})
    published: bool = field(default=True, metadata={"help": "Print what the published settings need."})
    rounds: int = field(default=5, metadata={"help": "Interleaved samples of every way."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    seed: int = field(default=0, metadata={"help": "Of images, weights and batches."})
    device: str = field(default="cpu", metadata={"help": "Where to compute."})
    output_dir: str = field(default="benchmarks", metadata={"help": "Folder of the report."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    import torch

    from hf_effml import ConvNetConfig
    from hf_effml.distillation.evaluation import benchmarks
    from hf_effml.distillation.evaluation.cost import recipe_costs
    from hf_effml.utils.benchmark import describe_run

    torch.set_num_threads(args.threads)
    how = {"rounds": args.rounds, "threads": args.threads}
    report = benchmarks.new_report()
    gradients, others = report.parts
    report.facts["run"] = describe_run(seed=args.seed, device=args.device, **how)
    report.facts["settings"] = vars(args)
    shape = {"image_size": args.image_size, "hidden_size": args.hidden_size}
    network = ConvNetConfig(**shape, id2label=dict(enumerate("0123456789")))
    student = ConvNetConfig(**shape, depth=args.depth, id2label=dict(enumerate("0123456789")))
    for steps in args.syn_steps:
        problem = benchmarks.make_problem(student, args.batch_syn, steps, args.seed, args.device)
        ms = benchmarks.bench_gradient(gradients, *problem, compiled=args.compile, **how)
    for experts in args.bank_experts:
        benchmarks.bench_bank(others, experts, **how)
    benchmarks.bench_maps(others, network, args.batch_syn, ms, **how, device=args.device)
    benchmarks.bench_augmentation(others, **how, seed=args.seed, device=args.device)
    if args.published:
        published = report.add_part("published", title="What the published settings need")
        for method in ("datm", "pad", "edf"):
            for name, cost in recipe_costs(read_recipes(method)).items():
                published.add(f"{method} {name}", **cost.as_row())
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


if __name__ == "__main__":
    sys.exit(run_script(main))
