"""Cutting a network at a named layer, without asking its author to change it.

torch.fx traces the network once, through torchvision's feature extraction where the network is made of torchvision's
parts or a layer has to be found by its name; the cut is made in the traced graph, so that what lies behind the cut is
not run. A network that cannot be traced (control flow that depends on the data) is cut with hooks: the same values, but
the whole network runs.
"""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mithridate.errors import ModelError
from mithridate.models.tails import DEFAULT_TAIL, automatic_cut, check_cut, protected, tail_after

DEFAULT_LAYER = "auto"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A network cut before its last linear layer.

    ``trunk(normalised) -> (embedding, head_input)``, both as the network has them (not yet pooled); with a tail there
    is a third, the activation where the tail begins. ``head`` is the last linear layer where the logits come straight
    out of one, else None. ``tail(activation) -> logits`` where one was asked for, else None.
    """

    trunk: nn.Module
    head: nn.Linear | None
    layer: str
    tail: nn.Module | None = None


def split_network(
    network: nn.Module, *, example: torch.Tensor, layer: str = DEFAULT_LAYER, tail_layer: str | None = None
) -> Split:
    """Cuts ``network`` (in evaluation mode) at ``layer``; ``auto`` is what feeds the last linear layer.

    ``tail_layer`` is where the tail begins; ``auto`` is the last place that leaves it a layer besides the head.

    ``layer`` is a module (``layer3``, ``features.4``) or any node that torchvision's ``get_graph_node_names`` lists.
    ``example``, a normalised batch, is run where the network cannot be traced, and to find a tail. The parts share
    their parameters with ``network``. Raises ModelError for a layer that is not there, or where no tail can begin.
    """
    named = layer != DEFAULT_LAYER or tail_layer not in (DEFAULT_TAIL, None)
    try:
        graph_module = _trace(network, by_name=named)
    except Exception as error:  # tracing runs the network symbolically: anything may come out if that is not possible
        if tail_layer is not None:
            raise ModelError("the network cannot be traced, and a tail can only be cut out of one that can") from error
        return _split_with_hooks(network, layer, example)
    output = _output_node(graph_module.graph)
    linear = _last_linear(graph_module, output)
    head_input = linear.args[0] if linear is not None else None
    if layer != DEFAULT_LAYER:
        embedding = _node_named(network, graph_module.graph, layer)
    else:
        embedding = head_input if isinstance(head_input, fx.Node) else _before_output(graph_module, output)
    points = [embedding, head_input if isinstance(head_input, fx.Node) else embedding]
    tail = None
    if tail_layer is not None:
        if tail_layer == DEFAULT_TAIL:
            cut = automatic_cut(graph_module, output, linear, example)
        else:
            cut = _node_named(network, graph_module.graph, tail_layer)
            check_cut(graph_module, cut, output, tail_layer, example)
        points.append(cut)
        tail = tail_after(graph_module, cut, output)
    head = graph_module.get_submodule(str(linear.target)) if linear is not None else None
    trunk = _cut(graph_module, *points)
    return Split(trunk=trunk, head=head if isinstance(head, nn.Linear) else None, layer=layer, tail=tail)


def _extractor(network: nn.Module, layer: str) -> fx.GraphModule:
    from torchvision.models import feature_extraction

    with warnings.catch_warnings():  # it warns where training and evaluation graphs differ; only the latter is used
        warnings.simplefilter("ignore")
        module = feature_extraction.create_feature_extractor(
            network, train_return_nodes=[layer], eval_return_nodes=[layer], suppress_diff_warning=True
        )
    graph_module: fx.GraphModule = module.eval()
    return graph_module


def _trace(network: nn.Module, *, by_name: bool) -> fx.GraphModule:
    """Nodes have the names that ``_extractor`` gives them only where they are found ``by_name``."""
    if not by_name and "torchvision" not in sys.modules:
        # Its import takes as long as torch's own, and nothing of the network can be torchvision's.
        return fx.symbolic_trace(network).eval()
    from torchvision.models import feature_extraction

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_names, eval_names = feature_extraction.get_graph_node_names(network, suppress_diff_warning=True)
        module = feature_extraction.create_feature_extractor(
            network,
            train_return_nodes=[train_names[-1]],
            eval_return_nodes=[eval_names[-1]],
            suppress_diff_warning=True,
        )
    graph_module: fx.GraphModule = module.eval()
    return graph_module


def _output_node(graph: fx.Graph) -> fx.Node:
    """The node whose value the network returns (feature extraction wraps it in a dictionary)."""
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    value = next(iter(result.values())) if isinstance(result, dict) else result
    assert isinstance(value, fx.Node)
    return value


def _last_linear(module: fx.GraphModule, output: fx.Node) -> fx.Node | None:
    is_linear = output.op == "call_module" and isinstance(module.get_submodule(str(output.target)), nn.Linear)
    return output if is_linear else None


def _before_output(module: fx.GraphModule, output: fx.Node) -> fx.Node:
    """Where the logits do not come out of a linear layer: what feeds the last layer that has weights."""
    node = output
    while node.all_input_nodes:
        if node.op == "call_module" and any(True for _ in module.get_submodule(str(node.target)).parameters()):
            return node.all_input_nodes[0]
        node = node.all_input_nodes[0]
    raise ModelError("the network has no layer with weights, so there is nothing to embed with; give embedding_layer")


def _node_named(network: nn.Module, graph: fx.Graph, layer: str) -> fx.Node:
    try:
        name = _output_node(_extractor(network, layer).graph).name
    except (ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"the network has no layer {layer!r}; its parts are {_children(network)}") from error
    found: fx.Node | None = next((node for node in graph.nodes if node.name == name), None)
    if found is None:
        raise ModelError(f"nothing of the layer {layer!r} reaches the logits; the parts are {_children(network)}")
    return found


def _children(network: nn.Module) -> str:
    return ", ".join(name for name, _ in network.named_children()) or "(none)"


def _cut(module: fx.GraphModule, embedding: fx.Node, head_input: fx.Node, cut: fx.Node | None = None) -> nn.Module:
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    graph.graph_copy(module.graph, copies)
    results = [copies[embedding], copies[head_input]]
    if cut is not None:
        with graph.inserting_after(copies[cut]):
            results.append(protected(graph, copies[cut], cut, module))
    graph.output(tuple(results))
    trunk = fx.GraphModule(module, graph)
    trunk.graph.eliminate_dead_code()
    trunk.delete_all_unused_submodules()
    trunk.recompile()
    return trunk


class _HookTrunk(nn.Module):
    """Runs the whole network and keeps what passed by; one call at a time."""

    def __init__(self, network: nn.Module, embedding: nn.Module, head: nn.Linear | None, *, before: bool) -> None:
        super().__init__()
        # Held in tuples so that the network is not registered a second time under this module.
        self._parts = (network, embedding, head)
        self._before = before
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> _HookTrunk:
        import copy

        network, embedding, head = (copy.deepcopy(part, memo) for part in self._parts)
        assert isinstance(network, nn.Module)
        assert isinstance(embedding, nn.Module)
        return _HookTrunk(network, embedding, head if isinstance(head, nn.Linear) else None, before=self._before)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        network, embedding, head = self._parts
        seen: dict[str, torch.Tensor] = {}
        thread = threading.get_ident()

        def keep(name: str, value: torch.Tensor) -> None:
            if threading.get_ident() == thread:  # other requests may run the same layers just now
                seen[name] = value

        with self._lock:
            handles = [
                embedding.register_forward_pre_hook(lambda _, args: keep("embedding", args[0]))
                if self._before
                else embedding.register_forward_hook(lambda _, __, out: keep("embedding", out))
            ]
            if head is not None:
                handles.append(head.register_forward_pre_hook(lambda _, args: keep("head_input", args[0])))
            try:
                network(images)
            finally:
                for handle in handles:
                    handle.remove()
        return seen["embedding"], seen.get("head_input", seen["embedding"])


def _split_with_hooks(network: nn.Module, layer: str, example: torch.Tensor) -> Split:
    last, head = _last_linear_run(network, example)
    if layer == DEFAULT_LAYER:
        if last is None:
            raise ModelError("the network cannot be traced and has no linear layer; name a module as embedding layer")
        return Split(trunk=_HookTrunk(network, last, head, before=True), head=head, layer=layer)
    modules = dict(network.named_modules())
    if layer not in modules:
        raise ModelError(f"the network has no layer {layer!r}; its parts are {_children(network)}")
    return Split(trunk=_HookTrunk(network, modules[layer], head, before=False), head=head, layer=layer)


def _last_linear_run(network: nn.Module, example: torch.Tensor) -> tuple[nn.Linear | None, nn.Linear | None]:
    """The linear layer that runs last, and the same again where its output is what the network returns, else None."""
    seen: list[tuple[nn.Linear, torch.Tensor]] = []
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(lambda layer, _, out: seen.append((layer, out))) for layer in linears]
    try:
        answer = network(example)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        return None, None
    last, output = seen[-1]
    return last, last if output is answer else None
