"""Cards and pushes: what accompanies a model or a distilled data set to the Hub, and what must not."""

from .cards import CardResult, add_results, render_model_card, write_model_card
from .dataset_cards import add_evaluations, render_dataset_card, write_dataset_card
from .push import push_folder


__all__ = [
    "CardResult",
    "add_evaluations",
    "add_results",
    "push_folder",
    "render_dataset_card",
    "render_model_card",
    "write_dataset_card",
    "write_model_card",
]
