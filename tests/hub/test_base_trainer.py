"""What every trainer of the package inherits."""

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from helpers import require_package, tiny_vim_config
from hf_effml import VimForImageClassification
from hf_effml.hub import CardResult, add_results
from hf_effml.trainers.base import EffMLTrainer


class TinyTrainer(EffMLTrainer):
    _name, _paper, _tags = "R-MeeTo", "2412.12496", ("tested",)


def make_trainer(model, output_dir, **arguments):
    args = TrainingArguments(output_dir=str(output_dir), report_to="none", use_cpu=True, **arguments)
    return TinyTrainer(model=model, args=args)


def test_card_without_training(tmp_path):
    trainer = make_trainer(VimForImageClassification(tiny_vim_config()), tmp_path / "run", learning_rate=0.5)
    trainer.card_facts["limits"] = ["Never trained."]
    trainer.create_model_card(tags="mine", dataset_tags="alice/data")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert {"rmeeto", "tested", "mine", "arxiv:2412.12496"} <= set(card.data.tags)
    assert len(card.data.tags) == len(set(card.data.tags))
    assert card.data.datasets == ["alice/data"] and card.data.license is None
    assert "| `learning_rate` | `0.5` |" in card.text and "- Never trained." in card.text
    # Neither pytest's command line nor housekeeping belongs on the card.
    assert "```bash" not in card.text
    assert not {"output_dir", "report_to", "accelerator_config"} & set(card.text.split("`"))


def test_default_arguments_are_not_told(tmp_path):
    trainer = make_trainer(VimForImageClassification(tiny_vim_config()), tmp_path)
    trainer.create_model_card()
    shown = ModelCard.load(tmp_path / "README.md").text
    assert [line for line in shown.split("\n") if line.startswith("| `")] == ["| `use_cpu` | `True` |"]


def test_results_come_from_the_log(tmp_path):
    trainer = make_trainer(VimForImageClassification(tiny_vim_config()), tmp_path)
    trainer.state.log_history = [
        {"eval_accuracy": 0.25, "eval_runtime": 1.0, "step": 0},
        {"loss": 1.0, "step": 5},
        {"eval_accuracy": 0.75, "eval_samples_per_second": 9.0, "eval_top_5": 1.0, "step": 10},
        {"train_runtime": 3.0, "step": 10},
    ]
    trainer.create_model_card(dataset="digits")
    card = ModelCard.load(tmp_path / "README.md")
    assert "| Accuracy | 0.75 | 0.25 |" in card.text and "| Top 5 | 1 | - |" in card.text
    assert "runtime" not in card.text and "per_second" not in card.text.replace(" ", "_")


def test_a_second_card_keeps_results_that_were_added(tmp_path):
    trainer = make_trainer(VimForImageClassification(tiny_vim_config()), tmp_path)
    trainer.state.log_history = [{"eval_accuracy": 0.75, "step": 0}]
    trainer.create_model_card(dataset="digits")
    add_results(tmp_path, [CardResult("Accuracy", 0.5, metric="accuracy")], "letters")
    before = (tmp_path / "README.md").read_text()
    trainer.create_model_card(dataset="digits")
    assert (tmp_path / "README.md").read_text() == before
    trainer.state.global_step, trainer.state.log_history = 10, []
    trainer.create_model_card(dataset="digits")
    assert "0.75" not in (tmp_path / "README.md").read_text() and not (tmp_path / "results.json").exists()


class Bare(torch.nn.Module):
    """A model whose matrix `table` must not decay, whatever wraps it."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(2, 2))
        self.linear = torch.nn.Linear(2, 2)

    def no_weight_decay(self):
        return {"table"}


class Wrapped(torch.nn.Module):
    """A wrapper as DDP's: the model is its `module`, and unknown attributes are the model's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def no_weight_decay(self):
        return self.module.no_weight_decay()


@pytest.mark.parametrize(
    "wrap, prefix", [(lambda model: model, ""), (Wrapped, "module."), (torch.compile, "_orig_mod.")]
)
def test_what_decays(tmp_path, wrap, prefix):
    trainer = make_trainer(VimForImageClassification(tiny_vim_config()), tmp_path)
    assert trainer.get_decay_parameter_names(wrap(Bare())) == [f"{prefix}linear.weight"]


def test_what_decays_in_vim(tmp_path):
    model = VimForImageClassification(tiny_vim_config())
    trainer = make_trainer(model, tmp_path)
    decayed = set(trainer.get_decay_parameter_names(model))
    assert not decayed & model.no_weight_decay()
    assert "classifier.weight" in decayed and not any("pos_embed" in name for name in decayed)


def test_what_decays_under_an_adapter(tmp_path, monkeypatch):
    # PEFT asks the Hub about the base model, and waits for an answer 23 s long.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    peft = require_package("peft")
    model = VimForImageClassification(tiny_vim_config())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["classifier"]))
    trainer = make_trainer(adapted, tmp_path)
    decayed = trainer.get_decay_parameter_names(adapted)
    assert any("lora_A" in name for name in decayed) and not any("pos_embed" in name for name in decayed)
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and "More Information Needed" not in card.text
