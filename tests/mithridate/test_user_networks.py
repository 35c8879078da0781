"""A user's own network: any module that a factory makes works, traceable or not, or is refused in one line."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mithridate.defenses.none import base_pass
from mithridate.errors import ModelError
from mithridate.models import Classifier, build_classifier, is_factory


def build(arch: str, layer: str = "auto") -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_classifier(arch, num_classes=10, image_shape=(1, 8, 8), embedding_layer=layer)


def random_images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A ModelError of one line that holds each of ``parts``."""
    with pytest.raises(ModelError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a user's own module and gives its name; forgotten after the test."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "their_nets.py").write_text(f"import torch\nfrom torch import nn\n\n{source}")
        return "their_nets"

    yield write
    for name in set(sys.modules) - known:
        if name.startswith("their_nets"):
            del sys.modules[name]


_PLAIN = """
class Net(nn.Module):
    def __init__(self, num_classes, tail=1, wild=False, backwards=False):
        super().__init__()
        if backwards:
            self.head = nn.Linear(8, num_classes)
        self.first = nn.Linear(64, 8)
        if not backwards:
            self.head = nn.Linear(8, num_classes)
        self.tail, self.wild = tail, wild

    def forward(self, x):
        hidden = torch.relu(self.first(x.flatten(1)))
        if self.wild and bool(hidden.sum() < -1):  # cannot be traced
            hidden = -hidden
        logits = self.head(hidden)
        return logits if self.tail == 1 else logits * self.tail
"""


def make_net(user_module: Callable[[str], str], options: str, layer: str = "auto") -> Classifier:
    name = user_module(f"{_PLAIN}\ndef make(num_classes):\n    return Net(num_classes, {options})\n")
    try:
        return build(f"{name}:make", layer=layer)
    finally:
        del sys.modules[name]


@pytest.mark.parametrize("layer", ["auto", "first"])
def test_a_network_that_cannot_be_traced_gives_the_numbers_of_its_twin(
    user_module: Callable[[str], str], layer: str
) -> None:
    wild, tame = (make_net(user_module, f"wild={wild}", layer) for wild in (True, False))
    images = random_images(5)
    with torch.no_grad():
        for got, wanted in zip(wild.features(images), tame.features(images), strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(wild(images), tame(images))
        assert torch.equal(wild.head(wild.features(images)[1]), wild(images))


@pytest.mark.parametrize("wild", [True, False])
@pytest.mark.parametrize("options", ["tail=3", "backwards=True", "tail=3, backwards=True"])
def test_the_head_is_the_layer_that_answers_not_the_last_one_registered(
    user_module: Callable[[str], str], options: str, wild: bool
) -> None:
    """A network that scales its logits has no head; that its linear layers are registered in any order is no matter."""
    model, images = make_net(user_module, f"{options}, wild={wild}"), random_images(3)
    assert model.has_head == ("tail" not in options)
    with torch.no_grad():
        torch.testing.assert_close(base_pass(model, images).logits, model(images))
        if not model.has_head:
            assert model.embed(images).shape == (3, 8)


def test_another_request_on_the_same_layers_does_not_change_a_hooked_embedding(
    user_module: Callable[[str], str],
) -> None:
    name = user_module(f"""
import threading
ENTERED, GO_ON = threading.Event(), threading.Event()
{_PLAIN}
class Slow(Net):
    def forward(self, x):
        logits = super().forward(x)
        ENTERED.set()
        assert GO_ON.wait(30)
        return logits

def make(num_classes):
    return Slow(num_classes, wild=True)
""")
    module = importlib.import_module(name)
    module.GO_ON.set()
    model, images = build(f"{name}:make"), random_images(4)
    with torch.no_grad():
        wanted = model.embed(images)
        module.GO_ON.clear()
        module.ENTERED.clear()
        answers: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: answers.append(model.embed(images)))
        thread.start()
        assert module.ENTERED.wait(30)
        model.head(torch.full((4, 8), 9.0))  # what base_pass does for another request
        module.GO_ON.set()
        thread.join(30)
    assert torch.equal(answers[0], wanted)


def test_a_users_buffers_move_with_the_model(user_module: Callable[[str], str]) -> None:
    name = user_module("""
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("average", torch.full((1, 1, 8, 8), 0.3))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.linear((x - self.average).flatten(1))
""")
    model = build(f"{name}:Net").to("meta")  # stands for a GPU: it does not mix with the CPU either
    assert model.embed(random_images(2).to("meta")).device.type == "meta"


def test_a_factory_is_given_what_it_asks_for_and_unnormalised_images(user_module: Callable[[str], str]) -> None:
    name = user_module("""
def make(in_channels, num_classes, **rest):
    assert (in_channels, num_classes, rest) == (1, 10, {})
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def nothing():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
""")
    images = random_images(2)
    for factory in ("make", "nothing"):
        model = build(f"{name}:{factory}")
        assert torch.equal(model.embed(images), images.flatten(1))
    assert is_factory(model.spec.arch)


@pytest.mark.parametrize(
    ("factory", "parts"),
    [
        ("their_nets:missing", ["cannot import 'their_nets:missing'", "AttributeError"]),
        ("no_such_module_of_theirs:make", ["cannot import", "ModuleNotFoundError", "package.module:factory"]),
        (":make", ["cannot import ':make'"]),
        ("their_nets:", ["cannot import 'their_nets:'"]),
        ("their_nets:NUMBER", ["is a int", "callable"]),
        ("their_nets:gives_none", ["returned NoneType", "torch.nn.Module"]),
        ("their_nets:raises", ["failed: KeyError: 'weights'"]),
        ("their_nets:wants_more", ["failed: TypeError", "colour"]),
        ("their_nets:eleven", ["gives (11,) logits an image", "the data has 10 classes"]),
        ("their_nets:pair", ["returns a tuple", "one tensor of logits"]),
        ("their_nets:too_small", ["cannot take 1x8x8 images", "shapes"]),
        ("their_nets:no_weights", ["no layer with weights"]),
        ("their_nets:speechless", ["cannot take 1x8x8 images", "AssertionError"]),
    ],
)
def test_a_bad_factory_is_refused(user_module: Callable[[str], str], factory: str, parts: list[str]) -> None:
    user_module("""
NUMBER = 3
def gives_none(): pass
def raises(): return {}["weights"]
def wants_more(colour): pass
def eleven(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 11))
def too_small(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(9, num_classes))
def no_weights(): return nn.Flatten()
class Pair(nn.Sequential):
    def forward(self, x): return super().forward(x), x
class Speechless(nn.Module):
    def forward(self, x): assert x is None
def speechless(): return Speechless()
def pair(num_classes): return Pair(nn.Flatten(), nn.Linear(64, num_classes))
""")
    with refused(*parts):
        build(factory)
