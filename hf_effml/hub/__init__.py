"""Cards and pushes: what accompanies a folder to the Hub, and what must not. Subjects say what their folders are."""

from hf_effml.utils.report import CardResult

from .cards import add_results, render_card, renew_results, write_card
from .checks import check_folder
from .kinds import FolderKind
from .model_folder import ModelFolder
from .push import push_folder


__all__ = [
    "CardResult",
    "FolderKind",
    "ModelFolder",
    "add_results",
    "check_folder",
    "push_folder",
    "render_card",
    "renew_results",
    "write_card",
]
