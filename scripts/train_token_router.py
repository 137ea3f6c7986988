"""Teaches a router which tokens of a prompt can skip which blocks of a language model, whose weights stay as they are.

Example: `hf-effml train token-router --recipe smoke --output_dir token-router-smoke`
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import set_seed

from hf_effml import TokenRouterConfig, TokenRouterModel, TokenRouterTrainer, TokenRouterTrainingArguments
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.cli.settings import check_least
from hf_effml.token_router.comparison import score_router
from hf_effml.token_router.schedule_search import SearchSettings, search_sparsity_schedule
from hf_effml.utils.language_models import load_language_model, train_language_model
from hf_effml.utils.sources.text_examples import LeftPaddingCollator, make_examples
from hf_effml.utils.text_data import TextData, load_text, make_windows


@dataclass
class ScriptArguments:
    """What to start from, and what to learn from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the language model; or see `start_steps`."}
    )
    start_steps: int = field(default=0, metadata={"help": "Steps to train a tiny one for, in OUTPUT_DIR/start."})
    dtype: str = field(default="auto", metadata={"help": "Type to load its weights in: auto, float32, bfloat16 ..."})
    data: str = field(default="pydoc", metadata={"help": "pydoc, .txt, .jsonl or .parquet, or a set of the Hub."})
    text_column: str = field(default="text", metadata={"help": "Where the texts stand in tables."})
    completion_marker: str | None = field(
        default=None, metadata={"help": "What ends the prompt in each text; prompts are as long as texts if left out."}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Texts to search and measure on; DATA if left out."})
    eval_text_column: str = field(default="text", metadata={"help": "The same for EVAL_DATA."})
    single_line_breaks: bool = field(default=False, metadata={"help": "Replace double line breaks by single ones."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of a text."})
    prompt_length: int | None = field(
        default=None, metadata={"help": "Of them routed when measuring and searching; three quarters if left out."}
    )
    eval_windows: int = field(default=64, metadata={"help": "Texts to measure on."})
    search_generations: int = field(
        default=0, metadata={"help": "Generations of the search for the schedule before training; 0 for uniform."}
    )
    refine_generations: int = field(default=0, metadata={"help": "The same after training, with the trained router."})
    search_population: int = field(default=24, metadata={"help": "Schedules in a generation."})
    search_windows: int = field(default=48, metadata={"help": "Texts to try schedules on."})

    def __post_init__(self) -> None:
        check_least(self, sequence_length=2, eval_windows=1, search_windows=1, start_steps=0, search_generations=0)
        if self.prompt_length is None:
            self.prompt_length = self.sequence_length * 3 // 4
        if not 0 < self.prompt_length < self.sequence_length:
            raise ValueError(f"`prompt_length` must be from 1 to below `sequence_length`; got {self.prompt_length}.")
        if self.search_generations or self.refine_generations:
            SearchSettings(population=self.search_population)

    def windows(self, texts: Any, tokenizer: Any, limit: int) -> Any:
        """So many pieces of texts."""
        return make_windows(texts, tokenizer, limit=limit, **self.cut())

    def cut(self) -> dict[str, Any]:
        """How texts are cut."""
        return {"length": self.sequence_length, "single_line_breaks": self.single_line_breaks}


@dataclass
class RoutingArguments:
    """How tokens skip blocks; the fields of `TokenRouterConfig`."""

    target_sparsity: float = field(default=0.3, metadata={"help": "Share of the tokens that skip a block on average."})
    router_type: Literal["one_pass", "dynamic"] = field(
        default="one_pass", metadata={"help": "Decide once, or before every block."}
    )
    num_protected_first: int = field(default=1, metadata={"help": "Blocks at the beginning that skip nothing."})
    num_protected_last: int = field(default=0, metadata={"help": "Blocks at the end that skip nothing."})
    selection: Literal["budget", "threshold"] = field(
        default="budget", metadata={"help": "Keep so many tokens, or those the router wants."}
    )
    kv_policy: Literal["drop", "keep"] = field(
        default="drop", metadata={"help": "Whether skipped tokens leave keys and values."}
    )
    skip_unit: Literal["block", "mlp"] = field(default="block", metadata={"help": "What is skipped."})
    decode_policy: Literal["threshold", "keep"] = field(
        default="keep", metadata={"help": "Whether generated tokens skip blocks."}
    )
    decode_threshold: float = field(
        default=0.5, metadata={"help": "Sparsity from which generated tokens skip a block."}
    )
    min_tokens: int = field(default=64, metadata={"help": "Shorter prompts run dense."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    types = (ScriptArguments, RoutingArguments, TokenRouterTrainingArguments)
    script, routing, args = parse_arguments(*types, argv=argv, program=__file__, description=__doc__)
    config = TokenRouterConfig(**asdict(routing))
    data = load_text(script.data, script.text_column)
    eval_data = data if script.eval_data is None else load_text(script.eval_data, script.eval_text_column)
    name = script.model_name_or_path or train_language_model(
        data.train, Path(args.output_dir) / "start", script.start_steps, args.seed
    )
    base, tokenizer = load_language_model(name, dtype=script.dtype)
    set_seed(args.seed)
    test = script.windows(eval_data.test, tokenizer, script.eval_windows)
    trainer = TokenRouterTrainer(
        TokenRouterModel(base, config),
        args,
        train_dataset=make_examples(data.train, tokenizer, completion_marker=script.completion_marker, **script.cut()),
        data_collator=LeftPaddingCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    if script.search_generations:
        _search(script, trainer, eval_data, "static", "search", script.search_generations)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if script.refine_generations:
        _search(script, trainer, eval_data, config.router_type, "refine", script.refine_generations)
    report = score_router(trainer.model.eval(), test, script.prompt_length, args.per_device_eval_batch_size)
    trainer.save_model()
    trainer.card_facts |= {
        "results": report.card_results("trained router", beside="dense"),
        "evaluated_on": f"{eval_data.name}, prompts of {script.prompt_length} tokens",
        "data": {"name": data.name, "hub_id": data.hub_id},
    }
    trainer.create_model_card()
    print(f"\n{report.as_text()}\n\nWrote {args.output_dir}. To load it:")
    print(f"AutoModelForCausalLM.from_pretrained({args.output_dir!r}, trust_remote_code=True)")
    facts = {"output_dir": args.output_dir, "steps": trainer.state.global_step, "sparsity_schedule": config.schedule}
    return report.as_dict() | facts


def _search(
    script: ScriptArguments, trainer: TokenRouterTrainer, data: TextData, router_type: str, name: str, generations: int
) -> None:
    """Searches a schedule; what an earlier run has found is continued."""
    result = search_sparsity_schedule(
        trainer.model,
        script.windows(data.train, trainer.processing_class, script.search_windows),
        script.prompt_length,
        population=script.search_population,
        generations=generations,
        router_type=router_type,
        seed=trainer.args.seed,
        batch_size=trainer.args.per_device_eval_batch_size,
        checkpoint=Path(trainer.args.output_dir) / f"{name}.json",
    )
    schedule = " ".join(f"{share:.2f}" for share in result.schedule)
    print(f"Schedule: {schedule} (KL {result.fitness:.4g} after {result.evaluations} evaluations)")


if __name__ == "__main__":
    sys.exit(run_script(main))
