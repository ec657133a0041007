"""A discriminator between true and made rows, for the adversarial term of a VAE (Larsen et al. 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (256, 64)
SLOPE = 0.2
PENALTY = 0.1  # on its slope at true rows (R1 of Mescheder et al. 2018): without it the two players circle


class Adversary(nn.Module):
    """Rows [B, K] -> one logit each, positive for true ones; with its own optimiser and its own steps.

    Rows are standardised per column by the training rows, so that no column tells itself apart by its size alone.
    """

    centre: Tensor
    unit: Tensor

    def __init__(self, c: Tensor, *, lr: float) -> None:
        super().__init__()
        std = c.std(0, correction=0)
        self.register_buffer("centre", c.mean(0))
        # Columns that hardly vary would shout: there any made row differs by many deviations.
        least = 0.3 * float(std.square().mean().sqrt().clamp_min(1e-12))
        self.register_buffer("unit", std.clamp_min(least))
        widths = (c.shape[1], *WIDTHS)
        layers: list[nn.Module] = []
        for i, o in zip(widths, WIDTHS):
            layers += [nn.Linear(i, o), nn.LeakyReLU(SLOPE)]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 1)).to(c.device)
        # Less momentum than usual, because its opponent moves (Radford et al. 2016).
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=lr, betas=(0.5, 0.999))

    def forward(self, rows: Tensor) -> Tensor:
        """[B, K] -> [B]."""
        scaled = (rows - self.centre) / self.unit
        return self.net(scaled / rows.shape[1] ** 0.5)[:, 0]

    def learn(self, true: Tensor, made: Tensor) -> float:
        """One step of telling true rows [n, K] from made ones [m, K]; returns the loss."""
        self.net.requires_grad_(True)
        true = true.detach().requires_grad_(True)
        verdict = self(true)
        (slope,) = torch.autograd.grad(verdict.sum(), true, create_graph=True)
        steep = (slope * self.unit).square().sum(1).mean() * true.shape[1]  # in what the net reads
        loss = F.softplus(-verdict).mean() + F.softplus(self(made.detach())).mean()
        loss = loss + 0.5 * PENALTY * steep
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def cost(self, made: Tensor) -> Tensor:
        """What made rows pay for being told apart; the non-saturating loss of Goodfellow et al. 2014."""
        self.net.requires_grad_(False)
        return F.softplus(-self(made)).mean()
