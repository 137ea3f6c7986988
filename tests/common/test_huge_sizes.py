"""Sizes that no machine can build are refused, by name and at once, in configurations and where models are made."""

import pytest
from common.model_cases import CONVNET, SET, VIMS
from huggingface_hub.errors import StrictDataclassError

import hf_effml


HUGE = {
    "VimConfig": {"num_hidden_layers": 2**31, "hidden_size": 2**31, "image_size": 10**6, "state_size": 2**63},
    "DyVMConfig": {"num_hidden_layers": 2**31, "expand": 2**40},
    "RMeeToVimConfig": {"num_hidden_layers": 2**31, "conv_kernel": 2**31},
    "ConvNetConfig": {"depth": 2**31, "hidden_size": 2**31, "image_size": 10**6, "num_channels": 2**63},
    "DistilledDatasetConfig": {"images_per_class": 2**31, "image_size": 10**6, "num_channels": 2**31},
    "TokenRouterConfig": {"router_hidden_size": 2**31, "num_hidden_layers": 2**31, "num_protected_last": 2**31},
}


@pytest.mark.parametrize("name, field", [(name, field) for name, fields in HUGE.items() for field in fields])
def test_a_huge_field_is_named(name, field):
    value = HUGE[name][field]
    with pytest.raises(StrictDataclassError, match=rf"`{field}`.*(at most|from 1 to) [\de+]+.*|`{field}` {value}"):
        getattr(hf_effml, name)(**{field: value})


@pytest.mark.parametrize("name", [name for name in HUGE if name != "TokenRouterConfig"])
def test_huge_numbers_of_classes(name):
    with pytest.raises(ValueError, match="`num_labels` must be from 0 to 1048576; got 2147483648"):
        getattr(hf_effml, name)(num_labels=2**31)


def test_sizes_that_are_huge_together():
    with pytest.raises(StrictDataclassError, match="`hidden_size` 8192, `num_hidden_layers` 4096, .* at most 1e.10"):
        hf_effml.VimConfig(hidden_size=8192, num_hidden_layers=4096)
    with pytest.raises(StrictDataclassError, match="`hidden_size` 65536, `depth` 9, .* at most 1e.10. Make them"):
        hf_effml.ConvNetConfig(hidden_size=2**16, depth=9, image_size=2**14)
    assert hf_effml.VimConfig(hidden_size=2048, num_hidden_layers=48).hidden_size == 2048


@pytest.mark.parametrize("case", [VIMS[1], VIMS[4], VIMS[6], CONVNET, SET], ids=lambda case: case.model_class.__name__)
def test_a_size_given_while_loading(case, tmp_path):
    case.build().save_pretrained(tmp_path)
    field = {"convnet": "depth", "distilled_dataset": "images_per_class"}.get(case.config().model_type, "hidden_size")
    with pytest.raises((ValueError, StrictDataclassError), match=f"`{field}`.* (at most|from 1 to)"):
        case.model_class.from_pretrained(tmp_path, **{field: 2**31})
