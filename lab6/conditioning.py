"""How the network learns of the labels: modules that turn a multi-hot vector into what a U-Net takes. Notebook 03.

To add one, write a module like those below and enter it in CONDITIONINGS. It is made with the width of the time
embedding, the width of a token and whether there is a null condition, and has

    pools         it gives a (B, width) vector that is added to the time embedding
    gives_tokens  it gives (B, slots, token_width) tokens for cross-attention, all of which are attended to; with
                  one_per_object only as many as the label set has objects, but at least three
    null          the learned input that takes the labels' place, or None
    forward       (labels (B, 24), null (B,) bool) -> (pooled or None, tokens or None)

Stands on labels.
"""

from __future__ import annotations

import torch
from torch import nn

from lab6.labels import COLOURS, OBJECTS, SHAPES


class LinearCondition(nn.Module):
    """Multi-hot labels through one linear layer, to be added to the time embedding.

    forward(labels (B, 24), null (B,) bool) -> (pooled (B, width), None). Where null is True, a learned vector takes
    their place. It must not be a label vector, and all zeros ("no object") would be one.
    """

    pools, gives_tokens, one_per_object = True, False, False

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__()
        self.linear = nn.Linear(len(OBJECTS), width)
        self.null = nn.Parameter(torch.zeros(width)) if null_condition else None

    def forward(self, labels, null):
        pooled = self.linear(labels)
        return (pooled if self.null is None else torch.where(null[:, None], self.null, pooled)), None


class MLPCondition(LinearCondition):
    """`LinearCondition` with three layers, GELU and dropout between them (report A)."""

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__(width, token_dim, null_condition)
        between = lambda: (nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width))
        self.linear = nn.Sequential(self.linear, *between(), *between())


class MultiHotCondition(nn.Module):
    """The multi-hot vector itself as the only token for cross-attention (report C); nothing is pooled.

    forward(labels (B, 24), null (B,) bool) -> (None, (B, 1, 24)). Where null is True, a learned vector takes its place.
    """

    pools, gives_tokens, one_per_object = False, True, False
    token_width = len(OBJECTS)

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(len(OBJECTS))) if null_condition else None

    def forward(self, labels, null):
        token = labels if self.null is None else torch.where(null[:, None], self.null.to(labels), labels)
        return None, token[:, None]


class TokenCondition(nn.Module):
    """One token per object for cross-attention, and a pooled vector to be added to the time embedding.

    An object's token is made from its colour's and its shape's embedding, so what is learned about "red" from a red
    cube also serves for a red sphere. There are as many slots as the largest set needs, at least three. Empty slots
    hold a learned token, and under the null condition all slots hold another (if all tokens were masked, there would
    be nothing to attend to).

    forward(labels (B, 24), null (B,) bool) -> (pooled (B, width), tokens (B, slots, token_dim)).
    """

    pools, gives_tokens, one_per_object = True, True, True

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__()
        self.token_width = token_dim
        self.colour = nn.Parameter(torch.randn(1, len(COLOURS), token_dim))
        self.shape = nn.Parameter(torch.randn(len(SHAPES), 1, token_dim))
        self.mix = nn.Sequential(nn.Linear(token_dim, token_dim), nn.SiLU(), nn.Linear(token_dim, token_dim))
        self.empty = nn.Parameter(torch.randn(token_dim))
        self.pool = nn.Sequential(nn.Linear(len(OBJECTS), width), nn.SiLU(), nn.Linear(width, width))
        self.null = nn.Parameter(torch.randn(token_dim)) if null_condition else None
        self.null_pooled = nn.Parameter(torch.zeros(width)) if null_condition else None
        self.slots = 0  # their number, if it is known; otherwise they are counted, for which the host waits for a GPU

    def forward(self, labels, null):
        table = self.mix((self.shape + self.colour).flatten(0, 1))  # (24, token_dim), in the order of OBJECTS
        slots = self.slots or max(3, int(labels.sum(1).max()))
        present, index = labels.sort(dim=1, descending=True, stable=True)
        tokens = torch.where(present[:, :slots, None] > 0, table[index[:, :slots]], self.empty.to(table))
        pooled = self.pool(labels)
        if self.null is not None:
            tokens = torch.where(null[:, None, None], self.null.to(table), tokens)
            pooled = torch.where(null[:, None], self.null_pooled.to(pooled), pooled)
        return pooled, tokens


#: Ways of telling the network the labels: name -> class of the module.
CONDITIONINGS = {
    "tokens": TokenCondition, "multi-hot": MultiHotCondition, "mlp": MLPCondition, "linear": LinearCondition,
}  # fmt: skip
