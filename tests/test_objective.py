"""lab6/objective.py: weights of the loss. (The learning rate is tested with the training.)"""

import pytest
import torch
from conftest import tiny

import lab6_utils as lab


def test_balanced_weights_let_all_times_count_alike():
    balance = lab.Balance(1000, "cpu")
    t = torch.arange(0, 1000, 10)
    assert (balance.weights(t) == 1).all(), "before anything is known"
    errors = torch.where(t < 500, 0.1, 0.05)
    for _ in range(1000):
        balance.learn(t, errors)
    weighed = balance.weights(t) * errors
    torch.testing.assert_close(weighed, weighed[:1].expand_as(weighed), rtol=1e-3, atol=0)
    assert balance.weights(t).mean().item() == pytest.approx(1, abs=1e-3)


def test_balanced_weights_have_limits_and_unseen_times_keep_theirs():
    balance = lab.Balance(100, "cpu")
    for _ in range(3000):
        balance.learn(torch.tensor([0, 99]), torch.tensor([1e3, 1e-4]))
    weights = balance.weights(torch.tensor([0, 50, 99]))
    assert weights[0].item() == pytest.approx(0.2) and weights[2] == 5
    assert balance.errors[10] == 1


def test_balanced_weights_are_restored():
    one, other = lab.Balance(100, "cpu"), lab.Balance(100, "cpu")
    one.learn(torch.tensor([3, 70]), torch.tensor([0.3, 0.1]))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.errors, other.errors) and one.errors[0] < 1


def test_muon_takes_the_matrices_inside_and_adamw_the_rest():
    settings = tiny(preset="layout", muon_learning_rate=0.02, learning_rate=0.004)
    network = lab.make_denoiser(settings)
    optimizer = lab.OPTIMIZERS["muon"](settings, network)
    inside, outside = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    named = {name: id(p) for name, p in network.named_parameters()}
    assert inside | outside == set(named.values()) and not inside & outside
    assert named["unet.mid_block.resnets.0.conv1.weight"] in inside
    assert {named[n] for n in ("unet.conv_in.weight", "unet.conv_out.weight", "condition.colour")} <= outside
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.004]
    before = network.unet.mid_block.resnets[0].conv1.weight.detach().clone()
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=lab.make_generator(0))
    optimizer.step()
    change = (network.unet.mid_block.resnets[0].conv1.weight - before).flatten(1)
    values = torch.linalg.svdvals(change) / (0.02 * 0.2 * max(change.shape) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.4, "orthogonal, and as large as an update of AdamW"
