"""Many passes of a network at once equal as many separate ones, whatever it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.defenses.pruned_network import ChangedTrunk
from mithridate.errors import ModelError, OptionError
from mithridate.models import Classifier, ModelSpec, build_classifier


class Odd(nn.Module):
    """One in-place ReLU used three times, a size read early on, a functional and a method activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.size(0)
        x = self.relu(self.norm(self.first(x)))
        y = self.relu(self.second(x))
        y += x
        y = self.relu(y)
        y = F.leaky_relu(self.second(y), 0.1)
        y = torch.tanh(y) + y.sigmoid()
        return self.linear(self.dropout(y).view(rows, -1))


class Shapes(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x + 1
        return super().forward(x)


def classifier(network: nn.Module | str) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(network, str):
            side = 64 if network in ("resnet18", "mobilenet_v3_small") else 8
            made = build_classifier(network, num_classes=5, image_shape=(3, side, side))
        else:
            spec = ModelSpec(arch="odd", num_classes=5, image_shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
            made = Classifier(network, spec)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):  # not the identity
                module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return made


def images(made: Classifier, count: int = 3) -> torch.Tensor:
    return torch.rand(count, *made.spec.image_shape, generator=torch.Generator().manual_seed(1))


NETWORKS = ["resnet20", "small-cnn", "resnet18", "mobilenet_v3_small", Odd]


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_unchanged_every_pass_is_the_networks_own(network: str | type[nn.Module]) -> None:
    made = classifier(network if isinstance(network, str) else network())
    pixels = images(made)
    begun = ChangedTrunk(made).begin(pixels)
    for copies in (1, 4, 2):  # the first part is run once, and whatever is in place leaves it as it was
        found = begun.run(lambda h: h, copies)
        wanted = made.trace(pixels).head_input.repeat_interleave(copies, 0)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_changes_come_behind_every_activation_and_carry_on(network: str | type[nn.Module]) -> None:
    """Against hooks and patched functions where the network runs as its author wrote it: 0.9 of every activation."""
    made = classifier(network if isinstance(network, str) else network())
    pixels, trunk, shapes = images(made), ChangedTrunk(made), []

    def change(activation: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(activation.shape))
        return activation * 0.9

    found = made.head(trunk.begin(pixels).run(change, 2))
    assert len(shapes) == len(trunk.names) == len(trunk.sizes)
    assert all(shape[0] == 6 for shape in shapes)
    assert [torch.Size(shape[1:]).numel() for shape in shapes] == list(trunk.sizes)
    if network == "resnet20":
        assert len(trunk.names) == 19
        with pytest.MonkeyPatch.context() as patch:
            relu = F.relu
            patch.setattr(F, "relu", lambda x: 0.9 * relu(x))
            wanted = made(pixels)
        torch.testing.assert_close(found, wanted.repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)
    if network is Odd:
        assert len(trunk.names) == 6


@torch.no_grad()
def test_only_the_named_layers_are_changed_and_what_lies_before_runs_once() -> None:
    made = classifier("resnet20")
    every = ChangedTrunk(made)
    last = ChangedTrunk(made, every.names[-1:])
    assert last.names == every.names[-1:]
    assert len(last._rest) < len(every._rest) / 5
    seen: list[int] = []
    begun = last.begin(images(made))
    begun.run(lambda h: (seen.append(len(h)), h)[1], 3)
    assert seen == [9]


@pytest.mark.parametrize("network", ["resnet20", "resnet18"])
@torch.no_grad()
def test_the_first_convolution_runs_once_and_the_second_for_every_pass(network: str) -> None:
    made = classifier(network)
    rows: list[int] = []
    first, second = [module for module in made.modules() if isinstance(module, nn.Conv2d)][:2]
    for module in (first, second):
        module.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    trunk = ChangedTrunk(made)
    rows.clear()
    begun = trunk.begin(images(made))
    assert rows == [3]
    for _ in range(2):
        begun.run(lambda h: h * 0.9, 4)
    assert rows == [3, 12, 12]


@pytest.mark.parametrize("network", ["resnet20", "resnet18", "mobilenet_v3_small"])
def test_batch_normalisation_stays_as_it_was_trained(network: str) -> None:
    """Its statistics are neither used from the batch nor moved by it, with a gradient or without."""
    made = classifier(network)
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    pixels, trunk = images(made).requires_grad_(), ChangedTrunk(made)
    together = trunk.begin(pixels).run(lambda h: h * 0.9, 2)
    torch.autograd.grad(together.sum(), pixels)
    assert before.keys() == dict(made.named_buffers()).keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.named_buffers())
    assert not any(module.training for module in made.network.modules())
    alone = trunk.begin(pixels[:1]).run(lambda h: h * 0.9, 2)
    torch.testing.assert_close(alone, together[:2], rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_the_images_from_every_pass() -> None:
    made = classifier("resnet20").double()
    pixels = images(made).double().requires_grad_()
    found = ChangedTrunk(made).begin(pixels).run(lambda h: h * 0.9, 3)
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    (again,) = torch.autograd.grad(ChangedTrunk(made).begin(pixels).run(lambda h: h * 0.9, 1).sum(), pixels)
    torch.testing.assert_close(gradient, 3 * again)


def test_what_cannot_be_changed_is_said() -> None:
    made = classifier("resnet20")
    with pytest.raises(OptionError, match=r"^the network has no activation function 'layer1'; allowed: relu, relu_1, "):
        ChangedTrunk(made, ["layer1"])
    with pytest.raises(ModelError, match="cannot be traced"):
        ChangedTrunk(classifier(Shapes()))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ModelError, match="has no activation function before its last layer"):
        ChangedTrunk(classifier(linear))
