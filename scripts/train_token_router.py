"""Teaches a router which tokens of a prompt can skip which blocks of a language model, whose weights stay as they are.

Example: `hf-effml train token-router --recipe smoke --output_dir token-router-smoke`
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_effml import TokenRouterConfig, TokenRouterModel, TokenRouterTrainer, TokenRouterTrainingArguments
from hf_effml.cli.parsing import parse_arguments, run_script
from hf_effml.hub import CardResult


@dataclass
class ScriptArguments:
    """What to start from, and what to learn from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the language model; or see `start_steps`."},
    )
    start_steps: int = field(default=0, metadata={"help": "Steps to train a tiny one for, in OUTPUT_DIR/start."})
    dtype: str = field(default="auto", metadata={"help": "Type to load its weights in: auto, float32, bfloat16 ..."})
    data: str = field(default="pydoc", metadata={"help": "pydoc, a .txt or .parquet file, or a data set of the Hub."})
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
        default="threshold", metadata={"help": "Whether generated tokens skip blocks."}
    )
    decode_threshold: float = field(
        default=0.5, metadata={"help": "Sparsity from which generated tokens skip a block."}
    )
    min_tokens: int = field(default=64, metadata={"help": "Shorter prompts run dense."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    script, routing, args = parse_arguments(
        ScriptArguments,
        RoutingArguments,
        TokenRouterTrainingArguments,
        argv=argv,
        program=__file__,
        description=__doc__,
    )
    from transformers import set_seed

    from hf_effml.utils.text_data import load_text, make_windows

    config = TokenRouterConfig(**asdict(routing))
    data = load_text(script.data, script.text_column)
    eval_data = data if script.eval_data is None else load_text(script.eval_data, script.eval_text_column)
    base, tokenizer = _load_base(script, data.train, args)
    set_seed(args.seed)
    model = TokenRouterModel(base, config)

    def windows(texts: list[str], limit: int) -> Any:
        return make_windows(
            texts, tokenizer, script.sequence_length, limit=limit, single_line_breaks=script.single_line_breaks
        )

    test = windows(eval_data.test, script.eval_windows)
    trainer = TokenRouterTrainer(
        model,
        args,
        train_dataset=_examples(script, data.train, tokenizer),
        data_collator=_collator(tokenizer),
        processing_class=tokenizer,
    )
    if script.search_generations:
        _search(script, model, windows(eval_data.train, script.search_windows), "static", "search", args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if script.refine_generations:
        _search(script, model, windows(eval_data.train, script.search_windows), config.router_type, "refine", args)
    rows = _measure(model.eval(), test, _prompt_length(script), args.per_device_eval_batch_size)
    trainer.save_model()
    _report(trainer, rows, data, eval_data.name, script)
    return {
        "output_dir": args.output_dir,
        "rows": {name: asdict(scores) for name, scores in rows.items()},
        "sparsity_schedule": list(config.schedule),
        "steps": trainer.state.global_step,
    }


def _load_base(script: ScriptArguments, texts: list[str], args: Any) -> tuple[Any, Any]:
    from hf_effml.scripts._start_language_model import load_language_model, train_language_model

    name = script.model_name_or_path
    if name is None:
        if script.start_steps < 1:
            raise ValueError(
                "There is no language model to start from. Give one with `--model_name_or_path FOLDER`, or train a "
                "tiny one with `--start_steps 200`."
            )
        name = train_language_model(texts, Path(args.output_dir) / "start", script.start_steps, args.seed)
    return load_language_model(name, dtype=script.dtype)


def _examples(script: ScriptArguments, texts: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Texts cut to length; with a marker, the tokens behind it are marked as the completion."""
    from hf_effml.utils.text_data import make_windows, tokenize

    if script.completion_marker is None:
        cut = make_windows(texts, tokenizer, script.sequence_length, single_line_breaks=script.single_line_breaks)
        return [{"input_ids": window.tolist()} for window in cut]
    pairs = [text.partition(script.completion_marker) for text in texts]
    prompts = tokenize([before + marker for before, marker, _ in pairs], tokenizer, script.single_line_breaks)
    examples = []
    for prompt, (_, _, after) in zip(prompts, pairs, strict=True):
        completion = tokenizer(after, add_special_tokens=False)["input_ids"]
        ids = (prompt + completion)[: script.sequence_length]
        if len(ids) > len(prompt):
            mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
            examples.append({"input_ids": ids, "completion_mask": mask})
    if not examples:
        raise ValueError(
            f"No text of `{script.data}` has `completion_marker` {script.completion_marker!r} with anything behind it "
            f"within {script.sequence_length} tokens."
        )
    return examples


def _collator(tokenizer: Any) -> Any:
    """Pads on the left, as `generate` has it."""
    import torch

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[value] * (length - len(row[name])) + list(row[name]) for row in rows])

        batch = {"input_ids": padded("input_ids", tokenizer.pad_token_id or 0)}
        ones = [{"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        batch["attention_mask"] = torch.tensor(
            [[0] * (length - len(row["attention_mask"])) + row["attention_mask"] for row in ones]
        )
        if "completion_mask" in rows[0]:
            batch["completion_mask"] = padded("completion_mask", 0)
        return batch

    return collate


def _prompt_length(script: ScriptArguments) -> int:
    return script.sequence_length * 3 // 4 if script.prompt_length is None else script.prompt_length


def _search(
    script: ScriptArguments, model: TokenRouterModel, windows: Any, router_type: str, name: str, args: Any
) -> None:
    """Searches a schedule; what an earlier run has found is continued."""
    from hf_effml import search_sparsity_schedule

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    result = search_sparsity_schedule(
        model,
        windows,
        _prompt_length(script),
        population=script.search_population,
        generations=script.search_generations if name == "search" else script.refine_generations,
        router_type=router_type,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        checkpoint=Path(args.output_dir) / f"{name}.json",
    )
    schedule = " ".join(f"{share:.2f}" for share in result.schedule)
    print(f"Schedule: {schedule} (KL {result.fitness:.4g} after {result.evaluations} evaluations)")


def _measure(model: TokenRouterModel, windows: Any, prompt_length: int, batch_size: int) -> dict[str, Any]:
    """The trained router beside the dense model and two rules, on texts it has not seen."""
    from hf_effml import score_continuations
    from hf_effml.token_router.patching import copy_config

    def score(**changes: Any) -> Any:
        config = copy_config(model.config, **changes)
        return score_continuations(model, windows, prompt_length, batch_size=batch_size, token_router_config=config)

    nothing = [0.0] * len(model.config.schedule)
    return {
        "dense": score(target_sparsity=0.0, sparsity_schedule=nothing),
        "random tokens": score(router_type="random", selection="budget"),
        "first and newest tokens": score(router_type="static", selection="budget"),
        "trained router": score(),
    }


def _report(trainer: Any, rows: dict[str, Any], data: Any, evaluated_on: str, script: ScriptArguments) -> None:
    own, dense, static = rows["trained router"], rows["dense"], rows["first and newest tokens"]
    trainer.card_facts |= {
        "results": [
            CardResult("Cross-entropy of continuations", own.cross_entropy, dense.cross_entropy),
            CardResult("KL divergence from the dense model", own.kl, 0.0),
            CardResult("The same with the static rule, first and newest tokens", static.kl, 0.0),
            CardResult("Share of the prompt's tokens that skip a block", own.sparsity, 0.0),
            CardResult("Work of the blocks on the prompt", own.flop_ratio, 1.0),
            CardResult("Keys and values of the prompt", own.kv_bytes / own.dense_kv_bytes, 1.0),
        ],
        "evaluated_on": f"{evaluated_on}, prompts of {_prompt_length(script)} tokens",
        "datasets": [data.hub_id] if data.hub_id else [],
    }
    trainer.create_model_card()
    print(f"\n{'':<26}{'cross-entropy':>22}{'KL to dense':>14}{'skipped':>10}{'work':>8}{'cache':>8}")
    for name, row in rows.items():
        entropy = f"{row.cross_entropy:.4f} ({row.cross_entropy - dense.cross_entropy:+.4f})"
        cache = row.kv_bytes / row.dense_kv_bytes
        print(f"{name:<26}{entropy:>22}{row.kl:>14.5f}{row.sparsity:>10.1%}{row.flop_ratio:>8.1%}{cache:>8.1%}")
    print(f"\nPrompts of {_prompt_length(script)} tokens are routed, what follows them is scored.")
    folder = trainer.args.output_dir
    print(f"Wrote {folder}. To load it:")
    print(f'AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)')


if __name__ == "__main__":
    sys.exit(run_script(main))
