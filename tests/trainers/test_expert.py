"""Training of experts: what is stored, that it repeats, resumes and splits over processes, and what is refused."""

import copy
import json
import multiprocessing
import os
import signal

import pytest
import torch
from accelerate import PartialState, debug_launcher
from transformers import ResNetConfig, ViTConfig

from helpers import assert_close
from hf_effml.distillation.bank.experts import ExpertRun
from hf_effml.distillation.bank.files import expert_name, write_tensors
from hf_effml.distillation.bank.trajectories import TrajectoryBank
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.flat_student import FlatStudent, build_student, seed_from
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor
from hf_effml.distillation.pad import DataCurriculum
from hf_effml.distillation.real_images import RealImageData, RealImages, load_real_images
from hf_effml.trainers.expert import ExpertTrainer, ExpertTrainingArguments
from processes import run_together


CLASSES = 3


def images_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    # Classes differ by what they show, so that there is something to learn.
    pixels = torch.rand(count, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) / CLASSES
    return pixels / 2, labels


def make_data(validation=True):
    (train, labels), (held_out, held_out_labels) = images_of(30, 0), images_of(9, 1)
    processor = ZCAImageProcessor.from_images(train)
    names = ["a", "b", "c"]
    parts = [
        RealImages(processor(pixels)["pixel_values"], classes, names)
        for pixels, classes in ((train, labels), (held_out, held_out_labels))
    ]
    return RealImageData("squares", parts[0], parts[1] if validation else None, parts[1], processor)


DATA = make_data()


def convnet(**fields):
    return ConvNetConfig(**{"image_size": 8, "depth": 2, "hidden_size": 4, "num_labels": CLASSES, **fields})


def trainer(folder, config=None, data=DATA, curriculum=None, order=None, **fields):
    settings = {"num_experts": 2, "num_train_epochs": 4, "train_batch_size": 8, "learning_rate": 0.1, "device": "cpu"}
    args = ExpertTrainingArguments(str(folder), **{**settings, "disable_tqdm": True, **fields})
    return ExpertTrainer(config or convnet(), args, data, curriculum, order)


def test_what_the_caller_gave_stays(tmp_path):
    config, order = convnet(), [torch.arange(label, 30, CLASSES) for label in range(CLASSES)]
    data, curriculum = make_data(), DataCurriculum(add_end_epoch=1, remove=((2, 0.1),))
    made = trainer(tmp_path, config, data, curriculum, order)
    before = copy.deepcopy((config.to_dict(), vars(made.args), curriculum, order, data.train.images))
    made.train()
    after = config.to_dict(), vars(made.args), curriculum, order, data.train.images
    assert before[:3] == after[:3]
    assert_close(after[3:], before[3:])


def rows_of(bank):
    return {str(expert): bank.read(expert, bank.epochs) for expert in range(len(bank))}


def files_of(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path != folder / "README.md"
    }


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_bank_holds_every_epoch(tmp_path):
    state = torch.get_rng_state()
    bank = trainer(tmp_path).train()
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(bank), bank.epochs) == (2, [0, 1, 2, 3, 4])
    rows = rows_of(bank)
    for trajectory in rows.values():
        # A snapshot that is a view of the network would equal the last one.
        steps = (trajectory[1:] - trajectory[:-1]).norm(dim=1)
        assert (steps > 1e-3).all() and trajectory.isfinite().all()
    assert not torch.equal(rows["0"][0], rows["1"][0])
    first = FlatStudent(build_student(convnet(), seed_from(seed_from(0, "expert", 1), "weights"))).flatten()
    assert_close(rows["1"][0], first)
    bank.check_student(FlatStudent(build_student(convnet())))
    bank.check_preprocessing(DATA.processor.fingerprint)
    assert bank.image_processor.fingerprint == DATA.processor.fingerprint
    files = {name for name in files_of(tmp_path) if not name.endswith(".py")}
    assert "| epoch 4 |" in (tmp_path / "README.md").read_text()
    assert files == {"bank.json", expert_name(0), expert_name(1), "preprocessor_config.json", "zca.safetensors"}


def test_an_epoch_is_what_it_says(tmp_path):
    """One step over all images, without augmentation, by plain SGD, computed by hand."""
    options = {"gsam": False, "augmentation": "none", "train_batch_size": 30, "num_train_epochs": 1}
    bank = trainer(tmp_path, **options).train()
    student = FlatStudent(build_student(convnet()))
    start = bank.read(0, 0)[0].requires_grad_()
    loss = torch.nn.functional.cross_entropy(student.logits(start, DATA.train.images), DATA.train.labels)
    (gradient,) = torch.autograd.grad(loss, start)
    assert_close(bank.read(0, 1)[0], (start - 0.1 * gradient).detach(), 1e-6)
    assert bank.metadata["history"][0][1]["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_experts_learn_and_are_measured(tmp_path):
    bank = trainer(tmp_path, num_train_epochs=12, eval_epochs=5, augmentation="flip").train()
    assert list(bank.mean_accuracy()) == [0, 5, 10, 12]
    assert bank.mean_accuracy()[12] > bank.mean_accuracy()[0] + 0.2
    for expert, history in enumerate(bank.metadata["history"]):
        measured = {entry["epoch"]: entry for entry in history}
        assert [entry["epoch"] for entry in history] == bank.epochs and "loss" not in measured[0]
        network = bank.network(expert, 5).eval()
        for split, images in (("train", DATA.train), ("validation", DATA.validation)):
            right = (network(images.images).logits.argmax(-1) == images.labels).float().mean().item()
            assert measured[5][f"{split}_accuracy"] == pytest.approx(right)
            assert f"{split}_accuracy" not in measured[4]


def test_every_expert_has_its_own_batches_and_one_update_of_statistics(tmp_path):
    seen, updates = {}, {}
    step = ExpertRun._step

    def watch(run, images, labels):
        loss = step(run, images, labels)
        seen.setdefault(run.seed, []).append(images)
        updates[run.seed] = int(run.module.features[1].num_batches_tracked)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertRun, "_step", watch)
        trainer(tmp_path, convnet(norm="batch"), augmentation="none", num_train_epochs=1).train()
    first, second = (torch.cat(batches) for batches in seen.values())
    assert not torch.equal(first, second) and torch.equal(first.sort(0).values, second.sort(0).values)
    # GSAM passes twice over each of the four batches.
    assert list(updates.values()) == [4, 4]


def test_nothing_measured(tmp_path):
    bank = trainer(tmp_path / "none", eval_epochs=0).train()
    assert bank.mean_accuracy() == {} and "loss" in bank.metadata["history"][1][4]
    bank = trainer(tmp_path / "no-validation", data=make_data(validation=False)).train()
    assert bank.mean_accuracy() == {} and len(bank.mean_accuracy("train")) == 5
    assert bank.metadata["measured_images"] == {"train": 30}


@pytest.mark.parametrize(
    ("fields", "differs"),
    [
        ({}, False),
        ({"eval_epochs": 3, "checkpoint_epochs": 1}, False),
        ({"seed": 1}, True),
        ({"gsam": False}, True),
        ({"gsam_rho": 0.1}, True),
        ({"gsam_alpha": 0.9}, True),
        ({"augmentation": "none"}, True),
        ({"crop_ratio": 0.3}, True),
        ({"momentum": 0.5}, True),
        ({"weight_decay": 0.1}, True),
        ({"train_batch_size": 7}, True),
    ],
)
def test_what_decides_the_trajectories(tmp_path, fields, differs):
    common = {"num_experts": 1, "augmentation": "crop"}
    plain = trainer(tmp_path / "plain", **common).train()
    other = trainer(tmp_path / "other", **{**common, **fields}).train()
    assert torch.equal(plain.read(0, -1), other.read(0, -1)) != differs


def test_only_some_epochs_are_kept(tmp_path):
    everything = rows_of(trainer(tmp_path / "all", num_train_epochs=6).train())
    for fields, kept in (
        ({"save_epochs": ["0-2", "6"]}, [0, 1, 2, 6]),
        ({"save_epochs": [5, 3, 5]}, [3, 5]),
    ):
        bank = trainer(tmp_path / "some", num_train_epochs=6, overwrite_output_dir=True, **fields).train()
        assert bank.epochs == kept
        assert_close(rows_of(bank), {expert: rows[kept] for expert, rows in everything.items()})


def test_half_precision_on_the_disk(tmp_path):
    exact = rows_of(trainer(tmp_path / "exact").train())
    bank = trainer(tmp_path / "half", save_dtype="bfloat16").train()
    assert_close(rows_of(bank), {expert: rows.bfloat16().float() for expert, rows in exact.items()})
    assert bank.metadata["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "config",
    [
        convnet(norm="batch"),
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES),
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            hidden_dropout_prob=0.2,
            num_labels=CLASSES,
        ),
    ],
    ids=["batch-norm", "resnet", "vit"],
)
def test_killed_and_continued_equals_the_straight_run(tmp_path, config):
    """Cut off by SIGKILL in the middle of the second expert, with momentum, running statistics and dropout."""
    options = {"momentum": 0.9, "learning_rate": 0.02, "num_experts": 3, "checkpoint_epochs": 2}
    straight = trainer(tmp_path / "straight", config, **options).train()

    def run_until_killed() -> None:
        torch.set_num_threads(1)
        record = ExpertRun.record

        def cut_off(run, **measured):
            record(run, **measured)
            if run.epoch == 3 and (tmp_path / "cut" / expert_name(0)).exists():
                os.kill(os.getpid(), signal.SIGKILL)

        ExpertRun.record = cut_off
        trainer(tmp_path / "cut", config, **options).train()

    process = multiprocessing.get_context("fork").Process(target=run_until_killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "cut" / "unfinished" / expert_name(1)).exists()
    with pytest.raises(ValueError, match="is not complete: `expert-00001.safetensors`, `expert-00002.*Continue"):
        TrajectoryBank.from_pretrained(tmp_path / "cut")
    epochs = []
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "cut", config, **options)
    train_epoch = ExpertRun.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertRun, "train_epoch", lambda run, *a: epochs.append(run.epoch) or train_epoch(run, *a))
        resumed.train()
    assert epochs == [2, 3, 0, 1, 2, 3]
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "straight")
    assert straight.metadata["history"] == TrajectoryBank.from_pretrained(tmp_path / "cut").metadata["history"]


def test_continues_before_the_first_kept_epoch(tmp_path):
    options = {"save_epochs": [3, 4], "checkpoint_epochs": 1, "num_experts": 1}
    straight = rows_of(trainer(tmp_path / "straight", **options).train())
    cut = trainer(tmp_path / "cut", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "_shown", lambda epoch: torch.arange(30) if epoch < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cut.train()
    assert_close(rows_of(trainer(tmp_path / "cut", **options).train()), straight)


def test_a_bank_grows(tmp_path):
    trainer(tmp_path / "bank", num_experts=1).train()
    grown = trainer(tmp_path / "bank", num_experts=3).train()
    assert_close(rows_of(grown), rows_of(trainer(tmp_path / "other", num_experts=3).train()))
    assert len(grown.metadata["history"]) == 3


def test_two_processes_equal_one(tmp_path):
    trainer(tmp_path / "one", num_experts=3).train()

    def in_each_process():
        torch.set_num_threads(1)
        mine = trainer(tmp_path / "two", num_experts=3)
        assert mine.state.num_processes == 2
        bank = mine.train()
        torch.save(rows_of(bank), tmp_path / f"process-{mine.state.process_index}.pt")

    PartialState._reset_state()
    debug_launcher(in_each_process, num_processes=2)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    for process in (0, 1):
        rows = torch.load(tmp_path / f"process-{process}.pt")
        assert_close(rows, rows_of(TrajectoryBank.from_pretrained(tmp_path / "one")))


def test_two_processes_refuse_alike(tmp_path):
    trainer(tmp_path / "bank").train()

    def in_each_process():
        with pytest.raises(ValueError, match="`training.learning_rate` is 0.1 there and 0.2 here"):
            trainer(tmp_path / "bank", learning_rate=0.2).train()

    PartialState._reset_state()
    debug_launcher(in_each_process, num_processes=2)


def test_curriculum_shows_what_it_names(tmp_path):
    order = [torch.arange(label, 30, CLASSES).flip(0) for label in range(CLASSES)]
    curriculum = DataCurriculum(initial_ratio=0.5, add_end_epoch=2, remove=((2, 0.2),))
    seen = []
    step = ExpertRun._step

    def watch(run, images, labels):
        seen.append((run.epoch, images.detach().clone()))
        return step(run, images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertRun, "_step", watch)
        options = {"augmentation": "none", "num_experts": 1, "num_train_epochs": 5}
        bank = trainer(tmp_path / "some", curriculum=curriculum, order=order, **options).train()
    orders = []
    for epoch in range(5):
        shown = torch.cat([images for when, images in seen if when == epoch])
        wanted = curriculum.indices(order, epoch)
        assert len(shown) == len(wanted)
        found = [int((DATA.train.images - image).abs().amax((1, 2, 3)).argmin()) for image in shown]
        assert sorted(found) == sorted(wanted.tolist()) and found != wanted.tolist()
        orders.append(found)
    assert sorted(orders[3]) == sorted(orders[4]) and orders[3] != orders[4]
    recorded = bank.metadata["curriculum"]
    assert DataCurriculum.from_dict({k: v for k, v in recorded.items() if k != "order"}) == curriculum
    with pytest.raises(ValueError, match="`curriculum.order` is"):
        other = [row.flip(0) for row in order]
        trainer(tmp_path / "some", curriculum=curriculum, order=other, **options).train()


def test_a_folder_of_other_settings_is_refused(tmp_path):
    trainer(tmp_path).train()
    before = files_of(tmp_path)
    for fields, said in (
        ({"learning_rate": 0.2}, "`training.learning_rate` is 0.1 there and 0.2 here"),
        ({"config": convnet(hidden_size=5)}, "`student.hidden_size` is 4 there and 5 here"),
        ({"seed": 3, "gsam": False}, r"`seed` is 0 there and 3 here; .*`training.optimizer` is 'gsam' there"),
        ({"data": make_data(validation=False)}, "`dataset.validation_images` is 9 there and 0 here"),
        ({"num_experts": 1}, "`expert-00001.safetensors`, which is none of the 1 experts"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path, **fields).train()
    with pytest.raises(ValueError, match="holds a bank already"):
        trainer(tmp_path).train(resume=False)
    assert files_of(tmp_path) == before
    bank = trainer(tmp_path, num_experts=1, learning_rate=0.2, overwrite_output_dir=True).train()
    assert len(bank) == 1 and not (tmp_path / expert_name(1)).exists()
    (tmp_path / "bank.json").unlink()
    with pytest.raises(ValueError, match="holds `expert-00000.safetensors` without a `bank.json`"):
        trainer(tmp_path).train()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts": 0}, "`num_experts` must be at least 1; got 0"),
        ({"num_train_epochs": 0}, "`num_train_epochs` must be at least 1; got 0"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"momentum": -0.1}, "`momentum` must be at least 0"),
        ({"gsam_rho": -1}, "`gsam_rho` must be at least 0"),
        ({"eval_epochs": -1}, "`eval_epochs` must be at least 0"),
        ({"augmentation": "blur"}, "'blur' is none of them"),
        ({"crop_ratio": 1.5}, "`crop_ratio` must be"),
        ({"save_epochs": [0, 5]}, r"`save_epochs` must be from 0 to `num_train_epochs` 4; got \[0, 5\]"),
        ({"save_epochs": []}, "`save_epochs` must be from 0 to `num_train_epochs` 4; got "),
        ({"save_epochs": ["2-1"]}, "`save_epochs` must be from 0 to `num_train_epochs` 4; got "),
        ({"save_epochs": [-1]}, "such as `0-22 50`; got `-1`"),
        ({"save_epochs": ["last"]}, "such as `0-22 50`; got `last`"),
        ({"save_dtype": "int8"}, "`save_dtype` must be float32, bfloat16 or float16"),
        ({"config": convnet(num_labels=5)}, "has 5 classes, the data has 3. Set `num_labels=3`"),
        ({"config": convnet(image_size=16)}, r"cannot take images of shape \(3, 8, 8\).*Set `image_size`"),
        ({"curriculum": DataCurriculum()}, "A `curriculum` needs an `order`"),
        ({"order": [torch.arange(30)]}, "an `order` a `curriculum`"),
    ],
)
def test_impossible_arguments(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, **fields)


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"expert 0 is (nan|inf) in epoch \d+. Lower `learning_rate`, now 1e\+20"):
        trainer(tmp_path, convnet(norm="none"), learning_rate=1e20).train()


def test_the_folder_tells_nothing_of_this_machine(tmp_path):
    bank = trainer(tmp_path / "bank").train()
    assert str(tmp_path) not in json.dumps(bank.metadata)


def test_digits(tmp_path):
    """Real images of one channel, whose networks pad differently."""
    data = load_real_images("digits", max_train=200)
    config = convnet(num_channels=1, num_labels=10)
    bank = trainer(tmp_path, config, data, num_experts=1, num_train_epochs=6, train_batch_size=16).train()
    assert bank.mean_accuracy("train")[6] > 0.3


def test_an_unfinished_expert_of_other_settings_is_refused(tmp_path):
    cut = trainer(tmp_path, num_experts=1, checkpoint_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "_shown", lambda epoch: torch.arange(30) if epoch < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cut.train()
    (tmp_path / "bank.json").unlink()
    with pytest.raises(ValueError, match="expert-00000.*other settings: `training.learning_rate` is 0.1"):
        trainer(tmp_path, num_experts=1, learning_rate=0.2).train()
    assert len(trainer(tmp_path, num_experts=1).train()) == 1


def test_a_damaged_state_is_named(tmp_path):
    folder = trainer(tmp_path, num_experts=1).folder
    folder.prepare(overwrite=False)
    write_tensors(folder.unfinished(0), {"model.x": torch.ones(1)}, {"epoch": 1, "history": []})
    with pytest.raises(ValueError, match="expert-00000.safetensors` is no state of this expert.*Delete it"):
        trainer(tmp_path, num_experts=1).train()


def test_two_runs_do_not_train_in_one_folder(tmp_path):
    other = trainer(tmp_path).folder
    other.prepare(overwrite=False)
    with other.at_work(0), pytest.raises(ValueError, match="Another run is training experts in"):
        trainer(tmp_path, overwrite_output_dir=True).train()
    trainer(tmp_path).train()


def test_a_process_gives_up_waiting_for_a_dead_one(tmp_path):
    """The second process is killed in its first expert; the first one has finished and waits."""

    def in_process(index):
        torch.set_num_threads(1)
        PartialState._reset_state()
        mine = trainer(tmp_path, num_experts=2)
        if index:
            mine._train_one = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            mine.train()
        said = r"Process 1 has ended before it had trained `expert-00001.safetensors` \(1 of its 1 experts"
        with pytest.raises(RuntimeError, match=said):
            mine.train()

    assert run_together(in_process) == [0, -signal.SIGKILL]


def test_processes_on_cpus_share_the_experts(tmp_path):
    """As `torchrun` starts them, without a word on the device."""

    def in_each_process():
        torch.set_num_threads(1)
        os.environ.pop("ACCELERATE_USE_CPU", None)
        mine = trainer(tmp_path, num_experts=2, device=None)
        assert mine.state.num_processes == 2
        trained = []
        mine._train_one, original = (
            (lambda number, *rest: (trained.append(number), original(number, *rest))),
            mine._train_one,
        )
        mine.train()
        assert trained == [mine.state.process_index]

    PartialState._reset_state()
    debug_launcher(in_each_process, num_processes=2)
