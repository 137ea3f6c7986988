"""Time, memory and exactness of the gradient of trajectory matching, five ways, and of what else happens often.

All ways get the same batches, augmentations and segment. Errors are those against the full unroll in double precision.

Example: `hf-effml bench distillation --syn_steps 20 40`
"""

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_effml.cli.parsing import parse_arguments, run_script


if TYPE_CHECKING:
    from torch import Tensor

    from hf_effml.distillation.unroll import InnerProblem

FULL, CHECKPOINTED, FIRST_ORDER = "full unroll", "checkpointed unroll", "first order (TESLA)"
OURS, COMPILED = "ours", "ours, compiled"
_CAM_INTERVAL = 100


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

    from hf_effml.cli.recipes import read_recipes
    from hf_effml.distillation.cost import recipe_costs
    from hf_effml.utils.benchmark import describe_run, markdown_table, one_line, write_report

    torch.set_num_threads(args.threads)
    run = describe_run(seed=args.seed, rounds=args.rounds, threads=args.threads, device=args.device)
    gradients = [row for steps in args.syn_steps for row in _bench_gradient(args, steps)]
    maps = _bench_maps(args)
    step = next(row["ms"] for row in reversed(gradients) if row["way"] == OURS)
    share = maps["ms"] * args.batch_syn / 100 / (_CAM_INTERVAL * step)
    edf = {"what": f"maps every {_CAM_INTERVAL} steps, share of EDF's time", "share": f"{share:.3%}"}
    others = [*_bench_bank(args), maps, edf, *_bench_augmentation(args)]
    results: dict[str, object] = {"run": run, "settings": vars(args), "gradients": gradients, "others": others}
    tables = [
        f"## One gradient of the matching loss\n\n{markdown_table(gradients)}",
        f"## What else happens often\n\n{markdown_table(others)}",
    ]
    if args.published:
        results["published"] = published = [
            {"setting": f"{method} {name}", **cost.as_row()}
            for method in ("datm", "pad", "edf")
            for name, cost in recipe_costs(read_recipes(method)).items()
        ]
        tables.append(f"## What the published settings need\n\n{markdown_table(published)}")
    tables.append(one_line(run))
    print("\n\n".join(tables))
    print(f"\nWrote {write_report(args.output_dir, 'bench_distillation', results, tables)}")
    return results


def make_segment(args: BenchArguments, steps: int) -> "tuple[InnerProblem, Tensor]":
    """Makes a student's training on images and a target of plausible size.

    Args:
        args (`BenchArguments`):
            Sizes and seed.
        steps (`int`):
            Steps of the unroll.

    Returns:
        `tuple[InnerProblem, Tensor]`: the problem and the target.
    """
    import torch

    from hf_effml.distillation import ConvNetConfig, FlatStudent, MatchingSettings, build_student
    from hf_effml.distillation.unroll import StudentDerivatives

    generator = torch.Generator().manual_seed(args.seed)
    config = ConvNetConfig(
        image_size=args.image_size,
        hidden_size=args.hidden_size,
        depth=args.depth,
        id2label=dict(enumerate("0123456789")),
    )
    student = FlatStudent(build_student(config, seed=args.seed)).to(args.device)
    start = student.flatten()
    count, size = args.batch_syn, args.image_size
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = 3 * torch.randn(count, 10, generator=generator)
    away = 0.01 * torch.randn(len(start), generator=generator)
    # On random images larger steps let rounding grow until no two exact ways agree.
    images, labels, lr, away = (tensor.to(args.device) for tensor in (images, labels, torch.tensor(0.003), away))
    settings = MatchingSettings(syn_steps=steps)
    return settings.problem(StudentDerivatives(student), images, labels, lr, start, args.seed), start + away


def _bench_gradient(args: BenchArguments, steps: int) -> list[dict[str, Any]]:
    from hf_effml.distillation.unroll import StudentDerivatives
    from hf_effml.utils.benchmark import compare, peak_memory

    problem, target = make_segment(args, steps)
    student = problem.derivatives.student
    ways: dict[str, Callable[[], list[Tensor]]] = {
        FULL: partial(_unrolled, problem, target, checkpoint=False),
        CHECKPOINTED: partial(_unrolled, problem, target, checkpoint=True),
        FIRST_ORDER: partial(_matched, problem, target, mode="first_order"),
        OURS: partial(_matched, problem, target),
    }
    if args.compile:
        compiled = problem._replace(derivatives=StudentDerivatives(student, compile=True))
        ways[COMPILED] = partial(_matched, compiled, target)
    reference = _unrolled(_in_double(problem), target.double(), checkpoint=False)
    exact = [name for name in ways if name != FIRST_ORDER]
    timings = compare(ways, [exact], rounds=args.rounds, threads=args.threads, tolerance=1e-2)
    memory = {name: peak_memory(way, args.device) for name, way in ways.items()}
    rows = []
    for name, way in ways.items():
        images, labels, lr = (_error(*pair) for pair in zip(way(), reference, strict=True))
        row: dict[str, Any] = {"steps": steps, "way": name, **timings[name].as_row()}
        row["speed"] = round(timings[FULL].speedup(timings[name]), 3)
        row["peak_MB"] = round(memory[name] / 1e6, 2)
        row["of_full"] = f"1/{memory[FULL] / memory[name]:.1f}"
        row["stored_parameters_MB"] = round((steps + 1) * student.numel * 4 / 1e6, 2)
        row |= {"error_images": images, "error_labels": labels, "error_lr": lr}
        rows.append(row)
    return rows


def _unrolled(problem: "InnerProblem", target: "Tensor", checkpoint: bool) -> "list[Tensor]":
    import torch

    from hf_effml.distillation.matching import matching_loss
    from hf_effml.distillation.unroll import unroll_reference

    leaves = [tensor.clone().requires_grad_() for tensor in (problem.images, problem.labels, problem.lr)]
    images, labels, lr = leaves
    final = unroll_reference(problem._replace(images=images, labels=labels, lr=lr), checkpoint=checkpoint)
    return list(torch.autograd.grad(matching_loss(final, problem.start, target)[0], leaves))


def _matched(
    problem: "InnerProblem", target: "Tensor", mode: Literal["exact", "first_order"] = "exact"
) -> "list[Tensor]":
    from hf_effml.distillation import MatchingSettings, match_segment

    settings = MatchingSettings(syn_steps=len(problem.plan), gradient_mode=mode, loss_threshold=float("inf"))
    found = match_segment(problem, target, settings).gradients
    if found is None:
        raise RuntimeError("The loss of the segment is not finite. Choose another seed or fewer steps.")
    return list(found)


def _in_double(problem: "InnerProblem") -> "InnerProblem":
    from hf_effml.distillation.unroll import StudentDerivatives

    student = copy.copy(problem.derivatives.student)
    student.module = copy.deepcopy(student.module).double()
    images, labels, lr, start = (
        tensor.double() for tensor in (problem.images, problem.labels, problem.lr, problem.start)
    )
    plan = [step._replace(draw=None if step.draw is None else _double(step.draw)) for step in problem.plan]
    return problem._replace(
        derivatives=StudentDerivatives(student), images=images, labels=labels, lr=lr, start=start, plan=plan
    )


def _error(given: "Tensor", expected: "Tensor") -> str:
    return f"{((given.double() - expected).norm() / expected.norm()).item():.0e}"


def _double(draw: Any) -> Any:
    from hf_effml.distillation.differentiable_augmentation import AugmentationDraw

    return AugmentationDraw(
        draw.operation,
        {name: value.double() if value.is_floating_point() else value for name, value in draw.values.items()},
    )


def _bench_bank(args: BenchArguments) -> list[dict[str, Any]]:
    """Start and target out of banks of the 32-pixel ConvNet, 20 snapshots per expert, in another place every time."""
    import torch

    from hf_effml.distillation import ConvNetConfig, TrajectoryBank, build_student
    from hf_effml.distillation.bank.files import write_bank, write_expert
    from hf_effml.utils.benchmark import compare

    config = ConvNetConfig(id2label=dict(enumerate("0123456789")))
    parameters = [
        {"name": name, "shape": list(value.shape)} for name, value in build_student(config).named_parameters()
    ]
    count = sum(torch.Size(entry["shape"]).numel() for entry in parameters)
    rows = []
    for experts in args.bank_experts:
        folder = Path(tempfile.mkdtemp(prefix="hf-effml-bench-"))
        try:
            metadata = {
                "num_experts": experts,
                "student": config.to_dict(),
                "parameters": parameters,
                "epochs": list(range(20)),
                "dtype": "float32",
            }
            for expert in range(experts):
                write_expert(folder, expert, torch.rand(20, count), metadata)
            write_bank(folder, metadata)
            bank = TrajectoryBank.from_pretrained(folder)
            turn = iter(range(10**9))

            def read(bank: TrajectoryBank = bank, turn: Any = turn, experts: int = experts) -> "list[Tensor]":
                place = next(turn)
                return list(bank.pair(place % experts, place * 7 % 18, 2))

            for _ in range(2 * experts):
                read()
            timing = compare({"read": read}, [], rounds=args.rounds, threads=args.threads)["read"]
            what = f"start and target, bank of {experts} ({experts * 20 * count * 4 / 1e6:.0f} MB)"
            rows.append({"what": what, "ms": round(timing.median, 3)})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def _bench_maps(args: BenchArguments) -> dict[str, Any]:
    import torch

    from hf_effml.distillation import ConvNetConfig, build_student, class_activation_map
    from hf_effml.utils.benchmark import compare

    size = args.image_size
    names = dict(enumerate("0123456789"))
    network = build_student(ConvNetConfig(image_size=size, hidden_size=args.hidden_size, id2label=names)).to(
        args.device
    )
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(100, 3, size, size, generator=generator).to(args.device)
    classes = (torch.arange(100) % 10).to(args.device)

    def one_by_one() -> "Tensor":
        maps = [class_activation_map(network, images[i : i + 1], classes[i : i + 1]) for i in range(len(images))]
        return torch.cat(maps)

    ways = {"batched": lambda: class_activation_map(network, images, classes), "one by one": one_by_one}
    timings = compare(ways, [list(ways)], rounds=args.rounds, threads=args.threads, tolerance=1e-3)
    return {
        "what": "Grad-CAM of 100 images",
        "ms": round(timings["batched"].median, 3),
        "loop_ms": round(timings["one by one"].median, 3),
        "faster": round(timings["one by one"].speedup(timings["batched"]), 2),
    }


def _bench_augmentation(args: BenchArguments) -> list[dict[str, Any]]:
    import torch

    from hf_effml.distillation import AugmentationSettings, augment, draw_augmentation
    from hf_effml.distillation.differentiable_augmentation import OPERATIONS, AugmentationDraw
    from hf_effml.utils.benchmark import compare

    generator = torch.Generator().manual_seed(args.seed)
    images = torch.rand(100, 3, 32, 32, generator=generator).to(args.device)
    rows = []
    for operation in OPERATIONS:
        settings = AugmentationSettings(operation)
        draw = draw_augmentation(settings, len(images), (32, 32), generator, args.device)
        if draw is None:
            continue

        def at_once(draw: AugmentationDraw = draw, settings: AugmentationSettings = settings) -> "Tensor":
            return augment(images, draw, settings)

        def one_by_one(draw: AugmentationDraw = draw, settings: AugmentationSettings = settings) -> "Tensor":
            parts = []
            for i in range(len(images)):
                own = AugmentationDraw(draw.operation, {name: value[i : i + 1] for name, value in draw.values.items()})
                parts.append(augment(images[i : i + 1], own, settings))
            return torch.cat(parts)

        ways = {"at once": at_once, "one by one": one_by_one}
        timings = compare(ways, [list(ways)], rounds=args.rounds, threads=args.threads, tolerance=1e-5)
        rows.append(
            {
                "what": f"augmentation by {operation}, 100 images of 32 px",
                "ms": round(timings["at once"].median, 3),
                "loop_ms": round(timings["one by one"].median, 3),
                "faster": round(timings["one by one"].speedup(timings["at once"]), 2),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(run_script(main))
