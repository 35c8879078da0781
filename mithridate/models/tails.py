"""Where a traced network can be cut in two, and the second half as a module of its own: what the tail scope adapts.

A cut is a node of the traced graph through which everything flows: one tensor that separates the images from the
logits, so that it is all that need be stored of an exemplar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from mithridate.errors import ModelError

DEFAULT_TAIL = "auto"

_PROBES = 3
"""Images run to see shapes: not 2, which could also be the tokens of a transformer (one patch, one class token)."""

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
_FUNCTIONS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")


def separating_nodes(output: fx.Node) -> list[fx.Node]:
    """The nodes through which all paths from the network's input to ``output`` lead, ``output`` too, in order."""
    relevant = _between(output)
    place = {node: number for number, node in enumerate(relevant)}
    separating, reach = [], 0  # reach: the last place where anything computed so far, but for the node itself, is used
    for number, node in enumerate(relevant):
        if reach <= number and (node.op != "placeholder" or number == 0):
            separating.append(node)
        reach = max([reach, *(place[user] for user in node.users if user in place)])
    return separating


def automatic_cut(module: fx.GraphModule, output: fx.Node, head: fx.Node | None, example: torch.Tensor) -> fx.Node:
    """The last separating node that still has a convolution, attention or linear layer besides ``head`` behind it.

    Raises ModelError where there is none.
    """
    layers = [node for node in _between(output) if node is not head and _is_layer(module, node)]
    if layers:
        nodes = list(module.graph.nodes)
        before = nodes.index(layers[-1])
        candidates = {n for n in separating_nodes(output) if nodes.index(n) < before and n.op != "placeholder"}
        usable = _Shapes(module, candidates).found(example)
        if usable:
            return usable[-1]
    raise ModelError(
        "no point of the network separates it into two parts of which the second has a layer to train besides the "
        "head; use rmc:scope=head or rmc:scope=all"
    )


def check_cut(module: fx.GraphModule, cut: fx.Node, output: fx.Node, layer: str, example: torch.Tensor) -> None:
    """Raises ModelError where the network cannot be cut at ``cut``, which the user called ``layer``."""
    if cut not in separating_nodes(output):
        raise ModelError(
            f"the network cannot be cut at the layer {layer!r}: a skip connection runs around it, so its output alone "
            "does not give the logits; name the end of a block instead, or auto"
        )
    if not _Shapes(module, {cut}).found(example):
        raise ModelError(f"the network cannot be cut at the layer {layer!r}: it does not give one tensor a batch")
    if not any(True for _ in tail_after(module, cut, output).parameters()):
        raise ModelError(f"behind the layer {layer!r} there is nothing to train; name an earlier one, or auto")


def tail_after(module: fx.GraphModule, cut: fx.Node, output: fx.Node) -> fx.GraphModule:
    """From the value of ``cut`` to that of ``output``; shares its parameters with ``module``."""
    needed = {output} - {cut}
    stack = list(needed)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node is not cut and node not in needed:
                needed.add(node)
                stack.append(node)
    graph = fx.Graph()
    start = graph.placeholder("activation")
    copies: dict[fx.Node, fx.Node] = {cut: protected(graph, start, cut, module)}
    for node in module.graph.nodes:
        if node in needed and node is not cut:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[output])
    tail = fx.GraphModule(module, graph)
    tail.delete_all_unused_submodules()
    tail.recompile()
    return tail.eval()


def protected(graph: fx.Graph, value: fx.Node, original: fx.Node, module: fx.GraphModule) -> fx.Node:
    """``value`` in ``graph``, copied where what follows ``original`` may write into it (ReLU in place)."""
    return graph.call_method("clone", (value,)) if _is_overwritten(original, module) else value


def _between(output: fx.Node) -> list[fx.Node]:
    """The nodes that depend on the network's input and reach ``output``, in the order in which they run."""
    reaching, stack = {output}, [output]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in reaching:
                reaching.add(node)
                stack.append(node)
    found: dict[fx.Node, None] = {}
    for node in output.graph.nodes:
        if node in reaching and (node.op == "placeholder" or any(n in found for n in node.all_input_nodes)):
            found[node] = None
    return list(found)


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether this is a convolution, attention or linear layer: a matrix to train, not just a scale and a shift."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        norm = isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
        return not norm and any(parameter.ndim > 1 for parameter in layer.parameters())
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    if not (any(part in name for part in ("conv", "linear", "attention")) or name in _FUNCTIONS):
        return False
    return any(n.op == "get_attr" and isinstance(_attribute(module, n), nn.Parameter) for n in node.all_input_nodes)


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _is_overwritten(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether an operation in place may change the value of ``node``, or a view of it, after it was computed."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            layer = module.get_submodule(str(user.target)) if user.op == "call_module" else None
            name = str(getattr(user.target, "__name__", user.target))
            if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
                return True
            if getattr(layer, "inplace", False) or user.kwargs.get("inplace", False):
                return True
            makes_new = layer is not None and any(True for _ in layer.parameters())
            if user not in seen and not makes_new:  # it may be a view: flatten, dropout in evaluation mode ...
                seen.add(user)
                stack.append(user)
    return False


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps which of ``wanted`` give one floating-point tensor with a row an image."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self._usable: list[fx.Node] = []

    def found(self, example: torch.Tensor) -> list[fx.Node]:
        """Those of ``wanted``, in the order in which they run."""
        with torch.no_grad():
            self.run(example[:1].expand(_PROBES, *example.shape[1:]))
        return self._usable

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if n in self._wanted and is_float and value.ndim > 1 and len(value) == _PROBES:
            self._usable.append(n)
        return value
