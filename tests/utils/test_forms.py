"""Fields of JSON files: what passes, and what is said about the others."""

import pytest

from hf_effml.utils.forms import check_forms, is_count, is_list, is_number, is_text, optional


@pytest.mark.parametrize(
    ("fits", "good", "bad"),
    [
        (is_count, [1, 10**9], [0, -1, True, 1.0, "1", None, 2**31]),
        (is_number, [1, -0.5], [float("nan"), float("inf"), True, "1", None]),
        (optional(is_text), [None, ""], [1, []]),
        (lambda value: is_list(value, is_count, 2), [[1, 2]], [[1], [1, 0], (1, 2), {"a": 1}]),
    ],
)
def test_what_fits(fits, good, bad):
    assert all(map(fits, good)) and not any(map(fits, bad))


def test_a_wrong_field_is_named():
    with pytest.raises(ValueError, match=r"`a` in `x.json` must be a number; got 'y+ \.\.\. \(102 char.*\). Save"):
        check_forms({"a": "y" * 100}, {"a": ("a number", is_count)}, "x.json", "Save it.")
