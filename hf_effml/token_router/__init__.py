"""Token routing (FTP): tokens that skip decoder blocks of a frozen language model."""

from transformers import AutoConfig, AutoModelForCausalLM

from .baselines import block_pruner, remove_blocks, remove_sub_blocks, shortgpt_blocks
from .block_influence import block_influence
from .configuration_token_router import (
    TokenRouterConfig,
    TokenRouterLlamaConfig,
    TokenRouterQwen2Config,
    TokenRouterQwen3Config,
)
from .evaluation import (
    ContinuationScores,
    MultipleChoiceScores,
    retention,
    score_continuations,
    score_multiple_choice,
)
from .modeling_token_router import TokenRouterModel
from .modeling_token_router_causal_lm import (
    TokenRouterLlamaForCausalLM,
    TokenRouterQwen2ForCausalLM,
    TokenRouterQwen3ForCausalLM,
)
from .patching import apply_token_router, disable_routing, remove_token_router
from .routing import TokenRouter
from .routing_report import RoutingReport
from .schedule_search import (
    ScheduleSearchResult,
    project_schedule,
    search_sparsity_schedule,
)
from .token_skip_cache import TokenSkipCacheLayer


for _config, _model in (
    (TokenRouterConfig, TokenRouterModel),
    (TokenRouterLlamaConfig, TokenRouterLlamaForCausalLM),
    (TokenRouterQwen2Config, TokenRouterQwen2ForCausalLM),
    (TokenRouterQwen3Config, TokenRouterQwen3ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    # Saved folders carry these files and load where this package is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "ContinuationScores",
    "MultipleChoiceScores",
    "RoutingReport",
    "ScheduleSearchResult",
    "TokenRouter",
    "TokenRouterConfig",
    "TokenRouterLlamaConfig",
    "TokenRouterLlamaForCausalLM",
    "TokenRouterModel",
    "TokenRouterQwen2Config",
    "TokenRouterQwen2ForCausalLM",
    "TokenRouterQwen3Config",
    "TokenRouterQwen3ForCausalLM",
    "TokenSkipCacheLayer",
    "apply_token_router",
    "block_influence",
    "block_pruner",
    "disable_routing",
    "project_schedule",
    "remove_blocks",
    "remove_sub_blocks",
    "remove_token_router",
    "retention",
    "score_continuations",
    "score_multiple_choice",
    "search_sparsity_schedule",
    "shortgpt_blocks",
]
