"""The loop of a training goes on exactly after an interruption, and stops at figures that broke."""

import logging

import pytest
import torch
from torch import nn

from ssnas.errors import InputError
from ssnas.training import trainer as trainer_module
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.trainer import Trainer

IDENTITY = {"work": "toy"}
EPOCHS, STEPS, BATCH = 3, 4, 2


class GeneratorState:
    """A random generator with a state dict."""

    def __init__(self, generator):
        self.generator = generator

    def state_dict(self):
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["state"])


class Training:
    """A noisy linear regression, with everything that a trainer has to restore."""

    def __init__(self, checkpoint=None, fail_at=None, stop_at=None, break_at=None, epochs=EPOCHS):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(STEPS * BATCH, 3), torch.randn(STEPS * BATCH, 1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, epochs)
        self.order, self.noise = (torch.Generator().manual_seed(seed) for seed in (1, 2))
        self.fail_at, self.stop_at, self.break_at, self.calls = fail_at, stop_at, break_at, 0
        state = {
            "model": self.model,
            "optimiser": self.optimiser,
            "schedule": self.schedule,
            "order": GeneratorState(self.order),
            "noise": GeneratorState(self.noise),
        }
        epoch = self.draw_epoch, self.step, self.finish
        self.trainer = Trainer("toy", epochs, state, *epoch, checkpoint)

    def draw_epoch(self):
        return torch.randperm(STEPS * BATCH, generator=self.order).view(STEPS, BATCH)

    def step(self, batches, epoch, number):
        batch = batches[number]
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        x = self.x[batch] + torch.randn(BATCH, 3, generator=self.noise)
        loss = (self.model(x) - self.y[batch]).square().mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.calls == self.break_at:
            loss = loss * torch.nan
        return {"loss": loss.detach(), "twice": 2 * loss.detach()}

    def finish(self, epoch):
        self.schedule.step()
        rate = self.schedule.get_last_lr()[0]
        return {"learning_rate": rate, "stop": epoch == self.stop_at}

    def result(self):
        history = [{k: v for k, v in row.items() if k != "images_per_second"} for row in self.rows]
        return history, self.model.state_dict()

    def run(self):
        self.rows = self.trainer.run()
        return self


def assert_same(actual, expected):
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        assert actual[1][key].equal(value), key


def test_history():
    training = Training().run()
    rows, _ = training.result()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.075, 0.025, 0.0])
    assert all(row["twice"] == pytest.approx(2 * row["loss"]) for row in rows)
    assert all(row["images_per_second"] > 0 for row in training.rows)
    assert not any("stop" in row for row in rows)
    assert training.trainer.seconds > 0


def test_the_loss_is_the_mean_over_the_steps():
    values = iter(torch.tensor([1.0, 2.0, 6.0, 3.0]))
    batches = torch.zeros(4, 2, dtype=torch.int64)
    places = []

    def step(drawn, epoch, number):
        assert drawn is batches
        places.append((epoch, number))
        return {"loss": next(values)}

    trainer = Trainer("toy", 1, {}, lambda: batches, step, lambda epoch: {})
    assert trainer.run()[0]["loss"] == 3.0
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize("seconds", [0, 1000], ids=["every step", "every epoch"])
@pytest.mark.parametrize("fail_at", [1, 2, 4, 5, 7, 12])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, fail_at, seconds):
    whole = Training().run().result()
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint, fail_at).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        resumed = Training(checkpoint).run()
    assert_same(resumed.result(), whole)
    done = fail_at - 1 if seconds == 0 else (fail_at - 1) // STEPS * STEPS
    assert resumed.calls == EPOCHS * STEPS - done


def test_interrupted_again_and_again(tmp_path, monkeypatch):
    whole = Training().run().result()
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0)
    for _ in range(EPOCHS * STEPS // 2 - 1):
        with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
            Training(checkpoint, fail_at=3).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        finished = Training(checkpoint, fail_at=3).run()
    assert_same(finished.result(), whole)


def test_interrupted_at_the_end_of_an_epoch(tmp_path, monkeypatch):
    whole = Training().run().result()
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        training = Training(checkpoint)

        def interrupt(epoch):
            raise KeyboardInterrupt

        training.trainer.finish_epoch = interrupt
        training.run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        assert_same(Training(checkpoint).run().result(), whole)


def test_seconds_include_the_interrupted_part(tmp_path):
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint, fail_at=STEPS + 1).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        state = checkpoint.load()
        state["position"]["seconds"] = 1000.0
        checkpoint.save(state)
        assert Training(checkpoint).run().trainer.seconds > 1000


@pytest.mark.parametrize(("seconds", "break_at"), [(0, 7), (1000, 7), (1000, 2), (0, 5)])
def test_not_finite_figures_stop_the_loop(tmp_path, monkeypatch, seconds, break_at):
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", seconds)
    epoch, step = (break_at - 1) // STEPS + 1, (break_at - 1) % STEPS + 1
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        with pytest.raises(InputError, match="toy: loss became nan") as caught:
            Training(checkpoint, break_at=break_at).run()
        assert f"epoch {epoch}, step {step};" in str(caught.value)
        state = checkpoint.load()
        if seconds and epoch == 1:
            assert state is None
            assert "there is no checkpoint" in str(caught.value)
        else:
            assert str(checkpoint.path) in str(caught.value)
            assert all(value.isfinite().all() for value in state["parts"]["model"].values())
            Training(checkpoint).run()


def test_a_bad_figure_between_two_looks_is_found_at_its_step(monkeypatch):
    """On an accelerator the figures are looked at every few steps."""
    monkeypatch.setattr(Trainer, "_check_steps", staticmethod(lambda pending: 3))
    with pytest.raises(InputError, match="epoch 2, step 2;"):
        Training(break_at=STEPS + 2).run()
    monkeypatch.undo()
    whole = Training().run().result()
    monkeypatch.setattr(Trainer, "_check_steps", staticmethod(lambda pending: 3))
    assert_same(Training().run().result(), whole)


def test_weights_that_broke_under_a_finite_loss_are_not_saved(tmp_path, monkeypatch):
    """A gradient may overflow while the loss does not: the loss shows it one step later."""
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0)
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        training = Training(checkpoint)

        def step(*place):
            figures = training.step(*place)
            if training.calls == STEPS + 2:
                with torch.no_grad():
                    training.model[0].weight.fill_(torch.nan)
            return figures

        training.trainer.step = step
        with pytest.raises(InputError, match="weights became nan"):
            training.run()
        weights = checkpoint.load()["parts"]["model"]
        assert all(value.isfinite().all() for value in weights.values())


def test_stop_ends_the_training_and_stays(tmp_path):
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        rows, _ = Training(checkpoint, stop_at=2).run().result()
        assert [row["epoch"] for row in rows] == [1, 2]
        again = Training(checkpoint, stop_at=2).run()
    assert again.calls == 0
    assert again.result()[0] == rows


def test_progress(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trainer_module, "REPORT_SECONDS", 0)
    Training().run()
    lines = [line for line in caplog.messages if "ETA" in line]
    assert [line.split("epoch ")[1].split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("toy" in line and "loss" in line and "images/s" in line for line in lines)
    assert lines[-1].endswith("ETA 0:00")


def test_resumption_is_told(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint, fail_at=STEPS + 3).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint).run()
    assert "toy: going on after epoch 1 of 3, step 2" in caplog.messages
