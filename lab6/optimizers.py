"""Optimisers by name. Notebook 03.

To add one, write a function (options, network) -> an optimiser of torch whose groups of parameters know their own
learning rate, and enter it in OPTIMIZERS. Stands on options.
"""

from __future__ import annotations

import torch
from torch import nn

from lab6.options import Training


def make_adamw(options: Training, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) for all parameters."""
    return torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=options.weight_decay,
                             fused=next(network.parameters()).device.type != "mps")  # fmt: skip


def make_muon(options: Training, network: nn.Module) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for the matrices and convolutions inside the network, whose updates it makes
    orthogonal; AdamW for all else: the first and the last convolution, embeddings of objects, norms and biases.

    An update is scaled so that it is as large as AdamW's would be (Liu et al. 2025), hence the similar rates.
    """
    from pytorch_optimizer import Muon
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_gram_newton_schulz

    class PreciseMuon(Muon):
        """The library orthogonalises in half precision, which CPUs must emulate: four times as slow as this."""

        # It overrides a private part: pyproject.toml holds the library to its minor version, a test to what it does.

        @staticmethod
        def _orthogonalize(group, updates):
            if updates[0].device.type != "cpu":
                return Muon._orthogonalize(group, updates)
            flat = (update.reshape(len(update), -1) for update in updates)
            return [zero_power_via_gram_newton_schulz(u, group["ns_steps"], dtype=torch.float32) for u in flat]

    outside = ("conv_in", "conv_out", "condition.colour", "condition.shape", "condition.blob")
    inside = {name for name, p in network.named_parameters() if p.ndim > 1 and not any(o in name for o in outside)}
    groups = [[p for name, p in network.named_parameters() if (name in inside) == chosen] for chosen in (True, False)]
    return PreciseMuon(
        [dict(params=groups[0], use_muon=True, lr=options.muon_learning_rate, use_adjusted_lr=True),
         dict(params=groups[1], use_muon=False, lr=options.learning_rate, betas=(0.9, 0.999), eps=1e-8)],
        weight_decay=options.weight_decay, adamw_wd=options.weight_decay, foreach=True,
    )  # fmt: skip


#: Optimisers that training may use: name -> function (options, network) -> optimiser.
OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon}
