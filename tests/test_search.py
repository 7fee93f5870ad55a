"""The search: blind to labels, exactly resumable, and its steps change what they should alone."""

import math
from dataclasses import replace

import pytest
import torch

from ssnas import search as search_module
from ssnas.config.schema import Search, Views
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.networks.operations import RELAXATIONS
from ssnas.networks.space import EDGES
from ssnas.networks.supernet import Supernet
from ssnas.search import Bilevel, search
from ssnas.training import trainer
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingImages
from ssnas.training.monitor import encode, knn_monitor
from ssnas.training.objectives import SELF_SUPERVISED_LOSSES, SelfSupervised

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
    return TrainingImages(torch.from_numpy(train.images), Normalise.of(train.images), True)


@pytest.fixture
def labels(splits):
    return torch.from_numpy(splits.train.labels[:17])


def run(images, config=CONFIG, labels=None, monitor=None, checkpoint=None, seed=0):
    if labels is not None:
        images = replace(images, labels=labels, num_classes=3)
    return search(images, config, Views(), seed, monitor, checkpoint)


def history(result, without=("images_per_second",)):
    return [{k: v for k, v in row.items() if k not in without} for row in result.history]


def choices(result):
    """The best operation of every edge."""
    return {
        kind: [result.supernet.ops[i] for i in weights.argmax(dim=1)]
        for kind, weights in result.supernet.architecture().items()
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
        part = replace(images, labels=labels)
        monitor = knn_monitor(part, replace(part, pixels=images.pixels[:5], labels=labels[:5]))
        return run(images, config, labels, monitor)

    without, with_labels, other = run(images, config), watched(labels), watched(permuted)
    assert same(without, with_labels)
    assert same(without, other)
    blind = ("images_per_second", "knn_accuracy")
    assert history(without, blind) == history(with_labels, blind) == history(other, blind)
    assert history(with_labels) != history(other)


def test_one_entry_is_one_more_objective(images, monkeypatch):
    """The search descends on the entry's loss, of embeddings of the projector's width."""
    shapes = set()

    def alignment(z_a, z_b, config):
        shapes.add((z_a.shape, z_b.shape, config.temperature))
        return (z_a - z_b).square().mean() + z_a.square().mean()

    monkeypatch.setitem(SELF_SUPERVISED_LOSSES, "alignment", alignment)
    config = replace(CONFIG, objective="alignment", batch_size=8, temperature=0.25, epochs=8)
    losses = [row["loss_weights"] for row in run(images, config).history]
    assert losses[-1] < losses[0]
    assert shapes == {((8, 4), (8, 4), 0.25)}


def test_supervised_search_sees_the_labels(images, labels):
    config = replace(CONFIG, objective="supervised", epochs=1, batch_size=8)
    one, again, other = (run(images, config, y) for y in (labels, labels, 2 - labels))
    assert same(one, again)
    assert not same(one, other)


def test_supervised_search_needs_single_labels(images, labels):
    config = replace(CONFIG, objective="supervised")
    for unfit in (None, torch.ones(17, 3)):
        with pytest.raises(InputError, match=r"search\.objective: 'supervised'.*barlow-twins"):
            run(images, config, unfit)


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
    whole = uninterrupted.setdefault("result", None) or run(images)
    uninterrupted["result"] = whole
    monkeypatch.setattr(trainer, "SAVE_SECONDS", seconds)
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
    batch, random = torch.arange(8).view(8, 1), torch.Generator().manual_seed(0)
    return step, lambda: objective(supernet, objective.draw(images, batch, random), 0)


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
    result = run(images, config)
    assert [row["loss_zero_one"] for row in result.history] == [0.0]
    assert same(result, run(images, replace(config, zero_one_weight=1e6)))


def test_the_zero_one_weight_drives_alpha_apart(images):
    """Without weight decay and with a huge weight, every σ(α) moves away from ½."""
    config = replace(CONFIG, epochs=1, batch_size=8, zero_one_weight=1e6, alpha_weight_decay=0.0)
    rows = run(images, config).alphas
    start = run(images, replace(config, alpha_learning_rate=1e-12)).alphas
    pairs = [(a["weight"] - 0.5, b["weight"] - 0.5) for a, b in zip(rows, start, strict=True)]
    further = [abs(after) > abs(before) for after, before in pairs]
    assert sum(further) / len(further) > 0.95


# Second order


class Toy(torch.nn.Module):
    """Stands for a supernet of one α and one ω."""

    def __init__(self):
        super().__init__()
        self.omega = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.alpha = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.relaxation = "softmax"

    def weights(self):
        return [self.omega]

    def architecture_parameters(self):
        return [self.alpha]

    def architecture_groups(self):
        return [[self.alpha]]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_gradient_is_that_of_the_unrolled_step(momentum):
    """Against autograd through ω' = ω − ξ (m b + ∂ℓ_train/∂ω + λ ω), b the momentum so far."""
    config = replace(CONFIG, learning_rate=0.1, momentum=momentum, weight_decay=0.01)
    config = replace(config, gradient_clip=1e9)
    toy = Toy()
    step = Bilevel(toy, torch.nn.Module(), config)

    def train_loss(omega, alpha):
        return (omega - alpha.sin()) ** 2 * (1 + alpha**2)

    def val_loss(omega, alpha):
        return (omega * alpha - 1) ** 2

    step.step_omega(lambda: train_loss(toy.omega, toy.alpha))
    buffer = step.omega_optimiser.optimiser.state[toy.omega].get("momentum_buffer")
    buffer = torch.tensor(0.0) if buffer is None else buffer.clone()
    omega, alpha = (p.detach().clone().requires_grad_() for p in (toy.omega, toy.alpha))
    (gradient,) = torch.autograd.grad(train_loss(omega, alpha), omega, create_graph=True)
    unrolled = omega - 0.1 * (momentum * buffer + gradient + 0.01 * omega)
    (expected,) = torch.autograd.grad(val_loss(unrolled, alpha), alpha)

    before = toy.omega.detach().clone()
    step.step_alpha(
        lambda: val_loss(toy.omega, toy.alpha), lambda: train_loss(toy.omega, toy.alpha)
    )
    assert toy.alpha.grad.item() == pytest.approx(expected.item(), rel=1e-4)
    assert toy.omega.equal(before)
    (first_order,) = torch.autograd.grad(val_loss(omega, alpha), alpha)
    assert abs(first_order.item() - expected.item()) > 0.003


def test_second_order_search_runs_and_differs(images, labels):
    config = replace(CONFIG, objective="supervised", epochs=1, batch_size=8)
    first, second = (
        run(images, replace(config, second_order=order), labels) for order in (False, True)
    )
    assert not same(first, second)
    assert all(math.isfinite(row["loss_alpha"]) for row in second.history)


# Sampling schemes

BILATERAL_KEYS = {"relaxation": "softmax", "objective": "supervised", "sampling": "bilateral"}
BILATERAL = replace(CONFIG, **BILATERAL_KEYS, epochs=3)


def test_bilateral_search_follows_its_schedule(images, labels):
    result = run(images, BILATERAL, labels)
    ratios = [row["mixing_ratio"] for row in result.history]
    assert ratios == pytest.approx([1, 1 - 1 / 9, 1 - 4 / 9])
    assert {row["backbone_rate"] for row in result.history} == {CONFIG.alpha_learning_rate}
    assert {row["cell"] for row in result.alphas} == {"normal", "reduce", "instance", "balanced"}


def test_heterogeneous_rates_slow_the_backbone_alone(images, labels, monkeypatch):
    rates = []
    step = Bilevel.step_alpha

    def watch(self, *arguments):
        rates.append([group["lr"].item() for group in self.alpha_optimiser.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(Bilevel, "step_alpha", watch)
    result = run(images, replace(BILATERAL, heterogeneous=True, batch_size=8), labels)
    factors = [math.exp(1 - 1 / a) for a in (1, 8 / 9, 5 / 9)]
    base = CONFIG.alpha_learning_rate
    assert [rate for rate, _ in rates] == pytest.approx([base * f for f in factors])
    assert [rate for _, rate in rates] == pytest.approx([base] * 3)
    assert [row["backbone_rate"] for row in result.history] == pytest.approx(
        [base * f for f in factors]
    )


@pytest.mark.parametrize("sampling", ["balanced", "bilateral"])
def test_resumed_sampling_equals_uninterrupted(tmp_path, images, labels, monkeypatch, sampling):
    config = replace(BILATERAL, sampling=sampling, epochs=2, heterogeneous=sampling == "bilateral")
    whole = run(images, config, labels)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    step, calls = Bilevel.step_omega, []

    def interrupted(self, loss):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, loss)

    monkeypatch.setattr(Bilevel, "step_omega", interrupted)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, {}) as checkpoint:
        run(images, config, labels, checkpoint=checkpoint)
    with Checkpoint(tmp_path, {}) as checkpoint:
        resumed = run(images, config, labels, checkpoint=checkpoint)
    assert same(whole, resumed)
    assert history(whole) == history(resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "balanced"}, r"search\.sampling: found 'balanced'.*barlow-twins"),
        (
            {"objective": "supervised", "heterogeneous": True},
            r"search\.heterogeneous.*sampling bilateral",
        ),
        (
            {**BILATERAL_KEYS, "second_order": True},
            r"search\.second_order: found true with sampling bilateral",
        ),
        ({"partial": 2}, r"search\.partial: found 2.*softmax"),
    ],
)
def test_options_that_do_not_go_together(images, labels, changes, message):
    with pytest.raises(InputError, match=message):
        run(images, replace(CONFIG, **changes), labels)


def test_a_search_of_no_epochs_leaves_a_random_genotype(images):
    one, again, other = (run(images, replace(CONFIG, epochs=0), seed=s) for s in (0, 0, 1))
    assert one.history == one.alphas == []
    assert choices(one) == choices(again) != choices(other)


# Images


@pytest.mark.parametrize(
    ("count", "share", "sizes"), [(8, 0.5, (4, 4)), (17, 0.5, (8, 8)), (40, 0.8, (8, 32))]
)
def test_the_parts_of_alpha_and_omega_are_disjoint(count, share, sizes):
    parts = search_module._alpha_and_omega_images(count, replace(CONFIG, omega_share=share), seed=0)
    drawn = torch.cat(parts).tolist()
    assert tuple(map(len, parts)) == sizes
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(count))


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_batches_never_mix_the_parts(images, monkeypatch, share):
    """An image's number goes into all its pixels, which the views then keep."""
    seen = {"alpha": [], "omega": []}

    def watch(self, supernet, views, epoch):
        trained = next(supernet.alphas.parameters()).requires_grad
        seen["alpha" if trained else "omega"] += [view[:, 0, 0, 0] for view in views]
        return sum(p.sum() for p in supernet.parameters()) + views[0].mean()

    def numbers(self, images, batch, random):
        return (batch[:, 0].float().view(-1, 1, 1, 1),) * 2

    monkeypatch.setattr(SelfSupervised, "draw", numbers)
    monkeypatch.setattr(SelfSupervised, "forward", watch)
    run(images, replace(CONFIG, epochs=1, omega_share=share))
    alpha, omega = (set(torch.cat(numbers).tolist()) for numbers in seen.values())
    assert (len(alpha), len(omega)) == {0.5: (8, 8), 0.75: (4, 12)}[share]
    assert not alpha & omega


@pytest.mark.parametrize("batch_size", [9, 100])
def test_a_batch_larger_than_half_of_the_images(images, batch_size):
    message = rf"search\.batch_size: found {batch_size}.*17 training images 8 drive.*at most 8"
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
    result = run(images, config)
    ops = RELAXATIONS[relaxation]
    assert len(result.alphas) == 2 * 2 * 14 * len(ops)
    places = {(r["epoch"], r["cell"], r["edge"], r["op"]) for r in result.alphas}
    assert len(places) == len(result.alphas)
    logged = {(r["epoch"], r["cell"], r["edge"], r["op"]): r["weight"] for r in result.alphas}
    for kind, weights in result.supernet.architecture().items():
        for (source, target), row in zip(EDGES, weights.tolist(), strict=True):
            for op, weight in zip(ops, row, strict=True):
                assert logged[2, kind, f"{source}->{target}", op] == weight


def test_decisions_count_the_logged_weights(images):
    config = replace(CONFIG, alpha_learning_rate=1.0, batch_size=8)
    result = run(images, config)
    for row in result.history:
        logged = [r for r in result.alphas if r["epoch"] == row["epoch"]]
        decided = [r["weight"] < 0.15 or r["weight"] > 0.85 for r in logged]
        assert row["decided"] == pytest.approx(sum(decided) / len(logged))
        for kind in ("normal", "reduce"):
            best = {}
            for r in (r for r in logged if r["cell"] == kind):
                best[r["edge"]] = max(best.get(r["edge"], (0, "")), (r["weight"], r["op"]))
            assert row[f"skip_{kind}"] == sum(op == "skip_connect" for _, op in best.values())
    assert 0 < result.history[-1]["decided"] < 1


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


# The pace of α


def test_alpha_travels_as_far_as_in_the_published_search():
    """28,700 steps of 0.0003 there; whatever the length here, the rate times α's steps is 8.6."""
    for epochs, warm_up, steps in ((100, 0.0, 287), (8, 0.25, 5), (1, 0.0, 1)):
        config = Search(epochs=epochs, alpha_learning_rate=None, alpha_warm_up=warm_up)
        moving = epochs - search_module.waiting_epochs(config)
        assert search_module.alpha_rate(config, steps) * moving * steps == pytest.approx(8.6)


def test_alpha_waits_for_omega(images):
    config = replace(CONFIG, epochs=4, batch_size=8, alpha_warm_up=0.5)
    result = run(images, config)
    by_epoch = {
        epoch: [row["weight"] for row in result.alphas if row["epoch"] == epoch]
        for epoch in range(1, 5)
    }
    assert by_epoch[1] == by_epoch[2] != by_epoch[3] != by_epoch[4]
    assert ["loss_alpha" in row for row in result.history] == [False, False, True, True]
    assert all(math.isfinite(row["loss_weights"]) for row in result.history)


def test_changed_edges_are_those_whose_best_operation_changed(images):
    config = replace(CONFIG, epochs=4, alpha_learning_rate=0.5)
    result = run(images, config)
    best = {}
    for row in result.alphas:
        edge = row["cell"], row["edge"]
        of_epoch = best.setdefault(row["epoch"], {})
        of_epoch[edge] = max(of_epoch.get(edge, (-1, "")), (row["weight"], row["op"]))
    for epoch in range(2, 5):
        changed_edges = sum(best[epoch][e][1] != best[epoch - 1][e][1] for e in best[epoch])
        assert result.history[epoch - 1]["changed_edges"] == changed_edges
    assert result.history[0]["changed_edges"] == 0


def test_a_search_stops_when_its_genotype_has_settled(images):
    still = replace(CONFIG, epochs=9, batch_size=8, alpha_learning_rate=1e-9, early_stop=3)
    # The first look finds nothing to compare with.
    assert len(run(images, still).history) == 4
    waiting = replace(still, alpha_warm_up=0.66)
    assert len(run(images, waiting).history) == 7
    assert len(run(images, replace(still, early_stop=0)).history) == 9


def test_second_order_needs_sgd(images):
    with pytest.raises(InputError, match=r"second_order.*'adamw'.*sgd"):
        run(images, replace(CONFIG, second_order=True, optimiser="adamw"))


def test_the_length_follows_from_the_number_of_images(images):
    config = replace(CONFIG, epochs=None, batch_size=None)
    many = TrainingImages(images.pixels[:1].expand(4000, -1, -1, -1), images.normalise, True)
    seconds = search_module.epoch_seconds(many, config, Views())
    assert 0 < seconds < 600
