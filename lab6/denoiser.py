"""The network: a U-Net of diffusers that knows which objects the image should show. Notebook 03.

Stands on settings, conditioning, diffusion, machine, labels and options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D
from torch import nn

from lab6.conditioning import CONDITIONINGS
from lab6.diffusion import q_sample
from lab6.labels import MANUAL_SET, encode_labels
from lab6.machine import autocast, make_generator
from lab6.options import Network
from lab6.settings import Settings

GUIDANCE_EMBEDDING = 64  # width of the embedding of s that a distilled network takes


class Denoiser(ModelMixin, ConfigMixin):
    """A U-Net of diffusers and its label conditioning: (x_t, t, labels) -> eps, v or x_0.

    The arguments are the fields of Settings with the same names. `null_condition` gives it a learned "no labels" input,
    which classifier-free guidance needs. For latents, `image_channels` and `image_size` are theirs (the docstrings say
    (B, 3, 64, 64)). Save and load it through `ICLEVRPipeline`.
    """

    @register_to_config
    def __init__(
        self,
        patch: int = 2,
        channels: tuple[int, ...] = (48, 96, 144),
        layers_per_block: int = 1,
        attention: tuple[str, ...] = ("none", "none", "cross"),
        up_attention: tuple[str, ...] = (),
        head_dim: int = 32,
        norm_groups: int = 16,
        scale_shift: bool = True,
        conditioning: str = "tokens",
        token_dim: int = 128,
        null_condition: bool = True,
        student_steps: int = 0,
        image_channels: int = 3,
        image_size: int = 64,
    ):
        super().__init__()
        self.condition = CONDITIONINGS[conditioning](4 * channels[0], token_dim, null_condition)
        prefix = {"none": "", "self": "Attn", "cross": "CrossAttn"}
        shared = dict(
            sample_size=image_size // patch,
            in_channels=image_channels * patch**2 + self.condition.blob_channels,
            out_channels=image_channels * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple(f"{prefix[a]}DownBlock2D" for a in attention),
            up_block_types=tuple(f"{prefix[a]}UpBlock2D" for a in reversed(up_attention or attention)),
            norm_num_groups=norm_groups,
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            class_embed_type="identity" if self.condition.pools else None,
        )
        if self.condition.gives_tokens:
            self.unet = self._unet_with_tokens(self.condition.token_width, channels, head_dim, student_steps, shared)
        else:
            # The middle block always attends; a head cannot be wider than the channels that attend.
            attending = [channels[-1], *(c for c, a in zip(channels, attention, strict=True) if a == "self")]
            attending += [c for c, a in zip(channels, up_attention, strict=False) if a == "self"]
            self.unet = UNet2DModel(attention_head_dim=min(head_dim, *attending), **shared)

    @staticmethod
    def _unet_with_tokens(width, channels, head_dim, student_steps, shared):
        # In UNet2DConditionModel this argument is the number of heads, despite its name; but blocks that attend to
        # themselves take it for the heads' width, so their heads are set right after.
        heads = tuple(max(1, c // head_dim) for c in channels)
        scale = dict(time_cond_proj_dim=GUIDANCE_EMBEDDING) if student_steps else {}
        unet = UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads, **shared, **scale)
        for block in (*unet.down_blocks, *unet.up_blocks):
            for layer in block.attentions if isinstance(block, AttnDownBlock2D | AttnUpBlock2D) else ():
                layer.heads = max(1, layer.inner_dim // head_dim)
                layer.scale = (layer.inner_dim / layer.heads) ** -0.5
        if student_steps:
            nn.init.zeros_(unet.time_embedding.cond_proj.weight)  # a distilled network begins as its teacher
        return unet

    @contextlib.contextmanager
    def expecting(self, objects: int):
        """Within it no label set has more objects than this: the network need not count them at every call, for which
        the host would wait for a GPU."""
        before, self.condition.slots = getattr(self.condition, "slots", 0), max(3, objects)
        try:
            yield
        finally:
            self.condition.slots = before

    def check_null(self):
        """Raise ValueError where the network has no null condition."""
        if self.condition.null is None:
            raise ValueError(
                "this model has no null condition (it was trained with label_dropout=0), so it has no classifier-free "
                "guidance and no composition: use guidance_scale=1, or train with label_dropout=0.1"
            )

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, null: torch.Tensor | None = None,
                guidance_scale: torch.Tensor | float = 1.0, places: torch.Tensor | None = None):  # fmt: skip
        """Predict what `prediction` names.

        Args:
            x_t: (B, 3, 64, 64); t: (B,) or () integers; labels: (B, 24) multi-hot.
            null: (B,) bool, True where the labels are to be ignored; default nowhere.
            guidance_scale: s of classifier-free guidance, (B,) or one for all; only a distilled network uses it.
            places: (B, 24, 2) x and y in pixels where each object is to stand, nan where that is open; only a network
                with conditioning="layout" uses it.

        Returns:
            (B, 3, 64, 64)

        Raises:
            ValueError: null is True somewhere, and the network has no null condition.
        """
        if null is None:
            null = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        elif self.condition.null is None and null.any():
            self.check_null()
        dtype = self.unet.conv_in.weight.dtype  # self.dtype would walk through all modules, half a millisecond
        x = F.pixel_unshuffle(x_t.to(dtype), self.config.patch)
        labels = labels.to(dtype)
        if self.condition.blob_channels:
            places = labels.new_full((*labels.shape, 2), torch.nan) if places is None else places
            pooled, tokens = self.condition(labels, null, places)
            x = torch.cat([x, self.condition.paint(labels, tokens, places, x.shape[-1])], 1)
        else:
            pooled, tokens = self.condition(labels, null)
        x = x.contiguous(memory_format=torch.channels_last)
        extra = {} if tokens is None else {"encoder_hidden_states": tokens}
        # The other sets of the batch do not see a larger set's slots.
        if self.condition.one_per_object and tokens.shape[1] > 3:
            slots = torch.arange(tokens.shape[1], device=labels.device)
            extra["encoder_attention_mask"] = slots < labels.sum(1, keepdim=True).clamp(min=3)
        if self.config.student_steps:
            if not isinstance(guidance_scale, torch.Tensor):  # full, since as_tensor would let the host wait for a GPU
                guidance_scale = torch.full((), float(guidance_scale), device=x.device)
            scale = guidance_scale.to(x.device).expand(len(x))
            extra["timestep_cond"] = get_timestep_embedding(100 * scale, GUIDANCE_EMBEDDING).to(dtype)
        return F.pixel_shuffle(self.unet(x, t, class_labels=pooled, **extra).sample, self.config.patch)


def denoiser_arguments(settings: Settings) -> dict:
    """The arguments of `Denoiser` for the network of `settings`."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(Network)} | dict(
        null_condition=settings.label_dropout > 0,
        student_steps=settings.student_steps,
        image_channels=3 if settings.space == "pixels" else settings.latent_channels,
        image_size=settings.image_size,
    )


def make_denoiser(settings: Settings, device: str | None = None) -> Denoiser:
    """The network of `settings`, initialised from its seed, on their device or another ("meta": shapes only)."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(settings.seed)
        denoiser = Denoiser(**denoiser_arguments(settings))
    return denoiser.to(device or settings.device, memory_format=torch.channels_last)


def count_flops(settings: Settings) -> int:
    """Floating-point operations of one forward pass of the network of `settings` over one image, as torch's
    FlopCounterMode counts them: matrix products, convolutions and attention. A training step takes three times as many
    for each image."""
    return _count_flops(**denoiser_arguments(settings))


@functools.cache  # dozens of experiments have the same network
def _count_flops(**arguments):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng(devices=[]):
        denoiser = Denoiser(**arguments)
    channels, size = arguments["image_channels"], arguments["image_size"]
    whole = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), whole:
        denoiser(torch.zeros(1, channels, size, size), torch.tensor(0), encode_labels(MANUAL_SET))
    return counter.get_total_flops()


def describe_denoiser(denoiser: Denoiser) -> list[dict]:
    """The parts of a denoiser in the order of computation, measured by passing one image through it.

    Returns:
        One dict a part: part, kind, output (channels, height, width), attention (none, self, cross), parameters.
    """
    unet, rows, hooks = denoiser.unet, [], []
    downs = [(f"down {i}", block) for i, block in enumerate(unet.down_blocks)]
    ups = [(f"up {i}", block) for i, block in enumerate(unet.up_blocks)]
    parts = [("input", unet.conv_in), *downs, ("middle", unet.mid_block), *ups, ("output", unet.conv_out)]

    def record(name, module, output):
        tensor = output[0] if isinstance(output, tuple) else output
        attentions = [type(a).__name__ for a in getattr(module, "attentions", None) or [] if a is not None]
        kind = "none" if not attentions else "self + cross" if "Transformer" in attentions[0] else "self"
        rows.append(dict(part=name, kind=type(module).__name__, output=tuple(tensor.shape[1:]), attention=kind,
                         parameters=count_parameters(module)))  # fmt: skip

    for name, module in parts:
        hooks.append(module.register_forward_hook(lambda m, _, out, name=name: record(name, m, out)))
    with torch.no_grad():
        size = denoiser.config.image_size
        x = torch.zeros(1, denoiser.config.image_channels, size, size, device=denoiser.device)
        denoiser(x, torch.tensor(0, device=denoiser.device), encode_labels(MANUAL_SET).to(denoiser.device))
    for hook in hooks:
        hook.remove()
    pooled = (4 * denoiser.config.channels[0],)
    time = unet.time_embedding
    return [
        dict(part="labels", kind=type(denoiser.condition).__name__, output=pooled, attention="none",
             parameters=count_parameters(denoiser.condition)),
        dict(part="time", kind=type(time).__name__, output=pooled, attention="none", parameters=count_parameters(time)),
        *rows,
    ]  # fmt: skip


@torch.no_grad()
def label_effect(denoiser: Denoiser, x_0, labels, t: int, alpha_bar, settings: Settings) -> float:
    """How much the prediction at time t changes when each image gets the labels of the next one.

    Args:
        x_0: (B, 3, 64, 64) real images; labels: (B, 24); alpha_bar: (T,).

    Returns:
        Root mean squared change over the root mean square of the prediction.
    """
    times = torch.full((len(x_0),), int(t))
    eps = torch.randn(x_0.shape, generator=make_generator(settings.seed, "label effect"))
    x_t = q_sample(x_0, times, eps, alpha_bar)
    x_t, times, labels = (v.to(denoiser.device) for v in (x_t, times, labels))
    with autocast(settings):
        right, wrong = (denoiser(x_t, times, y).float() for y in (labels, labels.roll(1, 0)))
    return ((right - wrong).pow(2).mean() / right.pow(2).mean()).sqrt().item()


def count_parameters(module: nn.Module) -> int:
    """Number of trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters())
