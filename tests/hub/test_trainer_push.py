"""A Trainer that pushes: what reaches the Hub, and that a stranger can use it."""

import re
from string import Template

import pytest
from hub.conftest import ALICE
from huggingface_hub import ModelCard


pytestmark = pytest.mark.hub

# The arguments hold an absolute path and a token, as they do for careless users.
TRAIN = Template(
    """
import sys
import torch
from hf_effml import VimConfig, VimForImageClassification
from hf_effml.trainers.base import EffMLTrainer
from hf_effml.vim import vim_image_processor
from pathlib import Path
from transformers import TrainingArguments

class Trainer(EffMLTrainer):
    _name, _paper, _tags = "Vim", "2401.09417", ("tested",)

sys.argv = [str(Path("train_tiny.py").absolute()), "--data", str(Path("photos").absolute()), "--hub_token", "$token"]
config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, state_size=4, num_labels=3)
data = [{"pixel_values": torch.randn(3, 32, 32), "labels": number % 3} for number in range(8)]
args = TrainingArguments(
    output_dir=str(Path("trained").absolute()),
    hub_model_id="alice/trained",
    hub_token="$token",
    push_to_hub=True,
    hub_strategy="every_save",
    hub_always_push=True,
    save_steps=2,
    max_steps=4,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    eval_strategy="steps",
    eval_steps=2,
    eval_on_start=True,
    report_to="none",
    use_cpu=True,
)
trainer = Trainer(
    model=VimForImageClassification(config),
    args=args,
    train_dataset=data,
    eval_dataset=data,
    processing_class=vim_image_processor(32),
    compute_metrics=lambda pair: {"accuracy": float((pair.predictions.argmax(-1) == pair.label_ids).mean())},
)
trainer.card_facts["evaluated_on"] = "random noise"
trainer.train()
trainer.push_to_hub()
"""
)


def test_trainer_push(hub, client):
    client.run(TRAIN.substitute(token=ALICE), home="trainer", token=ALICE)
    titles = [commit["title"] for commit in hub.repos["models", "alice/trained"].commits.values()]
    assert titles[-1] == "End of training" and any(title.startswith("Training in") for title in titles), titles
    assert client.leaks() == []
    assert "training_args.bin" not in hub.paths("alice/trained")

    text = hub.read("alice/trained", "README.md").decode()
    card = ModelCard(text)
    assert {"vision-mamba", "tested", "arxiv:2401.09417"} <= set(card.data.tags)
    assert [card.data.library_name, card.data.pipeline_tag] == ["transformers", "image-classification"]
    assert [result.metric_type for result in card.data.eval_results] == ["loss", "accuracy"]
    assert "More information needed" not in text
    assert "python train_tiny.py --data photos\n" in text
    assert "| `learning_rate` | `0.001` |" in text and "hub_token" not in text
    assert re.search(r"\| Accuracy \| [\d.]+ \| [\d.]+ \|", text), text

    snippet = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    printed = client.run(snippet, home="stranger", without_package=True)
    assert "'label': 'LABEL_" in printed and "'score'" in printed, printed
