"""Distilled sets pushed from one process and used in others: same bits, same networks trained on them."""

import json
from string import Template

import pytest
from hub.conftest import ALICE, BOB
from huggingface_hub import DatasetCard
from safetensors.torch import load_file

from helpers import require_package
from hf_effml.utils.imports import usable


pytestmark = pytest.mark.hub

# What trains before the push leaves its tensors in `expected/`, what trains after it compares with them.
TOOLS = """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification

torch.set_num_threads(1)
RESNET = dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)

def train_resnet(images, soft_labels, lr):
    # Plain torch and transformers, as for anybody who has neither this package nor its protocols.
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**RESNET)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(images).logits, soft_labels.softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {f"plain.{name}": tensor.float().clone() for name, tensor in model.state_dict().items()}

def compare(found, version):
    expected = load_file(f"expected/{version}.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, (name, tensor.dtype)
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name
"""

TRAIN_BY_PROTOCOL = """
from hf_effml.distillation.evaluation.protocols import get_protocol
from hf_effml.distillation.evaluation.training import train_student
from hf_effml.distillation.evaluation.students import student_by_name
from hf_effml.utils.imports import usable

def train_all(training_set):
    students = {"resnet": ResNetConfig(**RESNET)}
    if usable("timm"):
        students["timm"] = student_by_name("timm:test_resnet", 8, 3, 2)
    found = {}
    for kind, student in students.items():
        model = train_student(training_set, student, get_protocol("tm", epochs=3), disable_tqdm=True)
        found |= {f"{kind}.{name}": tensor.float().clone() for name, tensor in model.state_dict().items()}
    found |= {"images": training_set.images, "soft_labels": training_set.soft_labels}
    return found | train_resnet(training_set.images, training_set.soft_labels, training_set.learning_rate)
"""

# A real run, with a careless user's paths and token in its arguments.
PUSH = Template(
    TOOLS
    + TRAIN_BY_PROTOCOL
    + """
import sys
from huggingface_hub import HfApi
from hf_effml import ConvNetConfig, ExpertTrainer, ExpertTrainingArguments, TrajectoryBank, ZCAImageProcessor
from hf_effml import PADTrainer, PADTrainingArguments, distilled_from_real
from hf_effml.distillation.real_images import RealImageData, RealImages
from hf_effml.distillation.evaluation.training_sets import as_training_set
from hf_effml.scripts.push import main as push_main

sys.argv = [str(Path("distil.py").absolute()), "--data", str(Path("photos").absolute()), "--hub_token", "$token"]
images, labels = torch.rand(20, 3, 8, 8), torch.arange(20) % 2
processor = ZCAImageProcessor.from_images(images)
real = RealImages(processor.whiten(images), labels, ["cat", "dog"])
data = RealImageData("animals", real, None, real, processor, hub_id="alice/animals", revision="abc")
config = ConvNetConfig(image_size=8, depth=1, hidden_size=4)
quiet = dict(disable_tqdm=True)
ExpertTrainer(config, ExpertTrainingArguments("bank", num_experts=1, num_train_epochs=3, **quiet), data).train()
bank = TrajectoryBank.from_pretrained(str(Path("bank").absolute()))
args = PADTrainingArguments(
    str(Path("run").absolute()), max_steps=2, syn_steps=2, max_start_epoch=1, loss_threshold=100.0, lr_img=10.0,
    hub_token="$token", report_to="none", use_cpu=True, logging_steps=1, **quiet,
)
trainer = PADTrainer(distilled_from_real(data, bank, 2), args, bank=bank)
Path("expected").mkdir()
for version in ("first", "second"):
    trainer.train()
    save_file(train_all(as_training_set(trainer.model)), f"expected/{version}.safetensors")
    trainer.push_dataset_to_hub("alice/set", license="mit")
    HfApi().create_tag("alice/set", tag=version, repo_type="dataset")
trainer.model.push_to_hub("alice/state")
processor.save_pretrained("processor", push_to_hub=True, repo_id="alice/state")
push_main(["run/dataset", "alice/hidden", "--private"])
"""
)

STRANGER = (
    TOOLS
    + """
import json
from datasets import Array3D, load_dataset
from huggingface_hub import hf_hub_download

for version, revision in (("second", None), ("first", "first")):
    rows = load_dataset("alice/set", split="train", revision=revision)
    assert rows.features["image"] == Array3D((3, 8, 8), "float32") and rows.features["label"].names == ["cat", "dog"]
    assert rows["label"][:] == [0, 0, 1, 1] and rows["preview"][0].size == (8, 8)
    rows = rows.with_format("torch")
    images, soft_labels = rows["image"][:], rows["soft_label"][:]
    path = hf_hub_download("alice/set", "distillation.json", repo_type="dataset", revision=revision)
    lr = json.loads(Path(path).read_text())["learning_rate"]
    compare({"images": images, "soft_labels": soft_labels} | train_resnet(images, soft_labels, lr), version)
stream = load_dataset("alice/set", split="train", streaming=True)
streamed = torch.stack([torch.tensor(row["image"]) for row in stream])
compare({"images": streamed}, "second")
"""
)

FRIEND = Template(
    TOOLS
    + TRAIN_BY_PROTOCOL
    + """
from hf_effml import load_distilled

found = load_distilled("alice/set")
compare(train_all(found.training_set), "second")
assert found.label_names == ["cat", "dog"] and found.info["dataset"]["hub_id"] == "alice/animals"
assert found.processor.fingerprint == found.info["preprocessing"]
compare(train_all(load_distilled("alice/set", revision="first").training_set), "first")
state = load_distilled("alice/state")
compare(train_all(state.training_set), "second")
assert state.processor.fingerprint == found.processor.fingerprint
for name, token in (("alice/hidden", "$bob"), ("alice/hidden", False), ("alice/absent", None)):
    try:
        load_distilled(name, token=token)
    except FileNotFoundError as error:
        assert f"`{name}` holds no distilled set" in str(error) and "that you may read" in str(error), error
    else:
        raise SystemExit(f"loaded {name} with {token}")
compare({"images": load_distilled("alice/hidden", token="$alice").training_set.images}, "second")
"""
)

OFFLINE = (
    TOOLS
    + """
from datasets import load_dataset
from hf_effml import load_distilled

for name, revision, version in (("set", None, "second"), ("set", "first", "first"), ("state", None, "second")):
    found = load_distilled(f"alice/{name}", revision=revision)
    compare({"images": found.training_set.images, "soft_labels": found.training_set.soft_labels}, version)
    assert found.processor is not None
try:
    load_distilled("alice/absent")
except FileNotFoundError:
    pass
else:
    raise SystemExit("loaded what is not there")
"""
)


def test_push_here_train_there(hub, client):
    require_package("datasets")
    client.run(PUSH.substitute(token=ALICE), home="pusher", token=ALICE)
    assert client.leaks() == []
    trained = {name.partition(".")[0] for name in load_file(client.folder / "expected" / "second.safetensors")}
    assert trained >= {"resnet", "plain"} | ({"timm"} if usable("timm") else set())
    assert hub.repos["datasets", "alice/hidden"].private and not hub.repos["datasets", "alice/set"].private
    paths = hub.paths("alice/set", kind="datasets")
    assert not any(path.endswith((".py", ".pt", ".bin")) for path in paths), paths
    assert {"data/train-00000-of-00001.parquet", "distillation.json", "images.png", "zca.safetensors"} <= paths
    card = DatasetCard(hub.read("alice/set", "README.md", kind="datasets").decode())
    assert (
        'dataset_id = "alice/set"\n' in card.text
        and card.data.license == "mit"
        and "arxiv:2408.03360" in card.data.tags
    )
    assert "python distil.py --data photos\n" in card.text
    info = json.loads(hub.read("alice/set", "distillation.json", kind="datasets"))
    assert (info["method"], info["bank"], info["steps"]) == ("pad", "bank", 2)
    assert 'dataset_id = "alice/hidden"\n' in hub.read("alice/hidden", "README.md", kind="datasets").decode()

    client.run(STRANGER, home="stranger", without_package=True)
    client.run(FRIEND.substitute(alice=ALICE, bob=BOB), home="friend")
    hub.stop()
    client.run(OFFLINE, home="friend", offline=True)
