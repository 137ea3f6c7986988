"""Cards and pushes: what accompanies a model to the Hub, and what must not."""

from .cards import CardResult, add_results, render_model_card, write_model_card
from .push import push_folder


__all__ = ["CardResult", "add_results", "push_folder", "render_model_card", "write_model_card"]
