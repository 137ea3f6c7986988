"""Texts are read from every kind of file, split by their names, and what is no text is named by file and line."""

import json

import pytest

from helpers import require_package
from hf_effml.utils.sources import text_splits
from hf_effml.utils.text_data import load_multiple_choice, load_text


def lines(*texts, field="text"):
    return "".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts)


def test_json_lines(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(text_splits.logger, "warning", said.append)
    path = tmp_path / "texts.jsonl"
    path.write_text(lines("a", "b\u2028b", "c", None, "d", "e", ""), encoding="utf-8-sig")
    data = load_text(str(path))
    assert (data.train, data.test) == (["a", "b\u2028b", "c", "e"], ["d"]) and data.hub_id is None
    assert said == [f"`{path}` has no split to test on: every 5th of its texts is held out, always the same."]
    (tmp_path / "list.json").write_text(json.dumps([{"story": text} for text in "abcde"]))
    assert load_text(str(tmp_path / "list.json"), column="story").test == ["e"]
    (tmp_path / "lines.json").write_text(lines(*"abcde"))
    assert load_text(str(tmp_path / "lines.json")).test == ["e"]


def test_folders(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines("a", "b"))
    (tmp_path / "val.jsonl").write_text(lines("c"))
    (tmp_path / "config.json").write_text("{}")
    assert load_text(str(tmp_path)).train == ["a", "b"] and load_text(str(tmp_path)).test == ["c"]
    (tmp_path / "more" / "train").mkdir(parents=True)
    (tmp_path / "more" / "test").mkdir()
    (tmp_path / "more" / "train" / "a test of time.txt").write_text("t")
    (tmp_path / "more" / "test" / "b.txt").write_text("e")
    assert load_text(str(tmp_path / "more")).train == ["t"] and load_text(str(tmp_path / "more")).test == ["e"]
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "train.txt").write_text("t")
    (tmp_path / "twice" / "test.txt").symlink_to(tmp_path / "twice" / "train.txt")
    with pytest.raises(ValueError, match="is in the splits `train` and `test`"):
        load_text(str(tmp_path / "twice"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", lines("a") + "{'text': 1}\n", r"a.jsonl`, line 2, is no JSON \(Expecting property name"),
        ("a.jsonl", lines("a") + '["b"]\n', r"line 2, must be an object with a field `text`; it has \[\"b\"\]"),
        ("a.jsonl", lines(*"abcde", field="story"), "line 1, must be .* `text`; it has the fields `story`, `other`"),
        ("a.jsonl", lines("a", 7), "line 2, must be a text; it is of type int"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1, holds half a character"),
        ("a.jsonl", "[" * 100_000, "line 1, is no JSON"),
        ("a.json", '[{"text": "a"},\n {"text": }]', "a.json`, line 2, is no JSON"),
        ("a.jsonl", "", "must have texts to train and to test on; it has 0, 0"),
        ("a.txt", "", "it has 0, 0. Texts without a test split must be five or more, or one of several lines"),
        ("a.txt", b"abc\xff", "a.txt` is no UTF-8 text: byte 3 is 0xff"),
        ("a.parquet", b"PAR1", "a.parquet` cannot be read as a table: .* Replace it"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    require_package("datasets")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / name))


def test_tables_without_texts(tmp_path):
    datasets = require_package("datasets")
    datasets.Dataset.from_dict({"text": ["a", None, "b", "c", "d", "e"]}).to_parquet(tmp_path / "gaps.parquet")
    assert load_text(str(tmp_path / "gaps.parquet")).train == ["a", "b", "c", "e"]
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="numbers.parquet`, row 0, must be a text; it is of type int"):
        load_text(str(tmp_path / "numbers.parquet"))


def test_questions_without_an_answer(tmp_path):
    datasets = require_package("datasets")
    good = {"question": "1 + 1?", "choices": ["1", "2"], "label": 1}
    for number, wrong in enumerate(({"label": -1}, {"label": 2}, {"choices": None}, {"question": None})):
        rows = datasets.Dataset.from_list([good, good | wrong])
        rows.to_parquet(tmp_path / f"{number}.parquet")
        assert len(load_multiple_choice(str(tmp_path / f"{number}.parquet"), limit=1)) == 1
        with pytest.raises(ValueError, match=r"parquet`, row 1, is no question with choices and the number of the"):
            load_multiple_choice(str(tmp_path / f"{number}.parquet"))


def test_files_that_lie_beside_texts(tmp_path):
    for name in ("LICENSE.txt", "requirements.txt", "notes.txt"):
        (tmp_path / name).write_text("a\n" * 20)
    (tmp_path / "train.jsonl").write_text(lines(*"abcde"))
    assert load_text(str(tmp_path)).test == ["e"]
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "train.jsonl").rename(tmp_path / "tales.jsonl")
    (tmp_path / "config.json").write_text("{}")
    assert load_text(str(tmp_path)).test == ["e"]


def test_the_card_says_which_texts_are_for_testing(tmp_path, monkeypatch):
    datasets = require_package("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, parts = tmp_path / "tales", ("first", "second")
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(lines(name))
    files = "- config_name: {}\n  data_files: [{{split: train, path: a.jsonl}}, {{split: test, path: b.jsonl}}]\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{files.format('default')}---\n")
    data = load_text(str(folder))
    assert (data.train, data.test, data.hub_id) == (["a"], ["b"], None)
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(map(files.format, parts))}---\n")
    with pytest.raises(ValueError, match="pick one among .*'first', 'second'.* For example, `.*tales:first`"):
        load_text(str(folder))
    data = load_text(f"{folder}:second")
    assert (data.train, data.test, data.hub_id, data.name) == (["a"], ["b"], None, "tales:second")
