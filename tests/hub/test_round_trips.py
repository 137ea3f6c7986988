"""Models pushed from one process and loaded in another one with an empty cache."""

import shutil
from string import Template

import pytest
from hub.conftest import ALICE, BOB


pytestmark = pytest.mark.hub

# What pushes leaves its tensors in `expected/`, what loads compares with them.
TOOLS = """
import json, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

def probe(model):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixels).logits

def remember(model, version):
    Path("expected").mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors | {"the logits": probe(model)}, f"expected/{version}.safetensors")
    Path(f"expected/{version}.json").write_text(json.dumps(model.config.to_dict(), default=str))

def check(model, version):
    expected = load_file(f"expected/{version}.safetensors")
    torch.testing.assert_close(probe(model), expected.pop("the logits"), rtol=1e-6, atol=1e-6)
    tensors = model.state_dict()
    assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    unstored = ("_name_or_path", "transformers_version", "dtype", "auto_map", "architectures")
    for field, value in json.loads(Path(f"expected/{version}.json").read_text()).items():
        assert field in unstored or config[field] == value, (field, config[field], value)
"""

PUSH = Template(
    TOOLS
    + """
from huggingface_hub import HfApi
from hf_effml import $config as Config, $model as Model

fields = dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=4, state_size=4, num_labels=3)
model = Model(Config(**fields, **$fields))

def push(version, repo="alice/m", **options):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    remember(model, version)
    return model.push_to_hub(repo, **options)

push("first")
HfApi().create_tag("alice/m", tag="v1")
push("second")
push("proposed", create_pr=True)
push("sharded", "alice/sharded", max_shard_size="200KB")
push("hidden", "alice/hidden", private=True)
model.to(torch.bfloat16).push_to_hub("alice/half")
"""
)

LOAD_WITHOUT_PACKAGE = """
from transformers import AutoModelForImageClassification as Auto

for version, repo, revision in (
    ("second", "alice/m", "main"),
    ("first", "alice/m", "v1"),
    ("proposed", "alice/m", "refs/pr/1"),
    ("sharded", "alice/sharded", "main"),
):
    model = Auto.from_pretrained(repo, revision=revision, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    check(model, version)
half = Auto.from_pretrained("alice/half", trust_remote_code=True)
assert half.config.dtype == half.classifier.weight.dtype == torch.bfloat16

# Without consent, foreign code does not run.
try:
    Auto.from_pretrained("alice/m")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded remote code unasked")
"""

LOAD_WITH_PACKAGE = Template(
    TOOLS
    + """
import hf_effml
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForImageClassification as Auto

model = Auto.from_pretrained("alice/m")
assert type(model) is hf_effml.$model, type(model)
check(model, "second")
check(hf_effml.$model.from_pretrained("alice/m", revision="v1"), "first")

for token in ("$bob", "hf_$wrong", False):
    try:
        Auto.from_pretrained("alice/hidden", token=token)
    except OSError as error:
        assert isinstance(error.__cause__, RepositoryNotFoundError), repr(error.__cause__)
    else:
        raise SystemExit("loaded a private model without its owner's token")
check(Auto.from_pretrained("alice/hidden", token="$alice"), "hidden")
"""
)

LOAD_OFFLINE = """
from transformers import AutoModelForImageClassification as Auto

check(Auto.from_pretrained("alice/m", trust_remote_code=True), "second")
check(Auto.from_pretrained("alice/m", revision="v1", trust_remote_code=True), "first")
"""

CASES = {
    "vim": {"config": "VimConfig", "model": "VimForImageClassification", "fields": {}},
    "rmeeto": {
        "config": "RMeeToVimConfig",
        "model": "RMeeToVimForImageClassification",
        "fields": {"merge_r": 2, "merge_interval": 1},
    },
    "dyvm": {
        "config": "DyVMConfig",
        "model": "DyVMForImageClassification",
        "fields": {"token_keep_ratio": 0.7},
    },
}


# One of the family in every run, the others with the slow ones.
ROUND_TRIPS = [
    pytest.param(case, id=name, marks=[] if name == "rmeeto" else pytest.mark.slow) for name, case in CASES.items()
]


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_push_here_load_there(hub, client, case):
    client.run(PUSH.substitute(case), home="pusher", token=ALICE)
    # Nothing of the pusher's process but the expected tensors is left.
    shutil.rmtree(client.folder / "pusher")
    assert len([path for path in hub.paths("alice/sharded") if path.endswith(".safetensors")]) > 1
    assert hub.repos["models", "alice/hidden"].private
    assert client.leaks() == []

    client.run(TOOLS + LOAD_WITHOUT_PACKAGE, home="stranger", without_package=True)
    client.run(LOAD_WITH_PACKAGE.substitute(case, alice=ALICE, bob=BOB, wrong="wrong" * 7), home="friend")
    hub.stop()
    client.run(TOOLS + LOAD_OFFLINE, home="stranger", without_package=True, offline=True)


PUSH_TWICE = (
    TOOLS
    + """
from hf_effml import VimConfig, VimForImageClassification

config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, state_size=4, num_labels=3)
for version in ("first", "second"):
    model = VimForImageClassification(config)
    remember(model, version)
    Path(f"pushing-{version}").touch()
    model.push_to_hub("alice/m")
"""
)

LOAD_FIRST = """
from transformers import AutoModelForImageClassification as Auto

check(Auto.from_pretrained("alice/m", trust_remote_code=True), "first")
"""


def test_killed_pusher_leaves_the_old_state(hub, client):
    second_arrived = []

    def kill_at_second_push():
        if (client.folder / "pushing-second").exists():
            second_arrived.append(True)
            pusher.kill()

    hub.after_put = kill_at_second_push
    pusher = client.start(PUSH_TWICE, home="pusher", token=ALICE)
    assert pusher.wait() == -9 and second_arrived, pusher.stdout
    client.run(TOOLS + LOAD_FIRST, home="loader", without_package=True)
