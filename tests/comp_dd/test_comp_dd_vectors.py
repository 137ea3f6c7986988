"""The complexity score against recorded values of a tiny network, and at the edges of the threshold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import assert_close
from hf_effml.comp_dd import class_complexity, complexity_of_maps
from hf_effml.distillation.class_activation import class_activation_map, resize


VECTORS = Path(__file__).parents[1] / "vectors" / "comp_dd" / "complexity.safetensors"


class RecordedNet(nn.Module):
    def __init__(self, parameters):
        super().__init__()
        for number in (1, 2, 3):
            kernel = parameters[f"conv{number}.weight"]
            setattr(self, f"conv{number}", nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1))
        self.activation, self.pool = nn.ReLU(), nn.AvgPool2d(2)
        self.fc = nn.Linear(*reversed(parameters["fc.weight"].shape))
        self.load_state_dict(parameters)

    def forward(self, pixels):
        hidden = self.pool(self.conv1(pixels).relu())
        hidden = self.pool(self.conv2(hidden).relu())
        return self.fc(self.activation(self.conv3(hidden)).mean((2, 3)))


@pytest.fixture(scope="module")
def recorded():
    return load_file(VECTORS)


def test_maps_and_scores_are_those_recorded(recorded):
    parameters = {key.removeprefix("param."): value for key, value in recorded.items() if key.startswith("param.")}
    model, images = RecordedNet(parameters), recorded["input"]
    assert_close(model(images).detach(), recorded["logits"], 1e-4)
    maps = class_activation_map(model, images, None, size="map")
    assert_close(maps, recorded["cam_normalized"], 1e-4)
    assert_close(maps, class_activation_map(model, images, recorded["target"], "activation", size="map"), 1e-6)
    assert_close(complexity_of_maps(maps), recorded["complexity_native"], 1e-6)
    large = resize(maps.unsqueeze(1), images.shape[-2:]).squeeze(1)
    assert_close(large, recorded["cam_upsampled"], 1e-4)
    assert_close(complexity_of_maps(large), recorded["complexity_upsampled"], 1e-6)
    labels = recorded["label"].numpy()
    table = class_complexity(recorded["complexity_native"].numpy(), labels, [str(i) for i in range(labels.max() + 1)])
    means = np.array([row["complexity"] for row in table.rows.values()])
    assert np.abs(means - recorded["class_complexity"].numpy()).max() < 1e-6


def test_threshold_counts_ties_as_active(recorded):
    assert_close(complexity_of_maps(recorded["maps"]), recorded["maps_complexity_ge"], 1e-6)
    strictly_above = 100 * (1 - complexity_of_maps(recorded["maps"], np.nextafter(np.float32(0.5), np.float32(1))))
    assert_close(strictly_above, recorded["maps_percent_gt"].float(), 1e-4)
    assert torch.equal(complexity_of_maps(torch.zeros(2, 3, 3)), torch.ones(2))
