"""3,000 seeded inputs of all kinds, most of them broken: each ends in a right result or in an error raised on purpose.

`HF_EFFML_FUZZ_SEED` takes other inputs. What was found is printed; `pytest -m slow -s -n 0 tests/fuzz` shows it.
"""

import os
import random
import warnings
from collections import Counter
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest

from fuzz.outcomes import try_case


SEED = int(os.environ.get("HF_EFFML_FUZZ_SEED", "0"))
INPUTS = 375
FRAME = ("outcomes", "programs", "test_fuzz")
DOMAINS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in FRAME)


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_inputs_end_in_results_or_named_errors(domain, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    cases = import_module(f"fuzz.{domain}").cases(random.Random(f"{domain} {SEED}"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [try_case(case) for case in islice(cases, INPUTS)]
    kinds = Counter(outcome.kind for outcome in outcomes)
    print(f"\n{domain}: {dict(kinds)}")
    for outcome in outcomes:
        if outcome.kind not in ("right", "named"):
            print(f"  {outcome.kind}: {outcome.text}: {outcome.detail}")
    assert len(outcomes) == INPUTS
    assert kinds["right"] and kinds["named"], "inputs that are all of one kind try little"
    assert not kinds["hang"] and not kinds["nan"] and not kinds["deep"]
