"""Times reading, writing and scoring of pictures for Comp-DD beside what they replace.

Reading is compared with the official order (decode, ToTensor, Normalize, Resize) and with resizing first; pixels agree
within one grey level. Pictures are the two photographs that come with scikit-learn, or those of a folder.

Example: `hf-effml bench comp-dd --pictures /data/imagenet/val`
"""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.utils.imports import require
from hf_effml.utils.report import Column, Report


@dataclass
class BenchArguments:
    """What to measure."""

    pictures: str | None = field(default=None, metadata={"help": "Folder of JPEG files, searched below too."})
    count: int = field(default=24, metadata={"help": "Pictures to take."})
    size: int = field(default=128, metadata={"help": "Side to resize to."})
    scoring: bool = field(
        default=True, metadata={"help": "Whether to time scores, with a ResNet-18 at random weights."}
    )
    scoring_size: int = field(default=224, metadata={"help": "Side of the pictures that are scored."})
    rounds: int = field(default=7, metadata={"help": "Interleaved rounds; medians of them are shown."})
    output_dir: str = field(default="effml-bench", metadata={"help": "Folder for the numbers and the tables."})

    def __post_init__(self) -> None:
        if min(self.count, self.size, self.scoring_size, self.rounds) < 1:
            raise ValueError("`count`, `size`, `scoring_size` and `rounds` must be at least 1.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(BenchArguments, argv=argv, program=__file__, description=__doc__)
    import numpy as np
    import torch
    import torch.nn.functional as F

    from hf_effml.comp_dd.building import PictureSettings, encode_picture, read_picture, torchvision_decodes
    from hf_effml.utils.benchmark import compare, describe_run

    files = _pictures(args)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    # As torchvision's ToTensor, Normalize and Resize compute, in the same layout of memory.
    def pixels(data: bytes) -> torch.Tensor:
        array = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().to(torch.float32).div(255)

    def resized(image: torch.Tensor) -> torch.Tensor:
        side = (args.size, args.size)
        return F.interpolate(image[None], side, mode="bilinear", antialias=True, align_corners=False)[0]

    def official() -> list[torch.Tensor]:
        return [resized(pixels(data).clone().sub_(mean).div_(std)) for data in files]

    def resize_first() -> list[torch.Tensor]:
        return [resized(pixels(data)).clone().sub_(mean).div_(std) for data in files]

    def ours(**how: Any) -> Callable[[], list[Image.Image]]:
        settings = PictureSettings(**{"size": args.size, "decoder": "pil", **how})
        return lambda: [read_picture(data, settings) for data in files]

    ways: dict[str, Callable[[], list]] = {"official order": official, "resize first": resize_first}
    ways["ours, PIL"] = ours()
    if torchvision_decodes():
        ways["ours, torchvision"] = ours(decoder="torchvision")
    exact = [((image * std + mean) * 255).permute(1, 2, 0).numpy() for image in official()]
    errors = {}
    ways["fast_decode, inexact"] = ours(fast_decode=True)
    for name in list(ways)[2:]:
        pairs = zip(ways[name](), exact, strict=True)
        errors[name] = max(float(np.abs(np.array(image) - other).max()) for image, other in pairs)
        if errors[name] > 1.01 and name.startswith("ours"):
            raise RuntimeError(f"Nothing is reported: pixels of `{name}` differ by {errors[name]:.1f} grey levels.")
    columns = {
        "ms": Column("ms per picture", ".2f"),
        "speed": Column("times as fast", ".2f"),
        "error": Column("error"),
    }
    report = Report("bench_comp_dd", {}, title="Comp-DD")
    report.facts["run"] = describe_run(seed=0, rounds=args.rounds)
    report.facts["settings"] = vars(args)
    reading = report.add_part("reading", columns, title="Reading and resizing")
    timings = compare(ways, agree=[["official order", "resize first"]], rounds=args.rounds, tolerance=1e-3)
    for name, timing in timings.items():
        error = f"{errors[name]:.1f} grey levels at most" if name in errors else None
        speed = timings["official order"].speedup(of=timing)
        reading.add(name, ms=timing.median / len(files), speed=speed, error=error)
    images = ours()()
    formats = {
        "webp, lossless, method 0 (ours)": lambda: [encode_picture(image, PictureSettings()) for image in images],
        "webp, lossless, method 4": lambda: [_saved(image, "WEBP", lossless=True, method=4) for image in images],
        "png, level 6": lambda: [_saved(image, "PNG", compress_level=6) for image in images],
        "png, level 1": lambda: [_saved(image, "PNG", compress_level=1) for image in images],
    }
    writing = report.add_part("writing", columns | {"kB": Column("kB per picture", ".1f")}, title="Writing")
    timings = compare(formats, agree=[], rounds=args.rounds)
    for name, timing in timings.items():
        size = sum(map(len, formats[name]())) / len(files) / 1000
        writing.add(name, ms=timing.median / len(files), speed=timings["png, level 6"].speedup(of=timing), kB=size)
    if args.scoring:
        _bench_scoring(args, report.add_part("scoring", columns, title="Scoring"))
    print(report.as_markdown())
    print(f"\nWrote {report.save(args.output_dir)}")
    return report.as_dict()


def _bench_scoring(args: BenchArguments, part: Report) -> None:
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    from hf_effml import class_activation_map
    from hf_effml.utils.benchmark import compare

    torch.manual_seed(0)
    shape = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=1000)).eval()
    batch = torch.randn(8, 3, args.scoring_size, args.scoring_size)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return model(batch).logits

    def maps() -> torch.Tensor:
        return class_activation_map(model, batch, None, layer="resnet.encoder.stages.3", size="map")

    timings = compare({"one forward pass": forward, "maps of the predicted classes": maps}, [], rounds=args.rounds)
    for name, timing in timings.items():
        speed = timings["one forward pass"].speedup(of=timing)
        part.add(name, ms=timing.median / len(batch), speed=speed)


def _saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def _pictures(args: BenchArguments) -> list[bytes]:
    folder = args.pictures or Path(str(require("sklearn.datasets").__file__)).parent / "images"
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise FileNotFoundError(f"`pictures` must be a folder of JPEG files; there is none in `{folder}`.")
    return [found[number % len(found)].read_bytes() for number in range(args.count)]


if __name__ == "__main__":
    sys.exit(run_script(main))
