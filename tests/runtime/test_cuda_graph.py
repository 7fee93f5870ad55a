"""Steps as CUDA graphs, proven on a CPU: a tape replays a step's kernels without its Python."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssnas import finetune, losses, search
from ssnas.config.schema import Finetune, Search, Views
from ssnas.data.views import Normalise
from ssnas.engine.cpu import library as kernels
from ssnas.losses import make_loss
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.operations import RELAXATIONS
from ssnas.networks.supernet import Supernet
from ssnas.runtime import cuda_graph
from ssnas.runtime.cuda_graph import WARM_UP, GraphedStep
from ssnas.search import Bilevel
from ssnas.training import batches as batches_module
from ssnas.training import objectives
from ssnas.training import trainer as trainer_module
from ssnas.training.batches import BatchStream
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingData, TrainingImages
from ssnas.training.objectives import SelfSupervised, Supervised
from ssnas.training.optimizer import Descent, set_rate
from ssnas.training.trainer import Trainer

pytestmark = pytest.mark.slow

COUNTS = (20, 8, 4)
SEARCH = Search(channels=2, stem_multiplier=1, batch_size=4, projector=4, alpha_learning_rate=0.05)

# The tape

WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"}
WAITS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive"}
FROM_HOST = {"lift_fresh", "lift_fresh_copy"}


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()._cdata


class NeverWaiting(TorchDispatchMode):
    """Refuses what an accelerator would have to be waited for, and what comes from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        if name in FROM_HOST:
            raise AssertionError(f"{name} copies from the host")
        if name in ("index", "index_put_") and any(
            t.dtype == torch.bool for t in tensors(args[1:2])
        ):
            raise AssertionError(f"{name} by a mask waits for the device")
        return function(*args, **(kwargs or {}))


class Tape(NeverWaiting):
    """Records every kernel that runs within, and the very tensors that it reads and writes.

    Like a CUDA graph, `replay` runs the kernels again on the same memory; views are no kernels.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.before, self.made, self.kept = [], {}, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors((args, kwargs))
        for tensor in inputs:
            if storage(tensor) not in self.before.keys() | self.made:
                self.before[storage(tensor)] = (tensor, tensor.untyped_storage().clone())
        outputs = super().__torch_dispatch__(function, types, args, kwargs)
        read = {storage(tensor) for tensor in inputs}
        fresh = [storage(tensor) not in read for tensor in tensors(outputs)]
        self.made |= {storage(t) for t, new in zip(tensors(outputs), fresh, strict=True) if new}
        self.kept += [inputs, outputs]
        if function._schema.is_mutable or any(fresh):
            self.kernels.append((function, args, kwargs, tensors(outputs), fresh))
        return outputs

    def undo(self):
        """To record a graph executes nothing: all memory as it was before."""
        for tensor, values in self.before.values():
            tensor.untyped_storage().copy_(values)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, outputs, fresh in self.kernels:
            again = tensors(function(*args, **kwargs))
            for old, new, is_new in zip(outputs, again, fresh, strict=True):
                if is_new:
                    old.copy_(new)


class Taped(GraphedStep):
    """`GraphedStep` with a tape in the place of the CUDA graph; afterwards there is no function."""

    @staticmethod
    def _recordable(inputs):
        return True

    def _warm_up(self, inputs):
        return self.step(*inputs)

    def _record(self, inputs):
        with Tape() as tape:
            outputs = self.step(*inputs)
        tape.undo()
        self.step = None
        return tape.replay, outputs


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch):
    """No kernels but PyTorch's, since the tape sees no others; and few operations on an edge."""
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    few = ("max_pool_3x3", "skip_connect", "dil_conv_3x3")
    monkeypatch.setitem(RELAXATIONS, "sigmoid", few)
    monkeypatch.setitem(RELAXATIONS, "softmax", ("none", *few))


X = torch.arange(6.0)


@pytest.mark.parametrize(
    "look",
    [
        lambda: X.sum().item(),
        lambda: float(X[0]),
        lambda: bool((X > 0).all()),
        lambda: X.nonzero(),
        lambda: X[X > 1],
        lambda: X.masked_select(X > 1),
        lambda: X.new_tensor((1.0, 2.0)),
        lambda: torch.tensor(3),
        lambda: torch.optim.SGD([nn.Parameter(X.clone())], lr=torch.tensor(0.1)),
    ],
)
def test_the_tape_refuses_to_wait(look):
    with pytest.raises(AssertionError, match=r"waits for the device|from the host"), Tape():
        look()


def test_the_tape_replays_in_place_work_views_and_new_values():
    x, total = torch.ones(2, 3), torch.zeros(3)
    with Tape() as tape:
        doubled = 2 * x
        doubled[0].add_(1)
        total += doubled.sum(dim=0)
    tape.undo()
    assert total.tolist() == [0, 0, 0]
    for value in (1, 10):
        x.fill_(value)
        tape.replay()
    assert total.tolist() == [(2 + 2 + 1) + (20 + 20 + 1)] * 3


# Steps

STEPS = WARM_UP + 3


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bilevel_step(kind, objective):
    """A search step and what it changes; inputs and rates differ from step to step."""
    torch.manual_seed(0)
    config = replace(SEARCH, objective=objective)
    by_labels = objective == "supervised"
    supernet = Supernet(2, 3, 3, "sigmoid", 1, 3 if by_labels else None)
    criterion = Supervised(make_loss("ce"), 0.0)
    views = SelfSupervised(config, Views(), supernet.out_features)
    bilevel = Bilevel(supernet, criterion if by_labels else views, config)
    advance = kind(bilevel.step)

    def step(number):
        set_rate(bilevel.omega_optimiser.optimiser, 0, 0.1 / (1 + number))
        set_rate(bilevel.alpha_optimiser, 0, 0.02 * number)
        drawn = []
        for half in range(2):
            drawn.append(randn(4, 3, 8, 8, seed=10 * number + half))
            second = randn(4, 3, 8, 8, seed=10 * number + half + 5)
            drawn.append(torch.arange(4).roll(number) % 3 if by_labels else second)
        return advance(0, *drawn)

    return step, bilevel.state()


SGD = Finetune()


def descent_step(kind, loss, genotype, settings=SGD):
    torch.manual_seed(0)
    network = DerivedNetwork(genotype, 2, 3, 3, 3, 1)
    descent = Descent(network.parameters(), replace(settings, learning_rate=0.1, epochs=2 * STEPS))
    criterion = make_loss(loss, COUNTS, num_images=sum(COUNTS), epochs=STEPS)
    objective = Supervised(criterion, 0.0)

    def descend(epoch, *drawn):
        value = objective(network, drawn, epoch)
        descent.step(value)
        return {"loss": value.detach()}

    advance = kind(descend)

    def step(number):
        descent.schedule(number, 0)
        return advance(number, randn(4, 3, 8, 8, seed=number), torch.arange(4).roll(number) % 3)

    return step, {"network": network, "descent": descent}


def assert_replay_is_the_step(make):
    """Bit for bit the same figures and the same state, of optimisers and buffers too."""
    (eager, expected), (taped, state) = make(GraphedStep), make(Taped)
    for number in range(STEPS):
        figures = eager(number), taped(number)
        assert figures[0] == figures[1], number
        assert all(value.isfinite() for value in figures[0].values())
    for name, part in expected.items():
        expected_tensors, actual = (tensors(p.state_dict()) for p in (part, state[name]))
        assert len(expected_tensors) == len(actual)
        assert all(a.equal(b) for a, b in zip(expected_tensors, actual, strict=True)), name


@pytest.mark.parametrize("objective", ["barlow-twins", "nt-xent", "supervised"])
def test_replayed_search_steps_equal_eager_ones(objective):
    assert_replay_is_the_step(partial(bilevel_step, objective=objective))


@pytest.mark.parametrize("loss", ["focal+la", "ce+la", "ldam-drw", "balanced-sigmoid"])
def test_replayed_descent_equals_the_eager_one(genotype, loss):
    """`ldam-drw` changes its weights in the last fifth of the epochs, here among the replays."""
    assert_replay_is_the_step(partial(descent_step, loss=loss, genotype=genotype))


def test_a_replayed_cycle_of_adamw_equals_the_eager_one(genotype):
    settings = Finetune(optimiser="adamw", schedule="one-cycle", decay_norms=False)
    step = partial(descent_step, loss="ce+la", genotype=genotype, settings=settings)
    assert_replay_is_the_step(step)


# What `GraphedStep` promises


def test_elsewhere_every_call_is_a_plain_one():
    calls = []

    def function(number, x):
        calls.append(number)
        return {"double": 2 * x}

    graphed = GraphedStep(function)
    for number in range(WARM_UP + 2):
        assert graphed(number, torch.tensor(3.0))["double"] == 6
    assert calls == list(range(WARM_UP + 2))


def test_each_call_does_the_work_once_and_outputs_stay():
    total, calls = torch.zeros(2), []

    def function(number, x):
        calls.append(1)
        total.add_(x * number)
        return {"total": 1 * total}

    graphed = Taped(function)
    outputs = [graphed(n, torch.tensor([1.0, 10.0]))["total"] for n in range(WARM_UP + 3)]
    sums = [n * (n + 1) // 2 for n in range(WARM_UP + 3)]
    assert [output.tolist() for output in outputs] == [[n, 10 * n] for n in sums]
    assert len(calls) == WARM_UP + 1


def test_inputs_of_another_shape_are_refused():
    graphed = Taped(lambda x: {"double": 2 * x})
    for _ in range(WARM_UP + 1):
        graphed(torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\); found \(1,\)"):
        graphed(torch.zeros(1))


def test_the_environment_switches_graphs_off(monkeypatch):
    elsewhere = torch.empty(2, device="meta")
    monkeypatch.setattr(cuda_graph, "_device", lambda inputs: torch.device("cuda"))
    assert GraphedStep._recordable((elsewhere,))
    monkeypatch.setenv("SSNAS_GRAPHS", "0")
    assert not GraphedStep._recordable((elsewhere,))


def test_a_disabled_one_is_never_recorded():
    graphed = Taped(lambda x: {"double": 2 * x}, enabled=False)
    assert [graphed(torch.tensor(float(n)))["double"].item() for n in range(6)] == [
        *range(0, 12, 2)
    ]
    assert graphed.step is not None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"objective": "supervised", "sampling": "balanced"}, True),
        ({"objective": "supervised", "sampling": "bilateral"}, False),
        ({"second_order": True}, False),
    ],
)
def test_which_searches_are_captured(changes, expected):
    bilevel = Bilevel(Supernet(2, 3, 3, "softmax", 1), nn.Module(), replace(SEARCH, **changes))
    assert bilevel.graphed(bilevel.step).enabled is expected


# Whole trainings


@pytest.fixture
def images(splits):
    few = splits.train.take(slice(0, 16))
    return TrainingImages(torch.from_numpy(few.images), Normalise.of(few.images), True)


def history(rows):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def test_a_captured_search_is_the_plain_one(images, monkeypatch):
    config = replace(SEARCH, cells=3, epochs=3, batch_size=2)
    plain = search.search(images, config, Views(), 0)
    monkeypatch.setattr(search, "GraphedStep", Taped)
    graphed = search.search(images, config, Views(), 0)
    assert equal(graphed.supernet, plain.supernet)
    assert history(graphed.history) == history(plain.history)
    assert graphed.alphas == plain.alphas


def test_a_captured_training_goes_on_exactly(splits, genotype, tmp_path, monkeypatch):
    config = Finetune(epochs=3, batch_size=4, loss="focal+la", learning_rate=0.05)

    def fit(checkpoint=None):
        torch.manual_seed(0)
        network = DerivedNetwork(genotype, 2, 3, 3, 3, 1)
        data, cpu = TrainingData.of(splits), torch.device("cpu")
        return network, finetune.fit(network, data, config, 0, cpu, checkpoint=checkpoint).history

    plain, rows = fit()
    monkeypatch.setattr(finetune, "GraphedStep", Taped)
    save_once, calls = Trainer._save, []

    def save(self):
        save_once(self)
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 0)
    monkeypatch.setattr(Trainer, "_save", save)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, {}) as checkpoint:
        fit(checkpoint)
    with Checkpoint(tmp_path, {}) as checkpoint:
        resumed, resumed_rows = fit(checkpoint)
    assert equal(resumed, plain)
    assert history(resumed_rows) == history(rows)


@pytest.mark.parametrize("objective", ["barlow-twins", "supervised"])
def test_within_an_epoch_nothing_is_waited_for(images, splits, monkeypatch, objective):
    """Neither by the steps nor by the loop, once constants are made and indices are there."""
    labels = torch.from_numpy(splits.train.labels[:16])
    images = replace(images, labels=labels, num_classes=3)
    seen = []

    class Watched(Trainer):
        def _run_epoch(self, bar):
            step = self.step

            def watched(batches, epoch, number):
                assert (epoch, number) == (self.epoch, self.done)
                seen.append(number)
                with NeverWaiting() if epoch or number else nullcontext():
                    return step(batches, epoch, number)

            self.step = watched
            super()._run_epoch(bar)
            self.step = step

        def _collect(self, pending):
            assert self.done == len(self.batches), "looked at the figures within the epoch"
            super()._collect(pending)

    monkeypatch.setattr(search, "Trainer", Watched)
    monkeypatch.setattr(Trainer, "_check_steps", staticmethod(lambda pending: float("inf")))
    monkeypatch.setattr(batches_module, "BLOCK_PIXELS", 1)
    config = replace(SEARCH, epochs=2, batch_size=2, objective=objective, relaxation="softmax")
    search.search(images, config, Views(), 0)
    assert seen == [0, 1, 2, 3] * 2


def test_figures_stay_on_an_accelerator_for_the_epoch():
    for device, expected in (("cpu", 1), ("meta", float("inf"))):
        assert Trainer._check_steps([{"loss": torch.empty((), device=device)}]) == expected


class OnOneDevice(TorchDispatchMode):
    """Refuses kernels that mix the host's tensors with the device's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in tensors((args, kwargs, outputs)) if t.numel()}
        assert len(devices) < 2, f"{function} on {devices}"
        return outputs


@pytest.mark.parametrize("name", ["barlow-twins", "nt-xent", *losses.LOSSES])
def test_a_step_touches_one_device_alone(name, monkeypatch):
    """On the device `meta`, which is none: a constant left on the host would be found."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    views = name in ("barlow-twins", "nt-xent")
    config = replace(SEARCH, objective=name if views else "supervised")
    supernet = Supernet(2, 3, 3, "sigmoid", 1, None if views else 3).to("meta")
    x, targets = torch.empty(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    if views:
        objective, drawn = SelfSupervised(config, Views(), supernet.out_features), (x, x)
    else:
        objective = Supervised(make_loss(name, COUNTS, num_images=32, epochs=5), 0.0)
        drawn = x, targets
    objective.to("meta")
    drawn = tuple(tensor.to("meta") for tensor in drawn)
    epoch = torch.zeros((), dtype=torch.int64, device="meta")
    with OnOneDevice():
        objective(supernet, drawn, epoch).backward()
    assert all(p.grad.is_meta for p in supernet.parameters())


def test_what_is_drawn_comes_from_constants(images):
    settings = replace(Views(), jitter_probability=1.0)
    objective = SelfSupervised(SEARCH, settings, 4)
    stream = BatchStream(objective, images, SEARCH, (0, 0), (0, 1))
    batches = torch.arange(16).view(2, 4, 2, 1)
    stream.inputs(batches, 0, 0)
    stream._block = None
    with NeverWaiting():
        stream.inputs(batches, 0, 1)


def test_loaded_rates_stay_where_captured_steps_read_them():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimisers = [Descent([weight], Finetune(epochs=4, learning_rate=0.2)) for weight in weights]
    optimisers[0].schedule(1, 0)
    rate = optimisers[1].optimiser.param_groups[0]["lr"]
    optimisers[1].load_state_dict(optimisers[0].state_dict())
    assert optimisers[1].optimiser.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1 + 0.1 * 0.5**0.5)
    optimisers[0].schedule(2, 0)
    assert rate.item() == pytest.approx(0.1 + 0.1 * 0.5**0.5)


# Precision


@pytest.mark.parametrize("objective", ["barlow-twins", "nt-xent", "supervised"])
def test_in_bfloat16_losses_and_statistics_are_float32(monkeypatch, objective):
    monkeypatch.setattr(
        objectives, "autocast", lambda device: torch.autocast(device.type, torch.bfloat16)
    )
    seen = {}
    for name in ("barlow_twins", "nt_xent", "cross_correlation"):
        original = getattr(losses, name)

        def watch(*embeddings, name=name, original=original, **options):
            result = original(*embeddings, **options)
            seen[name] = {x.dtype for x in (*embeddings, result)}
            return result

        monkeypatch.setattr(losses, name, watch)
    step, state = bilevel_step(GraphedStep, objective)
    modules = [m for m in state["supernet"].modules() if isinstance(m, nn.Conv2d)]
    modules[0].register_forward_hook(lambda module, args, out: seen.update(layer={out.dtype}))
    figures = step(1)
    assert seen.pop("layer") == {torch.bfloat16}
    assert seen or objective == "supervised"
    assert all(dtypes == {torch.float32} for dtypes in seen.values())
    assert {value.dtype for value in figures.values()} == {torch.float32}
    kept = [t for part in state.values() for t in tensors(part.state_dict())]
    assert {t.dtype for t in kept} == {torch.float32, torch.int64}


# On a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("objective", ["barlow-twins", "nt-xent", "supervised"])
def test_cuda_graphs_replay_the_search(images, splits, monkeypatch, objective):
    labels = torch.from_numpy(splits.train.labels[:16])
    images = replace(images, pixels=images.pixels.cuda(), labels=labels.cuda(), num_classes=3)
    config = replace(SEARCH, epochs=3, batch_size=2, objective=objective)
    graphed = search.search(images, config, Views(), 0)
    monkeypatch.setattr(search, "GraphedStep", lambda function, enabled: function)
    plain = search.search(images, config, Views(), 0)
    for key in ("loss_alpha", "loss_weights"):
        assert [row[key] for row in graphed.history] == pytest.approx(
            [row[key] for row in plain.history], rel=1e-3
        )
