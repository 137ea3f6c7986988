"""The demo's part on dataset distillation: ten images that stand for nine hundred."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import hf_effml


if TYPE_CHECKING:
    from hf_effml.utils.report import Report

_EXPERTS, _EPOCHS, _STEPS = 4, 8, 100


def distil_digits(out: Path, seed: int) -> "tuple[Report, Path]":
    """Trains experts on the digits, distils one image per class and compares it with real ones.

    Args:
        out (`Path`):
            Folder to write: `distilled-digits` in it, and a picture.
        seed (`int`):
            Seed of everything.

    Returns:
        `tuple[Report, Path]`: what networks were trained on and their test accuracy, and the folder of the distilled
        set.
    """
    from transformers import PrinterCallback

    data = hf_effml.load_real_images("digits", whiten=False, seed=seed)
    labels = dict(enumerate("0123456789"))
    config = hf_effml.ConvNetConfig(num_channels=1, image_size=8, hidden_size=16, depth=2, id2label=labels)
    bank = _train_experts(data, config, out, seed)
    start = hf_effml.distilled_from_real(data, bank, 1, seed=seed)
    args = hf_effml.PADTrainingArguments(
        output_dir=str(out / "distilled-digits"),
        max_steps=_STEPS,
        syn_steps=10,
        max_start_epoch=4,
        lr_img=100.0,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = hf_effml.PADTrainer(start, args, bank=bank)
    trainer.remove_callback(PrinterCallback)
    initial = hf_effml.distilled_from_real(data, bank, 1, seed=seed)
    trainer.train()
    report = hf_effml.evaluate_distilled(
        trainer.model,
        config,
        data.test,
        protocol=hf_effml.get_protocol("tm-short", epochs=150),
        seeds=(0, 1),
        real=data.train,
        bank=bank,
        initial=initial,
        full_epochs=20,
        draws=1,
        disable_tqdm=True,
    )
    trainer.save_model()
    folder = trainer.save_dataset(reports=[report])
    trainer.save_picture(out / "distilled_digits.png")
    table = report.as_report()
    table.name, table.title = "distillation", "PAD: a ConvNet trained on ten digits"
    return table, folder


def _train_experts(data: Any, config: Any, out: Path, seed: int) -> Any:
    """A bank of experts that met easy images first."""
    args = hf_effml.ExpertTrainingArguments(
        output_dir=str(out / "digits-experts"),
        num_experts=_EXPERTS,
        num_train_epochs=_EPOCHS,
        train_batch_size=32,
        learning_rate=0.02,
        eval_epochs=_EPOCHS,
        seed=seed,
    )
    scores = hf_effml.score_difficulty(
        data.train, config, n_runs=1, epoch=2, seed=seed, learning_rate=0.02, batch_size=32, disable_tqdm=True
    )
    curriculum = hf_effml.DataCurriculum(add_end_epoch=2, remove=((4, 0.1), (6, 0.2)))
    order = hf_effml.easy_to_hard(scores, data.train.labels)
    return hf_effml.ExpertTrainer(config, args, data, curriculum, order).train()


__all__ = ["distil_digits"]
