import json

import numpy
import pytest
import torch

from hf_effml.hub import CardResult
from hf_effml.utils.report import Column, Report, markdown_table


def measured() -> Report:
    report = Report(
        "digits",
        {
            "accuracy": Column("accuracy", ".1%", change="difference", card="Accuracy", metric="accuracy"),
            "work": Column("M", ".2f", "x", 1e-6, change="share", card="Millions"),
            "kept": Column("kept", ".2f"),
        },
        title="Digits",
    )
    report.add("dense", accuracy=0.95, work=2_000_000, kept=None, hidden=[1])
    report.add("merged", accuracy=0.93, work=1_500_000, kept=(0.7, 0.49))
    return report


def test_tables():
    report = measured()
    report.notes.append("A note.")
    assert report.as_text() == (
        "Digits\n\n"
        "            accuracy             M       kept\n"
        "dense          95.0%         2.00x          -\n"
        "merged  93.0% (-2.0)  1.50x (-25%)  0.70 0.49\n\nA note."
    )
    assert report.as_markdown().splitlines()[2:5] == [
        "|  | accuracy | M | kept |",
        "| --- | --- | --- | --- |",
        "| dense | 95.0% | 2.00x | - |",
    ]
    assert markdown_table(["a", "b"], [[1234.5678, "x|y"], [0.123456, None]]).splitlines()[2:] == [
        r"| 1,235 | x\|y |",
        "| 0.1235 | - |",
    ]
    assert markdown_table(["a"], []) == ""


def test_seeds_are_shown_as_mean_and_deviation():
    column = Column("accuracy", ".1%")
    assert column.show([0.92, 0.94]) == "93.0 ± 1.4%"
    assert column.show([0.92]) == "92.0%"
    assert Column("steps").show([3, 5]) == "4 ± 1.414"


def test_undeclared_columns_are_all_shown():
    report = Report("bench")
    report.add("ours", peak_MB=1.23456, steps=40)
    report.add("full", of_full="1/3")
    assert report.as_text().splitlines() == [
        "      peak MB  steps  of full",
        "ours    1.235     40",
        "full                      1/3",
    ]


def test_files_hold_what_was_measured(tmp_path):
    report = measured()
    report.facts["data"] = "digits"
    part = report.add_part("others", title="Others")
    part.add("step", ms=1.5)
    part.notes.append("Of the part.")
    path = report.save(tmp_path / "new")
    assert path.read_text(encoding="utf-8") == report.as_markdown() + "\n"
    assert "## Others" in report.as_markdown() and "| step | 1.5 |" in report.as_markdown()
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["data"] == "digits" and content["notes"] == ["Of the part."]
    assert content["rows"][0] == {"name": "dense", "accuracy": 0.95, "work": 2_000_000, "kept": None, "hidden": [1]}
    assert content["others"] == [{"name": "step", "ms": 1.5}]


def test_rows_of_a_card():
    report = measured()
    assert report.card_results("merged", beside="dense") == [
        CardResult("Accuracy", 0.93, 0.95, "accuracy"),
        CardResult("Millions", 1.5, 2.0),
    ]
    assert report.card_results("dense") == [
        CardResult("Accuracy", 0.95, None, "accuracy"),
        CardResult("Millions", 2.0),
    ]


def test_what_is_not_plain_is_kept_and_shown(tmp_path):
    report = Report(
        "any", {"x": Column("x|y", ".1%", card="X"), "of.digits": Column("digits"), "m.all": Column("all")}
    )
    report.add("scalars", x=numpy.float32(0.5), of={"digits": torch.tensor(3)}, **{"m.all": numpy.bool_(True)})
    report.add("a|b\nc", x=[0.5, float("nan")], of=None, device=torch.device("cpu"))
    report.add("none", x=[], of=0.5)
    report.add_seed("seeds", x=numpy.float64(0.5))
    report.add_seed("seeds", x=torch.tensor(0.25, requires_grad=True))
    report.facts["at"] = tmp_path
    assert json.loads(json.dumps(report.as_dict()))["rows"] == [
        {"name": "scalars", "x": 0.5, "of": {"digits": 3}, "m.all": True},
        {"name": "a|b\nc", "x": [0.5, pytest.approx(float("nan"), nan_ok=True)], "of": None, "device": "cpu"},
        {"name": "none", "x": [], "of": 0.5},
        {"name": "seeds", "x": [0.5, 0.25]},
    ]
    lines = report.save(tmp_path).read_text().splitlines()
    assert lines[0] == r"|  | x\|y | digits | all |" and lines[2] == "| scalars | 50.0% | 3 | True |"
    assert lines[3].startswith(r"| a\|b c | [0.5, nan] |") and lines[5].startswith("| seeds | 37.5 ± 17.7% |")
    assert len(report.as_text().splitlines()) == 5
    assert [report.card_results(name)[0].value for name in ("none", "seeds")] == ["[]", 0.375]


def test_names_that_would_replace_others_are_refused():
    report = Report("any", facts={"data": "digits"})
    with pytest.raises(ValueError, match="`name` is the row's own name"):
        report.add("a", **{"name": "b"})
    report.add_part("steps")
    for name in ("steps", "rows", "notes", "data"):
        with pytest.raises(ValueError, match=f"`any` has `{name}` already"):
            report.add_part(name)
