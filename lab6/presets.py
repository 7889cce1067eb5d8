"""What profiles and presets fill in: how much is computed, and what each system fixes.

Plain values. Stands on options.
"""

from __future__ import annotations

from lab6.options import Network

#: Each profile says how much is computed; the same notebooks run in all of them.
PROFILES = {
    # the tests: seconds a notebook, every line exercised
    "tiny": dict(batch_size=8, epochs=2, max_images=48, steps=4, seeds=2, ddpm_images=1, evaluator_epochs=1,
                 evaluation_sets=4, rendered_scenes=24, evaluator_scenes=0),
    # the default without a GPU: shipped weights, a short training shown, few seeds
    "quick": dict(epochs=4, max_images=1024, seeds=5, ddpm_images=2),
    # shipped weights, all seeds, a short training shown; writes figures/
    "shipped": dict(epochs=12, max_images=1024, seeds=16),
    # trains everything; wants a GPU
    "full": dict(seeds=16, ddpm_images=32, rendered_scenes=6003),
}  # fmt: skip


# A network that shows something after a minute on a CPU. It sees few, large patches. It predicts x_0, since with so few
# channels and steps it does not learn to reproduce the noise, which eps and v need.
_MINUTE = dict(patch=4, channels=(48, 64, 96), attention=("none", "cross", "none"), prediction="sample", batch_size=16,
               learning_rate=2e-3, muon_learning_rate=4e-3, warmup_steps=20, ema_decay=0.99)  # fmt: skip


#: What the profiles train in place of the presets `tokens` and `layout`.
SMALL_TOKENS = {
    "tiny": dict(channels=(8, 16, 16), token_dim=16, norm_groups=8, warmup_steps=2),
    "quick": _MINUTE,
    "shipped": _MINUTE,
    "full": {},
}
# A batch of 32 keeps a GPU waiting for its kernels to be launched. The learning rates grow with the root of the batch's
# size; a larger batch has fewer steps in an epoch, so there are more epochs. (The quality of this has not been tested.)
_ON_A_GPU = dict(batch_size=128, learning_rate=1.6e-3, muon_learning_rate=3e-3, epochs=200)


def fill(profile: str, preset: str, overrides: dict) -> dict:
    """What a profile and a preset fix of Settings, {name: value}; the profile wins.

    overrides: what is given besides, with the device. A GPU has a recipe of its own, unless the batch's size or the
        learning rate is given.
    """
    on_a_gpu = overrides["device"] == "cuda" and not overrides.keys() & {"batch_size", "learning_rate"}
    return PRESETS[preset] | PROFILES[profile] | _adapt(profile, preset, on_a_gpu)


def _adapt(profile, preset, on_a_gpu):
    """What a profile changes of a preset: quick and shipped train a small network in place of `tokens` and `layout`,
    and all others briefly, at full size."""
    if preset in ("tokens", "layout"):
        return _ON_A_GPU if profile == "full" and on_a_gpu else SMALL_TOKENS[profile]
    if profile == "full":
        return {}
    if "teacher" in PRESETS[preset]:  # begins with the weights of its teacher, so it has the same size
        return dict(max_images=16 if profile == "tiny" else 128, epochs=2, warmup_steps=2)
    if profile == "tiny":
        channels = tuple(max(8, c // 128 * 8) for c in PRESETS[preset].get("channels", Network.channels))
        return dict(channels=channels, layers_per_block=1, norm_groups=8, head_dim=8, warmup_steps=0,
                    autoencoder_channels=(8, 8, 8), autoencoder_epochs=1)  # fmt: skip
    return dict(epochs=4, max_images=128, autoencoder_epochs=4, steps=20)


# What all reports share: pixels in, eps out, ancestral sampling, the plain U-Nets of diffusers, Adam. They drop no
# labels, so there is no classifier-free guidance. The averaged weights, gradient clipping and the even spread of t are
# this workbook's (assumed).
_REPORT = dict(patch=1, head_dim=8, norm_groups=32, scale_shift=False, layers_per_block=2, schedule="linear",
               prediction="epsilon", weight_decay=0.0, warmup_steps=0, decay_fraction=0.0, label_dropout=0.0,
               guidance="none", guidance_scale=1.0, steps=0)  # fmt: skip


#: What each system fixes in Settings; a field it leaves out keeps its default. Add a system here: profiles shrink it by
#: themselves (see `_adapt`).
PRESETS = {
    # Ours: told which objects and where they stand; trained by Muon on more images of three objects, all times alike.
    "layout": dict(conditioning="layout", optimizer="muon", loss_weighting="balanced", object_shares=(0.2, 0.3, 0.5),
                   decay_fraction=0.35, epochs=50, sampler="ddim", steps=4, guidance_scale=2.0),
    # Told the labels alone: one token per object into cross-attention, their pooled embedding into the time embedding.
    "tokens": dict(),
    # Distilled from layout: the scale is an input, and four DDIM steps do what eight guided steps of its teacher do.
    "few-step": dict(teacher="layout", conditioning="layout", student_steps=4, teacher_steps=8, label_dropout=0.0,
                     epochs=8, object_shares=(0.2, 0.3, 0.5), optimizer="muon", learning_rate=4e-4,
                     muon_learning_rate=7e-4, warmup_steps=50, decay_fraction=1.0, sampler="ddim", guidance_scale=3.0),
    # Ours, in the latents of an autoencoder (4 x 16 x 16), which is trained first.
    "latent": dict(space="latents", patch=1, channels=(96, 144, 192), attention=("none", "cross", "cross")),
    # Report A. Assumed: widths, two layers a block, attention in the middle block, linear schedule, Dropout(0.1). It
    # continues from its best epoch; here every run continues from its last.
    "mlp-fusion": _REPORT | dict(
        channels=(64, 128, 256, 256, 512), attention=("none", "none", "self", "self", "none"),
        up_attention=("none", "self", "self", "none", "none"),  # the 3rd and 4th block on the way up
        conditioning="mlp", batch_size=64, epochs=200, learning_rate=1e-4, keep="best",
    ),
    # Report B. Assumed: AdamW, its rate, batch and epochs, and that its learning rate falls to zero.
    "linear-attn": _REPORT | dict(
        channels=(32, 64, 96, 128), attention=("none", "self", "self", "self"), conditioning="linear",
        batch_size=32, epochs=100, learning_rate=1e-4, weight_decay=0.01, decay_fraction=1.0,
    ),
    # Report C. The blocks that it names attend to themselves; only the middle block attends to the labels.
    # Assumed: its heads, 32 channels each.
    "cross-attention": _REPORT | dict(
        channels=(64, 128, 256), attention=("none", "none", "self"), conditioning="multi-hot",
        head_dim=32, batch_size=64, epochs=50, learning_rate=2e-4, keep="every", keep_every=1,
    ),
    # Report D: a UNet2DModel that adds Linear(24, 512) of the labels to the time embedding.
    "linear-512": _REPORT | dict(
        channels=(128, 128, 256, 256), attention=("none", "none", "none", "self"), conditioning="linear",
        batch_size=32, epochs=300, learning_rate=1e-4,
    ),
    # Its larger model. Assumed: widths.
    "linear-512-six": _REPORT | dict(
        channels=(128, 128, 256, 256, 512, 512), attention=("none", "none", "none", "none", "self", "self"),
        conditioning="linear", batch_size=32, epochs=300, learning_rate=1e-4,
    ),
}  # fmt: skip


#: What the reports say of their systems: accuracy on test.json and new_test.json, and what they counted.
REPORTED = {
    "mlp-fusion": ("0.6289", "0.6146 (classifier-guided)", "24 classes right (nothing: 0.906, 0.891)"),
    "linear-attn": ("0.9219", "0.9531", "top k, by picture"),
    "cross-attention": ("0.8333", "0.9048", "top k, by label"),
    "linear-512": ("0.9010 (T = 500: 0.9740, 100: 0.8021)", "0.9271 (0.8906, 0.7865)", "top k, by picture"),
    "linear-512-six": ("–", "–", "loss only"),
}
