"""Networks with their weights as an argument: a vector a request, so that nobody can change the shared ones.

Made once, when a defence is made. What is spent here is saved at every step: channels last, and batch normalisation
with frozen statistics as part of the convolution before it. That is exact, gradients included: the convolution's
weight is scaled anew at each step, so what is trained are the published network's weight, scale and shift.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import fx, nn
from torch.func import functional_call

from mithridate.models.classifier import _BUILDING
from mithridate.models.folding import fold
from mithridate.types import Logits

_AGREEMENT = 1e-3
"""The fast form must give the network's own logits to this share of the largest one."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One parameter's part of the vector; ``moved`` where its channels come last there."""

    name: str
    shape: torch.Size
    moved: bool

    def cut(self, part: torch.Tensor) -> torch.Tensor:
        """The parameter again, out of its ``part`` of the vector."""
        if not self.moved:
            return part.view(self.shape)
        outputs, inputs, height, width = self.shape
        return part.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


class WeightedNetwork:
    """``network(weights [P], inputs [N, ...]) -> logits [N, C]``, differentiable in both; for one thread at a time."""

    def __init__(self, module: nn.Module, pieces: dict[_Piece, int], *, channels_last: bool) -> None:
        self._module, self._pieces, self._channels_last = module, pieces, channels_last

    def __call__(self, weights: torch.Tensor, inputs: torch.Tensor) -> Logits:
        parts = weights.split(list(self._pieces.values()))
        parameters = {piece.name: piece.cut(part) for piece, part in zip(self._pieces, parts, strict=True)}
        if self._channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits: Logits = functional_call(self._module, parameters, (inputs,))
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class PrivateWeights:
    """``network`` (in evaluation mode) as a function of a weight vector; ``start`` ``[P]`` is the network's own.

    ``example`` is a batch of what the network takes. ``vmap``, which knows no memory formats, may only be applied where
    ``channels_last`` is False. Traces the network: while this is made, no other thread may run one.
    """

    def __init__(self, network: nn.Module, example: torch.Tensor, *, channels_last: bool = True) -> None:
        layouts = (True, False) if channels_last else (False,)
        with torch.no_grad(), _BUILDING:
            expected: Logits = network(example)
            for module, layout in product(_forms(network), layouts):
                self._adopt(module, channels_last=layout)
                if self._agrees(example, expected):
                    break

    def function(self) -> WeightedNetwork:
        """For one caller; shares nothing that running it changes."""
        return WeightedNetwork(_sharing_weights(self._module), self._pieces, channels_last=self._channels_last)

    def parameters(self, weights: torch.Tensor) -> dict[int, nn.Parameter]:
        """The parameters in a weight vector ``[P]``, by the ``id`` of the network's own parameter."""
        own = dict(self._module.named_parameters())
        parts = weights.detach().split(list(self._pieces.values()))
        cut = ((piece, piece.cut(part).contiguous()) for piece, part in zip(self._pieces, parts, strict=True))
        return {id(own[piece.name]): nn.Parameter(value, requires_grad=False) for piece, value in cut}

    def _adopt(self, module: nn.Module, *, channels_last: bool) -> None:
        self._module, self._channels_last = module, channels_last
        named = dict(module.named_parameters())
        pieces = [_Piece(name=n, shape=p.shape, moved=channels_last and p.ndim == 4) for n, p in named.items()]
        self._pieces = {piece: named[piece.name].numel() for piece in pieces}
        parts = [named[p.name].permute(0, 2, 3, 1) if p.moved else named[p.name] for p in pieces]
        self.start = torch.cat([part.detach().reshape(-1) for part in parts])

    def _agrees(self, example: torch.Tensor, expected: Logits) -> bool:
        """Whether this form runs and gives the same: not where code behind the trace wants another memory layout."""
        try:
            logits = self.function()(self.start, example)
        except Exception:  # a user's code may raise anything
            return False
        return bool((logits - expected).abs().max() <= _AGREEMENT * expected.abs().max().clamp_min(1.0))


class _Traced(nn.Module):
    """A traced network whose copies share its code: a copied GraphModule is compiled again, and its source kept for
    ever."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        take_over(traced, self)
        self._code = type(traced).forward  # a plain function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._code(self, x)
        return out


def take_over(traced: fx.GraphModule, holder: nn.Module) -> None:
    """Gives ``holder`` what the graph calls and reads, without the graph itself."""
    for name, child in traced.named_children():
        holder.add_module(name, child)
    for name, parameter in traced.named_parameters(recurse=False):
        holder.register_parameter(name, parameter)
    for name, buffer in traced.named_buffers(recurse=False):
        holder.register_buffer(name, buffer)


def _forms(network: nn.Module) -> Iterator[nn.Module]:
    """The network folded, where it can be traced, and as it is."""
    with contextlib.suppress(Exception):  # tracing runs the network symbolically: anything may come out
        private = _sharing_weights(network)
        graph = private.graph if isinstance(private, fx.GraphModule) else fx.Tracer().trace(private)
        traced = fx.GraphModule(private, graph)
        fold(traced)
        yield _Traced(traced)
    yield _sharing_weights(network)


def _sharing_weights(module: nn.Module) -> nn.Module:
    """A copy of everything but the parameters, which ``functional_call`` replaces and never writes to."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
