"""Benchmarks run end to end at tiny sizes and refuse wrong outputs; no time is asserted."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from hf_effml import VimConfig, VimForImageClassification
from hf_effml.scripts import bench_dyvm, bench_rmeeto, bench_token_router, bench_vim
from hf_effml.token_router import benchmarks, token_skip_layer
from hf_effml.utils import benchmark
from hf_effml.utils.benchmark import (
    Timing,
    check_agreement,
    compare,
    describe_run,
    one_line,
    peak_memory,
)
from hf_effml.vim import selective_scan, vim_blocks
from hf_effml.vim.evaluation import bench_dyvm as dyvm_measures
from hf_effml.vim.evaluation import bench_rmeeto as rmeeto_measures
from hf_effml.vim.evaluation import bench_vim as vim_measures
from hf_effml.vim.evaluation.baselines import natural_images, with_transformers_mixer


def run(program, folder, *options):
    return program.main(["--quick", "--rounds", "2", "--output_dir", str(folder), *options])


def test_bench_vim_writes_table_and_json(tmp_path, capsys):
    results = run(bench_vim, tmp_path, "--batch_sizes", "1", "2")
    assert json.loads((tmp_path / "bench_vim.json").read_text()) == results
    table = (tmp_path / "bench_vim.md").read_text()
    assert table.strip() in capsys.readouterr().out
    for name in ("loop with indexing", "loop with unbind", "transformers' Mamba mixer twice", "DeiT-tiny"):
        assert name in table
    assert {row["what"] for row in results["scan"]} == {"forward", "forward + backward"}
    assert [row["tokens"] for row in results["scaling"]] == list(vim_measures.QUICK.lengths)
    assert {row["batch"] for row in results["model"]} == {1, 2}
    assert all(row["ms"] > 0 for row in [*results["scan"], *results["scaling"], *results["model"]])


def test_bench_vim_refuses_a_wrong_scan(tmp_path, monkeypatch):
    def wrong(*streams):
        return tuple(y + 0.01 for y in selective_scan(*streams))

    monkeypatch.setattr(vim_measures, "selective_scan", wrong)
    with pytest.raises(RuntimeError, match="Nothing is reported.*`loop with indexing` and `ours` differ by"):
        run(bench_vim, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bench_vim_refuses_a_wrong_model(tmp_path, monkeypatch):
    def wrong(*streams):
        return tuple(2 * y for y in selective_scan(*streams))

    monkeypatch.setattr(vim_blocks, "selective_scan", wrong)
    with pytest.raises(RuntimeError, match="Nothing is reported.*`Vim, ours` differ by"):
        run(bench_vim, tmp_path, "--batch_sizes", "1")


def test_bench_vim_restores_the_scan_and_checks_arguments(tmp_path):
    before = vim_blocks.selective_scan
    run(bench_vim, tmp_path, "--batch_sizes", "1", "--dtype", "bfloat16")
    assert vim_blocks.selective_scan is before
    with pytest.raises(ValueError, match="at least 1"):
        run(bench_vim, tmp_path, "--rounds", "0")


@pytest.mark.parametrize("divide_output", [True, False])
def test_the_transformers_stand_in_computes_the_same(divide_output):
    config = VimConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3, num_labels=5, divide_output=divide_output
    )
    model = VimForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(with_transformers_mixer(model)(pixels).logits, model(pixels).logits)


def test_bench_rmeeto_writes_table_and_json(tmp_path, capsys):
    results = run(bench_rmeeto, tmp_path, "--batch_sizes", "2", "--r", "0", "3")
    assert json.loads((tmp_path / "bench_rmeeto.json").read_text()) == results
    assert (tmp_path / "bench_rmeeto.md").read_text().strip() in capsys.readouterr().out
    names = {r: [row["merging"] for row in results["models"] if row["r"] == r] for r in (0, 3)}
    assert names[0] == [rmeeto_measures.OFF, rmeeto_measures.OURS]
    assert len(names[3]) == 5
    assert set(results["break_even_r"]) == {"2"}


def test_bench_rmeeto_refuses_a_wrong_merge(tmp_path, monkeypatch):
    from hf_effml.vim import token_reduction

    right = token_reduction.TokenPlan.merge

    def wrong(self, x, size=None, reduce="mean"):
        merged, total = right(self, x, size, reduce)
        return merged.flip(1), total

    monkeypatch.setattr(token_reduction.TokenPlan, "merge", wrong)
    with pytest.raises(RuntimeError, match="`as the official code` and `ours` differ by"):
        run(bench_rmeeto, tmp_path, "--r", "3")
    assert not list(tmp_path.iterdir())


def test_free_removal_has_the_lengths_of_merging():
    config = VimConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4, num_labels=5)
    variants = rmeeto_measures._variants(VimForImageClassification(config).eval(), r=3)
    pixels = torch.randn(1, 3, 32, 32)
    tokens = {name: model.vim(pixels).last_hidden_state.shape[1] for name, model in variants.items()}
    off = tokens.pop(rmeeto_measures.OFF)
    assert set(tokens.values()) == {off - 3}


@pytest.mark.parametrize(
    ("faster", "expected"), [({1: 0.9, 3: 1.1, 5: 1.2}, 3), ({1: 1.1, 3: 0.9, 5: 1.2}, 5), ({1: 1.1, 3: 0.9}, None)]
)
def test_break_even(faster, expected):
    rows = [{"batch": 1, "merging": rmeeto_measures.OURS, "r": r, "faster_than_off": f} for r, f in faster.items()]
    assert rmeeto_measures._break_even(rows, 1) == expected


def test_bench_dyvm_writes_table_and_json(tmp_path, capsys):
    results = run(bench_dyvm, tmp_path, "--batch_sizes", "1", "3")
    assert json.loads((tmp_path / "bench_dyvm.json").read_text()) == results
    assert (tmp_path / "bench_dyvm.md").read_text().strip() in capsys.readouterr().out
    rows = results["models"]
    assert len(rows) == 4 * 2 * 3 and len(results["choosing"]) == 3 * 2
    assert {row["tokens_kept"] for row in rows if row["asked"] == "0.7 / 0.8"} == {"all", "11 7 5"}
    for row in rows:
        selects_scans = row["model"] == dyvm_measures.SELECT and not row["asked"].endswith("/ 1")
        # The gates of the first of four blocks are the same for all images.
        assert abs(row["scans_run"] - 0.8) < 0.15 if selects_scans else row["scans_run"] == 1
        assert row["ms"] > 0


@pytest.mark.parametrize("wrong_mode", ["select", "mask"])
def test_bench_dyvm_refuses_modes_that_differ(tmp_path, monkeypatch, wrong_mode):
    right = dyvm_measures._bench_model

    def wrong(args, vim, model, *others):
        def shifted(module, inputs, output):
            if module.config.inference_mode == wrong_mode and module.vim.pruning:
                output.logits = output.logits + 1.0

        model.register_forward_hook(shifted)
        return right(args, vim, model, *others)

    monkeypatch.setattr(dyvm_measures, "_bench_model", wrong)
    with pytest.raises(RuntimeError, match="`DyVM, select` and `DyVM, mask` differ by"):
        run(bench_dyvm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_images_of_the_bench_have_the_spectrum_of_photographs():
    images = natural_images(8, 64, seed=0)
    assert images.shape == (8, 3, 64, 64) and images.std() == pytest.approx(1)
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))[0]
    # Amplitude 1/f is power 1/f^2.
    slope = (power[16:24].mean() / power[2:3].mean()).log2() / (torch.tensor(20 / 2)).log2()
    assert slope == pytest.approx(-2, abs=0.4)
    assert torch.corrcoef(images.transpose(0, 1).flatten(1))[0, 1] > 0.7


def test_agreement_looks_into_nested_outputs_and_names_the_tensor():
    good = [torch.ones(3), (torch.full((2, 2), 100.0),)]
    check_agreement({"a": good, "b": [torch.ones(3), (torch.full((2, 2), 100.001),)]}, tolerance=1e-4)
    with pytest.raises(RuntimeError, match=r"tensor 1 of the outputs of `a` and `b` differ by 1.0e-02"):
        check_agreement({"a": good, "b": [torch.ones(3), (torch.full((2, 2), 101.0),)]}, tolerance=1e-4)
    with pytest.raises(RuntimeError, match=r"are \(3,\) and \(4,\)"):
        check_agreement({"a": torch.ones(3), "b": torch.ones(4)}, tolerance=1e-4)
    with pytest.raises(RuntimeError, match="1 and 2 tensors"):
        check_agreement({"a": torch.ones(3), "b": [torch.ones(3)] * 2}, tolerance=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_agreement_refuses_what_is_not_finite(value):
    bad = torch.tensor([1.0, value])
    with pytest.raises(RuntimeError, match="Nothing is reported"):
        check_agreement({"a": bad, "b": bad.clone()}, tolerance=1e-4)


def test_compare_takes_turns_and_restores_threads(monkeypatch):
    monkeypatch.setattr(benchmark, "_SAMPLE_SECONDS", 0.0)
    order, before = [], torch.get_num_threads()

    def note(name):
        order.append((name, torch.get_num_threads()))
        return torch.ones(1)

    compare({"a": partial(note, "a"), "b": partial(note, "b")}, [["a", "b"]], rounds=3, threads=before + 1)
    assert [name for name, _ in order[-6:]] == ["a", "b"] * 3
    assert {threads for _, threads in order} == {before + 1}
    assert torch.get_num_threads() == before


def test_timing_summaries():
    slow, fast = Timing([4.0, 8.0, 6.0], [1.0, 1.0, 1.0]), Timing([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    assert (slow.median, slow.spread, fast.spread) == (6.0, 2.0, 0.0)
    assert (slow.speedup(fast), fast.speedup(slow)) == (3.0, pytest.approx(1 / 3))
    assert Timing([1.0], [1.0]).spread == 0.0


def test_peak_memory_counts_what_is_held_at_once():
    size = 2**18

    def chain():
        first = torch.ones(size)
        second = first + 1
        del first
        return second + 1

    assert peak_memory(chain) == pytest.approx(8 * size, rel=0.01)
    layer, x = nn.Linear(64, 64), torch.randn(8, 64)
    assert peak_memory(lambda: layer(layer(x)).sum().backward()) > peak_memory(lambda: layer(x))


def test_description_of_a_run():
    record = describe_run(seed=3, rounds=5)
    assert (record["seed"], record["rounds"], record["threads"]) == (3, 5, 1)
    assert f"torch {torch.__version__.partition('+')[0]}" in one_line(record)


def test_bench_token_router_writes_table_and_json(tmp_path, capsys):
    options = ["--batch_sizes", "2", "--sparsities", "0.4", "--decode_steps", "2"]
    results = run(bench_token_router, tmp_path, *options)
    assert json.loads((tmp_path / "bench_token_router.json").read_text()) == results
    assert (tmp_path / "bench_token_router.md").read_text().strip() in capsys.readouterr().out
    rows = {row["model"]: row for row in results["prompts"]}
    learned = set(benchmarks.LEARNED.values())
    assert set(rows) >= {benchmarks.PLAIN, benchmarks.ZERO, benchmarks.GATE, *learned}
    for name in learned:
        # Six of eight blocks keep 23 of 48 tokens each.
        assert rows[name]["kv"] == pytest.approx((2 * 48 + 6 * 23) / (8 * 48))
    assert rows[benchmarks.KEEP]["kv"] == 1 and rows[benchmarks.SHORTGPT]["kv"] == 0.625
    assert all(row["ms"] > 0 for row in [*results["prompts"], *results["decoding"]])
    assert {row["batch"] for row in results["choosing"]} == {2}


def test_bench_token_router_refuses_wrong_skipping(tmp_path, monkeypatch):
    right = token_skip_layer._put

    def wrong(hidden, rows, values):
        return right(hidden, rows, values + 1)

    monkeypatch.setattr(token_skip_layer, "_put", wrong)
    with pytest.raises(RuntimeError, match="Nothing is reported.*`one-pass router` and `computed, then multiplied`"):
        run(bench_token_router, tmp_path, "--sparsities", "0.4")
    assert not list(tmp_path.iterdir())


def test_skipping_for_free_takes_as_many_tokens():
    args = bench_token_router.BenchArguments(tokens=40, hidden_size=64, num_hidden_layers=8)
    model = bench_token_router.make_model(args)
    prompt = torch.arange(40).unsqueeze(0)
    config = benchmarks._config(model, 0.0)
    with torch.inference_mode():
        free = benchmarks._for_free(model, prompt, config)
        torch.testing.assert_close(free, model(prompt).logits[:, -1:], rtol=1e-4, atol=1e-4)
