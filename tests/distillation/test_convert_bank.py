"""The original programs' files: read, written, and refused when there is more in them than tensors."""

import pickle
from pathlib import Path

import pytest
import torch

from helpers import assert_close
from hf_effml.distillation.bank.convert import export_pickled_bank, import_distilled_tensors, import_pickled_bank
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.flat_student import FlatStudent, build_student
from hf_effml.distillation.image_processing_zca import ZCAImageProcessor
from hf_effml.distillation.modeling_convnet import ConvNetForImageClassification
from hf_effml.distillation.real_images import RealImageData, RealImages


CONFIG = ConvNetConfig(image_size=8, depth=2, hidden_size=4, num_labels=3)


def buffer(experts, epochs=3, first=0, config=CONFIG):
    """Experts as the original programs store them: lists of lists of lists of tensors."""
    networks = [
        [build_student(config, 10 * (first + expert) + epoch) for epoch in range(epochs)] for expert in range(experts)
    ]
    return [[[p.detach().cpu() for p in network.parameters()] for network in expert] for expert in networks]


def test_buffers_become_a_bank(tmp_path):
    # Numbers, not names, are sorted: file 10 comes after file 2.
    torch.save(buffer(2), tmp_path / "replay_buffer_2.pt")
    torch.save(buffer(1, first=2), tmp_path / "replay_buffer_10.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "notes.txt").write_text("not a buffer")
    bank = import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG)
    assert (len(bank), bank.epochs, bank.image_processor) == (3, [0, 1, 2], None)
    for expert in range(3):
        for epoch in range(3):
            flat = FlatStudent(build_student(CONFIG, 10 * expert + epoch)).flatten()
            assert_close(bank.read(expert, epoch)[0], flat)
    bank.check_student(FlatStudent(build_student(CONFIG)))
    with pytest.raises(ValueError, match="holds a bank already"):
        import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG)


def test_the_images_they_were_trained_on(tmp_path):
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    processor = ZCAImageProcessor.from_images(pixels)
    images = RealImages(processor.whiten(pixels), torch.arange(6) % 3, ["a", "b", "c"])
    data = RealImageData("squares", images, None, images, processor)
    torch.save(buffer(1), tmp_path / "replay_buffer_0.pt")
    bank = import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG, data=data)
    bank.check_preprocessing(processor.fingerprint)
    assert bank.image_processor.fingerprint == processor.fingerprint
    assert bank.metadata["dataset"]["label_names"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="has 5 classes, the data has 3"):
        other = ConvNetConfig(image_size=8, depth=2, hidden_size=4, num_labels=5)
        import_pickled_bank(tmp_path, tmp_path / "other", other, data=data)


def test_some_epochs_of_them(tmp_path):
    torch.save(buffer(1, epochs=6), tmp_path / "replay_buffer_0.pt")
    bank = import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG, epochs=[4, 1])
    assert bank.epochs == [1, 4]
    assert_close(bank.read(0, 4)[0], FlatStudent(build_student(CONFIG, 4)).flatten())
    for epochs in ([6], [-1], []):
        with pytest.raises(ValueError, match=r"has epochs 0 to 5; `epochs` asks for \["):
            import_pickled_bank(tmp_path, tmp_path / "other", CONFIG, epochs=epochs)


def test_round_trip(tmp_path):
    (tmp_path / "given").mkdir()
    torch.save(buffer(3), tmp_path / "given" / "replay_buffer_0.pt")
    bank = import_pickled_bank(tmp_path / "given", tmp_path / "bank", CONFIG)
    files = export_pickled_bank(bank, tmp_path / "written", experts_per_file=2)
    assert [file.name for file in files] == ["replay_buffer_0.pt", "replay_buffer_1.pt"]
    # As the original programs open them.
    written = [expert for file in files for expert in torch.load(file)]
    assert_close(written, buffer(3))
    assert files[1].stat().st_size < 0.7 * files[0].stat().st_size
    again = import_pickled_bank(tmp_path / "written", tmp_path / "again", CONFIG)
    assert [p.read_bytes() for p in sorted(again.folder.iterdir())] == [
        p.read_bytes() for p in sorted(bank.folder.iterdir())
    ]


def test_a_bank_with_gaps_is_not_exported(tmp_path):
    torch.save(buffer(1), tmp_path / "replay_buffer_0.pt")
    bank = import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG, epochs=[0, 2])
    with pytest.raises(ValueError, match=r"without gaps; the bank keeps \[0, 2\]"):
        export_pickled_bank(bank, tmp_path / "out")
    with pytest.raises(ValueError, match="`experts_per_file` must be at least 1"):
        export_pickled_bank(bank, tmp_path / "out", experts_per_file=0)


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_no_code_runs(tmp_path, archive):
    trap = tmp_path / "trap"
    content = buffer(1)
    content[0].append(Harmful(trap))
    torch.save(content, tmp_path / "replay_buffer_0.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match="replay_buffer_0.pt` holds more than tensors and lists"):
        import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG)
    (tmp_path / "images.pt").write_bytes(pickle.dumps(Harmful(trap), protocol=2))
    with pytest.raises(ValueError, match=r"images.pt` (holds more|is damaged)"):
        import_distilled_tensors(tmp_path / "images.pt", tmp_path / "images.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"trajectories": 1}, "must hold a list of experts"),
        ([], "must hold a list of experts"),
        ([[torch.ones(2)]], "must hold a list of experts"),
        (
            buffer(1, config=ConvNetConfig(image_size=8, depth=2, hidden_size=6, num_labels=3)),
            "shape .6, 3, 3, 3. where",
        ),
        ([[[torch.ones(4, 3, 3, 3)]]], "1 parameters, a ConvNetForImageClassification of `config` has 10"),
        (buffer(1) + buffer(1, epochs=2), "has epochs 0 to 1, others have 3. Name in `epochs`"),
    ],
)
def test_other_files(tmp_path, content, said):
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    with pytest.raises(ValueError, match=said):
        import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG)
    assert not list(tmp_path.glob("bank/*"))


def test_no_files_and_damaged_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no `replay_buffer_0.pt`"):
        import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG)
    torch.save(buffer(1), tmp_path / "replay_buffer_0.pt")
    content = (tmp_path / "replay_buffer_0.pt").read_bytes()
    (tmp_path / "replay_buffer_0.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        import_pickled_bank(tmp_path, tmp_path / "bank", CONFIG)


def save(folder, **contents):
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}_best.pt")
        torch.save(content, paths[-1])
    return paths


def test_distilled_tensors(tmp_path):
    images, logits = torch.randn(4, 3, 8, 8), torch.randn(4, 2)
    soft = import_distilled_tensors(*save(tmp_path, images=images, labels=logits, lr=torch.tensor(0.02)))
    assert_close([soft.images, soft.labels], [images, logits])
    assert soft.soft and soft.learning_rate == pytest.approx(0.02) and torch.equal(soft.class_ids, logits.argmax(1))
    ids = torch.tensor([0, 0, 1, 1])
    hard = import_distilled_tensors(*save(tmp_path, images=images.requires_grad_(), labels=ids))
    assert not hard.soft and torch.equal(hard.class_ids, ids) and hard.learning_rate is None
    assert not hard.images.requires_grad


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (
            {"images": torch.ones(4, 3, 8), "labels": torch.ones(4, 2)},
            "images_best.pt` must hold floating-point images",
        ),
        (
            {"images": torch.ones(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.ones(4, 2)},
            "images_best.pt` must hold",
        ),
        ({"images": torch.ones(4, 3, 8, 8), "labels": torch.ones(3, 2)}, "labels_best.pt` must hold a class number"),
        ({"images": torch.ones(4, 3, 8, 8), "labels": torch.ones(4)}, "labels_best.pt` must hold a class number"),
        ({"images": torch.ones(4, 3, 8, 8), "labels": [1, 2]}, "labels_best.pt` must hold a tensor; got a list"),
        ({"images": torch.ones(1, 3, 8, 8), "labels": torch.ones(1, 2), "lr": torch.ones(2)}, "must hold one number"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, contents, said):
    with pytest.raises(ValueError, match=said):
        import_distilled_tensors(*save(tmp_path, **contents))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "replay_buffer_0.pt` is damaged, or no file of torch: .*Get it again"),
        (b"\x80\x02", "replay_buffer_0.pt` is damaged, or no file of torch: it ends too early. Get it again"),
        ([], "must hold a list of experts"),
        ([[[torch.full((2, 3, 3, 3), torch.nan)]]], "another architecture: 1 parameters"),
    ],
)
def test_empty_and_damaged_buffers(tmp_path, content, said):
    file = tmp_path / "buffers" / "replay_buffer_0.pt"
    file.parent.mkdir()
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=said):
        import_pickled_bank(file.parent, tmp_path / "bank", ConvNetConfig(image_size=8, depth=1, hidden_size=2))


def test_parameters_that_are_not_finite_are_not_imported(tmp_path):
    config = ConvNetConfig(image_size=8, depth=1, hidden_size=2)
    parameters = [torch.full_like(value, torch.nan) for value in ConvNetForImageClassification(config).parameters()]
    torch.save([[parameters]], tmp_path / "replay_buffer_0.pt")
    with pytest.raises(ValueError, match="replay_buffer_0.pt` holds parameters that are not finite"):
        import_pickled_bank(tmp_path, tmp_path / "bank", config)
