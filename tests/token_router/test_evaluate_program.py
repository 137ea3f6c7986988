"""The program runs end to end on tiny models and reports what was measured; wrong use is explained."""

import json

import pytest
import torch
from PIL import Image

from helpers import require_package, tiny_language_model, tiny_tokenizer
from hf_effml import TokenRouterConfig, TokenRouterModel
from hf_effml.cli.parsing import run_script
from hf_effml.hub import CardResult, write_card
from hf_effml.scripts.evaluate_token_router import main
from hf_effml.token_router import comparison
from hf_effml.token_router.comparison import VARIANTS, RoutingVariant


SMALL = ["--limit", "3", "--prompt_length", "24", "--continuation_length", "8", "--rounds", "1", "--batch_size", "2"]
FIELDS = {"target_sparsity": 0.3, "min_tokens": 0, "num_hidden_layers": 4}


@pytest.fixture
def base(tmp_path):
    """A folder with a language model and its tokenizer."""
    folder = tmp_path / "base"
    tiny_language_model(vocab_size=258).save_pretrained(folder)
    tiny_tokenizer(bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def router(base, tmp_path):
    """A folder with a router that is not the static rule, and its card."""
    from transformers import AutoModelForCausalLM

    model = TokenRouterModel(AutoModelForCausalLM.from_pretrained(base), TokenRouterConfig(**FIELDS))
    with torch.no_grad():
        for parameter in model.token_router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path / "my-router")
    results = [CardResult("Keys and values of the prompt", 0.5, 1.0)]
    write_card(tmp_path / "my-router", results=results, evaluated_on="pydoc, prompts of 24 tokens")
    return tmp_path / "my-router"


@pytest.fixture
def questions(tmp_path):
    datasets = require_package("datasets")
    rows = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "label": n % 2} for n in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "even.parquet"))
    return tmp_path / "even.parquet"


def test_all_rows_of_a_plain_model(base, capsys):
    options = ["--target_sparsity", "0.3", "--min_tokens", "0", "--rows", *VARIANTS]
    results = main([str(base), *options, *SMALL])
    assert json.loads(json.dumps(results)) == results
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "dense",
        "random tokens",
        "static router",
        "dynamic router, untrained",
        "one-pass router, untrained",
        "one-pass router, K/V kept",
        "ShortGPT, 1 of 4 blocks*",
        "BlockPruner, 2 of 8 parts*",
    ]
    dense, _, static, dynamic, one_pass, kept, shortgpt, pruner = rows.values()
    assert (dense["kl"], dense["time"], dense["work"], dense["retention"]) == (0, 1, 1, None)
    # An untrained router is the static rule.
    for row in (dynamic, one_pass):
        assert row["kl"] == pytest.approx(static["kl"], rel=1e-4) and row["kl"] > 0
    # 9 of 24 tokens skip 3 of 4 blocks.
    for row in list(rows.values())[1:6]:
        assert row["sparsity"] == pytest.approx(9 / 24 * 3 / 4) and 0.6 < row["work"] < 1
    assert static["cache"] == pytest.approx(1 - static["sparsity"]) and kept["cache"] == 1
    assert kept["work"] > static["work"]
    assert (shortgpt["sparsity"], shortgpt["work"], shortgpt["cache"]) == pytest.approx((0.25, 0.75, 0.75))
    assert pruner["sparsity"] == 0.25 and pruner["work"] < 1
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in rows)
    assert "25.0% and 25.0% of the blocks that 32" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 119


def test_a_router_with_questions_card_and_picture(router, questions, tmp_path, capsys):
    require_package("matplotlib")
    picture = tmp_path / "skipped.png"
    extras = ["--tasks", str(questions), "--add_to_card", "--picture", str(picture), "--prompt", "A short one."]
    results = main([str(router), *extras, *SMALL])
    names = [row["name"] for row in results["rows"]]
    assert names[:5] == ["dense", "random tokens", "static router", "dynamic router", "one-pass router"]
    assert names[5:] == ["one-pass router, K/V kept", "ShortGPT, 1 of 4 blocks*"]
    own, static = results["rows"][4], results["rows"][2]
    assert own["kl"] != pytest.approx(static["kl"], rel=1e-3)
    assert set(own["accuracy"]) == {"even"} and own["task_sparsity"]["even"] > 0.2
    card = (router / "README.md").read_text()
    assert f"| Keys and values of the prompt | {own['cache']:.4g} | 1 |" in card
    assert (
        "Measured on even.\n" in card
        and "| Accuracy | " in card
        and "Time of the prompt (ms per batch, cpu, batch 2)" in card
    )
    assert Image.open(picture).width > 900
    text = capsys.readouterr().out
    assert f"Drew {picture}" in text and "Renewed" in text and "even  retention" in text


def test_other_sparsity_other_base_and_full_checkpoints(router, base, tmp_path):
    own = main([str(router), "--base_model", str(base), "--rows", "one_pass", "--target_sparsity", "0.6", *SMALL])
    assert own["rows"][1]["name"] == "one-pass router"
    assert own["rows"][1]["sparsity"] == pytest.approx(19 / 24 * 3 / 4)
    model = TokenRouterModel.from_pretrained(router)
    model.to_full_checkpoint().save_pretrained(tmp_path / "full")
    tiny_tokenizer(bos_token="<s>").save_pretrained(tmp_path / "full")
    again = main([str(tmp_path / "full"), "--rows", "one_pass", "--target_sparsity", "0.6", *SMALL])
    for name in ("cross_entropy", "kl", "prompt_cross_entropy", "sparsity"):
        assert again["rows"][1][name] == pytest.approx(own["rows"][1][name], rel=1e-5)


def test_short_questions_that_run_dense_are_mentioned(base, questions, capsys):
    main([str(base), "--target_sparsity", "0.3", "--rows", "static", "--tasks", str(questions), *SMALL])
    text = " ".join(capsys.readouterr().out.split())
    assert "Of the tokens of even, 0.0% were skipped: contexts of less than 64 tokens run dense." in text


@pytest.mark.parametrize(
    "fields, missing", [({"skip_unit": "mlp"}, {"kv_kept"}), ({"num_protected_first": 0}, {"dynamic", "one_pass"})]
)
def test_rows_that_settings_rule_out_are_left_out(fields, missing):
    config = TokenRouterConfig(**FIELDS, router_type="static", **fields)
    assert set(VARIANTS) - set(comparison.possible_variants(config)) == missing | {"block_pruner"}


def test_work_without_attentions_and_mlps(base):
    model, _, _, trained = comparison.load_with_router(str(base), target_sparsity=0.3)
    prompt = torch.arange(24)[None]
    assert not trained

    def removed(attentions, mlps):
        return comparison._removed(model, RoutingVariant("", model, attentions=attentions, mlps=mlps), prompt)

    # A whole block in two halves, of different blocks.
    assert removed([0, 1], [2, 3]) == pytest.approx((0.5, 0.5, 0.5))
    share, work, cache = removed([3], [])
    assert (share, cache) == pytest.approx((0.125, 0.75)) and 0.75 < work < 1
    assert work + removed([], [0])[1] == pytest.approx(1.75)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "`MODEL` must be given"),
        (["{base}"], "has no router. Say what to skip, for example `--target_sparsity 0.3`"),
        (["{base}", "--target_sparsity", "1.5"], "`target_sparsity` must be at least 0 and less than 1; got 1.5"),
        (["{base}", "--target_sparsity", "0"], "nothing is skipped"),
        (["{base}", "--target_sparsity", "0.3", "--rows", "one-pass"], "did you mean `one_pass`?"),
        (["{base}", "--limit", "0"], "`--limit` must be at least 1; got 0"),
        (["{base}", "--prompt_length", "1"], "`--prompt_length` must be at least 2; got 1"),
        (["{base}", "--target_sparsity", "0.3", "--data", "gone.txt"], "There is no file `gone.txt`"),
        (["{base}", "--target_sparsity", "0.3", "--tasks", "gone.parquet"], "There is no file `gone.parquet`"),
        (["{base}", "--target_sparsity", "0.3", "--add_to_card"], "needs a folder with a card"),
        (["{router}", "--add_to_card", "--rows", "static"], "add `one_pass` to `--rows`"),
        (["{base}", "--target_sparsity", "0.3", "--prompt_length", "1000000"], "longest text has"),
        (["{base}", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["{base}", "--spar", "0.3"], "`--spar` is no option"),
    ],
)
def test_wrong_use_ends_with_two_lines(base, router, argv, message, capsys):
    argv = [word.format(base=base, router=router) for word in argv]
    assert run_script(main, argv) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("Loading weights")]
    assert len(lines) == 2 and lines[0].startswith("error: ") and message in lines[0]
