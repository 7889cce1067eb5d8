"""What counts in the loss, and how fast the network learns from it. Notebook 03.

Stands on settings and diffusion.
"""

from __future__ import annotations

import torch

from lab6.diffusion import snr
from lab6.settings import Settings


def learning_rate(settings: Settings, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay_fraction` of training.

    While it is constant it does not depend on the length of the training, so a run can be prolonged. The rate of Muon
    goes the same way.
    """
    return settings.learning_rate * rate_factor(settings, step, total_steps)


def rate_factor(settings: Settings, step: int, total_steps: int) -> float:
    """The share of each learning rate that holds at a step, from 0 to 1 (see `learning_rate`)."""
    up = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    down = min(1.0, (total_steps - step) / max(1.0, settings.decay_fraction * total_steps))
    return up * (down if settings.decay_fraction else 1.0)


def loss_weights(settings: Settings, alpha_bar: torch.Tensor) -> torch.Tensor:
    """How much the squared error of the prediction counts at each t, (T,): ones, or min-SNR (Hang et al. 2023).

    min-SNR weighs the error of x_0 by min(SNR, gamma). The error of eps is SNR times it, that of v SNR + 1 times.
    "balanced" weights follow from the errors themselves: see `Balance`.
    """
    if settings.loss_weighting in ("none", "balanced"):
        return torch.ones_like(alpha_bar)
    ratio = snr(alpha_bar)
    by = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}[settings.prediction]
    return ratio.clamp(max=settings.min_snr_gamma) / by


class Balance:
    """Weights of the loss that let all times count alike: one over the running mean of the error around t.

    Near t = 0 the network is asked for the grain of the image, which it cannot know: the error is large there and
    hardly falls, while the objects are decided where it is small.

    Attributes:
        errors: (BINS,) running mean of the squared error of the prediction in equal parts of the time from 0 to T.
    """

    BINS, MEMORY, LOWEST, HIGHEST = 20, 0.99, 0.2, 5.0

    def __init__(self, steps: int, device: str):
        self.steps, self.errors = steps, torch.ones(min(steps, self.BINS), device=device)

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """The weight of each time, (B,): 1 in the mean over all times, but within limits."""
        inverse = 1 / self.errors
        return (inverse / inverse.mean()).clamp(self.LOWEST, self.HIGHEST)[self._bins(t)]

    def learn(self, t: torch.Tensor, errors: torch.Tensor):
        """Take the errors (B,) at times t into account; the host does not wait for a GPU."""
        bins, zeros = self._bins(t), torch.zeros_like(self.errors)
        count, total = zeros.index_add(0, bins, torch.ones_like(errors)), zeros.index_add(0, bins, errors)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.errors)
        self.errors.lerp_(mean, 1 - self.MEMORY)

    def _bins(self, t):
        return t * len(self.errors) // self.steps

    def state_dict(self) -> dict:
        """What a checkpoint holds of it."""
        return {"errors": self.errors}

    def load_state_dict(self, saved: dict):
        """Go on from a checkpoint."""
        self.errors.copy_(saved["errors"])
