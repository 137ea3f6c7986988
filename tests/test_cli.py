"""The command line: help without torch, all programs and recipes, wrong use in two lines, one object with --json."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import TrainingArguments

from hf_effml import __version__
from hf_effml.cli.commands import command_line_of, scripts_folder
from hf_effml.cli.main import main
from hf_effml.cli.parsing import UsageError, parse_arguments, run_script
from hf_effml.cli.recipes import read_recipes
from hf_effml.trainers.arguments import EffMLTrainingArguments


COMMAND = Path(sys.executable).parent / "hf-effml"
# Experiments are run by their path only.
PROGRAMS = sorted(path.stem for path in scripts_folder().glob("[!_]*.py") if not path.stem.startswith("experiment_"))
RECIPES = [(p.stem, name) for p in sorted(scripts_folder().glob("[!_]*.py")) for name in read_recipes(p)]


def _words(program: str) -> list[str]:
    """The command that runs a program: `train_rmeeto` is `train rmeeto`, `convert_vim` is `convert`."""
    return command_line_of(program).split()[1:]


# Nine lines that stand for a billion values.
_BILLION = "\n".join(
    ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 10))],
)


@dataclass
class Options:
    """What to do."""

    source: str = field(metadata={"help": "Where from.", "positional": True})
    mode: Literal["merge", "prune"] = field(default="merge", metadata={"help": "How."})
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "How many."})
    ratio: float | None = field(default=0.5, metadata={"help": "How much."})
    shuffle: bool = field(default=True, metadata={"help": "Whether to shuffle."})


@dataclass
class Arguments(TrainingArguments):
    """How to train."""

    output_dir: str | None = field(default="out", metadata={"help": "Folder to write."})


def _parse(*argv: str, types: tuple[type, ...] = (Options,)) -> tuple:
    return parse_arguments(*types, argv=list(argv), program="train_try.py", description="Tries things.")


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "settings.yaml").write_text(text)
        return ["--config", str(tmp_path / "settings.yaml")]

    return write


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["--version"], ["methods"], ["methods", "--help"], ["env", "--help"], ["train", "--help"]]
)
def test_help_does_not_import_torch(argv):
    code = (
        f"import sys; sys.argv = ['hf-effml', *{argv!r}]\n"
        "from hf_effml.cli.main import main\n"
        "try: code = main()\n"
        "except SystemExit as exit: code = exit.code\n"
        "assert not code and not {'torch', 'transformers'} & set(sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout


def test_the_console_script_is_installed():
    outcome = subprocess.run([COMMAND, "--help"], capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stdout.startswith("usage: hf-effml <command>")


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen([COMMAND, "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_overview_lists_what_exists(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for program in PROGRAMS:
        assert all(word in text for word in _words(program)), program
    assert "mmfl" not in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program_fits_a_screen(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as end:
        main([*_words(program), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith(f"usage: hf-effml {' '.join(_words(program))} ")
    assert len(text.splitlines()) <= 60, "more than a screen"
    assert not program.startswith("train_") or "--output_dir" in text


@pytest.mark.parametrize("command", ["train", "evaluate", "bench"])
def test_help_of_a_command_describes_its_programs(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for program in (program for program in PROGRAMS if program.startswith(command)):
        description = import_module(f"hf_effml.scripts.{program}").__doc__.splitlines()[0]
        assert description in " ".join(text.split())


def test_inherited_options_are_shown_on_demand(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            _parse(flag, types=(Options, Arguments))
        texts.append(capsys.readouterr().out)
    for text in texts:
        assert "--sizes" in text and "--output_dir" in text and "SOURCE" in text
    assert "--adam_beta1" not in texts[0] and "--adam_beta1" in texts[1]


def test_precedence(config):
    settings = config("source: a\nmode: prune\nratio: 1e-4\nsizes: [3, 4]\nshuffle: false\n")
    (options,) = _parse(*settings)
    assert options == Options("a", "prune", [3, 4], 1e-4, False)
    (options,) = _parse(*settings, "b", "--mode", "merge", "--sizes", "5", "--shuffle")
    assert options == Options("b", "merge", [5], 1e-4, True)


def test_null_mappings_and_reserved_names_in_a_configuration(config):
    settings = config("ratio: null\nlr_scheduler_kwargs: {num_cycles: 2}\ndebug: underflow_overflow\n")
    options, arguments = _parse("a", *settings, types=(Options, Arguments))
    assert options.ratio is None
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert [str(option.value) for option in arguments.debug] == ["underflow_overflow"]


def test_hyphens_and_negations():
    (options,) = _parse("a", "--no_shuffle")
    assert options.shuffle is False
    _, arguments = _parse("a", "--output-dir", "b", types=(Options, Arguments))
    assert arguments.output_dir == "b"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "`SOURCE` must be given."),
        (["a", "--moed", "merge"], "`--moed` is no option; did you mean `--mode`?"),
        (["a", "--mod", "merge"], "`--mod` is no option; did you mean `--mode`?"),
        (["a", "b"], "`b` is one argument too many."),
        (["a", "--mode", "melt"], "invalid choice: 'melt'"),
        (["a", "--sizes", "few"], "invalid int value: 'few'"),
        (["a", "--ratio"], "expected one argument"),
        (["a", "--recipe", "smoke"], "`smoke` is no recipe; there are: none."),
    ],
)
def test_wrong_arguments(argv, message):
    with pytest.raises(UsageError) as error:
        _parse(*argv)
    assert message in str(error.value)
    assert str(error.value).endswith("\n`hf-effml train try --help` shows how to use it.")


@pytest.mark.parametrize(
    "argv, same",
    [(["help"], ["--help"]), (["help", "train"], ["train", "--help"]), (["help", "methods"], ["methods", "--help"])],
)
def test_help_is_a_command_too(argv, same, capsys):
    texts = []
    for words in (argv, same):
        try:
            assert main(words) == 0
        except SystemExit as end:
            assert end.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_the_package_runs_as_a_module():
    run = [sys.executable, "-m", "hf_effml", "--version"]
    outcome = subprocess.run(run, capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stdout.strip() == __version__


@pytest.mark.parametrize(
    "text, message",
    [
        ("moed: merge", "`moed` in `settings.yaml` is no option; did you mean `mode`?"),
        ("- merge", "must map names of options to values; got a list."),
        ("a: [", "is not valid YAML"),
        ("mode: melt", "invalid choice: 'melt'"),
        ("sizes: [few]", "`sizes` in `settings.yaml`: argument --sizes: invalid int value: 'few'"),
        ("", "is empty. Write one option a line"),
        ("ratio: 1\nmode: merge\nratio: 2", "`ratio` is there twice"),
        ("ratio: .nan", "`ratio` in `settings.yaml`: `ratio` must be a finite number; got nan."),
        ("mode: no", "invalid choice: 'no'"),
        ("mode: null", "`mode` in `settings.yaml`: it is empty, and must have a value."),
        ("mode: [merge]", "`mode` in `settings.yaml`: it is a list, and must be one value"),
        ("sizes: [1, null]", "it must be a list of plain values"),
        ('source: "\\0"', "must not hold the character NUL"),
        ("ratio: {a: 1}", "it is a mapping, and must be a plain value"),
        ("source: 1.10", "it is the number 1.1, and must be a text. Write it in quotes."),
        (_BILLION, "more than 100,000 values"),
        ("ratio: &a [*a]", "a value that contains itself"),
        ("ratio: " + 100 * "[", "is not valid YAML"),
        ("ratio: " + 100 * "[" + 100 * "]", "more than 40 levels of nesting"),
    ],
)
def test_wrong_configuration(config, text, message):
    with pytest.raises(UsageError) as error:
        _parse("a", *config(text))
    assert message in str(error.value)


def test_a_configuration_that_is_no_text(config):
    option, path = config("mode: merge")
    Path(path).write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not valid YAML"):
        _parse("a", option, path)


def test_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="`--config .*settings.yaml` cannot be read: No such file"):
        _parse("a", "--config", str(tmp_path / "settings.yaml"))


def test_an_empty_output_folder_is_named():
    with pytest.raises(ValueError, match="`output_dir` must name a folder; got an empty text."):
        _parse("a", "--output_dir", "", types=(Options, EffMLTrainingArguments))


def test_values_are_typed_by_their_fields(config):
    text = "lr_scheduler_kwargs: {min_lr: 1e-6}\nsave_strategy: no\nreport_to: null\nsizes: []\nshuffle: no\n"
    options, arguments = _parse("a", *config(text), types=(Options, EffMLTrainingArguments))
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert arguments.save_strategy == "no" and arguments.report_to == []
    assert options.sizes == [] and options.shuffle is False
    for given, expected in (("[]", []), ("[tensorboard, wandb]", ["tensorboard", "wandb"]), ("wandb", ["wandb"])):
        _, arguments = _parse("a", *config(f"report_to: {given}"), types=(Options, EffMLTrainingArguments))
        assert arguments.report_to == expected


@pytest.mark.parametrize(
    "name, value",
    [
        ("per_device_train_batch_size", "-4"),
        ("per_device_eval_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("learning_rate", "-1"),
        ("learning_rate", "nan"),
        ("weight_decay", "inf"),
        ("num_train_epochs", "-1"),
        ("seed", "-1"),
        ("save_total_limit", "0"),
        ("dataloader_num_workers", "-1"),
    ],
)
def test_impossible_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*; got {value}"):
        _parse("a", f"--{name}", value, types=(Options, EffMLTrainingArguments))


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("program, name", RECIPES, ids="-".join)
def test_every_recipe_parses(program, name, monkeypatch, tmp_path):
    recipe = read_recipes(program)[name]
    assert recipe["about"].endswith("."), "a sentence on what the recipe is for"
    program = import_module(f"hf_effml.scripts.{program}")

    def parse_and_stop(*types, **options):
        raise _Parsed(parse_arguments(*types, **options))

    monkeypatch.setattr(program, "parse_arguments", parse_and_stop)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_Parsed):
        program.main(["--recipe", name])


def test_every_recipe_that_a_recipe_names_exists():
    for program, name in RECIPES:
        recipe = read_recipes(program)[name]
        for key, other in (("start_recipe", "vim"), ("bank_recipe", "expert")):
            assert recipe.get(key) is None or recipe[key] in read_recipes(other), (program, name)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("`r` must be\n positive; got -1."), 2, "error: `r` must be positive; got -1."),
        (FileNotFoundError("no such folder"), 2, "error: no such folder"),
        (ImportError("`timm` is needed here"), 2, "error: `timm` is needed here"),
        (StrictDataclassFieldValidationError("merge_r", ValueError("-1")), 2, "error: Validation error for field"),
        (RuntimeError("out of memory"), 1, "error: RuntimeError: out of memory"),
        (
            StrictDataclassClassValidationError("validate_merge", ValueError("`merge_r` is -1.")),
            2,
            "error: `merge_r` is -1.",
        ),
    ],
)
def test_errors_end_in_two_lines(error, code, line, capsys):
    def program(argv):
        raise error

    assert run_script(program, []) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(line) and len(lines) <= 2
    assert run_script(program, ["--json"]) == code
    assert "error" in json.loads(capsys.readouterr().out)


def test_debug_shows_the_traceback(capsys):
    def program(argv):
        raise ValueError("wrong")

    assert run_script(program, ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_json_is_the_only_output(capsys):
    def program(argv):
        print("for people")
        return {"accuracy": 0.5}

    assert run_script(program, ["--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"accuracy": 0.5}
    assert captured.err == "for people\n"
    assert run_script(program, []) == 0
    assert capsys.readouterr().out == "for people\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "`trian` is no command; did you mean `train`?"),
        (["--quiet"], "`--quiet` is no command."),
        (["train"], "`hf-effml train` needs a method first: "),
        (["train", "--recipe", "smoke"], "`hf-effml train` needs a method first: "),
        (["train", "isqa"], "`isqa` is not in hf-effml"),
        (["train", "rmeto"], "did you mean `rmeeto`?"),
        (["train", "rmeeto", "--merge_rr", "3"], "`--merge_rr` is no option; did you mean `--merge_r`?"),
        (["train", "rmeeto", "--recipe", "smok"], "`smok` is no recipe; there are: "),
        (["train", "dyvm", "--token_keep_ration", "0.5"], "`--token_keep_ration` is no option; did you mean"),
        (["train", "dyvm", "--teacher", "self"], "There is no model to start from."),
        (["train", "dyvm", "--calibration_images", "-1"], "`calibration_images` must not be negative; got -1."),
        (["train", "token-router", "--data", "pydoc"], "There is no language model to start from."),
        (["train", "token-router", "--continuation_share", "1"], "`continuation_share` must be at least 0 and less"),
        (["train", "token-router", "--target_sparsity", "30"], "`target_sparsity` must be at least 0 and less than 1"),
        (
            ["train", "pad", "--images_per_class", "2"],
            "There are no experts to match. Give a bank with `--bank FOLDER`",
        ),
        (["train", "edf", "--drop_ratio", "1"], "`drop_ratio` must be from 0 to below 1; got 1.0."),
        (["train", "datm", "--max_grad_norm", "1"], "`max_grad_norm` must stay 0 for trajectory matching"),
        (["train", "expert", "--num_experts", "0"], "`num_experts` must be at least 1"),
        (["bench", "token-router", "--rounds", "0"], "must be at least 1"),
        (["bench", "dyvm", "--rounds", "0"], "must be at least 1"),
        (["bench", "dyvm", "--token_keep_ratio", "0.5"], "must be of one length, one pair per setting"),
        (["methods", "magic"], "`magic` is no method"),
        (["methods", "--all"], "`--all` is no option of `hf-effml methods`."),
        (["env", "torch"], "`torch` is no option of `hf-effml env`."),
        (["convert"], "`SOURCE`, `OUT` must be given."),
        (["convert", "nothing.pth", "out"], "nothing.pth"),
        (["push", "nothing", "me/model"], "nothing"),
        (["push", "nothing"], "`REPO` must be given."),
    ],
)
def test_wrong_use_of_commands(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert 1 <= len(captured.err.splitlines()) <= 2 and "Traceback" not in captured.err


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert [method["key"] for method in methods if method["available"]] == [
        "dyvm",
        "rmeeto",
        "token-router",
        "edf",
        "pad",
    ]
    assert len(methods) == 7


def test_one_method_with_its_citation(capsys):
    assert main(["methods", "rmeeto"]) == 0
    text = capsys.readouterr().out
    assert "RMeeToTrainer" in text and "eprint = {2412.12496}" in text
