"""A network as a function of its weights: the same values and gradients, whatever was folded, and nothing shared."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from mithridate.defenses.learner import Examples, Learner, chooses_bfloat16, runs_together
from mithridate.defenses.private_weights import PrivateWeights
from mithridate.models.cifar_resnet import CifarResNet
from mithridate.models.folding import FoldedConv, fold
from mithridate.models.small_cnn import SmallCNN


class Peculiar(nn.Module):
    """Convolutions that must not be folded, and one that must: see ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm1 = nn.BatchNorm2d(8, affine=False)
        self.second = nn.Conv2d(8, 8, 3, groups=2, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 1)
        self.norm3 = nn.BatchNorm2d(8, track_running_stats=False)
        self.norm4 = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.first(x)).relu()  # folded: a bias, another padding, no scale of its own
        raw = self.second(x)
        x = self.norm2(raw) + raw  # not folded: what comes out of the convolution is used twice
        x = self.norm4(self.shared(x)) + self.shared(x.relu())  # not folded: one convolution runs twice
        x = self.norm3(self.shared(x))  # not folded: the statistics are the batch's
        out: torch.Tensor = self.linear(x.mean((2, 3)))
        return out


class Branching(nn.Module):
    """Cannot be traced: what runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.convolution(x))
        if x.sum() > 1e9:
            x = x * 0
        out: torch.Tensor = self.linear(x.mean((2, 3)))
        return out


class Viewing(nn.Module):
    """Cannot be run with channels last: it views maps, and a weight, as rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.convolution(x)) + self.convolution.weight.view(8, -1).sum(1).view(1, 8, 1, 1)
        out: torch.Tensor = self.linear(x.view(x.shape[0], -1))
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small-cnn": (lambda: SmallCNN(num_classes=5, in_channels=3, side=8), 3),
    "resnet20": (lambda: CifarResNet(3, num_classes=5), 19),
    "peculiar": (Peculiar, 1),
    "branching": (Branching, 0),
    "viewing": (Viewing, 0),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With random weights, scales, shifts and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name][0]().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean):
                    if value is not None:
                        value.data.normal_()
                if module.running_var is not None:
                    module.running_var.uniform_(0.5, 2)
    return network.to(dtype).requires_grad_(False)


def batch(seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(5, (6,), generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_the_networks_own(name: str) -> None:
    """After a step of plain gradient descent by both, on every weight, they still agree."""
    network, (inputs, labels) = made(name), batch()
    private = PrivateWeights(network, inputs)
    function = private.function()
    torch.testing.assert_close(function(private.start, inputs), network(inputs), rtol=0, atol=1e-10)
    weights = private.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(function(weights, inputs), labels), weights)
    own = deepcopy(network).requires_grad_(True)
    F.cross_entropy(own(inputs), labels).backward()
    with torch.no_grad():
        for parameter in own.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert gradient.numel() == sum(parameter.numel() for parameter in own.parameters())
    moved = function(private.start - 0.1 * gradient, batch(2)[0])
    torch.testing.assert_close(moved, own(batch(2)[0]), rtol=0, atol=1e-9)
    assert (moved - network(batch(2)[0])).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["small-cnn", "resnet20", "peculiar", "viewing"])
def test_folds_only_what_is_proven_to_follow(name: str) -> None:
    network = made(name)
    traced = fx.GraphModule(network, fx.Tracer().trace(network))
    fold(traced)
    assert sum(isinstance(module, FoldedConv) for module in traced.modules()) == (
        1 if name == "peculiar" else 0 if name == "viewing" else NETWORKS[name][1]
    )


def test_hooks_keep_a_pair_apart() -> None:
    network = made("small-cnn")
    convolution = network.get_submodule("stem.0")
    convolution.register_forward_hook(lambda layer, inputs, output: 2 * output)
    inputs, _ = batch()
    private = PrivateWeights(network, inputs)
    torch.testing.assert_close(private.function()(private.start, inputs), network(inputs), rtol=0, atol=1e-10)


def test_the_network_is_left_alone() -> None:
    network, (inputs, _) = made("small-cnn"), batch()
    before, names = deepcopy(network.state_dict()), [name for name, _ in network.named_modules()]
    private = PrivateWeights(network, inputs)
    first, second = private.function(), private.function()
    answer = first(private.start, inputs)
    first(private.start * 2, inputs)
    with pytest.raises(RuntimeError):
        first(private.start, inputs[:, :2])
    assert torch.equal(second(private.start, inputs), answer)
    assert torch.equal(first(private.start, inputs), answer)
    assert [name for name, _ in network.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_function_more_costs_no_memory_for_good() -> None:
    network, (inputs, _) = made("resnet20"), batch()
    private = PrivateWeights(network, inputs)

    def held_after(calls: int) -> int:
        for _ in range(calls):
            private.function()(private.start, inputs[:1])
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = held_after(20)
        assert held_after(20) - before < 50_000  # bytes: a traced resnet20 that is copied leaves 10,000 a time
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["small-cnn", "resnet20", "viewing"])
def test_together_and_one_after_the_other_are_the_same(name: str) -> None:
    network, count = made(name), 3
    private = PrivateWeights(network, batch()[0], channels_last=False)
    assert runs_together(private, batch()[0])
    parts = [batch(seed) for seed in range(count)]
    noise = torch.randn(count, len(private.start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = private.start + 0.01 * noise
    examples = Examples(
        inputs=torch.stack([inputs for inputs, _ in parts]),
        labels=torch.stack([labels for _, labels in parts]),
        weights=torch.rand(count, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    one, all_at_once = (
        Learner(network=private.function(), prepare=lambda x: x, together=together) for together in (False, True)
    )
    for mine, other in zip(one.gradients(weights, examples), all_at_once.gradients(weights, examples), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.losses(weights, examples), all_at_once.losses(weights, examples), rtol=1e-9, atol=0)
    doubled = replace(examples, weights=2 * examples.weights)
    torch.testing.assert_close(one.losses(weights, doubled), 2 * one.losses(weights, examples))


class Strict(nn.Module):
    """Mixes types by hand: does not run in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.linear(x.mean((2, 3)))
        return torch.index_add(torch.zeros(len(x), 5), 0, torch.arange(len(x)), scores)


def test_what_vmap_cannot_take_runs_one_after_the_other() -> None:
    inputs, _ = batch()
    assert not runs_together(PrivateWeights(made("branching"), inputs, channels_last=False), inputs)


def test_bfloat16_is_left_to_networks_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = batch(dtype=torch.float32)
    can, cannot = (PrivateWeights(n, inputs) for n in (made("small-cnn", torch.float32), Strict().eval()))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert chooses_bfloat16("auto", can, inputs)
    assert not chooses_bfloat16("auto", cannot, inputs)
    assert not chooses_bfloat16("float32", can, inputs)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not chooses_bfloat16("auto", can, inputs)
    assert chooses_bfloat16("bfloat16", can, inputs)
