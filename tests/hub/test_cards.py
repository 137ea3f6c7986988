"""Model cards: what is on them, in which order, and what must not be."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData

from helpers import require_package, run_python, tiny_language_model, tiny_tokenizer, tiny_vim_config
from hf_effml import TokenRouterConfig, TokenRouterModel, VimForImageClassification, vim_image_processor
from hf_effml.hub import CardResult, add_results, render_card, write_card
from hf_effml.hub.cards import set_repo_id
from hf_effml.hub.model_folder import is_hub_id
from hf_effml.hub.privacy import find_private, scrub, scrub_command
from hf_effml.hub.training_log import draw_log
from hf_effml.methods import METHODS


TOKEN = "hf_" + "A" * 34
RESULTS = [
    CardResult("Accuracy", 0.9345678, starting_point=0.95, metric="accuracy"),
    CardResult("Multiply-adds", 1234567, starting_point=2345678),
    CardResult("Latency (ms | image, 2 CPU cores)", 12.3456),
]


@pytest.fixture
def folder(tmp_path):
    """A saved image classifier, as far as a card is concerned."""
    folder = tmp_path / "my-vim"
    folder.mkdir()
    config = {
        "architectures": ["RMeeToVimForImageClassification"],
        "auto_map": {"AutoModelForImageClassification": "modeling_rmeeto.RMeeToVimForImageClassification"},
        "id2label": {str(label): str(label) for label in range(10)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def full_card(folder):
    return render_card(
        folder,
        "alice/my-vim",
        method="rmeeto",
        results=RESULTS,
        evaluated_on="the test split of digits",
        command=["/home/alice/bin/hf-effml", "train", "rmeeto", "--hub_token", TOKEN, "--data=/home/alice/digits"],
        arguments={"learning_rate": 1e-3, "data": "/home/alice/digits", "hub_token": TOKEN, "betas": [0.9, 0.95]},
        base_model="alice/vim-digits",
        datasets=["alice/digits"],
        limits=["It was trained on tiny pictures."],
        data={"name": "/home/alice/digits", "splits": {"training": 1437}},
        license="mit",
        tags=["tiny"],
    )


def test_order_of_sections(folder):
    headings = re.findall(r"^#+ (.*)$", full_card(folder).text, flags=re.M)
    assert headings == ["my-vim", "Use", "The model", "Results", "How it was made", "Limits", "Versions", "Citation"]


def test_metadata(folder):
    full_card(folder).save(folder / "README.md")
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert data.base_model == "alice/vim-digits"
    assert data.datasets == ["alice/digits"]
    assert data.license == "mit"
    assert {"rmeeto", "token-merging", "tiny", "arxiv:2412.12496", "arxiv:2401.09417"} <= set(data.tags)
    assert len(data.eval_results) == 1 and data.model_name == "my-vim"
    result = data.eval_results[0]
    assert [result.metric_type, result.metric_value] == ["accuracy", 0.9345678]
    assert [result.dataset_name, result.dataset_type] == ["the test split of digits", "the-test-split-of-digits"]


def test_content(folder):
    text = full_card(folder).text
    assert 'model_id = "alice/my-vim"\n' in text and "trust_remote_code=True" in text
    assert "|  | This model | Its starting point |" in text
    assert "| Accuracy | 0.9346 | 0.95 |" in text
    assert "| Multiply-adds | 1,234,567 | 2,345,678 |" in text
    assert r"| Latency (ms \| image, 2 CPU cores) | 12.35 | - |" in text
    assert "hf-effml train rmeeto --data=digits\n" in text
    assert "| Name | `digits` |\n| Training examples | 1,437 |" in text and "| Classes | `0`, `1`," in text
    assert "| `learning_rate` | `0.001` |" in text and "| `data` | `digits` |" in text
    assert "10 classes" in text and "- It was trained on tiny pictures." in text
    assert re.search(r"hf-effml [\d.]+, transformers 5", text)
    assert text.count("@misc{") == 2
    assert find_private(text) == [] and "alice/bin" not in text


def test_only_what_is_known(folder):
    text = render_card(folder).text
    assert "## Results" not in text and "## Citation" not in text and "None" not in text
    assert 'model_id = "my-vim"\n' in text
    one_column = render_card(folder, results=[CardResult("Tokens", 197)])
    assert "|  | This model |\n| --- | --- |\n| Tokens | 197 |\n" in one_column.text
    assert "model-index" not in one_column.content
    for local in ("/home/alice/gone", "../gone"):
        card = render_card(folder, base_model=local)
        assert card.data.base_model is None and card.data.license is None
        assert "Starting point: `gone`, a folder of whoever made it." in card.text and find_private(card.text) == []


@pytest.mark.parametrize("key", [method.key for method in METHODS])
def test_no_placeholder_for_any_method(folder, key):
    for card in (render_card(folder, method=key), full_card(folder)):
        assert not re.search(r"more information needed|\[\]|\(\)|todo|unknown|\n{4,}", card.text, flags=re.I)
        assert "{{" not in card.text and "{%" not in card.text


def test_snippet_without_pictures(folder):
    config = {"architectures": ["VimForImageClassification"], "num_channels": 1}
    text = render_card(folder, config=config).text
    assert "AutoModelForImageClassification.from_pretrained(model_id)" in text
    assert "pipeline(" not in text and "trust_remote_code" not in text


def test_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert render_card(folder).data.library_name == "peft"


def test_added_results_keep_what_was_written(folder):
    write_card(folder, "alice/my-vim", results=RESULTS, evaluated_on="the test split of digits", limits=["Small."])
    card = ModelCard.load(folder / "README.md")
    card.text = card.text.replace("<!-- end of limits", "- My own limit.\n<!-- end of limits")
    card.text = card.text.replace("## Limits", "My own words | here.\n\n## Limits", 1)
    card.data.language = "en"
    card.save(folder / "README.md")
    before = card.text
    new = [CardResult("Accuracy", 0.96, starting_point=0.95, metric="accuracy"), CardResult("Memory (MB)", 120)]
    add_results(folder, new, "the test split of digits")
    after = ModelCard.load(folder / "README.md")
    assert "| Accuracy | 0.96 | 0.95 |" in after.text and "| Memory (MB) | 120 | - |" in after.text
    ours = ("0.9346", "0.96", "Memory", "hf-effml: results")
    assert [line for line in before.split("\n") if not any(word in line for word in ours)] == [
        line for line in after.text.split("\n") if not any(word in line for word in ours)
    ]
    assert [result.metric_value for result in after.data.eval_results] == [0.96]
    assert after.data.language == "en"

    add_results(folder, [CardResult("Accuracy", 0.5, metric="accuracy")], "photographs")
    again = ModelCard.load(folder / "README.md")
    assert "| Accuracy | 0.96 | 0.95 |" in again.text
    assert "Measured on photographs.\n\n|  | This model |\n| --- | --- |\n| Accuracy | 0.5 |" in again.text
    assert [result.metric_value for result in again.data.eval_results] == [0.96, 0.5]
    kept = json.loads((folder / "results.json").read_text())["results"]
    assert [(row["name"], row["evaluated_on"]) for row in kept if row["metric"]] == [
        ("Accuracy", "the test split of digits"),
        ("Accuracy", "photographs"),
    ]


def test_a_renewed_card_keeps_what_was_written(folder, caplog):
    write_card(folder, "alice/my-vim", results=RESULTS, evaluated_on="digits", license="mit")
    path = folder / "README.md"
    text = path.read_text().replace("license: mit", "license: cc-by-4.0\nlanguage: en")
    text = text.replace("<!-- end of summary -->", "I trained it on a train.\n<!-- end of summary -->")
    text = text.replace("<!-- hf-effml: limits", "## My thanks\n\nTo my cat.\n\n<!-- hf-effml: limits")
    text = text.replace("| Multiply-adds |", "| Multiply-adds, by hand |")
    path.write_text(text + "\nThe end.\n")
    write_card(folder, results=[CardResult("Accuracy", 0.25, metric="accuracy")], evaluated_on="digits", tags=["new"])
    card = ModelCard.load(path)
    order = ["train.", "## Use", "| Accuracy | 0.25 |", "by hand", "## My thanks", "## Limits", "\nThe end.\n"]
    assert [card.text.index(words) for words in order] == sorted(card.text.index(words) for words in order)
    assert card.text.count("## Use") == card.text.count("## Limits") == 1
    assert [card.data.license, card.data.language] == ["cc-by-4.0", "en"] and "new" in card.data.tags
    assert [result.metric_value for result in card.data.eval_results] == [0.25]
    again = write_card(folder, results=[], license="mit").read_text()
    assert "0.25" not in again and "by hand" in again and "license: mit" in again and "model-index" not in again
    assert not (folder / "results.json").exists()


def test_a_renewed_card_keeps_how_a_model_was_made(folder):
    full_card(folder).save(folder / "README.md")
    text = write_card(folder, "alice/my-vim", method="rmeeto").read_text()
    assert "| `learning_rate` | `0.001` |" in text and "| Training examples | 1,437 |" in text
    assert "| `learning_rate` |" not in write_card(folder, arguments={"seed": 1}).read_text()


def test_cards_of_others(folder):
    write_card(folder)
    add_results(folder, RESULTS, "digits")
    text = (folder / "README.md").read_text()
    assert text.index("## Results") < text.index("Measured on digits.") < text.index("## How it was made")
    ModelCard("---\nlicense: mit\n---\n\n# Mine\n\nWords.\n").save(folder / "README.md")
    add_results(folder, RESULTS, "digits")
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith("\n# Mine\n\nWords.\n\n<!-- hf-effml: results") and card.data.license == "mit"
    assert card.text.count("## Results") == 1 and "## Use" not in card.text
    (folder / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="write_card"):
        add_results(folder, RESULTS, "digits")
    (folder / "results.json").write_text('{"results": [{"wrong": 1}]}')
    write_card(folder, results=[])
    (folder / "results.json").write_text('{"results": [{"wrong": 1}]}')
    with pytest.raises(ValueError, match=r"results.json.*must hold a list `results`"):
        add_results(folder, RESULTS, "digits")


def test_repository_id_follows_a_push(folder):
    before = write_card(folder).read_text()
    set_repo_id(folder, "alice/elsewhere")
    after = (folder / "README.md").read_text()
    assert 'model_id = "alice/elsewhere"\n' in after and after.count("alice") == 1
    set_repo_id(folder, "my-vim")
    assert (folder / "README.md").read_text() == before


def test_names_of_folders_never_become_code(tmp_path):
    folder = tmp_path / 'a"; raise SystemExit("run"); "\n\n# Injected'
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["VimModel"]}))
    text = write_card(folder).read_text()
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    assignment = snippet.splitlines()[2]
    assert assignment.startswith("model_id = ")
    assert ast.literal_eval(assignment.removeprefix("model_id = ")) == 'a"; raise SystemExit("run"); " # Injected'
    assert "\n# Injected" not in text


def test_what_the_snippet_prints_and_how_training_went(tmp_path):
    VimForImageClassification(tiny_vim_config(num_labels=4)).save_pretrained(tmp_path / "vim")
    vim_image_processor(16).save_pretrained(tmp_path / "vim")
    history = [{"loss": 2.0 / (step + 1), "step": 10 * step} for step in range(30)]
    history.append({"train_runtime": 12.3, "step": 290})
    history.append({"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0, "step": 290})
    require_package("matplotlib")
    assert draw_log(history, tmp_path / "vim" / "training.png", "Course")
    text = write_card(tmp_path / "vim", method="vim", history=history).read_text()
    output = re.search(r"prints\n\n```\n(.*?)\n```", text, flags=re.S)[1]
    assert len(ast.literal_eval(output)) == 2 and "'label': 'LABEL_" in output
    assert "290 steps, 12 s since the last start." in text and "![Course of the training](training.png)" in text
    assert "| Step | Training loss | Evaluation loss | Accuracy |" in text and "| 290 | 0.06667 | 0.5 | 0.75 |" in text
    assert len(re.findall(r"^\| \d", text, flags=re.M)) == 10 and "runtime" not in text
    assert not draw_log([{"loss": 1.0, "step": 1}], tmp_path / "none.png", "One point")


def test_metadata_without_a_task_gets_no_index(folder):
    card = render_card(folder, config={}, results=RESULTS, evaluated_on="digits")
    assert card.data.pipeline_tag is None and card.data.eval_results is None
    assert isinstance(card.data, ModelCardData)


ROUTER = {
    "architectures": ["TokenRouterModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_token_router.TokenRouterModel"},
    "base_model_name_or_path": "alice/llama",
    "min_tokens": 64,
    "model_type": "token_router",
}
FULL = {
    "architectures": ["TokenRouterLlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_token_router_causal_lm.TokenRouterLlamaForCausalLM"},
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "model_type": "token_router_llama",
    "token_router": {"base_model_name_or_path": "alice/llama", "min_tokens": 0},
}


def test_card_of_a_router(tmp_path):
    results = [CardResult("Accuracy", 0.5, 0.6, "accuracy")]
    card = render_card(
        tmp_path, "alice/r", config=ROUTER, method="token-router", results=results, evaluated_on="arc_easy"
    )
    assert (card.data.pipeline_tag, card.data.base_model) == ("text-generation", "alice/llama")
    assert card.data.eval_results[0].task_type == "text-generation"
    assert {"token-router", "arxiv:2412.11494"} <= set(card.data.tags)
    assert "AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)" in card.text
    assert "AutoTokenizer.from_pretrained(model.config.base_model_name_or_path)" in card.text
    assert "Starting point: [`alice/llama`]" in card.text
    for limit in ("Routing is not causal", "less than 64 tokens run dense", "no other", "prompt length"):
        assert limit in card.text
    assert "picture" not in card.text and "{{" not in card.text


def test_card_of_a_full_checkpoint(tmp_path):
    text = render_card(tmp_path, config=FULL).text
    assert 'AutoTokenizer.from_pretrained(model.config.token_router["base_model_name_or_path"])' in text
    assert "classes" not in text and "run dense" not in text and "print(model.routing_report)" in text
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)" in render_card(tmp_path, config=FULL).text


def test_card_of_any_language_model(tmp_path):
    text = render_card(tmp_path, config={"architectures": ["LlamaForCausalLM"]}).text
    assert "AutoTokenizer.from_pretrained(model_id)\n" in text and "routing" not in text.lower()


@pytest.mark.parametrize("kind", ["router", "full"])
def test_snippets_of_language_models_run(kind, tmp_path):
    tiny_language_model(vocab_size=258).save_pretrained(tmp_path / "base")
    tiny_tokenizer(bos_token="<s>").save_pretrained(tmp_path / "base")
    model = tiny_language_model(vocab_size=258)
    config = TokenRouterConfig(target_sparsity=0.3, base_model_name_or_path="base")
    model = TokenRouterModel(model, config)
    if kind == "full":
        model = model.to_full_checkpoint()
        tiny_tokenizer(bos_token="<s>").save_pretrained(tmp_path / kind)
    model.save_pretrained(tmp_path / kind)
    text = write_card(tmp_path / kind, method="token-router").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    printed = run_python(snippet, cwd=tmp_path, without_package=True)
    assert "% skipped" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    "name, answer",
    [("alice/llama", True), ("gpt2", True), (None, False), ("/srv/llama", False), ("./x", False), ("a/b/c", False)],
)
def test_is_hub_id(name, answer, tmp_path, monkeypatch):
    assert is_hub_id(name) is answer
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_id("gpt2")


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/home/alice/photos", "photos"),
        ("/", "."),
        ("~/photos", "photos"),
        (r"C:\Users\alice\photos", "photos"),
        ("alice/photos", "alice/photos"),
        (f"key={TOKEN}", "key=<token>"),
        ({"hub_token": "x", "wandb_api_key": "x", "max_tokens": 3}, {"max_tokens": 3}),
        (["/a/b", {"c": "/d/e"}, 1.5, None, True], ["b", {"c": "e"}, 1.5, None, True]),
    ],
)
def test_scrub(value, shown):
    assert scrub(value) == shown


@pytest.mark.parametrize(
    "argv, shown",
    [
        (["python", "/srv/train.py", "--lr", "1e-3"], "python train.py --lr 1e-3"),
        (["a", "--hub-token", "secret", "--x", "1"], "a --x 1"),
        (["a", "--hub_token=secret", "b"], "a b"),
        (["a", "--push_to_hub", "--password", "--x=/y/z"], "a --push_to_hub --x=z"),
        (["a", "two words"], "a 'two words'"),
    ],
)
def test_scrub_command(argv, shown):
    assert scrub_command(argv) == shown


def test_find_private():
    text = f"hf_effml\nhttps://example.org/home/alice/x\n{TOKEN}\n'/Users/bob/x'\nnext to /home/\nfile:///root/x"
    assert [remark.split(" ")[1] for remark in find_private(text)] == ["3", "4", "6"]
    assert TOKEN not in str(find_private(text))
