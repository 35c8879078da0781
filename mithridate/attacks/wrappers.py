"""What makes an attack by gradients fit a defence that is random (EOT) or has no useful gradient (BPDA).

Both take what an attack calls and give another: ``attack.run(expectation(forward, copies=20), ...)``.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch

from mithridate.attacks.judging import Forward
from mithridate.types import Images, Logits


def expectation(forward: Forward, *, copies: int, generator: torch.Generator | None = None) -> Forward:
    """Expectation over transformation (Athalye et al. 2018, arXiv:1707.07397): the log of the mean probability over
    ``copies`` calls of a random ``forward``, with its gradient, the mean over all calls'.

    ``generator``: where ``forward`` draws from, if from nothing else. Only one call's activations are then held at a
    time, however many ``copies``: for the gradient each call is repeated with the same draws, which costs another pass
    forward. Without it all calls' activations are held. Raises ValueError for less than one copy.
    """
    if copies < 1:
        raise ValueError(f"an expectation is over at least 1 copy; seen: {copies}")

    def averaged(images: Images) -> Logits:
        if generator is not None and images.requires_grad and torch.is_grad_enabled():
            result: Logits = _Expectation.apply(images, forward, copies, generator)
            return result
        return _log_mean([forward(images).log_softmax(1) for _ in range(copies)])

    return averaged


def straight_through(exact: Forward, approximation: Forward) -> Forward:
    """Backward pass differentiable approximation (Athalye et al. 2018, arXiv:1802.00420): the values of ``exact``, bit
    for bit, with the gradient of ``approximation``.

    Either a whole network or only what stands before one: ``lambda images: network(straight_through(quantise, lambda
    images: images)(images))``. Both have to give the same shape; raises ValueError where they do not.
    """

    def call(images: Images) -> torch.Tensor:
        with torch.no_grad():
            values = exact(images)
        if not torch.is_grad_enabled():
            return values
        path = approximation(images)
        if path.shape != values.shape:
            raise ValueError(
                f"an approximation gives what it stands for; seen: {list(path.shape)} for {list(values.shape)}"
            )
        result: torch.Tensor = _StraightThrough.apply(path, values)
        return result

    return call


def _log_mean(calls: list[Logits]) -> Logits:
    return torch.stack(calls).logsumexp(0) - log(len(calls))


class _Expectation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Images, forward: Forward, copies: int, generator: torch.Generator) -> Logits:
        states, calls = [], []
        for _ in range(copies):
            states.append(generator.get_state())
            calls.append(forward(images.detach()).log_softmax(1))
        mean = _log_mean(calls)
        ctx.repeat, ctx.generator, ctx.states = forward, generator, states
        ctx.save_for_backward(images, mean, *calls)
        return mean

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> tuple[torch.Tensor, None, None, None]:
        images, mean, *calls = ctx.saved_tensors
        total, after = torch.zeros_like(images), ctx.generator.get_state()
        for state, call in zip(ctx.states, calls, strict=True):
            ctx.generator.set_state(state)
            point = images.detach().requires_grad_()
            with torch.enable_grad():
                again = ctx.repeat(point).log_softmax(1)
            if not again.requires_grad:
                continue
            share = (call - mean).exp().nan_to_num(nan=0.0) / len(calls)  # of this call in the mean probability
            total += torch.autograd.grad(again, point, upstream * share)[0]
        ctx.generator.set_state(after)
        return total, None, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> tuple[torch.Tensor, None]:
        return upstream, None
