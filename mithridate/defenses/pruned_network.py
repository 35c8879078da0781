"""A classifier's trunk with something done to every activation on the way, many passes at once.

The traced graph is run node by node. What lies before the first changed activation is run once for all passes; the rest
runs on several copies of every image, in one batch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from mithridate.defenses.private_weights import take_over
from mithridate.errors import ModelError, OptionError
from mithridate.models import Classifier
from mithridate.models.classifier import padded, pooled

Change = Callable[[torch.Tensor], torch.Tensor]
"""What is done to an activation, ``[rows, ...]`` to the same."""

_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
)
_FUNCTIONS = {kind.__name__.lower() for kind in _MODULES} | {"leaky_relu"}
_PROBES = 3
_AGREEMENT = 1e-4


class ChangedTrunk:
    """``classifier``'s trunk, changed behind ``layers``: every activation function, or those of ``names`` that are
    given.

    ``sizes``: how many numbers each of them has an image. Raises ModelError where the network could not be traced or
    has no activation function, OptionError for a layer that is not there.
    """

    def __init__(self, classifier: Classifier, layers: Iterable[str] | None = None) -> None:
        trunk = classifier.traced_trunk
        nodes = list(trunk.graph.nodes)
        names = [node.name for node in nodes if _is_activation(trunk, node)]
        if not names:
            raise ModelError(f"{classifier.spec.arch} has no activation function before its last layer")
        chosen = names if layers is None else list(layers)
        for name in chosen:
            if name not in names:
                raise OptionError(f"the network has no activation function {name!r}; allowed: {', '.join(names)}")
        self.names = tuple(name for name in names if name in chosen)
        self._classifier, self._layers = classifier, _layers(trunk)
        self._changed = {node for node in nodes if node.name in chosen}
        self._head_input: fx.Node = nodes[-1].args[0][1]
        self._of_images = _downstream({node for node in nodes if node.op == "placeholder"})
        self.sizes = self._probe(nodes)

    def with_layers(self, change: Callable[[nn.Module], nn.Module]) -> ChangedTrunk:
        """The same with ``change(layers)`` in the place of its layers: same names, same shapes, other weights."""
        other = copy.copy(self)
        other._layers = change(self._layers)
        return other

    def begin(self, images: torch.Tensor) -> Passes:
        """``[N, C, H, W]``: runs what all passes share."""
        return Passes(self, self._classifier.normalise(images))

    def _probe(self, nodes: list[fx.Node]) -> tuple[int, ...]:
        """The sizes; and whether a first part may be run once, or there is none (a size is taken in it, say)."""
        classifier, sizes, behind = self._classifier, [], _downstream(self._changed)

        def note(activation: torch.Tensor) -> torch.Tensor:
            sizes.append(activation[0].numel())
            return activation

        random = torch.Generator().manual_seed(0)
        images = torch.rand(2, *classifier.spec.image_shape, generator=random).to(classifier.device)
        with torch.no_grad():
            wanted = classifier.trace(images).head_input.repeat_interleave(_PROBES, 0)
            for first in ([node for node in nodes if node not in behind], []):
                rest = [node for node in nodes if node not in first]
                crossing = {used for node in rest for used in node.all_input_nodes}
                self._first, self._rest = _program(first, crossing), _program(rest, {self._head_input})
                with suppress(RuntimeError):
                    sizes.clear()
                    seen = self.begin(images).run(note, _PROBES)
                    if seen.shape == wanted.shape and (seen - wanted).abs().max() <= _AGREEMENT * wanted.abs().max():
                        return tuple(sizes)
        raise ModelError(f"{classifier.spec.arch} cannot be run on several copies of an image at once")


class Passes:
    """One batch of images on its way through a changed trunk."""

    def __init__(self, trunk: ChangedTrunk, inputs: torch.Tensor) -> None:
        self._trunk, self._inputs = trunk, inputs
        self._first: dict[fx.Node, Any] = {}
        whole = padded(inputs)  # what is dropped behind it must not depend on how many images there are
        self._execute(trunk._first, self._first, whole, None)
        for node, value in self._first.items():
            if node in trunk._of_images and isinstance(value, torch.Tensor) and value.ndim and len(value) == len(whole):
                self._first[node] = value[: len(inputs)]

    def run(self, change: Change, copies: int) -> torch.Tensor:
        """Head inputs ``[N * copies, D]``, the copies of an image side by side; ``change`` sees ``N * copies`` rows."""
        values = _Copies(self._first, self._trunk._of_images, len(self._inputs), copies)
        self._execute(self._trunk._rest, values, self._inputs.repeat_interleave(copies, 0), change)
        return pooled(values[self._trunk._head_input])

    def _execute(
        self, program: _Program, values: dict[fx.Node, Any], inputs: torch.Tensor, change: Change | None
    ) -> None:
        for node, done_with in program:
            value = _value(self._trunk._layers, node, values, inputs)
            values[node] = change(value) if change is not None and node in self._trunk._changed else value
            for used in done_with:
                values.pop(used, None)


class _Copies(dict[fx.Node, Any]):
    """Values of the second part; those of the first are copied for every pass when they are needed."""

    def __init__(self, first: dict[fx.Node, Any], of_images: set[fx.Node], count: int, copies: int) -> None:
        super().__init__()
        self._first, self._of_images, self._count, self._copies = first, of_images, count, copies

    def __missing__(self, node: fx.Node) -> Any:
        value = self._first[node]
        if node in self._of_images and isinstance(value, torch.Tensor) and value.ndim and len(value) == self._count:
            value = value.repeat_interleave(self._copies, 0)
        self[node] = value
        return value


def _layers(traced: fx.GraphModule) -> nn.Module:
    """What the graph calls and reads, without the graph: copying one compiles it again."""
    layers = nn.Module()
    take_over(traced, layers)
    return layers.eval()


_Program = list[tuple[fx.Node, tuple[fx.Node, ...]]]
"""Nodes in the order in which they run, each with those whose values are not needed any more behind it."""


def _program(nodes: list[fx.Node], kept: set[fx.Node]) -> _Program:
    program: _Program = []
    needed = set(kept)
    for node in reversed(nodes):
        if node.op != "output":
            last = tuple(used for used in node.all_input_nodes if used not in needed)
            needed.update(last)
            program.append((node, last if node in needed else (*last, node)))
    return program[::-1]


def _value(module: nn.Module, node: fx.Node, values: dict[fx.Node, Any], inputs: torch.Tensor) -> Any:
    target = str(node.target)
    if node.op == "placeholder":
        return inputs
    if node.op == "get_attr":
        return operator.attrgetter(target)(module)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return module.get_submodule(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _downstream(nodes: set[fx.Node]) -> set[fx.Node]:
    """These and all that depend on them."""
    found, stack = set(nodes), list(nodes)
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def _is_activation(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _MODULES)
    if node.op not in ("call_function", "call_method"):
        return False
    return str(getattr(node.target, "__name__", node.target)).rstrip("_") in _FUNCTIONS
