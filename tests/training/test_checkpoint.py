"""Checkpoints survive a full disk, damage and interruption; the loop goes on exactly."""

import errno
import logging
import multiprocessing
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssnas.errors import InputError
from ssnas.training import trainer as loop_module
from ssnas.training.checkpoint import Checkpoint, code_digest
from ssnas.training.trainer import GeneratorState, Loop

IDENTITY = {"parameters": {"epochs": 3, "search": {"channels": 8}}, "data": "d" * 64}
STATE = {"weights": torch.arange(6.0).view(2, 3), "rows": [{"epoch": 1, "loss": 0.5}]}


def saved(folder, state=STATE, identity=IDENTITY):
    with Checkpoint(folder, identity) as checkpoint:
        checkpoint.save(state)
    return folder / "last.pt"


def loaded(folder, identity=IDENTITY):
    with Checkpoint(folder, identity) as checkpoint:
        return checkpoint.load()


def names(folder):
    return {path.name for path in folder.iterdir()} - {"lock"}


# Checkpoint


def test_round_trip(tmp_path):
    saved(tmp_path / "new" / "folder")
    found = loaded(tmp_path / "new" / "folder")
    assert found["weights"].equal(STATE["weights"])
    assert found["rows"] == STATE["rows"]


def test_identities_compare_as_json(tmp_path):
    saved(tmp_path, identity={"parameters": {"size": (1, 2), "flip": None}})
    assert loaded(tmp_path, {"parameters": {"size": [1, 2], "flip": None}}) is not None


def test_nothing_to_load(tmp_path):
    assert loaded(tmp_path) is None
    assert names(tmp_path) == set()


def test_the_newest_state_replaces_the_old_one(tmp_path):
    saved(tmp_path)
    saved(tmp_path, {"weights": torch.ones(1)})
    assert loaded(tmp_path)["weights"].equal(torch.ones(1))
    assert names(tmp_path) == {"last.pt"}


def test_finish_removes_the_checkpoint(tmp_path):
    saved(tmp_path)
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        checkpoint.finish()
        checkpoint.finish()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("first", [False, True])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, first):
    if not first:
        saved(tmp_path)

    def fill(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    word = "there is none yet" if first else "the one before is kept"
    with (
        Checkpoint(tmp_path, IDENTITY) as checkpoint,
        pytest.raises(InputError, match=f"No space left on device.*{word}") as caught,
    ):
        checkpoint.save({"weights": torch.ones(1)})
    assert str(tmp_path / "last.pt") in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == (set() if first else {"last.pt"})
    if not first:
        assert loaded(tmp_path)["weights"].equal(STATE["weights"])


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path)

    def crash(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, {"weights": torch.ones(1)})
    monkeypatch.undo()
    assert loaded(tmp_path)["weights"].equal(STATE["weights"])
    assert names(tmp_path) == {"last.pt"}


def cut(share):
    return lambda content: content[: int(share * len(content))]


def flipped(place):
    def flip(content):
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]

    return flip


UNREADABLE = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"text, no checkpoint\n",
    "letters": lambda content: b"aaaa",
    "tuple": lambda content: b"t" + content,
    **{f"cut at {share}": cut(share) for share in (0.001, 0.01, 0.3, 0.6, 0.9, 0.999)},
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_checkpoint_is_set_aside(tmp_path, caplog, damage):
    path = saved(tmp_path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert loaded(tmp_path) is None
    (aside,) = names(tmp_path)
    assert (tmp_path / aside).read_bytes() == damaged
    assert str(path) in caplog.text
    assert aside in caplog.text
    assert loaded(tmp_path) is None


@pytest.mark.parametrize("place", [i / 24 for i in range(25)])
def test_a_flipped_byte_never_gives_another_state(tmp_path, place):
    path = saved(tmp_path)
    path.write_bytes(flipped(place)(path.read_bytes()))
    found = loaded(tmp_path)
    if found is not None:
        assert found["weights"].equal(STATE["weights"])
        assert found["rows"] == STATE["rows"]


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, 3])
def test_a_file_of_something_else_is_set_aside(tmp_path, caplog, content):
    torch.save(content, tmp_path / "last.pt")
    assert loaded(tmp_path) is None
    assert "set aside" in caplog.text


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_is_not_run(tmp_path, caplog, write):
    run = tmp_path / "run"
    write({"identity": IDENTITY, "state": Bomb(run)}, tmp_path / "last.pt")
    assert loaded(tmp_path) is None
    assert not run.exists()
    assert "set aside" in caplog.text


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        (IDENTITY | {"parameters": {"epochs": 5, "search": {"channels": 8}}}, r"parameters\.epochs: 3 there, 5 here"),  # noqa: E501
        (IDENTITY | {"parameters": {"epochs": 3, "search": {"channels": 4}}}, r"parameters\.search\.channels: 8 there, 4 here"),  # noqa: E501
        (IDENTITY | {"data": "e" * 64}, "other data"),
        (IDENTITY | {"code": "f" * 64}, "code"),
    ],
)  # fmt: skip
def test_other_work_is_set_aside(tmp_path, caplog, identity, difference):
    saved(tmp_path)
    assert loaded(tmp_path, identity) is None
    assert caplog.messages[0].count("\n") == 0
    assert re.search(difference, caplog.text)
    (aside,) = names(tmp_path)
    assert aside in caplog.text
    assert torch.load(tmp_path / aside, weights_only=True)["identity"] == IDENTITY


def enter(folder):
    try:
        with Checkpoint(folder, IDENTITY):
            pass
    except InputError as error:
        sys.exit(3 if "another process is at this work" in str(error) else 4)


def test_only_one_process_at_a_time(tmp_path):
    def other_process():
        process = multiprocessing.get_context("fork").Process(target=enter, args=(tmp_path,))
        process.start()
        process.join()
        return process.exitcode

    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        checkpoint.save(STATE)
        assert other_process() == 3
        with pytest.raises(InputError, match="another process"), Checkpoint(tmp_path, IDENTITY):
            pass
    assert other_process() == 0
    assert loaded(tmp_path) is not None


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoint(tmp_path, IDENTITY):
        _ = 1 / 0
    assert loaded(tmp_path) is None


def test_code_digest_follows_the_sources(tmp_path, monkeypatch):
    before = code_digest()
    assert before == code_digest()
    source = tmp_path / "checkpoint.py"
    source.write_text("changed")
    monkeypatch.setattr(sys.modules["ssnas.training.checkpoint"], "__file__", str(source))
    assert code_digest() != before


# Loop

EPOCHS, STEPS, BATCH = 3, 4, 2


class Training:
    """A noisy linear regression, with everything that a loop has to restore."""

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
        batches = self.draw_batches
        self.loop = Loop("toy", epochs, state, batches, self.step, self.finish, checkpoint)

    def draw_batches(self):
        return torch.randperm(STEPS * BATCH, generator=self.order).view(STEPS, BATCH)

    def step(self, batch):
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
        self.rows = self.loop.run()
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
    assert training.loop.seconds > 0


def test_the_loss_is_the_mean_over_the_steps():
    values = iter(torch.tensor([1.0, 2.0, 6.0, 3.0]))
    batches = torch.zeros(4, 2, dtype=torch.int64)
    loop = Loop("toy", 1, {}, lambda: batches, lambda b: {"loss": next(values)}, lambda e: {})
    assert loop.run()[0]["loss"] == 3.0


@pytest.mark.parametrize("seconds", [0, 1000], ids=["every step", "every epoch"])
@pytest.mark.parametrize("fail_at", [1, 2, 4, 5, 7, 12])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, fail_at, seconds):
    whole = Training().run().result()
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint, fail_at).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        resumed = Training(checkpoint).run()
    assert_same(resumed.result(), whole)
    done = fail_at - 1 if seconds == 0 else (fail_at - 1) // STEPS * STEPS
    assert resumed.calls == EPOCHS * STEPS - done


def test_interrupted_again_and_again(tmp_path, monkeypatch):
    whole = Training().run().result()
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0)
    for _ in range(EPOCHS * STEPS // 2 - 1):
        with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
            Training(checkpoint, fail_at=3).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        finished = Training(checkpoint, fail_at=3).run()
    assert_same(finished.result(), whole)


def test_interrupted_at_the_end_of_an_epoch(tmp_path, monkeypatch):
    whole = Training().run().result()
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        training = Training(checkpoint)

        def interrupt(epoch):
            raise KeyboardInterrupt

        training.loop.finish_epoch = interrupt
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
        assert Training(checkpoint).run().loop.seconds > 1000


@pytest.mark.parametrize(("seconds", "break_at"), [(0, 7), (1000, 7), (1000, 2), (0, 5)])
def test_not_finite_figures_stop_the_loop(tmp_path, monkeypatch, seconds, break_at):
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", seconds)
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
    monkeypatch.setattr(Loop, "_check_steps", staticmethod(lambda pending: 3))
    with pytest.raises(InputError, match="epoch 2, step 2;"):
        Training(break_at=STEPS + 2).run()
    monkeypatch.undo()
    whole = Training().run().result()
    monkeypatch.setattr(Loop, "_check_steps", staticmethod(lambda pending: 3))
    assert_same(Training().run().result(), whole)


def test_weights_that_broke_under_a_finite_loss_are_not_saved(tmp_path, monkeypatch):
    """A gradient may overflow while the loss does not: the loss shows it one step later."""
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0)
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        training = Training(checkpoint)

        def step(batch):
            figures = training.step(batch)
            if training.calls == STEPS + 2:
                with torch.no_grad():
                    training.model[0].weight.fill_(torch.nan)
            return figures

        training.loop.step = step
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
    monkeypatch.setattr(loop_module, "REPORT_SECONDS", 0)
    Training().run()
    lines = [line for line in caplog.messages if "ETA" in line]
    assert [line.split("epoch ")[1].split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("toy" in line and "loss" in line and "images/s" in line for line in lines)
    assert lines[-1].endswith("ETA 0:00")


def test_resumption_is_told(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint, fail_at=STEPS + 3).run()
    with Checkpoint(tmp_path, IDENTITY) as checkpoint:
        Training(checkpoint).run()
    assert "toy: going on after epoch 1 of 3, step 2" in caplog.messages
