"""The environment of all tests, and the data they share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

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

from helpers import require_package  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


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
