"""What the tests of the head scope share: the two fits as one would write them by hand, and callers who leave."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from mithridate.defenses import Budget, Defence, Prediction, Resources, build_defence
from mithridate.defenses.head_adam import AdamConfig


def predict(text: str, resources: Resources, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    """One request to the defence that ``text`` names."""
    return answer(build_defence(text, resources), images, budget)


def answer(defence: Defence, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    """One request."""
    return defence.predict(images, generator=torch.Generator().manual_seed(3), budget=budget or Budget())


def allow(looks: int) -> Callable[[], bool]:
    """A caller who is gone after so many looks at the budget."""
    left = iter([False] * looks)
    return lambda: next(left, True)


# The closed form


def slow_ridge(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, points: torch.Tensor, penalty: float
) -> torch.Tensor:
    """One image: the normal equations, (sum_k w_k x_k x_k' + ridge I) W = sum_k w_k x_k t_k', then points W."""
    width, columns = inputs.shape[1], weights[:, None]
    ridge = penalty * float((columns * inputs**2).sum()) / width
    matrix = inputs.T @ (columns * inputs) + ridge * torch.eye(width, dtype=torch.float64)
    return points @ torch.linalg.solve(matrix, inputs.T @ (columns * targets))


# The descent


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How one fit of one head went: the ``head`` after ``kept`` steps, and the held-out ``losses`` before and then."""

    head: nn.Linear
    steps: int
    kept: int
    reason: str
    losses: tuple[float, float]


def slow_descent(
    features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, head: nn.Linear, config: AdamConfig, held: int
) -> Descent:
    """torch's own Adam and gradients; the ``held`` nearest are not learned from, and choose the weights."""
    tuned = deepcopy(head).double().requires_grad_(True)
    start = [parameter.detach().clone() for parameter in tuned.parameters()]
    stay = 1 / (1 + 2 * config.learning_rate * config.anchor)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=config.learning_rate)
    shares = torch.where(torch.arange(len(weights)) < held, 0, weights)
    shares = shares / shares.sum() if held else shares
    validating = weights[:held] / weights[:held].sum()
    best, kept, step, initial = None, 0, 0, 0.0
    while True:
        each = F.cross_entropy(tuned(features.double()), labels, reduction="none")
        loss, validation = (each * shares).sum(), (each[:held] * validating).sum().item() if held else -step
        if best is None or validation < best:
            best, kept, chosen = validation, step, deepcopy(tuned)
        initial = validation if step == 0 else initial
        if loss < config.tolerance:
            reason = "converged"
        elif held and step - kept >= config.patience:
            reason = "patience"
        elif step >= config.steps:
            reason = "max_steps"
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for parameter, home in zip(tuned.parameters(), start, strict=True):
                    parameter.copy_(home + stay * (parameter - home))
            step += 1
            continue
        return Descent(head=chosen, steps=step, kept=kept, reason=reason, losses=(initial, best))


def slow_head_fit(
    features: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    head: nn.Linear,
    config: AdamConfig,
    ceiling: int = 10**9,
) -> tuple[nn.Linear, int, Descent]:
    """One image: the fit that decides, and where it says so the fit on everyone. The head, the steps, the first fit."""
    held = int(config.held_out * len(features))
    allowed = replace(config, steps=max(1, min(config.steps, ceiling)))
    first = slow_descent(features, labels, weights, head, allowed, held)
    if not held or not config.refit or first.kept == 0 or first.steps + first.kept > ceiling:
        return first.head, first.steps, first
    second = slow_descent(features, labels, weights, head, replace(config, steps=first.kept, tolerance=0), 0)
    assert second.steps == first.kept
    return second.head, first.steps + second.steps, first
