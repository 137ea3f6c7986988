"""A local Hub, and clients of it that share nothing with the test process but a folder."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub.local_hub import LocalHub

from processes import Job


# Put together here, so that no scanner takes them for real ones.
ALICE, BOB = "hf_" + "Alice" * 7, "hf_" + "Bobby" * 7


@dataclass
class Client:
    """Runs Python in fresh interpreters. A new `home` is an empty cache; nothing else but `folder` is shared."""

    hub: LocalHub
    folder: Path
    xet: bool = False

    def start(
        self, code: str, home: str, token: str | None = None, without_package: bool = False, offline: bool = False
    ) -> Job:
        """Starts code that sees the local Hub, with `hf_effml` not importable if asked for."""
        if without_package:
            code = "import sys\nsys.modules['hf_effml'] = None\n" + code
        known = ("HF_", "TRANSFORMERS_", "HUGGING")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(known)}
        environment |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        return Job(code, cwd=self.folder, environment=environment, merged=True)

    def run(self, code: str, home: str, **options: object) -> str:
        """Runs code to its end, which must be a good one; what it printed."""
        job = self.start(code, home, **options)
        assert job.wait() == 0, job.stdout
        return job.stdout

    def leaks(self) -> list[str]:
        """Files on the server, with what they hold of this machine or of an account."""
        secrets = [ALICE, BOB, str(self.folder), str(Path.home()) + "/", sys.prefix, str(Path(__file__).parents[2])]
        found = []
        for repo in self.hub.repos.values():
            for commit in repo.commits.values():
                for path, file in commit["files"].items():
                    found += [f"{path}: {s}" for s in secrets if s.encode() in self.hub.blobs[file.sha256]]
        return found


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """A Hub with two users, alice and bob, and no repository."""
    with LocalHub({ALICE: "alice", BOB: "bob"}) as hub:
        yield hub


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    """A client of the Hub that works in the test's own folder."""
    return Client(hub, tmp_path)
