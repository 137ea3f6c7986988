"""The bank of trajectories: what is read, what is refused, how fast, and the way over the Hub."""

import json
import pickle
import time

import pytest
import torch
from hub.conftest import ALICE, client, hub  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig

from helpers import assert_close, pixels
from hf_effml.distillation.bank.files import expert_name, write_bank, write_expert
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor
from hf_effml.hub import check_folder, write_card


def config_of(**fields):
    return ConvNetConfig(**{"image_size": 8, "depth": 2, "hidden_size": 4, "num_labels": 3, **fields})


def make_bank(folder, config=None, experts=2, epochs=(0, 1, 2, 3), dtype=torch.float32, **metadata):
    """A bank of networks that were not trained; the rows it was written from."""
    config = config or config_of()
    rows = [
        torch.stack([FlatStudent(build_student(config, 100 * expert + epoch)).flatten() for epoch in epochs])
        for expert in range(experts)
    ]
    network = build_student(config)
    metadata = {
        "num_experts": experts,
        "student": config.to_dict(),
        "parameters": [{"name": name, "shape": list(value.shape)} for name, value in network.named_parameters()],
        "epochs": list(epochs),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": 0,
        **metadata,
    }
    write_bank(folder, metadata)
    for expert, trajectory in enumerate(rows):
        write_expert(folder, expert, trajectory.to(dtype), json.loads(json.dumps(metadata)))
    return rows


@pytest.fixture
def bank(tmp_path):
    bank = TrajectoryBank.from_pretrained(make_bank_folder(tmp_path))
    return bank


def make_bank_folder(folder):
    make_bank(folder / "bank")
    return folder / "bank"


def test_reads_what_was_written(tmp_path):
    rows = make_bank(tmp_path)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    assert (len(bank), bank.epochs, bank.num_parameters) == (2, [0, 1, 2, 3], rows[0].shape[1])
    assert_close(bank.read(1, [3, 0]), rows[1][[3, 0]])
    assert_close(bank.read(0, 2), rows[0][2:3])
    assert_close(bank.read(0, -1), rows[0][3:])
    start, target = bank.pair(1, 1, 2)
    assert_close([start, target], [rows[1][1], rows[1][3]])


def test_rows_are_no_views_of_the_file(tmp_path):
    rows = make_bank(tmp_path)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    for tensor in (bank.read(0, 1), *bank.pair(0, 1, 1)):
        tensor.zero_()
    assert_close(bank.read(0, [1, 2]), rows[0][1:3])


def test_only_some_epochs(tmp_path):
    rows = make_bank(tmp_path, epochs=(0, 2, 4, 9))
    bank = TrajectoryBank.from_pretrained(tmp_path)
    assert_close(bank.read(0, [9, 2]), rows[0][[3, 1]])
    with pytest.raises(ValueError, match="no parameters of epoch 3; it keeps epochs 0, 2, 4, 9"):
        bank.pair(0, 2, 1)


def test_network_has_the_parameters(tmp_path):
    config = config_of(norm="batch")
    rows = make_bank(tmp_path, config)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    network = bank.network(1, 2)
    images = pixels(config, batch=5)
    expected = FlatStudent(build_student(config)).logits(rows[1][2], images)
    assert_close(network(images).logits.detach(), expected)
    assert_close(FlatStudent(bank.network(1)).flatten(), rows[1][3])
    assert not network.training and all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_says_so_once(tmp_path, dtype, monkeypatch):
    rows = make_bank(tmp_path, dtype=dtype)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    said = []
    monkeypatch.setattr("hf_effml.distillation.bank.trajectories.logger.info", said.append)
    assert_close([bank.read(0, 1), bank.read(1, 1)], [row[1:2].to(dtype).float() for row in rows])
    assert len(said) == 1 and str(dtype) in said[0]


def test_a_pair_takes_no_more_time_from_a_larger_bank(tmp_path):
    """The size that experts of 32 pixels have; 40 of their epochs."""
    config = ConvNetConfig(num_labels=10)
    network = build_student(config)
    parameters = [{"name": name, "shape": list(value.shape)} for name, value in network.named_parameters()]
    metadata = {"num_experts": 1, "student": config.to_dict(), "parameters": parameters, "epochs": list(range(40))}
    write_bank(tmp_path, metadata)
    write_expert(tmp_path, 0, torch.zeros(40, 320010), json.loads(json.dumps(metadata)))
    bank = TrajectoryBank.from_pretrained(tmp_path)
    bank.pair(0, 0, 2)
    times = []
    for epoch in range(1, 37):
        begin = time.perf_counter()
        bank.pair(0, epoch, 2)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[len(times) // 2] < 0.01


def test_travels_to_another_process(tmp_path):
    rows = make_bank(tmp_path)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    bank.read(0, 1)
    assert_close(pickle.loads(pickle.dumps(bank)).read(0, 1), rows[0][1:2])


def test_range(tmp_path):
    make_bank(tmp_path, epochs=range(11))
    bank = TrajectoryBank.from_pretrained(tmp_path)
    bank.check_range(max_start_epoch=8, expert_epochs=2)
    bank.pair(0, 7, 2)
    for too_far in (9, 50):
        with pytest.raises(ValueError, match=r"ends with epoch 10\. The largest possible `max_start_epoch` is 8\."):
            bank.check_range(too_far, 2)
    with pytest.raises(ValueError, match="No start from `min_start_epoch` 8 on is possible"):
        bank.check_range(9, 3, min_start_epoch=8)
    with pytest.raises(ValueError, match="`min_start_epoch` must be from 0 to below"):
        bank.check_range(2, 1, min_start_epoch=2)
    with pytest.raises(ValueError, match="`expert_epochs` must be at least 1"):
        bank.check_range(2, 0)


def test_range_of_some_epochs(tmp_path):
    make_bank(tmp_path, epochs=(0, 1, 2, 3, 4, 9))
    bank = TrajectoryBank.from_pretrained(tmp_path)
    bank.check_range(max_start_epoch=3, expert_epochs=2)
    with pytest.raises(ValueError, match=r"start at epoch 3 cannot be matched\. The largest possible .* is 3\."):
        bank.check_range(5, 2)


def test_students_that_fit(bank):
    bank.check_student(FlatStudent(build_student(bank.student_config)))
    bank.check_student(FlatStudent(build_student(json.loads(json.dumps(bank.student_config.to_dict())))))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_of(num_labels=4), "`num_labels` 3 in the bank, 4 in the student"),
        (config_of(image_size=16), "`image_size` 8 in the bank, 16 in the student"),
        (config_of(hidden_size=8), r"`features.0.weight` of shape (4, 3, 3, 3) in the bank, of shape (8, 3, 3, 3) in"),
        (config_of(norm="none"), "`features.1.weight` of shape (4,) in the bank, absent in the student"),
        (
            ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3),
            "`model_type` convnet in the bank, resnet in the student",
        ),
    ],
)
def test_students_that_do_not_fit(bank, config, said):
    with pytest.raises(ValueError) as error:
        bank.check_student(FlatStudent(build_student(config)))
    assert said in str(error.value) and "is no match for the bank" in str(error.value)


def test_a_student_that_only_might_not_fit(bank, monkeypatch):
    said = []
    monkeypatch.setattr("hf_effml.distillation.bank.trajectories.logger.warning_once", said.append)
    bank.check_student(FlatStudent(build_student(config_of(pooling="max"))))
    assert said == ["The student differs from the bank's networks: `pooling` avg in the bank, max in the student."]


def test_preprocessing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_effml.distillation.bank.trajectories.logger.warning_once", said.append)
    make_bank(tmp_path, preprocessing="abc")
    bank = TrajectoryBank.from_pretrained(tmp_path)
    bank.check_preprocessing("abc")
    with pytest.raises(ValueError, match="`abc`.*`xyz`.*`bank.image_processor`"):
        bank.check_preprocessing("xyz")
    assert not said
    bank.check_preprocessing("xyz", allow_mismatch=True)
    assert len(said) == 1 and "`xyz`" in said[0]


def test_broken_folders(tmp_path):
    make_bank(tmp_path, experts=3)
    file = tmp_path / expert_name(1)
    content = file.read_bytes()
    for damage, error, said in (
        (lambda: file.unlink(), ValueError, "`expert-00001.safetensors` of 3 experts missing"),
        (lambda: file.write_bytes(content[:100]), ValueError, "`expert-00001.safetensors` in .* is too short"),
        (lambda: file.write_bytes(content[:-4]), ValueError, "expert-00001.safetensors` is no trajectory, or damaged"),
        (
            lambda: save_file({"trajectory": torch.zeros(9, 999)}, file),
            ValueError,
            r"must hold \(4, .* got \(9, 999\)",
        ),
        (
            lambda: (tmp_path / expert_name(7)).write_bytes(b""),
            ValueError,
            "do not belong .*`expert-00007.safetensors`",
        ),
        (lambda: (tmp_path / "bank.json").write_text("{"), ValueError, "is no JSON"),
        (lambda: (tmp_path / "bank.json").write_text("{}"), ValueError, "has no `format_version`"),
        (lambda: (tmp_path / "bank.json").write_text('{"format_version": 2}'), ValueError, "Upgrade hf-effml"),
        (lambda: (tmp_path / "bank.json").write_text('{"format_version": 1}'), ValueError, "`num_experts`, `student`"),
        (lambda: (tmp_path / "bank.json").unlink(), FileNotFoundError, "has no `bank.json`"),
    ):
        description = (tmp_path / "bank.json").read_bytes()
        damage()
        with pytest.raises(error, match=said):
            TrajectoryBank.from_pretrained(tmp_path).read(1, 0)
        file.write_bytes(content)
        (tmp_path / "bank.json").write_bytes(description)
        (tmp_path / expert_name(7)).unlink(missing_ok=True)
    assert len(TrajectoryBank.from_pretrained(tmp_path)) == 3


def test_an_expert_of_another_bank(tmp_path):
    make_bank(tmp_path / "one")
    make_bank(tmp_path / "two", seed=1)
    (tmp_path / "two" / expert_name(0)).rename(tmp_path / "one" / expert_name(0))
    bank = TrajectoryBank.from_pretrained(tmp_path / "one")
    bank.read(1, 0)
    with pytest.raises(ValueError, match="expert-00000.safetensors` belongs to a bank with other settings"):
        bank.read(0, 0)
    with pytest.raises(IndexError, match="from 0 to 1; got 2"):
        bank.read(2, 0)


def test_no_such_bank(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such/bank/at/all` is no folder, and no data set on the Hub"):
        TrajectoryBank.from_pretrained("no-such/bank/at/all")


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    rows = make_bank(tmp_path)

    def cut_off(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_effml.utils.files.save_file", cut_off)
    metadata = TrajectoryBank.from_pretrained(tmp_path).metadata
    with pytest.raises(KeyboardInterrupt):
        write_expert(tmp_path, 0, torch.zeros_like(rows[0]), metadata)
    assert_close(TrajectoryBank.from_pretrained(tmp_path).read(0, 1), rows[0][1:2])
    assert not list(tmp_path.glob(".*"))


HISTORY = [
    [{"epoch": 0, "train_accuracy": 0.2, "validation_accuracy": 0.1}, {"epoch": 1, "loss": 2.0}],
    [{"epoch": 0, "train_accuracy": 0.4, "validation_accuracy": 0.2}, {"epoch": 1, "validation_accuracy": 0.8}],
]


def test_mean_accuracy(tmp_path):
    make_bank(tmp_path, history=HISTORY)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    assert bank.mean_accuracy("train") == pytest.approx({0: 0.3})
    assert bank.mean_accuracy() == pytest.approx({0: 0.15, 1: 0.8})


def test_only_a_complete_bank_is_ready_for_the_hub(tmp_path):
    make_bank(tmp_path, history=HISTORY)
    write_card(tmp_path, "alice/bank")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "notes.pt").write_bytes(b"mine")
    check_folder(tmp_path)
    (tmp_path / expert_name(0)).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"is not complete: `{expert_name(0)}` of 2 experts missing"):
        check_folder(tmp_path)


LOAD = """
import json, sys, torch
from hf_effml.distillation.bank.trajectories import TrajectoryBank
bank = TrajectoryBank.from_pretrained("alice/bank")
before = sorted(path.name for path in bank.folder.iterdir())
start, target = bank.pair(1, 0, 3)
after = sorted(path.name for path in bank.folder.iterdir())
image = torch.full((1, 3, 8, 8), 0.25)
torch.save([start, target, bank.image_processor(image)["pixel_values"]], "read.pt")
print(json.dumps([before, after, len(bank), bank.image_processor.fingerprint]))
try:
    TrajectoryBank.from_pretrained("alice/no-bank")
except FileNotFoundError as error:
    print(error)
# What was fetched can be pushed again; the rest of it is fetched first.
bank.push_to_hub("alice/copy")
"""


@pytest.mark.hub
def test_over_the_hub(tmp_path, client):  # noqa: F811
    image = torch.full((1, 3, 8, 8), 0.25)
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    processor = ZCAImageProcessor.from_images(images)
    dataset = {"name": "cifar10", "hub_id": "uoft-cs/cifar10", "revision": "abc", "train_images": 45000}
    rows = make_bank(tmp_path / "b", history=HISTORY, dataset=dataset, preprocessing=processor.fingerprint)
    processor.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "unfinished").mkdir()
    (tmp_path / "b" / "unfinished" / "notes.txt").write_text("mine")
    push = "from hf_effml.distillation.bank.trajectories import TrajectoryBank\nbank = TrajectoryBank.from_pretrained"
    client.run(push + "('b')\nprint(bank.push_to_hub('alice/bank', private=True).oid)", "one", token=ALICE)
    printed = client.run(LOAD, "two", token=ALICE).splitlines()
    before, after, experts, fingerprint = json.loads(printed[0])
    assert before == ["bank.json"] and after == ["bank.json", expert_name(1)] and experts == 2
    assert fingerprint == processor.fingerprint and "no data set on the Hub" in printed[1]
    assert_close(torch.load(tmp_path / "read.pt"), [rows[1][0], rows[1][3], processor(image)["pixel_values"]])
    repos = [client.hub.repos["datasets", f"alice/{name}"] for name in ("bank", "copy")]
    files = [next(reversed(repo.commits.values()))["files"] for repo in repos]
    wanted = {"bank.json", expert_name(0), expert_name(1), "README.md", "preprocessor_config.json", "zca.safetensors"}
    assert wanted <= files[0].keys() and "unfinished/notes.txt" not in files[0]
    card = client.hub.blobs[files[0]["README.md"].sha256].decode()
    for part in ("source_datasets:\n- uoft-cs/cifar10", 'dataset_id = "alice/bank"', "| epoch 0 | 30.0 ± 10.0 |"):
        assert part in card
    for name in wanted - {"README.md"}:
        assert files[1][name].sha256 == files[0][name].sha256
    assert not client.leaks()
    with safe_open(tmp_path / "b" / expert_name(0), "pt") as file:
        assert file.keys() == ["trajectory"]


@pytest.mark.parametrize("header", ["null", "[1]", "{", '{"history": 3}', '{"history": [{}]}'])
def test_headers_of_another_kind_are_refused(tmp_path, header):
    make_bank(tmp_path)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    path = tmp_path / expert_name(0)
    save_file(load_file(path), path, metadata={"hf_effml": header})
    with pytest.raises(ValueError, match="expert-00000.safetensors`"):
        bank.check_expert(0)


def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    make_bank(tmp_path)
    bank = TrajectoryBank.from_pretrained(tmp_path)
    path = tmp_path / expert_name(0)
    tensors = load_file(path)
    tensors["trajectory"][1, 2] = torch.nan
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(tensors, path, metadata=header)
    said = "`trajectory` in `.*expert-00000.safetensors` holds values that are not finite"
    with pytest.raises(ValueError, match=said):
        bank.read(0, bank.epochs)
    with pytest.raises(ValueError, match=said):
        bank.check_expert(0)
    bank.read(0, bank.epochs[0])


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": "2"},
        {"num_experts": 2**31},
        {"epochs": []},
        {"epochs": {"0": 1}},
        {"parameters": None},
        {"parameters": [{"name": "a", "shape": [-1]}]},
        {"student": []},
        {"dataset": 3},
        {"history": [[None]]},
    ],
)
def test_descriptions_of_another_type_are_named(tmp_path, change):
    make_bank(tmp_path)
    path = tmp_path / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` in `.*bank.json` must be "):
        TrajectoryBank.from_pretrained(tmp_path)
