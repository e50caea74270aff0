"""Muon for the matrices of the layers, Adam for the embedding and the gains.

Both keep float32 master weights: the model itself may be in bfloat16, where small steps vanish.
"""

from __future__ import annotations

from typing import Any

import torch
from tools.train_toy.model import Toy
from torch import Tensor

MUON_RATE, ADAM_RATE = 0.015, 0.003
MOMENTUM = 0.95
BETAS = (0.9, 0.98)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix towards 1 by a quintic Newton-Schulz iteration.

    The coefficients trade exactness for speed: five rounds bring every value of a normalized
    matrix that is not tiny somewhere near 1, which is all that a direction of descent needs.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Optimizer:
    def __init__(self, model: Toy, average: float = 0.995) -> None:
        self.parameters = dict(model.named_parameters())
        self.masters = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.second = {
            n: torch.zeros_like(m) for n, m in self.masters.items() if not self._by_muon(n)
        }
        self.averages = {n: m.clone() for n, m in self.masters.items()}
        self.average, self.steps = average, 0

    def _by_muon(self, name: str) -> bool:
        return self.masters[name].ndim == 2 and not name.startswith("embed")

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the full learning rates; clears the gradients."""
        self.steps += 1
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.parameters.items():
            if self._by_muon(name):
                alike.setdefault(tuple(parameter.shape), []).append(name)
            else:
                self._adam(name, parameter.grad.float(), scale * ADAM_RATE)
        for names in alike.values():
            self._muon(names, scale * MUON_RATE)
        # Early on the average must not remember the initial weights.
        keep = min(self.average, self.steps / (self.steps + 10))
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
            parameter.grad = None
            self.averages[name].lerp_(self.masters[name], 1 - keep)

    def _adam(self, name: str, grad: Tensor, rate: float) -> None:
        first, second = self.first[name], self.second[name]
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad.square(), 1 - BETAS[1])
        mean = first / (1 - BETAS[0] ** self.steps)
        spread = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(1e-10)
        self.masters[name].addcdiv_(mean, spread, value=-rate)

    def _muon(self, names: list[str], rate: float) -> None:
        """Matrices of one shape are stepped together: one batched product for all layers."""
        steps = []
        for name in names:
            grad = self.parameters[name].grad.float()
            self.first[name].lerp_(grad, 1 - MOMENTUM)
            steps.append(grad.lerp(self.first[name], MOMENTUM))
        rows, columns = steps[0].shape
        rate *= max(1.0, rows / columns) ** 0.5
        for name, step in zip(names, orthogonalize(torch.stack(steps)), strict=True):
            self.masters[name].add_(step.float(), alpha=-rate)

    def state(self) -> dict[str, Any]:
        kept = ("masters", "first", "second", "averages", "steps")
        return {key: getattr(self, key) for key in kept}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
