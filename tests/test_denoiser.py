"""lab6/denoiser.py: labels change the prediction; the reports' networks by hand."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny, tiny_linear
from diffusers.models.attention_processor import Attention
from torch import nn

import lab6_utils as lab

MAKERS = {
    "tokens": tiny,
    "linear": tiny_linear,
    "mlp": lambda **overrides: tiny_linear(**dict(conditioning="mlp") | overrides),
    "multi-hot": lambda **overrides: tiny(**dict(conditioning="multi-hot") | overrides),
}


@pytest.fixture(scope="module", params=MAKERS)
def denoiser(request):
    return lab.make_denoiser(MAKERS[request.param]()).eval().requires_grad_(False)


def noise(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def predict(denoiser, label_sets, t=500, x_t=None, null=None):
    labels = label_sets if isinstance(label_sets, torch.Tensor) else lab.encode_labels(label_sets)
    x_t = noise(1).expand(len(labels), -1, -1, -1) if x_t is None else x_t
    return denoiser(x_t, torch.as_tensor(t), labels, null)


def distance(a, b):
    return (a - b).abs().max().item()


def test_every_object_changes_the_prediction(denoiser):
    outputs = predict(denoiser, torch.eye(24))
    assert outputs.shape == (24, 3, 64, 64) and outputs.isfinite().all()
    assert min(distance(a, b) for a, b in itertools.combinations(outputs, 2)) > 1e-4


def test_colours_are_bound_to_shapes(denoiser):
    one, other = predict(denoiser, [["red sphere", "cyan cube"], ["cyan sphere", "red cube"]])
    assert distance(one, other) > 1e-4


def test_one_object_more_changes_the_prediction(denoiser):
    names = list(lab.OBJECTS[::5])
    outputs = torch.cat([predict(denoiser, names[:k]) for k in range(1, 6)])
    assert min(distance(a, b) for a, b in itertools.combinations(outputs, 2)) > 1e-4


def test_the_order_of_labels_does_not_matter(denoiser):
    outputs = predict(denoiser, list(itertools.permutations(lab.MANUAL_SET)))
    assert distance(outputs, outputs[:1].expand_as(outputs)) < 1e-5


def test_the_null_condition_ignores_the_labels(denoiser):
    null = torch.ones(3, dtype=torch.bool)
    labels = lab.encode_labels([["red sphere"], ["cyan cube", "gray cube"], lab.MANUAL_SET])
    outputs = predict(denoiser, labels, null=null)
    assert distance(outputs, outputs[:1].expand_as(outputs)) < 1e-5


def test_the_null_condition_is_no_label_vector(denoiser):
    denoiser = copy.deepcopy(denoiser)
    with torch.no_grad():
        for p in denoiser.parameters():  # as after training: nothing is zero any more
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        labels = torch.cat([torch.zeros(1, 24), torch.ones(1, 24), torch.eye(24)])
        given = predict(denoiser, labels)
        nothing = predict(denoiser, labels[:1], null=torch.ones(1, dtype=torch.bool))
    assert min(distance(nothing[0], other) for other in given) > 1e-4


def test_null_is_chosen_for_each_picture(denoiser):
    labels = lab.encode_labels([["red sphere"], ["red sphere"]])
    mixed = predict(denoiser, labels, null=torch.tensor([False, True]))
    torch.testing.assert_close(mixed[:1], predict(denoiser, labels[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        mixed[1:], predict(denoiser, labels[:1], null=torch.ones(1).bool()), rtol=1e-4, atol=1e-5
    )
    assert distance(mixed[0], mixed[1]) > 1e-4


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_model_without_null_condition_refuses_it(make):
    denoiser = lab.make_denoiser(make(label_dropout=0.0))
    assert predict(denoiser, ["red sphere"]).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"no null condition .* use guidance_scale=1"):
        predict(denoiser, ["red sphere"], null=torch.ones(1, dtype=torch.bool))


def test_predictions_do_not_depend_on_the_batch(denoiser):
    sets = [["red sphere"], ["cyan cube", "gray cube"], lab.MANUAL_SET, lab.OBJECTS[::5]]  # 1, 2, 3 and 5 objects
    x_t, times = noise(4), torch.tensor([3, 250, 700, 999])
    together = predict(denoiser, sets, times, x_t)
    for i in range(4):
        alone = predict(denoiser, sets[i : i + 1], times[i : i + 1], x_t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_slots_that_nobody_fills_change_nothing():
    """Training fixes their number beforehand (`train`), so that a GPU need not be asked at every step."""
    denoiser = lab.make_denoiser(lab.make_settings("tiny", device="cpu")).eval()
    x_t, labels = torch.randn(2, 3, 64, 64), lab.encode_labels([["red cube"], ["blue sphere", "gray cube"]])
    with torch.no_grad():
        counted = denoiser(x_t, torch.tensor(500), labels)
        denoiser.condition.slots = 5
        torch.testing.assert_close(denoiser(x_t, torch.tensor(500), labels), counted)


def test_the_time_step_matters_and_may_be_one_for_all(denoiser):
    sets, x_t = [["red sphere"], ["cyan cube"]], noise(2)
    one, each = predict(denoiser, sets, 500, x_t), predict(denoiser, sets, torch.tensor([500, 500]), x_t)
    torch.testing.assert_close(one, each)
    assert distance(one, predict(denoiser, sets, 501, x_t)) > 1e-6 < distance(one, predict(denoiser, sets, 0, x_t))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_parameter_is_trained(make):
    denoiser = lab.make_denoiser(make())
    labels = lab.encode_labels([["red sphere"], lab.OBJECTS[:3], lab.OBJECTS[3:24:3][:5], ["cyan cube", "gray cube"]])
    labels = torch.cat([labels, torch.eye(24)])
    null = torch.zeros(len(labels), dtype=torch.bool)
    null[3] = True
    denoiser(noise(len(labels)), torch.arange(len(labels)) * 30, labels, null).pow(2).mean().backward()
    silent = [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [], "these are wired to nothing"


def test_who_attends_to_a_single_token_has_no_choice():
    """Report C's only cross-attention has one token to look at: its queries and keys do nothing."""
    denoiser = lab.make_denoiser(MAKERS["multi-hot"]()).eval().requires_grad_(False)
    sets = [["red sphere"], lab.MANUAL_SET]
    before = predict(denoiser, sets)
    for name, p in denoiser.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            p.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(predict(denoiser, sets), before, rtol=1e-4, atol=1e-5)


class Passing(nn.Module):
    """In place of a U-Net: returns its input and remembers its shape."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1)  # tells the denoiser its data type

    def forward(self, x, t, class_labels, **extra):
        self.seen, self.tokens = x.shape, extra.get("encoder_hidden_states")
        return SimpleNamespace(sample=x)


@pytest.mark.parametrize("patch, seen", [(1, (3, 64, 64)), (2, (12, 32, 32)), (4, (48, 16, 16))])
def test_pixels_become_channels_and_return(patch, seen):
    denoiser = lab.make_denoiser(tiny(patch=patch))
    assert predict(denoiser, ["red sphere"]).shape == (1, 3, 64, 64)
    denoiser.unet, x_t = Passing(), noise(2)
    assert torch.equal(predict(denoiser, [["red sphere"], ["cyan cube"]], x_t=x_t), x_t)
    assert denoiser.unet.seen == (2, *seen)


def test_there_is_a_token_for_each_object():
    denoiser = lab.make_denoiser(tiny())
    table = denoiser.condition(torch.eye(24), torch.zeros(24).bool())[1][:, 0]
    denoiser.unet = Passing()
    for names in (["red sphere"], ["cyan cube", "gray cube"], lab.MANUAL_SET, lab.OBJECTS[:5]):
        predict(denoiser, names)
        tokens = denoiser.unet.tokens[0]
        assert len(tokens) == max(3, len(names))
        for name, token in zip(sorted(names, key=lab.OBJECTS.index), tokens, strict=False):
            torch.testing.assert_close(token, table[lab.OBJECTS.index(name)])
        for token in tokens[len(names) :]:
            torch.testing.assert_close(token, denoiser.condition.empty)


class Table(nn.Module):
    """A conditioning as a student might add it: 24 tokens, of which those of the objects asked for are not zero."""

    pools, gives_tokens, one_per_object, blob_channels = False, True, False, 0
    token_width, null = 8, None

    def __init__(self, width, token_dim, null_condition):
        super().__init__()
        self.table = nn.Parameter(torch.randn(24, 8))

    def forward(self, labels, null):
        return None, labels[:, :, None] * self.table


def test_all_tokens_of_a_new_conditioning_are_attended_to(monkeypatch):
    monkeypatch.setitem(lab.CONDITIONINGS, "table", Table)
    denoiser = lab.make_denoiser(tiny(conditioning="table", label_dropout=0))
    outputs = [predict(denoiser, [name]) for name in lab.OBJECTS]
    differences = [(one - other).abs().max() for one, other in itertools.pairwise(outputs)]
    assert min(differences) > 1e-6, "the last objects of the list, too"


def test_heads_of_networks_that_fit_are_not_narrowed():
    """Weights of the same shapes would give another network."""
    settings = tiny(conditioning="linear", attention=["none"] * 3, channels=[8, 16, 32], head_dim=32)
    assert lab.make_denoiser(settings).unet.mid_block.attentions[0].heads == 1


@pytest.mark.parametrize("conditioning", ["mlp", "linear"])
def test_every_conditioning_goes_with_self_attention_of_narrow_networks(conditioning):
    settings = tiny(conditioning=conditioning, attention=["none", "none", "self"], head_dim=32)
    assert predict(lab.make_denoiser(settings), ["red cube"]).shape == (1, 3, 64, 64)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    first, after = lab.make_denoiser(tiny(seed=3)).state_dict(), torch.rand(1)
    torch.manual_seed(2)
    again, other = lab.make_denoiser(tiny(seed=3)).state_dict(), lab.make_denoiser(tiny(seed=4)).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the caller's random numbers are left alone"


def where_attention_is(denoiser):
    return {".".join(name.split(".")[:2]).removesuffix(".attentions") for name, _ in denoiser.unet.named_modules()
            if ".attentions." in name}  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def full(preset, **overrides):
    return lab.make_settings("full", preset=preset, device="cpu", precision="fp32", **overrides)


def unet_by_hand(channels, down, up, labels=0, label_token=0):
    """Parameters of a U-Net of two layers a block on 64x64 pixels, layer by layer.

    down, up: numbers of the blocks that attend, in the order of computation; labels: parameters of the labels' layers;
    label_token: width of a token to which the middle block attends, in place of attending to itself only.
    """
    width = 4 * channels[0]
    linear = lambda i, o: i * o + o
    conv = lambda i, o, k=3: i * o * k * k + o
    norm = lambda c: 2 * c
    resnet = lambda i, o: (norm(i) + conv(i, o) + linear(width, o) + norm(o) + conv(o, o)
                           + (conv(i, o, 1) if i != o else 0))  # fmt: skip
    attention = lambda c: norm(c) + 4 * linear(c, c)  # query, key, value, output
    crossing = lambda c: (norm(c) + 2 * conv(c, c, 1)  # into the transformer and out of it
                          + 3 * norm(c) + 3 * c * c + linear(c, c)  # attends to itself: queries, keys, values, output
                          + c * c + 2 * label_token * c + linear(c, c)  # attends to the label's token
                          + linear(c, 8 * c) + linear(4 * c, c))  # gated feed-forward  # fmt: skip
    total, last = conv(3, channels[0]) + norm(channels[0]) + conv(channels[0], 3), len(channels) - 1
    total += linear(channels[0], width) + linear(width, width) + labels  # time
    for i, c in enumerate(channels):
        total += resnet(channels[max(i - 1, 0)], c) + resnet(c, c) + (i in down) * 2 * attention(c)
        total += conv(c, c) if i < last else 0  # shrinks
    c = channels[-1]
    total += resnet(c, c) * 2 + (crossing(c) if label_token else attention(c))
    # Each resnet on the way up also takes what was left on the way down: by two resnets and, last, by the shrinking
    # above them or conv_in.
    for i, c in enumerate(reversed(channels)):
        below, above = channels[min(last - i + 1, last)], channels[max(last - i - 1, 0)]
        total += resnet(below + c, c) + resnet(c + c, c) + resnet(c + above, c) + (i in up) * 3 * attention(c)
        total += conv(c, c) if i < last else 0  # grows
    return total


REPORTS = {  # blocks that attend on the way down and up, parameters of the labels' layers, width of a label's token
    "mlp-fusion": ((64, 128, 256, 256, 512), {2, 3}, {2, 3}, (24 * 256 + 256) + 2 * (256 * 256 + 256), 0),
    "linear-attn": ((32, 64, 96, 128), {1, 2, 3}, {0, 1, 2}, 24 * 128 + 128, 0),
    "cross-attention": ((64, 128, 256), {2}, {0}, 0, 24),
    "linear-512": ((128, 128, 256, 256), {3}, {0}, 24 * 512 + 512, 0),
    "linear-512-six": ((128, 128, 256, 256, 512, 512), {4, 5}, {0, 1}, 24 * 512 + 512, 0),
}


@pytest.mark.parametrize("preset", REPORTS)
def test_the_reports_networks_by_hand(preset):
    channels, down, up, labels, token = REPORTS[preset]
    denoiser = lab.make_denoiser(full(preset))
    assert count(denoiser) == unet_by_hand(channels, down, up, labels, token)
    attends = {*(f"down_blocks.{i}" for i in down), "mid_block", *(f"up_blocks.{i}" for i in up)}
    assert where_attention_is(denoiser) == attends
    crossing = {name.split(".")[0] for name, _ in denoiser.unet.named_modules() if name.endswith("attn2")}
    assert crossing == ({"mid_block"} if token else set()), "as named, C's blocks attend to themselves"
    assert denoiser.condition.null is None and denoiser.unet.config.resnet_time_scale_shift == "default"


def test_the_sizes_that_the_notes_give():
    assert unet_by_hand(*REPORTS["linear-512"]) == 28_495_107
    assert round(unet_by_hand(*REPORTS["cross-attention"]) / 1e6, 1) == 16.8


@pytest.mark.parametrize(("preset", "said"), [
    ("mlp-fusion", dict(learning_rate=1e-4, batch_size=64, epochs=200, keep="best")),
    ("linear-attn", dict(layers_per_block=2)),
    ("cross-attention", dict(learning_rate=2e-4, batch_size=64, epochs=50, keep="every", keep_every=1)),
    ("linear-512", dict(learning_rate=1e-4, batch_size=32, epochs=300)),
    ("linear-512-six", dict(learning_rate=1e-4, batch_size=32, epochs=300)),
])  # fmt: skip
def test_what_the_reports_say(preset, said):
    shared = dict(num_train_timesteps=1000, schedule="linear", prediction="epsilon", loss_weighting="none", patch=1,
                  label_dropout=0.0, guidance="none", guidance_scale=1.0, sampler="ddpm", steps=1000)  # fmt: skip
    settings = full(preset)
    assert {name: getattr(settings, name) for name in shared | said} == shared | said


def test_tokens_is_our_flagship():
    settings = full("tokens")
    denoiser = lab.make_denoiser(settings)
    lowest = len(settings.channels) - 1
    assert where_attention_is(denoiser) == {f"down_blocks.{lowest}", "mid_block", "up_blocks.0"}
    crossing = [m.to_k.in_features for name, m in denoiser.named_modules() if name.endswith("attn2")]
    assert len(crossing) >= 3 and set(crossing) == {settings.token_dim}, "attends to the objects' tokens"
    heads = {m.heads for name, m in denoiser.unet.down_blocks[lowest].named_modules() if name.endswith("attn2")}
    assert heads == {settings.channels[-1] // settings.head_dim}
    assert denoiser.condition.null is not None and settings.label_dropout > 0
    assert denoiser.unet.config.resnet_time_scale_shift == "scale_shift"


@pytest.mark.parametrize(("preset", "change"), [("cross-attention", {}), ("tokens", {"attention": ["self"] * 3})])
def test_heads_are_as_wide_as_is_said(preset, change):
    """All of a network that crosses somewhere, on the way down, in the middle and on the way up."""
    settings = full(preset, **change)
    layers = [m for m in lab.make_denoiser(settings).modules() if isinstance(m, Attention)]
    assert len(layers) >= 7
    for layer in layers:
        assert layer.heads == max(1, layer.inner_dim // settings.head_dim)
        assert layer.scale == pytest.approx((layer.inner_dim / layer.heads) ** -0.5)


@pytest.mark.parametrize("preset", lab.PRESETS)
def test_the_description_counts_everything(preset):
    denoiser = lab.make_denoiser(full(preset))
    parts = lab.describe_denoiser(denoiser)
    norm = count(denoiser.unet.conv_norm_out)
    assert sum(p["parameters"] for p in parts) + norm == count(denoiser) == lab.count_parameters(denoiser)
    by_name = {p["part"]: p for p in parts}
    low = denoiser.config.image_size // denoiser.config.patch // 2 ** (len(denoiser.config.channels) - 1)
    assert by_name["middle"]["output"] == (denoiser.config.channels[-1], low, low)
    assert by_name["input"]["output"][1] == denoiser.config.image_size // denoiser.config.patch
    attends = {p["part"] for p in parts if p["attention"] != "none"}
    assert {f"{p.removesuffix('_block').replace('_blocks.', ' ')}" for p in where_attention_is(denoiser)} == {
        part.replace("middle", "mid") for part in attends
    }
    assert not denoiser.unet.mid_block._forward_hooks, "its hooks are removed"


def test_label_effect_is_zero_only_where_labels_are_equal():
    settings, x_0 = tiny(), noise(4).clamp(-1, 1)
    denoiser, alpha_bar = lab.make_denoiser(settings), lab.alphas_bar("cosine")
    same, mixed = lab.encode_labels([["red sphere"]] * 4), torch.eye(24)[:4]
    assert lab.label_effect(denoiser, x_0, same, 500, alpha_bar, settings) == pytest.approx(0, abs=1e-6)
    effect = lab.label_effect(denoiser, x_0, mixed, 500, alpha_bar, settings)
    assert math.isfinite(effect) and effect > 1e-3
