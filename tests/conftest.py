"""The environment of all tests, and the data they share."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


# Read once, at the first import of torch and huggingface_hub: a cache of our own, and no way to the network. Tests of
# the Hub start subprocesses that see their local server instead.
_HF_HOME = tempfile.mkdtemp(prefix="hf-effml-tests-")
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    NO_PROXY="127.0.0.1,localhost",
)
for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
# Tiny tensors gain nothing from a second thread, workers share the cores, and forks inherit no dead threads.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

from helpers import colours, require_package  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core for folders of tests; tests of named files are over sooner in one process."""
    if all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    config.option.dist = "worksteal"
    return min(os.cpu_count() or 1, 8)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """After a run of all tests, how many lines of them there are to a line of what they test."""
    if config.args != config.getini("testpaths") or hasattr(config, "workerinput"):
        return
    shares = []
    for folder in sorted([*(REPOSITORY / "hf_effml").iterdir(), REPOSITORY / "trainers"]):
        tests = REPOSITORY / "tests" / folder.name
        if tests.is_dir():
            written, tested = (
                sum(len(path.read_text().splitlines()) for path in place.rglob("*.py")) for place in (tests, folder)
            )
            shares.append(f"{folder.name} {written / tested:.2f}")
    terminalreporter.write_line(f"Lines of tests per line of code: {', '.join(shares)}")


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    """Dynamo counts how often it compiles a method in a process, and gives up after eight, whoever asked for it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch hands out uninitialised with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data: `HF_EFFML_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("HF_EFFML_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set HF_EFFML_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def digits() -> tuple[list[dict], list[dict]]:
    """scikit-learn's 8x8 digits, `(train, test)`: examples with normalised `(1, 8, 8)` images."""
    data = require_package("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [{"pixel_values": images[index], "labels": int(data.target[index])} for index in order]
    return examples[:1437], examples[1437:]


@pytest.fixture(scope="session")
def expert_bank() -> tuple[Any, Any]:
    """See `colours`."""
    return colours()


@pytest.fixture
def distil(expert_bank: tuple[Any, Any], tmp_path: Path) -> Any:
    """Makes a trainer of two synthetic images per class: `distil("EDF", folder="run", bank=..., **arguments)`."""
    import hf_effml

    def make(method: str = "TrajectoryMatching", folder: str = "run", start: Any = None, **others: Any) -> Any:
        data, bank = expert_bank
        parts = {
            name: others.pop(name) for name in ("callbacks", "eval_dataset", "processing_class") if name in others
        }
        parts |= {
            name: others.pop(name) for name in list(others) if name in ("cam_model", "cam_processor", "cam_label_map")
        }
        parts["bank"] = others.pop("bank", bank)
        model = start if start is not None else hf_effml.distilled_from_real(data, bank, 2)
        defaults = {"max_steps": 4, "syn_steps": 3, "batch_syn": 4, "max_start_epoch": 4, "lr_img": 20.0}
        defaults |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = getattr(hf_effml, f"{method}TrainingArguments")(str(tmp_path / folder), **(defaults | others))
        return getattr(hf_effml, f"{method}Trainer")(model, arguments, **parts)

    return make
