"""The search: blind to labels, exactly resumable, and its steps change what they should alone."""

import math
from dataclasses import replace

import pytest
import torch

from ssnas import loop as loop_module
from ssnas import search as module
from ssnas.augment import Normalise
from ssnas.checkpoint import Checkpoint
from ssnas.config import Search, Views
from ssnas.errors import InputError
from ssnas.search import Bilevel, Images, SelfSupervised, encode, knn_monitor, search
from ssnas.space import EDGES, RELAXATIONS
from ssnas.supernet import Supernet

CONFIG = Search(
    channels=2,
    cells=3,
    stem_multiplier=1,
    epochs=2,
    batch_size=4,
    projector=4,
    alpha_learning_rate=0.05,
)


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    """A pool, the identity and a convolution stand for all operations, in a third of the time."""
    few = ("avg_pool_3x3", "skip_connect", "dil_conv_3x3")
    monkeypatch.setitem(RELAXATIONS, "sigmoid", few)
    monkeypatch.setitem(RELAXATIONS, "softmax", ("none", *few))


@pytest.fixture
def images(splits):
    train = splits.train.take(slice(0, 17))
    return Images(torch.from_numpy(train.images), Normalise.of(train.images), True)


@pytest.fixture
def labels(splits):
    return torch.from_numpy(splits.train.labels[:17])


def run(images, config=CONFIG, labels=None, monitor=None, checkpoint=None, seed=0):
    if labels is not None:
        images = replace(images, labels=labels, num_classes=3)
    return search(images, config, Views(), seed, monitor, checkpoint)


def history(found, without=("images_per_second",)):
    return [{k: v for k, v in row.items() if k not in without} for row in found.history]


def choices(found):
    """The best operation of every edge."""
    return {
        kind: [found.supernet.ops[i] for i in weights.argmax(dim=1)]
        for kind, weights in found.supernet.architecture().items()
    }


def same(one, other):
    """Bit for bit the same supernet, α, log of α and chosen operations."""
    a, b = one.supernet.state_dict(), other.supernet.state_dict()
    return (
        a.keys() == b.keys()
        and all(a[key].equal(b[key]) for key in a)
        and one.alphas == other.alphas
        and choices(one) == choices(other)
    )


# Labels


@pytest.mark.parametrize("objective", ["barlow-twins", "nt-xent"])
def test_self_supervised_search_is_blind_to_labels(images, labels, objective):
    config = replace(CONFIG, objective=objective, batch_size=8)
    permuted = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert not permuted.equal(labels)

    def watched(labels):
        part = (images.pixels, labels)
        monitor = knn_monitor(part, (images.pixels[:5], labels[:5]), images.normalise)
        return run(images, config, labels, monitor)

    without, with_labels, other = run(images, config), watched(labels), watched(permuted)
    assert same(without, with_labels)
    assert same(without, other)
    blind = ("images_per_second", "knn_accuracy")
    assert history(without, blind) == history(with_labels, blind) == history(other, blind)
    assert history(with_labels) != history(other)


def test_supervised_search_sees_the_labels(images, labels):
    config = replace(CONFIG, objective="supervised", epochs=1, batch_size=8)
    one, again, other = (run(images, config, given) for given in (labels, labels, 2 - labels))
    assert same(one, again)
    assert not same(one, other)


def test_supervised_search_needs_single_labels(images, labels):
    config = replace(CONFIG, objective="supervised")
    for given in (None, torch.ones(17, 3)):
        with pytest.raises(InputError, match=r"search\.objective: 'supervised'.*barlow-twins"):
            run(images, config, given)


def test_another_seed_gives_another_search(images):
    config = replace(CONFIG, epochs=1, batch_size=8)
    one, again, other = (run(images, config, seed=seed) for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)


# Resuming


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.mark.parametrize(("fail_at", "seconds"), [(4, 0), (4, 1000)])
def test_resumed_equals_uninterrupted(
    tmp_path, monkeypatch, images, uninterrupted, fail_at, seconds
):
    whole = uninterrupted.setdefault("found", None) or run(images)
    uninterrupted["found"] = whole
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", seconds)
    step, calls = Bilevel.step_omega, []

    def interrupted(self, loss):
        calls.append(1)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return step(self, loss)

    monkeypatch.setattr(Bilevel, "step_omega", interrupted)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, {}) as checkpoint:
        run(images, checkpoint=checkpoint)
    with Checkpoint(tmp_path, {}) as checkpoint:
        resumed = run(images, checkpoint=checkpoint, seed=0)
    done = fail_at - 1 if seconds == 0 else (fail_at - 1) // 2 * 2
    assert len(calls) == fail_at + 4 - done
    assert same(resumed, whole)
    assert history(resumed) == history(whole)


# Steps


@pytest.fixture
def bilevel(images):
    torch.manual_seed(0)
    supernet = Supernet(2, 3, 3, "sigmoid", 1)
    objective = SelfSupervised(CONFIG, Views(), supernet.out_features)
    step = Bilevel(supernet, objective, CONFIG)
    batch, random = torch.arange(8), torch.Generator().manual_seed(0)
    return step, lambda: objective(supernet, images, batch, random)


def snapshot(step):
    everything = {"supernet": step.supernet.state_dict(), "objective": step.objective.state_dict()}
    flat = {f"{a}.{b}": v.clone() for a, part in everything.items() for b, v in part.items()}
    alpha = {key: value for key, value in flat.items() if ".alphas." in key}
    return alpha, {key: value for key, value in flat.items() if key not in alpha}


def changed(before, after):
    return {key for key in before if not before[key].equal(after[key])}


def test_a_step_on_alpha_changes_alpha_alone(bilevel):
    step, loss = bilevel
    step.step_omega(loss)
    alpha, omega = snapshot(step)
    assert any("running_mean" in key for key in omega if key.startswith("objective"))
    gradients = [None if p.grad is None else p.grad.clone() for p in step.omega]
    figures = step.step_alpha(loss)
    after_alpha, after_omega = snapshot(step)
    assert changed(alpha, after_alpha) == set(alpha)
    assert changed(omega, after_omega) == set()
    for parameter, before in zip(step.omega, gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or parameter.grad.equal(before)
    assert set(figures) == {"loss_alpha", "loss_zero_one"}
    assert all(p.requires_grad for p in [*step.omega, *step.alpha])


def test_a_step_on_omega_changes_omega_alone(bilevel):
    step, loss = bilevel
    step.step_alpha(loss)
    alpha, omega = snapshot(step)
    gradients = [p.grad.clone() for p in step.alpha]
    step.step_omega(loss)
    after_alpha, after_omega = snapshot(step)
    assert changed(alpha, after_alpha) == set()
    moved = changed(omega, after_omega)
    assert any("running_mean" in key for key in moved if key.startswith("supernet"))
    assert any("running_mean" in key for key in moved if key.startswith("objective"))
    assert any("stem.0.weight" in key for key in moved)
    assert all(p.grad.equal(g) for p, g in zip(step.alpha, gradients, strict=True))


def test_weights_and_alphas_are_all_parameters_once(bilevel):
    step, _ = bilevel
    parameters = [*step.supernet.parameters(), *step.objective.parameters()]
    assert sorted(map(id, [*step.omega, *step.alpha])) == sorted(map(id, parameters))


def test_the_gradient_of_omega_is_clipped(bilevel):
    step, loss = bilevel
    step.step_omega(lambda: 1e6 * loss())
    norm = torch.cat([p.grad.flatten() for p in step.omega if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(CONFIG.gradient_clip, rel=1e-3)


@pytest.mark.parametrize(("norm", "expected"), [("l2", -0.01), ("l1", -0.1)])
def test_zero_one_term_of_all_weights(bilevel, norm, expected):
    step, _ = bilevel
    step.config = replace(CONFIG, zero_one_norm=norm)
    with torch.no_grad():
        step.alpha[0].fill_(math.log(0.6 / 0.4))
        step.alpha[1].fill_(math.log(0.4 / 0.6))
    assert step.zero_one().item() == pytest.approx(expected)


def test_softmax_has_no_zero_one_term(images):
    config = replace(CONFIG, relaxation="softmax", epochs=1, batch_size=8)
    found = run(images, config)
    assert [row["loss_zero_one"] for row in found.history] == [0.0]
    assert same(found, run(images, replace(config, zero_one_weight=1e6)))


def test_the_zero_one_weight_drives_alpha_apart(images):
    """Without weight decay and with a huge weight, every σ(α) moves away from ½."""
    config = replace(CONFIG, epochs=1, batch_size=8, zero_one_weight=1e6, alpha_weight_decay=0.0)
    rows = run(images, config).alphas
    start = run(images, replace(config, alpha_learning_rate=1e-12)).alphas
    pairs = [(a["weight"] - 0.5, b["weight"] - 0.5) for a, b in zip(rows, start, strict=True)]
    further = [abs(after) > abs(before) for after, before in pairs]
    assert sum(further) / len(further) > 0.95


# Images


@pytest.mark.parametrize("count", [8, 9, 17])
def test_halves_are_disjoint_and_cover_the_images(count):
    halves = module._halves(count, 4, seed=0)
    assert halves.shape == (count // 2, 2)
    drawn = halves.flatten().tolist()
    assert len(set(drawn)) == len(drawn) == count // 2 * 2
    assert set(drawn) <= set(range(count))


def test_batches_never_mix_the_halves(images, monkeypatch):
    seen = {"alpha": set(), "omega": set()}
    forward = SelfSupervised.forward

    def watch(self, supernet, images, batch, random):
        side = "omega" if next(supernet.alphas.parameters()).requires_grad is False else "alpha"
        seen[side] |= set(batch.tolist())
        return forward(self, supernet, images, batch, random)

    monkeypatch.setattr(SelfSupervised, "forward", watch)
    run(images, replace(CONFIG, epochs=1))
    assert len(seen["alpha"]) == len(seen["omega"]) == 8
    assert not seen["alpha"] & seen["omega"]


@pytest.mark.parametrize("batch_size", [9, 100])
def test_a_batch_larger_than_half_of_the_images(images, batch_size):
    message = rf"search\.batch_size: found {batch_size}.*17 training images is 8.*at most 8"
    with pytest.raises(InputError, match=message):
        run(images, replace(CONFIG, batch_size=batch_size))


def test_the_short_last_batch_is_dropped(images, monkeypatch):
    sizes = []
    step = Bilevel.step_omega
    monkeypatch.setattr(
        Bilevel, "step_omega", lambda self, loss: sizes.append(1) or step(self, loss)
    )
    run(images, replace(CONFIG, batch_size=5, epochs=1))
    assert len(sizes) == 1


# Figures


def test_learning_rates_anneal_along_a_cosine(images):
    config = replace(CONFIG, epochs=3, batch_size=8, learning_rate=0.1, min_learning_rate=0.02)
    rates = [row["learning_rate"] for row in run(images, config).history]
    expected = [0.02 + 0.08 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
def test_every_weight_is_logged_every_epoch(images, relaxation):
    config = replace(CONFIG, relaxation=relaxation, batch_size=8)
    found = run(images, config)
    ops = RELAXATIONS[relaxation]
    assert len(found.alphas) == 2 * 2 * 14 * len(ops)
    places = {(r["epoch"], r["cell"], r["edge"], r["op"]) for r in found.alphas}
    assert len(places) == len(found.alphas)
    logged = {(r["epoch"], r["cell"], r["edge"], r["op"]): r["weight"] for r in found.alphas}
    for kind, weights in found.supernet.architecture().items():
        for (source, target), row in zip(EDGES, weights.tolist(), strict=True):
            for op, weight in zip(ops, row, strict=True):
                assert logged[2, kind, f"{source}->{target}", op] == weight


def test_decisions_count_the_logged_weights(images):
    config = replace(CONFIG, alpha_learning_rate=1.0, batch_size=8)
    found = run(images, config)
    for row in found.history:
        logged = [r for r in found.alphas if r["epoch"] == row["epoch"]]
        decided = [r["weight"] < 0.15 or r["weight"] > 0.85 for r in logged]
        assert row["decided"] == pytest.approx(sum(decided) / len(logged))
        for kind in ("normal", "reduce"):
            best = {}
            for r in (r for r in logged if r["cell"] == kind):
                best[r["edge"]] = max(best.get(r["edge"], (0, "")), (r["weight"], r["op"]))
            assert row[f"skip_{kind}"] == sum(op == "skip_connect" for _, op in best.values())
    assert 0 < found.history[-1]["decided"] < 1


def test_the_monitor_runs_every_few_epochs(images):
    config = replace(CONFIG, epochs=3, batch_size=8, knn_every=2)
    rows = run(images, config, monitor=lambda supernet: 0.5).history
    assert [row.get("knn_accuracy") for row in rows] == [None, 0.5, None]
    config = replace(config, epochs=1, knn_every=0)
    (row,) = run(images, config, monitor=lambda supernet: 0.5).history
    assert "knn_accuracy" not in row


def test_encoding_changes_nothing_and_ignores_the_batch(images):
    torch.manual_seed(0)
    supernet = Supernet(2, 3, 3, "sigmoid", 1)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    whole, parts = (encode(supernet, images.pixels, images.normalise, n) for n in (256, 5))
    assert whole.shape == (17, supernet.out_features)
    torch.testing.assert_close(whole, parts)
    assert changed(before, supernet.state_dict()) == set()
    assert supernet.training
    assert not whole.requires_grad


def test_diverging_search_is_told(images):
    with pytest.raises(InputError, match=r"search: loss_\w+ became (nan|inf) at epoch"):
        run(images, replace(CONFIG, epochs=4, loss_scale=1e38))
