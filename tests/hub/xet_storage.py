"""The local Hub with the newer upload protocol: large files go to Xet storage, here a folder the clients write to.

`local://` addresses and the layout of the shard files are internals of hf-xet 1.8; tests skip when they have moved.
"""

import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hub.local_hub import ROUTES, Handler, HubError, LocalHub


_RECORD = 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


def _hexadecimal(digest: bytes) -> str:
    """How Xet prints a hash: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


def _files_of_shard(content: bytes) -> Iterator[tuple[str, str]]:
    """Pairs of sha256 and Xet hash of the files that a shard describes."""
    position = _RECORD
    while content[position : position + 32] != b"\xff" * 32:
        file_hash = _hexadecimal(content[position : position + 32])
        flags, segments = struct.unpack_from("<II", content, position + 32)
        position += _RECORD * (1 + segments * (2 if flags & _HAS_VERIFICATION else 1))
        if flags & _HAS_SHA256:
            yield _hexadecimal(content[position : position + 32]), file_hash
            position += _RECORD


class XetHub(LocalHub):
    """A Hub that hands out addresses of Xet storage and reads from it what was uploaded there."""

    def __init__(self, tokens: dict[str, str], storage: Path):
        super().__init__(tokens, XetHandler)
        self.address = f"local://{storage}"
        self.storage = storage
        self.xet_hashes: dict[str, str] = {}

    def receive(self, sha256: str, size: int) -> None:
        """Takes a file out of the storage into `blobs`."""
        import hf_xet

        for shard in self.storage.rglob("*.mdb"):
            self.xet_hashes.update(_files_of_shard(shard.read_bytes()))
        if sha256 not in self.xet_hashes:
            raise HubError(400, message="The content was never uploaded")
        with tempfile.TemporaryDirectory() as folder:
            # A copy, because the uploading client may still hold the database in the storage open.
            storage, destination = Path(folder, "storage"), Path(folder, "file")
            shutil.copytree(self.storage, storage)
            wanted = hf_xet.PyXetDownloadInfo(str(destination), self.xet_hashes[sha256], size)
            hf_xet.download_files([wanted], f"local://{storage}", ("token", int(time.time()) + 3600), None, None)
            self.blobs[sha256] = destination.read_bytes()


class XetHandler(Handler):
    """The routes that Xet adds, and its marks on files."""

    hub: XetHub
    routes = [
        ("GET", r"/api/(?P<kind>\w+)/(?P<repo_id>[^/]+/[^/]+)/xet-(?:read|write)-token/.+", "get_token"),
        *ROUTES,
    ]

    def get_token(self, kind: str, repo_id: str) -> tuple:
        self.repo(kind, repo_id)
        expires = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.hub.address,
            "X-Xet-Access-Token": "token",
            "X-Xet-Token-Expiration": str(expires),
        }
        return 200, {"casUrl": self.hub.address, "accessToken": "token", "exp": expires}, headers

    def apply(self, files: dict, key: str, value: dict) -> None:
        if key == "lfsFile" and value["oid"] not in self.hub.blobs:
            self.hub.receive(value["oid"], value["size"])
        super().apply(files, key, value)

    def get_tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> tuple:
        status, entries = super().get_tree(kind, repo_id, revision, path)
        for entry in entries:
            if entry.get("lfs", {}).get("oid") in self.hub.xet_hashes:
                entry["xetHash"] = self.hub.xet_hashes[entry["lfs"]["oid"]]
        return status, entries

    def get_file(self, repo_id: str, revision: str, path: str, kind: str | None = None) -> tuple:
        status, content, headers = super().get_file(repo_id, revision, path, kind)
        xet_hash = self.hub.xet_hashes.get(headers.get("ETag", "").strip('"'))
        if xet_hash is not None:
            route = f"{self.hub.url}/api/{kind or 'models'}/{repo_id}/xet-read-token/{revision}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
        return status, content, headers
