"""Batch normalisation whose statistics are frozen, as part of the convolution before it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FoldedConv(nn.Module):
    """A convolution and the batch normalisation behind it, its statistics frozen, as one convolution."""

    def __init__(self, convolution: Any, norm: Any) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolution: Any = self.convolution
        norm: Any = self.norm
        scale = torch.rsqrt(norm.running_var + norm.eps)  # [O]
        scale = scale if norm.weight is None else norm.weight * scale
        centre = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
        shift = -centre * scale if norm.bias is None else norm.bias - centre * scale
        weight = convolution.weight * scale.reshape(-1, *(1,) * (convolution.weight.ndim - 1))
        out: torch.Tensor = convolution._conv_forward(x, weight, shift)
        return out


def fold(traced: fx.GraphModule) -> None:
    """Makes one module of a convolution and a batch normalisation where one follows the other and nothing else uses
    either."""
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    calls.update(str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        names = str(before.target), str(node.target)
        convolution, norm = (traced.get_submodule(name) for name in names)
        if all(calls[name] == 1 for name in names) and _are_plain(convolution, norm):
            traced.set_submodule(names[0], FoldedConv(convolution, norm).eval())
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


def _are_plain(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether these are torch's own layers, unhooked, with statistics that stay."""
    if type(convolution) not in _CONVOLUTIONS or type(norm) not in _NORMS:
        return False
    hooked = any(getattr(layer, hooks) for layer in (convolution, norm) for hooks in _HOOKS)
    return not hooked and not norm.training and norm.running_mean is not None


def quickened(traced: fx.GraphModule) -> fx.GraphModule:
    """A copy that gives the same to rounding (about 1e-6) in less time: folded for good, its weights channels last.

    For frozen weights only: the copy does not follow a change of theirs.
    """
    quick = copy.deepcopy(traced)
    fold(quick)
    for name, module in list(quick.named_modules()):
        if isinstance(module, FoldedConv):
            quick.set_submodule(name, fuse_conv_bn_eval(module.convolution, module.norm))
    return quick.to(memory_format=torch.channels_last).requires_grad_(False)
