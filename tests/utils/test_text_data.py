"""Texts and questions come out of every source as documented, and windows hold what texts say."""

import pytest
import torch

from helpers import require_package, tiny_tokenizer
from hf_effml.utils import text_data
from hf_effml.utils.text_data import MultipleChoiceItem, load_multiple_choice, load_text, make_windows, tokenize


START = 257


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows as a parquet file into a folder that `HF_EFFML_DATA` names."""
    datasets = require_package("datasets")
    monkeypatch.setenv("HF_EFFML_DATA", str(tmp_path))

    def write(name, rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / name))
        return name

    return write


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: data sets by id and subset, each with its splits as lists of rows."""
    datasets = require_package("datasets")
    stored = {}

    def load_dataset(name, subset=None):
        splits = stored[name, subset]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stored


def rows_of(*texts):
    return [{"text": text} for text in texts]


def test_pydoc_is_always_split_alike():
    first, second = load_text("pydoc"), load_text("pydoc")
    assert first == second and first.name == "pydoc" and first.hub_id is None
    assert not set(first.train) & set(first.test)
    assert len(first.train) > 50 and len(first.test) == (len(first.train) + len(first.test)) // 5


def test_a_text_file_is_one_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number}\n" for number in range(100)))
    data = load_text(str(path))
    assert data.name == f"{tmp_path.name}/book" and data.hub_id is None
    assert len(data.train) == len(data.test) == 1
    assert data.train[0] + data.test[0] == path.read_text() and data.test[0].startswith("line 8")
    path.write_text("no end of line")
    with pytest.raises(ValueError, match="must have texts to train and to test on; it has 1, 0"):
        load_text(str(path))


def test_tables(write):
    name = write("one.parquet", rows_of(*"abcdefghij", " \n"))
    assert load_text(name).train == [*"abcdfghi"] and load_text(name).test == ["e", "j"]
    write("both/train.parquet", rows_of("a", "b"))
    write("both/validation.parquet", rows_of("c"))
    data = load_text("both")
    assert (data.name, data.train, data.test, data.hub_id) == ("both", ["a", "b"], ["c"], None)
    other = write("other.parquet", [{"story": letter} for letter in "abcde"])
    assert load_text(other, column="story").test == ["e"]
    with pytest.raises(ValueError, match=r"`other.parquet` must have a column `text`; it has `story`"):
        load_text(other)


def test_a_folder_of_text_files_has_one_text_per_file(tmp_path):
    require_package("datasets")
    (tmp_path / "train.txt").write_text("one\n\ntwo\n")
    (tmp_path / "validation.txt").write_text("three\nfour\n")
    data = load_text(str(tmp_path))
    assert [text.strip() for text in data.train] == ["one\n\ntwo"] and [len(data.test)] == [1]


def test_sets_on_the_hub(hub):
    hub["me/texts", None] = {"train": rows_of("a"), "test": rows_of("b"), "validation": rows_of("c")}
    hub["me/texts", "big"] = {"train": rows_of(*"abcde")}
    hub["me/texts", "odd"] = {"dev": rows_of("a")}
    data = load_text("me/texts")
    assert (data.name, data.hub_id, data.train, data.test) == ("me/texts", "me/texts", ["a"], ["c"])
    assert (load_text("me/texts:big").hub_id, load_text("me/texts:big").test) == ("me/texts", ["e"])
    with pytest.raises(ValueError, match="must have a split `train` or `validation` or `test`; it has `dev`"):
        load_text("me/texts:odd")


def test_what_is_not_there(monkeypatch, tmp_path):
    datasets = require_package("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("no way out")))
    with pytest.raises(FileNotFoundError, match=r"No data `me/gone`: .* \(no way out\)"):
        load_text("me/gone")
    with pytest.raises(FileNotFoundError, match=r"There is no file `gone.parquet`"):
        load_multiple_choice("gone.parquet")
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"must be a .txt or a .parquet file"):
        load_text(str(tmp_path / "a.csv"))


def test_windows_are_pieces_of_one_text_and_begin_like_texts():
    tokenizer = tiny_tokenizer(bos_token="<s>")
    windows = make_windows(["abcdefg", "hi", "jklm"], tokenizer, 4)
    assert windows.dtype == torch.long and windows.tolist()[0][0] == START
    assert [tokenizer.decode(row) for row in windows] == ["<s>abc", "<s>def", "<s>jkl"]
    assert torch.equal(make_windows(["abcdefg", "hi", "jklm"], tokenizer, 4, limit=2), windows[:2])
    without = tiny_tokenizer()
    assert [without.decode(row) for row in make_windows(["abcdefg", "hi"], without, 3)] == ["abc", "def"]
    assert make_windows(["abc"], tokenizer, 4).shape == (1, 4)


def test_windows_with_single_line_breaks():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(make_windows(["a\n\nb"], tokenizer, 3, single_line_breaks=True)[0]) == "a\nb"
    assert tokenizer.decode(make_windows(["a\n\nb"], tokenizer, 4)[0]) == "a\n\nb"


@pytest.mark.parametrize("length, message", [(1, "at least 2; got 1"), (6, "longest text has: 5 tokens; got 6")])
def test_windows_of_impossible_length(length, message):
    with pytest.raises(ValueError, match=f"`length` must .*{message}"):
        make_windows(["abcd", "ab"], tiny_tokenizer(bos_token="<s>"), length)


HUB_ROWS = {
    "hellaswag": (
        ("Rowan/hellaswag", None),
        "validation",
        {
            "activity_label": "Home",
            "ctx_a": "How to sweep [title] Take a broom. [step] Now",
            "ctx_b": "you",
            "endings": ["sweep [substeps] it.", "sleep."],
            "label": "1",
        },
        MultipleChoiceItem("Home: How to sweep. Take a broom. Now You", [" sweep it.", " sleep."], 1),
    ),
    "ARC-Easy": (
        ("allenai/ai2_arc", "ARC-Easy"),
        "test",
        {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        MultipleChoiceItem("Question: Why?\nAnswer:", [" x", " y", " z"], 2),
    ),
    "arc_challenge": (
        ("allenai/ai2_arc", "ARC-Challenge"),
        "test",
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        MultipleChoiceItem("Question: Why?\nAnswer:", [" x", " y"], 0),
    ),
    "winogrande": (
        ("allenai/winogrande", "winogrande_xl"),
        "validation",
        {"sentence": "Ann saw Bea because _ was late.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        MultipleChoiceItem(["Ann saw Bea because Ann", "Ann saw Bea because Bea"], [" was late."] * 2, 1),
    ),
    "piqa": (
        ("baber/piqa", None),
        "validation",
        {"goal": "Open a jar", "sol1": "Turn it.", "sol2": "Burn it.", "label": 0},
        MultipleChoiceItem("Question: Open a jar\nAnswer:", [" Turn it.", " Burn it."], 0),
    ),
    "mmlu": (
        ("cais/mmlu", "all"),
        "test",
        {"question": "One and one?", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
        MultipleChoiceItem("One and one?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", [" A", " B", " C", " D"], 1),
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_questions_of_the_hub(name, hub):
    where, split, row, expected = HUB_ROWS[name]
    hub[where] = {split: [row, row, row]}
    assert load_multiple_choice(name) == [expected] * 3
    assert load_multiple_choice(name, limit=2) == [expected] * 2


def test_questions_of_files(write):
    rows = [{"id": "1", "question": "Is _ it?", "choices": ["a", "b"], "label": 1}]
    context = {
        "winogrande_part.parquet": ["Is a", "Is b"],
        "hellaswag.parquet": "Is _ it?",
        "openbookqa.parquet": "Is _ it?",
        "boolq.parquet": "Is _ it?\nAnswer:",
        "piqa.parquet": "Question: Is _ it?\nAnswer:",
        "mine.parquet": "Question: Is _ it?\nAnswer:",
        "mmlu.parquet": "Is _ it?\nA. a\nB. b\nAnswer:",
    }
    for name, expected in context.items():
        (item,) = load_multiple_choice(write(name, rows))
        assert item.context == expected and item.label == 1, name
        assert len(item.contexts) == len(item.choices) == 2
    with pytest.raises(ValueError, match=r"must have text after its blank `_`; got `Who is _`"):
        load_multiple_choice(write("winogrande.parquet", [{**rows[0], "question": "Who is _"}]))
    with pytest.raises(ValueError, match=r"must have a column `question`, `choices`, `label`; it has `text`"):
        load_multiple_choice(write("text.parquet", rows_of("a")))


def test_unknown_questions():
    with pytest.raises(ValueError, match=r"there are hellaswag, .* and parquet files .* Did you mean `winogrande`\?"):
        load_multiple_choice("winogrand")
    assert set(HUB_ROWS) == {*text_data._TASKS, "ARC-Easy"} - {"arc_easy"}


def test_shared_texts_and_questions(shared_data, monkeypatch):
    require_package("datasets")
    monkeypatch.setenv("HF_EFFML_DATA", str(shared_data))
    data = load_text("text/tinystories")
    assert (len(data.train), len(data.test)) == (733, 126)
    ids = next(tokenize(data.test, tiny_tokenizer(bos_token="<s>"), single_line_breaks=True))
    assert len(ids) == 1 + len(data.test[0].replace("\n\n", "\n").encode())
    for path in sorted((shared_data / "mcq").glob("*.parquet")):
        items = load_multiple_choice(f"mcq/{path.name}", limit=100)
        assert len(items) == 100
        for item in items:
            assert 0 <= item.label < len(item.choices) == len(item.contexts)
            assert all(choice.startswith(" ") and choice.strip() for choice in item.choices)


def test_packed_windows_go_across_texts():
    tokenizer = tiny_tokenizer()
    texts = ["one two three", "four", "five six"]
    joined = [token for ids in tokenize(texts, tokenizer) for token in ids]
    windows = make_windows(texts, tokenizer, 4, packed=True)
    assert windows.flatten().tolist() == joined[: len(joined) // 4 * 4]
    assert make_windows(texts, tokenizer, 4, packed=True, limit=1).tolist() == [joined[:4]]
    with pytest.raises(ValueError, match=f"{len(joined)} tokens; got 999"):
        make_windows(texts, tokenizer, 999, packed=True)
