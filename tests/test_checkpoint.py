"""Checkpoints: where their tensors go."""

import pytest
import torch
from torch import nn

from pyro_blora.checkpoint import load_checkpoint, save_checkpoint


def optimizer_of(module):
    return torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)  # as make_optimizer's


def stepped(device="cpu"):
    """A module, and its optimizer after one step."""
    module = nn.Linear(3, 2).to(device)
    optimizer = optimizer_of(module)
    module(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_every_optimizer_state_is_where_its_parameter_is(tmp_path):
    """On the meta device, in the place of a GPU: the fused step takes no state from the host."""
    save_checkpoint(tmp_path, *stepped(), 1, 8)
    module = nn.Linear(3, 2, device="meta")
    optimizer = optimizer_of(module)
    assert load_checkpoint(tmp_path, module, optimizer, 8).step == 1
    for parameter in module.parameters():
        devices = {key: x.device.type for key, x in optimizer.state[parameter].items()}
        assert devices == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "meta")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_the_fused_step_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, device):
    module, optimizer = stepped(device)
    save_checkpoint(tmp_path, module, optimizer, 1, 8)
    other = nn.Linear(3, 2, device=device)
    again = optimizer_of(other)
    load_checkpoint(tmp_path, other, again, 8)
    for net, its in ((module, optimizer), (other, again)):
        net.zero_grad()
        (net(torch.ones(1, 3, device=device)) ** 2).sum().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
