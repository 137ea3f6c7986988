"""Trains a small model here, makes it faster and distils its data, all methods at hand: some two minutes, no download.

Example: `hf-effml demo --out effml-demo`
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.scripts._demo_distillation import distil_digits


if TYPE_CHECKING:
    from transformers import Trainer

    from hf_effml import ImageData, VimForImageClassification
    from hf_effml.scripts.evaluate_rmeeto import Measurement


_ROUNDS = 7


@dataclass
class DemoArguments:
    """Where to write, and how long to train."""

    out: str = field(default="effml-demo", metadata={"help": "Folder to write."})
    epochs: int = field(default=10, metadata={"help": "Passes over the digits to train the Vim."})
    retrain_epochs: int = field(default=3, metadata={"help": "Passes over the digits to re-train a faster one."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})


@dataclass(frozen=True)
class Start:
    """What every method starts from: the trained model, the data, and where to write."""

    model: "VimForImageClassification"
    data: "ImageData"
    processor: Any
    args: DemoArguments


class RMeeToDemo:
    """R-MeeTo's part: merged tokens at several amounts, with and without re-training."""

    amounts = (8, 14, 20)
    retrained = (20,)

    def __init__(self, start: Start):
        self.start = start
        self.folder = Path(start.args.out) / "rmeeto-digits"

    def models(self) -> "dict[str, VimForImageClassification]":
        """Makes the models to measure, by the names of their rows."""
        merged = {f"r={r} merged": self._merge(r) for r in self.amounts}
        return merged | {f"r={r} merged + re-trained": self._retrain(r) for r in self.retrained}

    def finish(self, rows: "dict[str, Measurement]") -> Path:
        """Saves the model of the last row with its card, and draws the pictures; returns the model's folder."""
        from hf_effml.scripts.evaluate_rmeeto import card_results

        name = f"r={self.retrained[-1]} merged + re-trained"
        own, base = rows[name], next(iter(rows.values()))
        self.trainer.save_model()
        self.trainer.card_facts |= {
            "evaluated_on": self.start.data.name,
            "results": card_results(own, base, _machine()),
        }
        self.trainer.create_model_card()
        self._draw_trade_off(rows)
        self._draw_tokens()
        return self.folder

    def _merge(self, r: int) -> "VimForImageClassification":
        from hf_effml import RMeeToVimForImageClassification

        return RMeeToVimForImageClassification.from_vim(self.start.model, merge_r=r, merge_class_position="exact")

    def _retrain(self, r: int) -> "VimForImageClassification":
        from hf_effml import RMeeToTrainer, RMeeToTrainingArguments

        settings = _settings(
            self.start.args, self.folder, self.start.args.retrain_epochs, learning_rate=2e-3, warmup_steps=0.1
        )
        self.trainer = RMeeToTrainer(
            self._merge(r),
            RMeeToTrainingArguments(**settings),
            train_dataset=self.start.data.train,
            processing_class=self.start.processor,
        )
        _train(self.trainer, f"re-training, r={r}")
        return self.trainer.model

    def _draw_trade_off(self, rows: "dict[str, Measurement]") -> None:
        from hf_effml.utils.plotting import plot_trade_off

        def points(amounts: tuple[int, ...], what: str) -> list[tuple[str, float, float]]:
            found = [(r, rows[f"r={r} {what}"]) for r in amounts]
            return [(f"r={r}", row.speed_up, row.accuracy) for r, row in found]

        name, base = next(iter(rows.items()))
        plot_trade_off(
            (name, 1.0, base.accuracy),
            {
                "merged": points(self.amounts, "merged"),
                "merged + re-trained": points(self.retrained, "merged + re-trained"),
            },
            Path(self.start.args.out) / "accuracy_speed.png",
            title="R-MeeTo on handwritten digits",
            note=f"Vim of 6 blocks, 65 tokens, {base.multiply_adds / 1e6:.1f} M multiply-adds; {_machine()}",
        )

    def _draw_tokens(self) -> None:
        import torch

        from hf_effml import visualize_merge
        from hf_effml.utils.plotting import plot_images

        data, model = self.start.data, self.trainer.model
        chosen = [next(i for i, row in enumerate(data.test.rows) if row["label"] == digit) for digit in range(9)]
        pixels = torch.stack([data.test[index]["pixel_values"] for index in chosen])
        with torch.inference_mode():
            output = model(pixels, output_merge_info=True)
        info, found = output.merge_info, output.logits.argmax(-1).tolist()
        plot_images(
            [visualize_merge(data.test.rows[index]["image"], info, number) for number, index in enumerate(chosen)],
            [f"a {digit}, read as {data.labels[label]}" for digit, label in enumerate(found)],
            Path(self.start.args.out) / "merged_tokens.png",
            columns=3,
            title=f"64 patches and the {info.sizes.shape[1] - 1} tokens that R-MeeTo leaves of them",
        )


class DyVMDemo:
    """DyVM's part: one model that has learned to drop half of its tokens and to skip a fifth of its scans."""

    name = "DyVM 0.7 / 0.8 fine-tuned"

    def __init__(self, start: Start):
        self.start = start
        self.folder = Path(start.args.out) / "dyvm-digits"

    def models(self) -> "dict[str, VimForImageClassification]":
        """Makes the model to measure, by the name of its row."""
        from hf_effml import DyVMForImageClassification, DyVMTrainer, DyVMTrainingArguments

        args = self.start.args
        # Predictors and gates start from nothing, so they get a little longer.
        settings = _settings(args, self.folder, args.retrain_epochs + 1, learning_rate=4e-3, warmup_steps=0.1)
        self.trainer = DyVMTrainer(
            DyVMForImageClassification.from_vim(
                self.start.model, pruning_layers=[2, 4], token_keep_ratio=0.7, block_keep_ratio=0.8
            ),
            DyVMTrainingArguments(**settings),
            train_dataset=self.start.data.train,
            processing_class=self.start.processor,
        )
        _train(self.trainer, "fine-tuning, DyVM")
        return {self.name: self.trainer.model}

    def finish(self, rows: "dict[str, Measurement]") -> Path:
        """Saves the model with its card, and draws what it drops; returns the model's folder."""
        from hf_effml.scripts.evaluate_dyvm import draw_dropped_patches
        from hf_effml.scripts.evaluate_rmeeto import card_results

        own, base = rows[self.name], next(iter(rows.values()))
        data, processor = self.start.data, self.start.processor
        self.trainer.save_model()
        self.trainer.card_facts |= {"evaluated_on": data.name, "results": card_results(own, base, _machine())}
        self.trainer.create_model_card()
        picture = Path(self.start.args.out) / "dropped_tokens.png"
        draw_dropped_patches(self.trainer.model, data, processor, picture)
        return self.folder


# Each later method adds its part here.
PARTS = (RMeeToDemo, DyVMDemo)


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(DemoArguments, argv=argv, program=__file__, description=__doc__)
    began = time.perf_counter()
    print("Loading torch and transformers ...", flush=True)
    import torch
    from transformers.utils import logging

    from hf_effml.scripts.evaluate_rmeeto import measure
    from hf_effml.utils.benchmark import describe_run

    logging.disable_progress_bar()
    # A second thread hardly helps a model this small, and waits ten times as long wherever the cores are shared.
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    start = _train_start(args)
    parts = [part(start) for part in PARTS]
    models = {"Vim, the start": start.model}
    for part in parts:
        models |= part.models()
    rows = {
        row.name: row
        for row in measure(
            {name: model.eval() for name, model in models.items()},
            start.data.test,
            rounds=_ROUNDS,
            work_of=partial(_amount_of_work, start),
        )
    }
    folders = [str(part.finish(rows)) for part in parts]
    distilled, set_folder = distil_digits(Path(args.out), args.seed)
    seconds = round(time.perf_counter() - began, 1)
    results = {
        "rows": [asdict(row) for row in rows.values()],
        "distillation": distilled.as_dict()["rows"],
        "seconds": seconds,
        "run": describe_run(seed=args.seed, rounds=_ROUNDS, threads=1),
    }
    (Path(args.out) / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _print_table(list(rows.values()))
    print(f"\nPAD: a ConvNet trained on ten digits\n\n{distilled.as_markdown()}")
    print(f"\nMeasured in turn on {_machine()}. Wrote {args.out} in {seconds:.0f} s:")
    print(f"  {', '.join(sorted(path.name for path in Path(args.out).iterdir()))}\nUse it:")
    print(f'  pipeline("image-classification", "{folders[-1]}", trust_remote_code=True)')
    print(f'  load_dataset("parquet", data_files="{set_folder}/data/*.parquet", split="train")')
    return results | {"folders": folders}


def _train_start(args: DemoArguments) -> Start:
    """A small Vim, trained on scikit-learn's digits."""
    from transformers import set_seed

    from hf_effml import (
        Augmentation,
        VimConfig,
        VimForImageClassification,
        VimTrainer,
        VimTrainingArguments,
        load_image_data,
        vim_image_processor,
    )

    set_seed(args.seed)
    processor = vim_image_processor(16, crop_share=1.0)
    data = load_image_data("digits", processor, Augmentation(max_shift=1), seed=args.seed)
    config = VimConfig(
        image_size=16,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=6,
        state_size=8,
        symmetric_dt_init=True,
        **data.label_fields,
    )
    trainer = VimTrainer(
        VimForImageClassification(config),
        VimTrainingArguments(**_settings(args, Path(args.out), args.epochs, learning_rate=3e-3, warmup_steps=0.1)),
        train_dataset=data.train,
        processing_class=processor,
    )
    _train(trainer, "training a Vim")
    return Start(trainer.model, data, processor, args)


def _settings(args: DemoArguments, folder: Path, epochs: int, **others: Any) -> dict[str, Any]:
    """Arguments of every training here."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 32,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "seed": args.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


def _train(trainer: "Trainer", what: str) -> None:
    """Trains with one bar and nothing else on the screen."""
    from tqdm import tqdm
    from transformers import PrinterCallback, TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc=what, unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bar())
    trainer.train()


def _amount_of_work(start: Start, model: "VimForImageClassification") -> tuple[dict[str, int], list[int]]:
    """Multiply-adds by kind and tokens by block, with the scans that really run on the test images."""
    from hf_effml.scripts.evaluate_dyvm import amount_of_work, run_over

    return amount_of_work(model, run_over(model, start.data.test, 32)[1])


def _print_table(rows: "list[Measurement]") -> None:
    base, *_ = rows
    print(f"\n{'':<28}{'accuracy':>18}{'tokens per block':>20}{'M multiply-adds':>18}{'speed':>9}")
    for row in rows:
        accuracy, tokens = f"{row.accuracy:.1%}", f"{row.tokens:.0f}"
        work = f"{row.multiply_adds / 1e6:.2f}"
        if row is not base:
            accuracy += f" ({100 * (row.accuracy - base.accuracy):+.1f})"
            tokens += f" ({row.tokens / base.tokens - 1:+.0%})"
            work += f" ({row.multiply_adds / base.multiply_adds - 1:+.0%})"
        print(f"{row.name:<28}{accuracy:>18}{tokens:>20}{work:>18}{row.speed_up:>8.2f}x")


def _machine() -> str:
    return "1 CPU thread, batch 32"


if __name__ == "__main__":
    sys.exit(run_script(main))
