"""GSAM: known answers, SGD as its limit, and what an optimiser of torch promises."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from helpers import assert_close
from hf_effml.distillation.configuration_convnet import ConvNetConfig
from hf_effml.distillation.gsam import GSAM
from hf_effml.distillation.modeling_convnet import ConvNetForImageClassification


VECTORS = Path(__file__).parents[1] / "vectors" / "distillation"


def network(norm="instance", seed=0):
    torch.manual_seed(seed)
    return ConvNetForImageClassification(ConvNetConfig(image_size=8, depth=2, hidden_size=6, num_labels=4, norm=norm))


def steps(model, optimizer, count=3, batch=6, scheduler=None):
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(count):
        images, labels = torch.randn(batch, 3, 8, 8, generator=generator), torch.arange(batch) % 4

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images).logits, labels)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
        if scheduler is not None:
            scheduler.step()
    return losses


def test_known_answers():
    vectors = load_file(VECTORS / "gsam_step.safetensors")
    model = network().train()
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: vectors[f"params0.{name}"] for name in names})
    optimizer = GSAM(model.parameters(), lr=0.01, rho=0.01, alpha=0.3)
    for step in range(3):

        def closure(step=step):
            loss = F.cross_entropy(model(vectors[f"step{step}.x"]).logits, vectors[f"step{step}.y"])
            loss.backward()
            return loss

        torch.testing.assert_close(optimizer.step(closure), vectors[f"step{step}.loss"], rtol=2e-5, atol=2e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.data, vectors[f"step{step}.params.{name}"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_no_distance_is_sgd(momentum, weight_decay):
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    ours, reference = network("batch").train(), network("batch").train()
    steps(ours, GSAM(ours.parameters(), rho=0, **settings))
    steps(reference, torch.optim.SGD(reference.parameters(), **settings))
    assert_close(ours.state_dict(), reference.state_dict())


def test_plain_distance_follows_its_formula():
    """On a quadratic, whose gradients are known: g(w) = A w."""
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]]).double()
    start = torch.tensor([1.0, -2.0]).double()
    weight = nn.Parameter(start.clone())
    optimizer = GSAM([weight], lr=1.0, rho=0.2, alpha=0.5, adaptive=False)

    def closure():
        weight.grad = matrix @ weight.detach()
        return weight.square().sum()

    optimizer.step(closure)
    first = matrix @ start
    second = matrix @ (start + 0.2 * first / first.norm())
    orthogonal = first - first.dot(second) / second.dot(second) * second
    torch.testing.assert_close(weight.data, start - (second - 0.5 * orthogonal))


def test_groups_keep_their_own_distance():
    """The second gradient of a group that does not move is still taken where the others went."""
    together, apart = network(), network()
    steps(together, GSAM(together.parameters(), rho=0.5))
    steps(apart, GSAM([{"params": apart.features.parameters()}, {"params": apart.classifier.parameters()}], rho=0.5))
    assert_close(apart.state_dict(), together.state_dict())
    mixed = network()
    steps(
        mixed,
        GSAM(
            [{"params": mixed.features.parameters()}, {"params": [*mixed.classifier.parameters()], "rho": 0}], rho=0.5
        ),
    )
    assert not torch.equal(mixed.classifier.weight, together.classifier.weight)


@pytest.mark.parametrize("given", [True, False])
def test_running_statistics_of_the_second_pass(given):
    model, once = network("batch").train(), network("batch").train()
    steps(model, GSAM(model.parameters(), module=model if given else None), count=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        once(torch.randn(6, 3, 8, 8, generator=generator))
    norm, expected = model.features[1], once.features[1]
    assert norm.track_running_stats
    assert torch.equal(norm.running_mean, expected.running_mean) == given
    assert int(norm.num_batches_tracked) == (1 if given else 2)


def test_second_pass_normalises_by_the_batch():
    """Without any change of the running statistics the path is the same: they play no part in training."""
    watched, plain = network("batch").train(), network("batch").train()
    steps(watched, GSAM(watched.parameters(), rho=0.3, module=watched))
    steps(plain, GSAM(plain.parameters(), rho=0.3))
    for ours, reference in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, reference)


def test_frozen_layers_and_parameters_stay():
    model = network("batch").train()
    model.features[1].eval()
    model.features[0].weight.requires_grad_(False)
    frozen = model.features[0].weight.clone()
    steps(model, GSAM(model.parameters(), lr=0.1, module=model))
    assert torch.equal(model.features[0].weight, frozen)
    assert int(model.features[1].num_batches_tracked) == 0


def test_state_goes_on_and_schedules_apply():
    """Another optimiser takes over the momentum half way; a schedule changes the learning rate of both alike."""

    def train(model, takes_over):
        optimizer = GSAM(model.parameters(), lr=0.1, momentum=0.9)
        steps(model, optimizer)
        if takes_over:
            optimizer, state = GSAM(model.parameters(), lr=0.3), optimizer.state_dict()
            optimizer.load_state_dict(state)
        steps(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)
        return model.state_dict()

    assert_close(train(network(), takes_over=True), train(network(), takes_over=False))


def test_errors():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="`rho` must be at least 0; got -1"):
        GSAM([weight], rho=-1)
    with pytest.raises(ValueError, match="needs a `closure`"):
        GSAM([weight]).step(None)
