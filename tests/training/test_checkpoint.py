"""Checkpoints survive a full disk, damage and interruption."""

import errno
import multiprocessing
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from ssnas.errors import InputError
from ssnas.runtime.source import closure
from ssnas.training.checkpoint import Checkpoint

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
    read = loaded(tmp_path)
    if read is not None:
        assert read["weights"].equal(STATE["weights"])
        assert read["rows"] == STATE["rows"]


def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path, caplog):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    place = content.find(STATE["weights"].numpy().tobytes())
    assert place > 0
    content[place] ^= 1
    path.write_bytes(content)
    assert loaded(tmp_path) is None
    assert "damaged" in caplog.text


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


@pytest.fixture
def training_code(tmp_path):
    """Sources of a training, and the identity of a checkpoint of it."""
    root = tmp_path / "sources"
    (root / "ssnas").mkdir(parents=True)
    (root / "ssnas" / "__init__.py").touch()
    (root / "ssnas" / "losses.py").write_text("GAMMA = 2.0\n")
    (root / "ssnas" / "search.py").write_text("from ssnas.losses import GAMMA\n")
    return root, lambda: IDENTITY | {"code": closure("ssnas.search", root)}


def test_a_killed_run_goes_on_after_a_changed_comment(tmp_path, training_code):
    root, identity = training_code
    saved(tmp_path / "run", identity=identity())
    (root / "ssnas" / "losses.py").write_text(
        '"""Losses."""\n\n# Lin et al. 2017\nGAMMA = 2.0\n"""Focus."""\n'
    )
    (root / "ssnas" / "report.py").write_text("COLOUR = 'red'\n")
    assert loaded(tmp_path / "run", identity())["weights"].equal(STATE["weights"])


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("losses.py", "GAMMA = 3.0\n", "other code.ssnas/losses.py"),
        (
            "search.py",
            "from ssnas.losses import GAMMA\nimport ssnas.more\n",
            "other code.ssnas/more.py; other code.ssnas/search.py",
        ),
    ],
)
def test_a_changed_computation_sets_the_checkpoint_aside(
    tmp_path, caplog, training_code, name, text, named
):
    root, identity = training_code
    before = identity()
    saved(tmp_path / "run", identity=before)
    (root / "ssnas" / "more.py").touch()
    (root / "ssnas" / name).write_text(text)
    assert loaded(tmp_path / "run", identity()) is None
    assert f"belongs to other work ({named})" in caplog.text
    (aside,) = names(tmp_path / "run")
    assert torch.load(tmp_path / "run" / aside, weights_only=True)["identity"] == before


def test_a_checkpoint_with_one_digest_for_all_code_is_set_aside_in_few_words(tmp_path, caplog):
    """Runs before the digests of single files left such checkpoints."""
    saved(tmp_path, identity=IDENTITY | {"code": "f" * 64})
    assert loaded(tmp_path, IDENTITY | {"code": {"ssnas/search.py": "e" * 64}}) is None
    assert "belongs to other work (other code)" in caplog.text
