"""The tail cut: wherever it is made, the second half says exactly what the whole network says; or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.errors import ModelError
from mithridate.models import Classifier, ModelSpec, build_classifier
from mithridate.models.cifar_resnet import CifarResNet

COLOUR = (3, 32, 32)


def build(
    arch: str, tail: str | None = "auto", shape: tuple[int, int, int] = COLOUR, layer: str = "auto"
) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_classifier(arch, num_classes=7, image_shape=shape, tail_layer=tail, embedding_layer=layer)
        for module in model.modules():  # statistics that do something
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model


def wrap(network: nn.Module, tail: str | None = "auto", shape: tuple[int, int, int] = COLOUR) -> Classifier:
    mean = (0.5,) * shape[0]
    spec = ModelSpec(arch="net", num_classes=5, image_shape=shape, mean=mean, std=mean, tail_layer=tail)
    with torch.no_grad():
        return Classifier(network, spec)


def random_images(count: int, shape: tuple[int, int, int] = COLOUR) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    with pytest.raises(ModelError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def is_exact(model: Classifier, shape: tuple[int, int, int] = COLOUR, count: int = 5) -> torch.Tensor:
    """Trunk and tail in a row are the network, to the bit; the tail leaves its input alone. Gives the activation."""
    images = random_images(count, shape)
    with torch.no_grad():
        trace = model.trace(images)
        assert trace.activation is not None
        before = trace.activation.clone()
        assert torch.equal(model.tail(trace.activation), model(images))
        assert torch.equal(trace.activation, before)
        assert torch.equal(trace.embedding, model.embed(images))
    return trace.activation


@pytest.mark.parametrize(
    ("arch", "shape", "activation"),
    [
        ("small-cnn", (1, 8, 8), (64, 4, 4)),
        ("small-cnn", (1, 28, 28), (128, 7, 7)),
        ("resnet20", COLOUR, (64, 8, 8)),
        ("resnet18", COLOUR, (512, 1, 1)),
        ("resnet50", (3, 64, 64), (2048, 2, 2)),
        ("mobilenet_v3_small", COLOUR, (576,)),
        ("densenet121", COLOUR, (512, 1, 1)),  # the input of the last dense block
        ("squeezenet1_1", COLOUR, (512, 1, 1)),  # it ends in a convolution, not in a head
        ("alexnet", (3, 64, 64), (4096,)),
    ],
)
def test_the_automatic_cut_is_exact(arch: str, shape: tuple[int, int, int], activation: tuple[int, ...]) -> None:
    assert is_exact(build(arch, shape=shape), shape).shape == (5, *activation)


def test_the_automatic_cut_of_a_residual_network_is_the_end_of_its_last_but_one_block() -> None:
    network = build("resnet20").network
    assert isinstance(network, CifarResNet)
    model, images = build("resnet20"), random_images(4)
    seen: list[torch.Tensor] = []
    model.network.layer3[1].register_forward_hook(lambda _, __, out: seen.append(out))  # type: ignore[union-attr, index]
    with torch.no_grad():
        activation = model.trace(images).activation
        model(images)
    assert torch.equal(seen[0], activation)
    names = {name.removeprefix("layer3.2.") for name, _ in model.tail.named_parameters() if "layer3" in name}
    assert names == {f"{kind}.{what}" for kind, what in [("conv1", "weight"), ("conv2", "weight")]} | {
        f"{kind}.{what}" for kind in ("bn1", "bn2") for what in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("arch", "layer"),
    [("resnet20", layer) for layer in ("layer1", "layer2.1", "layer3.1", "layer3", "conv1", "bn1")]
    + [("resnet18", layer) for layer in ("conv1", "bn1", "layer4.0", "layer4")],
)
def test_a_named_cut_is_exact(arch: str, layer: str) -> None:
    is_exact(build(arch, layer))


class InPlace(nn.Module):
    """Overwrites a view of the cut, which no single node shows. Twice is not the same as once, as with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 5)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = x.flatten(2).transpose(1, 2)
        y = self.second(self.act(y)).mul_(2)
        return self.head(y.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", ["auto", "first", "second", "flatten"])
def test_operations_in_place_do_not_reach_what_was_kept(layer: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        is_exact(wrap(InPlace(), layer))


def test_a_transformer_is_cut_between_its_blocks() -> None:
    import torchvision

    network = torchvision.models.VisionTransformer(32, 8, 3, 2, 48, 96, num_classes=5)
    nn.init.normal_(network.heads.head.weight)
    model = wrap(network)
    assert is_exact(model).shape == (5, 17, 48)
    assert {n.split(".")[2] for n, _ in model.tail.named_parameters() if "layers" in n} == {"encoder_layer_2"}
    for layer in ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"):
        is_exact(wrap(network, layer))
    with refused("'encoder.layers.encoder_layer_2.ln_1'", "a skip connection runs around it"):
        wrap(network, "encoder.layers.encoder_layer_2.ln_1")


def test_an_embedding_before_or_after_the_cut_is_the_same_as_without() -> None:
    for layer in ("layer1", "layer3", "auto"):
        plain, cut = build("resnet20", None, layer=layer), build("resnet20", "layer2.1", layer=layer)
        images = random_images(4)
        with torch.no_grad():
            trace = cut.trace(images)
            assert torch.equal(trace.embedding, plain.features(images)[0])
            assert torch.equal(trace.head_input, plain.features(images)[1])
            assert torch.equal(cut.head(trace.head_input), cut(images))
        assert plain.trace(images).activation is None


# What cannot be cut


@pytest.mark.parametrize(
    ("arch", "layer", "parts"),
    [
        ("resnet20", "layer3.2.conv1", ["'layer3.2.conv1'", "a skip connection runs around it"]),
        ("resnet20", "layer3.2.bn2", ["'layer3.2.bn2'", "a skip connection runs around it"]),
        ("resnet50", "layer4.2.relu", ["a skip connection runs around it"]),
        ("densenet121", "features.denseblock4.denselayer3", ["a skip connection runs around it"]),
        ("googlenet", "inception5b.branch1", ["a skip connection runs around it"]),
        ("resnet20", "linear", ["behind the layer 'linear' there is nothing to train"]),
        ("resnet20", "layer9", ["no layer 'layer9'", "layer1, layer2, layer3"]),
        ("resnet20", "", ["no layer ''"]),
    ],
)
def test_a_layer_that_does_not_separate_is_refused(arch: str, layer: str, parts: list[str]) -> None:
    with refused(*parts):
        build(arch, layer, (3, 64, 64))


class Wild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(x if bool(x.sum() > 0) else -x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", ["auto", "conv"])
def test_a_network_that_cannot_be_traced_has_no_tail(layer: str) -> None:
    with refused("cannot be traced", "a tail"):
        wrap(Wild(), layer)
    assert not wrap(Wild(), None).has_tail


def test_a_network_with_nothing_but_a_head_has_no_tail() -> None:
    with refused("a layer to train besides the head", "rmc:scope=head"):
        wrap(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)))


class Functional(nn.Module):
    """No layer has its own module: the weights are read by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.rand(4, 3, 3, 3)), nn.Parameter(torch.rand(4, 4))
        self.scale = nn.Parameter(torch.rand(4, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.kernel).mean((2, 3))
        x = torch.relu(F.linear(x, self.matrix))
        return self.head(x * self.scale.flatten())  # type: ignore[no-any-return]


def test_weights_that_functions_read_count_too_but_a_scale_does_not() -> None:
    model = wrap(Functional())
    assert is_exact(model).shape == (5, 4)
    assert {name for name, _ in model.tail.named_parameters()} == {"matrix", "scale", "head.weight", "head.bias"}


class TokensFirst(nn.Module):
    """Between its layers the images are not the first dimension: there is no row an image to store."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.turn = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        x = self.second(self.turn(x.unsqueeze(0).relu()))  # [1, N, 8]
        return self.head(x[0])  # type: ignore[no-any-return]


def test_a_cut_has_a_row_an_image() -> None:
    assert is_exact(wrap(TokensFirst())).shape == (5, 8)
    with refused("'turn'", "does not give one tensor"):
        wrap(TokensFirst(), "turn")


class Twice(nn.Module):
    """One layer that runs twice: the tail has the second run only, and still the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1)).relu()
        x = self.layer(x).relu()
        return self.head(self.layer(x).relu())  # type: ignore[no-any-return]


def test_shared_weights_are_cut_by_when_they_run() -> None:
    model = wrap(Twice())
    is_exact(model)
    assert {name for name, _ in model.tail.named_parameters()} == {
        f"{layer}.{what}" for layer in ("layer", "head") for what in ("weight", "bias")
    }


@pytest.mark.parametrize("make", [Functional, Twice, InPlace, lambda: CifarResNet(1, num_classes=5)])
def test_everything_flows_through_a_cut_that_is_called_separating(make: Callable[[], nn.Module]) -> None:
    """The obvious oracle: take the node away, and the images no longer reach the logits."""
    from mithridate.models.splitting import _output_node, _trace
    from mithridate.models.tails import separating_nodes

    graph = _trace(make().eval(), by_name=False).graph
    output = _output_node(graph)
    start = next(node for node in graph.nodes if node.op == "placeholder")

    def reaches(node: object, without: object) -> bool:
        if node is without:
            return False
        return node is start or any(reaches(n, without) for n in node.all_input_nodes)  # type: ignore[attr-defined]

    def computed_from_images(node: object) -> bool:
        return reaches(node, None)

    on_the_way = [n for n in graph.nodes if computed_from_images(n) and not reaches(output, n)]
    assert separating_nodes(output) == on_the_way
    assert len(on_the_way) > 2


# The same image, the same activation; private weights; moves


@pytest.mark.parametrize("arch", ["small-cnn", "resnet20"])
def test_activations_do_not_depend_on_the_batch_to_the_bit(arch: str) -> None:
    shape = (1, 28, 28) if arch == "small-cnn" else COLOUR
    model, images = build(arch, shape=shape), random_images(32, shape)
    with torch.no_grad():
        whole = model.trace(images).activation
        assert whole is not None
        for size in (1, 2, 3, 7):
            parts = [model.trace(batch).activation for batch in images.split(size)]
            assert torch.equal(torch.cat([part for part in parts if part is not None]), whole), size


def test_a_private_tail_trains_and_leaves_the_classifier_alone() -> None:
    model, images = build("resnet20"), random_images(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    activation = model.trace(images).activation
    assert activation is not None
    tail = model.private_tail()
    assert all(parameter.requires_grad for parameter in tail.parameters())
    assert not any(parameter.requires_grad for parameter in model.tail.parameters())
    assert not any(module.training for module in tail.modules())
    assert torch.equal(tail(activation), model(images))
    optimizer = torch.optim.SGD(tail.parameters(), lr=0.1)
    F.cross_entropy(tail(activation), torch.zeros(4, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(parameter.grad is not None for parameter in tail.parameters())
    assert not torch.allclose(tail(activation), model(images))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.tail(activation), model(images))


def test_the_tail_has_the_networks_own_weights() -> None:
    """Also after a copy and a move: who changes the one changes the other."""
    model = build("resnet20")
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        own = {parameter.data_ptr() for parameter in each.network.parameters()}
        assert {parameter.data_ptr() for parameter in each.tail.parameters()} <= own
        images = random_images(3).to(each.mean.dtype)
        with torch.no_grad():
            next(each.network.layer3[2].parameters()).mul_(2)  # type: ignore[operator, union-attr, index]
            activation = each.trace(images).activation
            assert activation is not None
            assert torch.equal(each.tail(activation), each(images))
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in model.network.parameters())


def test_the_tails_buffers_move_with_the_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.register_buffer("shift", torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x.flatten(1)).relu()
            return self.head(self.second(x) + self.shift)  # type: ignore[no-any-return]

    model = wrap(Net()).to("meta")  # stands for a GPU: it does not mix with the CPU either
    activation = model.trace(random_images(2).to("meta")).activation
    assert activation is not None
    assert model.tail(activation).device.type == "meta"


def test_a_classifier_without_a_tail_says_so() -> None:
    model = build("resnet20", None)
    assert not model.has_tail
    for ask in (lambda: model.tail, model.private_tail):
        with refused("resnet20 was not cut", "--tail-layer"):
            ask()
    assert build("resnet20", "layer3").spec.metadata() == model.spec.metadata()  # the weights' file stays the same


def test_the_gradient_goes_through_trunk_and_tail() -> None:
    """What an attack on the tail scope needs."""
    model, images = build("resnet20"), random_images(4).requires_grad_(True)
    activation = model.trace(images).activation
    assert activation is not None
    (through,) = torch.autograd.grad(model.tail(activation).logsumexp(1).sum(), images)
    (whole,) = torch.autograd.grad(model(images).logsumexp(1).sum(), images)
    torch.testing.assert_close(through, whole)
