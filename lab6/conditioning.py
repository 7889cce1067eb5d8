"""How the network learns of the labels: modules that turn a multi-hot vector into what a U-Net takes. Notebook 03.

To add one, write a module like those below and enter it in CONDITIONINGS. It is made with the width of the time
embedding, the width of a token and whether there is a null condition, and has

    pools          it gives a (B, width) vector that is added to the time embedding
    gives_tokens   it gives (B, slots, token_width) tokens for cross-attention, all of which are attended to; with
                   one_per_object only as many as the label set has objects, but at least three
    blob_channels  the channels that it adds to the network's input; 0, unless it is told where the objects stand
    null           the learned input that takes the labels' place, or None
    forward        (labels (B, 24), null (B,) bool) -> (pooled or None, tokens or None); with blob_channels it
                   also takes places (B, 24, 2), and `paint` gives the additional input

Stands on labels.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lab6.labels import COLOURS, OBJECTS, SHAPES


class LinearCondition(nn.Module):
    """Multi-hot labels through one linear layer, to be added to the time embedding.

    forward(labels (B, 24), null (B,) bool) -> (pooled (B, width), None). Where null is True, a learned vector takes
    their place. It must not be a label vector, and all zeros ("no object") would be one.
    """

    pools, gives_tokens, one_per_object, blob_channels = True, False, False, 0

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

    pools, gives_tokens, one_per_object, blob_channels = False, True, False, 0
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

    pools, gives_tokens, one_per_object, blob_channels = True, True, True, 0

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
        present, index = self.slots_of(labels)
        tokens = torch.where(present[..., None], table[index], self.empty.to(table))
        pooled = self.pool(labels)
        if self.null is not None:
            tokens = torch.where(null[:, None, None], self.null.to(table), tokens)
            pooled = torch.where(null[:, None], self.null_pooled.to(pooled), pooled)
        return pooled, tokens

    def slots_of(self, labels):
        """Which object each slot holds: (is it filled, the object's index), both (B, slots)."""
        slots = self.slots or max(3, int(labels.sum(1).max()))
        present, index = labels.sort(dim=1, descending=True, stable=True)
        return present[:, :slots] > 0, index[:, :slots]


class LayoutCondition(TokenCondition):
    """`TokenCondition` that is also told where the objects stand, as far as that is known.

    An object's place is added to its token, as Fourier features of x and y through a small network, and its token is
    painted into the input as a blob: a Gaussian around the place, in 16 channels. So where the network paints an object
    it also sees which, before attention has sorted that out. Under the null condition the blobs stay, with the null
    token: the network is told that something stands there, not what. An object of unknown place (nan) has no blob.

    forward(labels (B, 24), null (B,) bool, places (B, 24, 2), x and y in pixels of the 64 x 64 image) -> (pooled,
    tokens).
    """

    blob_channels = 16
    radius = 5.0  # of a blob: its standard deviation in pixels; an object is about 12 wide
    octaves = 6  # of the Fourier features: wavelengths of 128, 64, ..., 4 pixels

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__(width, token_dim, null_condition)
        features = 4 * self.octaves
        self.place = nn.Sequential(nn.Linear(features, token_dim), nn.SiLU(), nn.Linear(token_dim, token_dim))
        nn.init.zeros_(self.place[2].weight)  # at first a token is as it would be without a place
        nn.init.zeros_(self.place[2].bias)
        self.blob = nn.Linear(token_dim, self.blob_channels)
        # Where the first three objects stand in scenes of the training data: what `draw_places` draws from.
        self.register_buffer("layouts", torch.full((2048, 3, 2), torch.nan))

    def remember(self, places):
        """Keep 2,048 of these layouts (M, 3, 2) with the weights; each several times where there are fewer."""
        if len(places):
            self.layouts.copy_(places[torch.arange(len(self.layouts)) * len(places) // len(self.layouts)])

    def forward(self, labels, null, places=None):
        pooled, tokens = super().forward(labels, null)
        if places is not None:
            places, known = self.by_slot(labels, places)
            waves = places[..., None] * 2 ** torch.arange(self.octaves, device=places.device) * (2 * math.pi / 128)
            features = torch.cat([waves.sin(), waves.cos()], -1).flatten(2)
            tokens = tokens + known * self.place(features.to(tokens))
        return pooled, tokens

    def paint(self, labels, tokens, places, size):
        """The blobs of all objects of known place, (B, 16, size, size)."""
        places, known = self.by_slot(labels, places)
        maps = self.gaussians(places, size).to(tokens)
        return torch.einsum("bsyx,bsc->bcyx", maps, known * self.blob(tokens))

    def by_slot(self, labels, places):
        """Place of each slot's object, (B, slots, 2), and whether it is known, (B, slots, 1); 0 where it is not."""
        present, index = self.slots_of(labels)
        places = places.gather(1, index[..., None].expand(-1, -1, 2))
        return places.nan_to_num(), (present & places.isfinite().all(2))[..., None]

    def gaussians(self, places, size):
        """A map for each place, 1 there and falling around it: (B, slots, 2) -> (B, slots, size, size)."""
        grid = (torch.arange(size, device=places.device) + 0.5) * 64 / size
        x, y = (torch.exp(-(((grid - place) / self.radius) ** 2) / 2) for place in places.split(1, dim=2))
        return y[..., :, None] * x[..., None, :]


#: Ways of telling the network the labels: name -> class of the module.
CONDITIONINGS = {
    "layout": LayoutCondition, "tokens": TokenCondition, "multi-hot": MultiHotCondition, "mlp": MLPCondition,
    "linear": LinearCondition,
}  # fmt: skip
