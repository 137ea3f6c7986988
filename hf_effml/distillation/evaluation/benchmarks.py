"""Time, memory and exactness of what distillation does often: gradients, reading a bank, maps, augmentation."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from hf_effml.distillation.bank.files import write_bank, write_expert
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.class_activation import class_activation_map
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.differentiable_augmentation import (
    OPERATIONS,
    AugmentationDraw,
    AugmentationSettings,
    augment,
    draw_augmentation,
)
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.matching import MatchingSettings, match_segment, matching_loss
from hf_effml.distillation.unroll import InnerProblem, StudentDerivatives, unroll_reference
from hf_effml.utils.benchmark import compare, peak_memory
from hf_effml.utils.report import Column, Report


__all__ = ["WAYS", "bench_augmentation", "bench_bank", "bench_gradient", "bench_maps", "make_problem", "new_report"]

FULL, CHECKPOINTED, FIRST_ORDER = "full unroll", "checkpointed unroll", "first order (TESLA)"
OURS, COMPILED = "ours", "ours, compiled"
WAYS = (FULL, CHECKPOINTED, FIRST_ORDER, OURS, COMPILED)
_CAM_INTERVAL = 100
_CLASSES = dict(enumerate("0123456789"))
_GRADIENT = {
    "ms": Column("ms"),
    "spread_ms": Column("spread ms"),
    "cpu_ms": Column("cpu ms"),
    "speed": Column("speed", unit="x"),
    "peak_MB": Column("peak MB"),
    "of_full": Column("of full"),
    "stored_parameters_MB": Column("stored parameters MB"),
    "error_images": Column("error images"),
    "error_labels": Column("error labels"),
    "error_lr": Column("error lr"),
}


def new_report() -> Report:
    """Makes the report that the measurements fill.

    Returns:
        [`~hf_effml.utils.report.Report`]: its parts are `gradients` and `others`.
    """
    report = Report("bench_distillation")
    report.add_part("gradients", _GRADIENT, "One gradient of the matching loss")
    report.add_part("others", title="What else happens often")
    return report


def make_problem(
    config: ConvNetConfig, images: int, steps: int, seed: int = 0, device: str = "cpu"
) -> tuple[InnerProblem, Tensor]:
    """Makes a student's training on random images and a target of plausible size.

    Args:
        config ([`ConvNetConfig`]):
            The student.
        images (`int`):
            Synthetic images, all of which are in every step.
        steps (`int`):
            Steps of the unroll.
        seed (`int`, *optional*, defaults to 0):
            Seed of images, weights and augmentation.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where to compute.

    Returns:
        `tuple[InnerProblem, Tensor]`: the problem and the target.
    """
    generator = torch.Generator().manual_seed(seed)
    student = FlatStudent(build_student(config, seed=seed)).to(device)
    start = student.flatten()
    pixels = torch.randn(images, 3, *config.image_shape, generator=generator)
    labels = 3 * torch.randn(images, config.num_labels, generator=generator)
    away = 0.01 * torch.randn(len(start), generator=generator)
    # On random images larger steps let rounding grow until no two exact ways agree.
    pixels, labels, lr, away = (tensor.to(device) for tensor in (pixels, labels, torch.tensor(0.003), away))
    settings = MatchingSettings(syn_steps=steps)
    return settings.problem(StudentDerivatives(student), pixels, labels, lr, start, seed), start + away


def bench_gradient(
    report: Report, problem: InnerProblem, target: Tensor, *, compiled: bool, rounds: int, threads: int
) -> float:
    """Measures the gradient of the matching loss, five ways; the exact ones are held against each other first.

    Args:
        report ([`~hf_effml.utils.report.Report`]):
            Gets a row for every way.
        problem ([`~hf_effml.distillation.unroll.InnerProblem`]):
            From [`make_problem`].
        target (`Tensor`):
            From there too.
        compiled (`bool`):
            Whether to measure the compiled derivatives, too.
        rounds (`int`):
            Interleaved samples of every way.
        threads (`int`):
            Threads of torch.

    Returns:
        `float`: milliseconds of a step of ours.

    Raises:
        RuntimeError: If the exact ways differ.
    """
    student, steps = problem.derivatives.student, len(problem.plan)
    device = problem.images.device
    ways: dict[str, Callable[[], list[Tensor]]] = {
        FULL: partial(_unrolled, problem, target, checkpoint=False),
        CHECKPOINTED: partial(_unrolled, problem, target, checkpoint=True),
        FIRST_ORDER: partial(_matched, problem, target, mode="first_order"),
        OURS: partial(_matched, problem, target),
    }
    if compiled:
        faster = problem._replace(derivatives=StudentDerivatives(student, compile=True))
        ways[COMPILED] = partial(_matched, faster, target)
    reference = _unrolled(_in_double(problem), target.double(), checkpoint=False)
    exact = [name for name in ways if name != FIRST_ORDER]
    timings = compare(ways, [exact], rounds=rounds, threads=threads, tolerance=1e-2)
    memory = {name: peak_memory(way, device) for name, way in ways.items()}
    for name, way in ways.items():
        images, labels, lr = (_error(*pair) for pair in zip(way(), reference, strict=True))
        report.add(
            f"{name}, {steps} steps",
            steps=steps,
            way=name,
            **timings[name].as_row(),
            speed=round(timings[FULL].speedup(timings[name]), 3),
            peak_MB=round(memory[name] / 1e6, 2),
            of_full=f"1/{memory[FULL] / memory[name]:.1f}",
            stored_parameters_MB=round((steps + 1) * student.numel * 4 / 1e6, 2),
            error_images=images,
            error_labels=labels,
            error_lr=lr,
        )
    return timings[OURS].median


def bench_bank(report: Report, experts: int, *, rounds: int, threads: int) -> None:
    """Measures reading start and target out of a bank of the 32-pixel ConvNet, in another place every time.

    Args:
        report ([`~hf_effml.utils.report.Report`]):
            Gets a row.
        experts (`int`):
            Experts of 20 snapshots each.
        rounds, threads (`int`):
            As for [`bench_gradient`].
    """
    config = ConvNetConfig(id2label=_CLASSES)
    student = FlatStudent(build_student(config))
    metadata = {
        "num_experts": experts,
        "student": config.to_dict(),
        "parameters": [{"name": n, "shape": list(s)} for n, s in zip(student.names, student.shapes, strict=True)],
        "epochs": list(range(20)),
        "dtype": "float32",
    }
    with tempfile.TemporaryDirectory(prefix="hf-effml-bench-") as folder:
        for expert in range(experts):
            write_expert(folder, expert, torch.rand(20, student.numel), metadata)
        write_bank(folder, metadata)
        bank, turn = TrajectoryBank.from_pretrained(folder), count()

        def read() -> list[Tensor]:
            place = next(turn)
            return list(bank.pair(place % experts, place * 7 % 18, 2))

        for _ in range(2 * experts):
            read()
        timing = compare({"read": read}, [], rounds=rounds, threads=threads)["read"]
    size = experts * 20 * student.numel * 4 / 1e6
    report.add(f"start and target, bank of {experts} ({size:.0f} MB)", ms=round(timing.median, 3))


def bench_maps(
    report: Report, config: ConvNetConfig, batch: int, step_ms: float, *, rounds: int, threads: int, device: str
) -> None:
    """Measures activation maps of 100 images, and what they are of EDF's time.

    Args:
        report ([`~hf_effml.utils.report.Report`]):
            Gets two rows.
        config ([`ConvNetConfig`]):
            The network that is explained.
        batch (`int`):
            Synthetic images of the distillation.
        step_ms (`float`):
            Milliseconds of one of its steps.
        rounds, threads (`int`):
            As for [`bench_gradient`].
        device (`str`):
            Where to compute.
    """
    network = build_student(config).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(100, 3, *config.image_shape, generator=generator).to(device)
    classes = (torch.arange(100) % 10).to(device)

    def one_by_one() -> Tensor:
        maps = [class_activation_map(network, images[i : i + 1], classes[i : i + 1]) for i in range(len(images))]
        return torch.cat(maps)

    at_once = partial(class_activation_map, network, images, classes)
    ms = _add_both(report, "Grad-CAM of 100 images", at_once, one_by_one, 1e-3, rounds, threads)
    share = ms * batch / 100 / (_CAM_INTERVAL * step_ms)
    report.add(f"maps every {_CAM_INTERVAL} steps, share of EDF's time", share=f"{share:.3%}")


def bench_augmentation(report: Report, *, rounds: int, threads: int, seed: int, device: str) -> None:
    """Measures every augmentation on 100 images at once and one by one.

    Args:
        report ([`~hf_effml.utils.report.Report`]):
            Gets a row for every operation.
        rounds, threads (`int`):
            As for [`bench_gradient`].
        seed (`int`):
            Seed of images and draws.
        device (`str`):
            Where to compute.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(100, 3, 32, 32, generator=generator).to(device)
    for operation in OPERATIONS:
        settings = AugmentationSettings(operation)
        draw = draw_augmentation(settings, len(images), (32, 32), generator, device)
        if draw is not None:
            at_once, one_by_one = partial(augment, images, draw, settings), partial(_each, images, draw, settings)
            what = f"augmentation by {operation}, 100 images of 32 px"
            _add_both(report, what, at_once, one_by_one, 1e-5, rounds, threads)


def _add_both(
    report: Report,
    what: str,
    at_once: Callable[[], Tensor],
    one_by_one: Callable[[], Tensor],
    tolerance: float,
    rounds: int,
    threads: int,
) -> float:
    ways = {"at once": at_once, "one by one": one_by_one}
    timings = compare(ways, [list(ways)], rounds=rounds, threads=threads, tolerance=tolerance)
    faster = timings["one by one"].speedup(timings["at once"])
    ms, loop = timings["at once"].median, timings["one by one"].median
    report.add(what, ms=round(ms, 3), loop_ms=round(loop, 3), faster=round(faster, 2))
    return ms


def _each(images: Tensor, draw: AugmentationDraw, settings: AugmentationSettings) -> Tensor:
    parts = []
    for i in range(len(images)):
        own = AugmentationDraw(draw.operation, {name: value[i : i + 1] for name, value in draw.values.items()})
        parts.append(augment(images[i : i + 1], own, settings))
    return torch.cat(parts)


def _unrolled(problem: InnerProblem, target: Tensor, checkpoint: bool) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (problem.images, problem.labels, problem.lr)]
    images, labels, lr = leaves
    final = unroll_reference(problem._replace(images=images, labels=labels, lr=lr), checkpoint=checkpoint)
    return list(torch.autograd.grad(matching_loss(final, problem.start, target)[0], leaves))


def _matched(problem: InnerProblem, target: Tensor, mode: Literal["exact", "first_order"] = "exact") -> list[Tensor]:
    settings = MatchingSettings(syn_steps=len(problem.plan), gradient_mode=mode, loss_threshold=float("inf"))
    found = match_segment(problem, target, settings).gradients
    if found is None:
        raise RuntimeError("The loss of the segment is not finite. Choose another seed or fewer steps.")
    return list(found)


def _in_double(problem: InnerProblem) -> InnerProblem:
    student = copy.copy(problem.derivatives.student)
    student.module = copy.deepcopy(student.module).double()
    images, labels, lr, start = (
        tensor.double() for tensor in (problem.images, problem.labels, problem.lr, problem.start)
    )
    plan = [step._replace(draw=None if step.draw is None else _double(step.draw)) for step in problem.plan]
    return problem._replace(
        derivatives=StudentDerivatives(student), images=images, labels=labels, lr=lr, start=start, plan=plan
    )


def _double(draw: AugmentationDraw) -> AugmentationDraw:
    values = {name: value.double() if value.is_floating_point() else value for name, value in draw.values.items()}
    return AugmentationDraw(draw.operation, values)


def _error(given: Tensor, expected: Tensor) -> str:
    return f"{((given.double() - expected).norm() / expected.norm()).item():.0e}"
