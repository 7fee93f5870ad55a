"""The descent on ω against PyTorch's own optimisers and values computed by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ssnas.config.schema import Training
from ssnas.training.optimizer import Descent, one_cycle

ADAMW = Training(
    epochs=3,
    optimiser="adamw",
    schedule="one-cycle",
    learning_rate=0.1,
    warm_up=0.5,
    weight_decay=0.2,
    decay_norms=False,
    gradient_clip=1e6,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1))


def loss_of(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()


def test_a_cycle_of_adamw_is_pytorchs_adamw_at_the_rates_of_the_cycle():
    ours, theirs = network(), network()
    descent = Descent(ours.parameters(), ADAMW, steps=4)
    kernels, others = [], []
    for parameter in theirs.parameters():
        (kernels if parameter.ndim > 1 else others).append(parameter)
    peer = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.999),
    )
    for epoch in range(3):
        for step in range(4):
            number = 4 * epoch + step
            descent.schedule(epoch, step)
            descent.step(loss_of(ours, number))
            for group in peer.param_groups:
                group["lr"] = one_cycle(number / 12, 0.1, 0.5)
            peer.zero_grad()
            loss_of(theirs, number).backward()
            peer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_cycle_follows_pytorchs_schedule():
    """OneCycleLR reaches its ends one step earlier, hence 101 steps there."""
    weight = nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.4, total_steps=101, pct_start=0.26, final_div_factor=1e12
    )
    # Its rise takes pct_start · 101 − 1 steps: 25.26 here.
    for step in range(101):
        expected = one_cycle(step / 100, 0.4, warm_up=0.2526)
        assert theirs.get_last_lr()[0] == pytest.approx(expected, abs=2e-4), step
        if step < 100:
            optimiser.step()
            theirs.step()


@pytest.mark.parametrize("decay_norms", [True, False])
def test_norms_and_biases_decay_only_where_asked(decay_norms):
    model = network()
    settings = replace(ADAMW, optimiser="sgd", momentum=0.0, decay_norms=decay_norms)
    before = [p.detach().clone() for p in model.parameters()]
    descent = Descent(model.parameters(), settings)
    descent.step(0.0 * sum(p.sum() for p in model.parameters()))
    for parameter, old in zip(model.parameters(), before, strict=True):
        decayed = decay_norms or parameter.ndim > 1
        moved = old * (1 - one_cycle(0, 0.1, 0.5) * 0.2) if decayed else old
        torch.testing.assert_close(parameter.detach(), moved)


def test_a_cycle_goes_on_where_it_was():
    whole, cut = network(), network()
    first, second = Descent(whole.parameters(), ADAMW, 4), Descent(cut.parameters(), ADAMW, 4)
    for number in range(7):
        for model, descent in ((whole, first), (cut, second)):
            descent.schedule(*divmod(number, 4))
            descent.step(loss_of(model, number))
        if number == 3:
            state = second.state_dict()
            second = Descent(cut.parameters(), ADAMW, 4)
            second.load_state_dict(state)
    assert all(a.equal(b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
