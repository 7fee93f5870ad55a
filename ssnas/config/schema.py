"""Parameters as typed, validated, frozen objects.

The defaults are the papers'. Where another module's table says what a key accepts, the key names
that table (`module:name`), so that a loss, an operation or a data set is added in one place.

The text below a key is its meaning, in docs/parameters.md too. "Published:" starts the papers'
values: T21's, unless another paper is named, and "open" where T21 is silent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ssnas.errors import InputError, shown

BY_NUMBER = "or null"
"""Marks numbers that are null where they shall follow from the number of images, by
`ssnas.config.recipes.sized`, before anything reads them."""

TRANSFER_WEIGHTS = ("search", "finetune", "none")


def _key(default: Any, **limits: Any) -> Any:
    """Declare a field with its limits: `choices`, `low` (≥), `above` (>), `high` (≤).

    `choices` are the values themselves, or `module:name` of the table or function that has them.
    """
    return dataclasses.field(default=default, metadata=limits)


@dataclass(frozen=True)
class Data:
    """Images and how they become a long-tailed split (see `ssnas.data.split`)."""

    dataset: str = "digits"
    """Source of the images: a name, a folder or an `.npz` file. Published: CIFAR-10, ChestMNIST."""
    size: int | None = _key(None, low=8, high=4096)
    """Side of the square images in pixels; null keeps the source's. Published: 28 (ChestMNIST), 28
    and 224 (X-rays)."""
    channels: str = _key("keep", choices="ssnas.data.folders:CHANNELS")
    """Keep the images' colours, or convert all to grey or to colour."""
    profile: str = _key("exponential", choices="ssnas.data.longtail:PROFILES")
    """Profile: how many images each class keeps; `natural` keeps them all. Published: `power` in
    the text, `exponential` in the quoted baselines."""
    imbalance: float = _key(10.0, low=1.0, high=1e6)
    """Imbalance factor ρ: the largest class over the smallest. Published: 10 (CIFAR-10-LT)."""
    largest_class: int | None = _key(None, low=1, high=10**9)
    """Most images of the largest class; null: as many as the source's smallest class has. `natural`
    ignores it. Published: 5000, all."""
    max_images: int | None = _key(None, low=2, high=10**9)
    """Most training images, and most validation images of the source, drawn at random after the
    profile; null: all."""
    labelled_fraction: float = _key(1.0, above=0.0, high=1.0)
    """Share of the training images that keep their labels; only the search sees the others.
    Published: 1."""
    unlabelled: str | None = None
    """More images, without labels, that only the search sees: a folder, or an array of an .npz as
    `file.npz:array`. Published: null."""
    val_fraction: float = _key(0.1, above=0.0, high=0.5)
    """Share of the training images held out for validation, if the source has none. Published:
    open."""
    test_fraction: float = _key(0.2, low=0.0, high=0.5)
    """Share of the images held out for the test, if the source has none; 0: no test."""
    bad_images: str = _key("error", choices="ssnas.data.folders:BAD_IMAGES")
    """Action on an unreadable file: end the run, or skip the file and list it."""
    flip: bool | None = None
    """Mirror images left to right in views and crops; null: as the source says. Published: true
    (CIFAR-10)."""
    white_level: int | None = _key(None, low=1, high=65535)
    """Value that is white in image files of more than 8 bits, such as 4095 for 12; null: as the
    files say, or the smallest of 8, 10, 12, 14 and 16 bits that holds them all."""
    groups: str | None = None
    """Images that belong together, such as those of a patient, and so go into one split: a CSV file
    with the columns `image` and `group`, or a regular expression on file names with the group in
    parentheses, such as `(patient\\d+)_`; null: as the source says."""


@dataclass(frozen=True)
class Views:
    """Random views of the self-supervised objectives (see `ssnas.data.views.views`)."""

    min_area: float = _key(0.2, above=0.0, high=1.0)
    """Smallest random crop, as a share of the area. Published: open."""
    brightness: float = _key(0.4, low=0.0, high=1.0)
    """Strength of the jitter: a factor in 1 ± value. Published: 0.4 (Barlow Twins)."""
    contrast: float = _key(0.4, low=0.0, high=1.0)
    """Strength of the jitter: a factor in 1 ± value. Published: 0.4 (Barlow Twins)."""
    saturation: float = _key(0.2, low=0.0, high=1.0)
    """Strength of the jitter: a factor in 1 ± value; colour images only. Published: 0.2 (Barlow
    Twins)."""
    hue: float = _key(0.1, low=0.0, high=0.5)
    """Largest turn of the hue, as a share of the circle; colour images only. Published: 0.1
    (Barlow Twins)."""
    jitter_probability: float = _key(0.8, low=0.0, high=1.0)
    """Probability of any jitter. Published: 0.8 (Barlow Twins)."""
    grey_probability: float = _key(0.2, low=0.0, high=1.0)
    """Probability of turning a colour image grey. Published: 0.2 (Barlow Twins)."""


@dataclass(frozen=True)
class Training:
    """The descent on ω and what it sees, for search and fine-tuning alike (T21, section 4).

    `sampling` draws the batches (see `ssnas.data.sampling`). Under `bilateral` the two branches are
    mixed by the schedule `mixing`, of steepness `steepness` (see `ssnas.networks.bilateral`).
    """

    recipe: str = _key("published", choices="ssnas.config.recipes:RECIPES")
    """Values of other keys, see docs/recipes.md; keys that are set beside it win. In params.yaml
    the top-level `recipe` sets it. Published: `published`."""
    epochs: Annotated[int, BY_NUMBER] = _key(100, low=0, high=10**5)
    """Passes over the images that drive ω; null: by their number (`ssnas.config.recipes.sized`); a
    search of 0 gives a random genotype. Published: 100; Y24 40."""
    batch_size: Annotated[int, BY_NUMBER] = _key(32, low=2, high=2**16)
    """Images a step; in a search for each of α and ω, under `bilateral` for each sampler; null: by
    the number of images. Published: 32; Y24 64; H24 128."""
    optimiser: str = _key("sgd", choices="ssnas.training.optimizer:OPTIMISERS")
    """Optimiser of ω. Published: `sgd`."""
    learning_rate: float = _key(0.025, above=0.0, high=100.0)
    """Largest learning rate of ω. Published: 0.025; H24 0.02."""
    schedule: str = _key("cosine", choices="ssnas.training.optimizer:SCHEDULES")
    """Course of the learning rate: down along a cosine, by epoch; or up and down again in one
    cycle, by step. Published: `cosine`."""
    warm_up: float = _key(0.25, low=0.0, high=0.9)
    """Share of the steps in which the learning rate of `one-cycle` rises. Published: no such
    schedule."""
    min_learning_rate: float = _key(0.0, low=0.0, high=100.0)
    """Learning rate at the end of the `cosine`. Published: open; Y24 0.001."""
    momentum: float = _key(0.9, low=0.0, high=0.999)
    """Momentum of SGD, or β₁ of AdamW. Published: 0.9."""
    weight_decay: Annotated[float, BY_NUMBER] = _key(3e-4, low=0.0, high=10.0)
    """Decay of ω; null: by the number of images. Published: 3e-4."""
    decay_norms: bool = True
    """Decay batch norms and biases too, not the weights of convolutions and linear layers alone.
    Published: true."""
    gradient_clip: float = _key(5.0, above=0.0, high=1e9)
    """Largest norm of the gradient. Published: 5 (DARTS)."""
    crop_padding: float = _key(0.125, low=0.0, high=0.5)
    """Largest shift of the random crop, as a share of the side; in a search with `supervised`
    only. Published: 4 of 32 pixels (DARTS)."""
    sampling: str = _key("instance", choices="ssnas.data.sampling:SAMPLERS")
    """Sampler of the batches: every image equally often, every class equally often, or a batch of
    each for BBN's two branches. The last two need one label an image, and in a search `supervised`.
    Published: `instance`; H24 all three."""
    mixing: str = _key("parabolic", choices="ssnas.networks.bilateral:SCHEDULES")
    """Mixing ratio a of `bilateral`, the share of the first branch, over the progress t/T: 1 −
    (t/T)², 1/(1 + exp(k (t/T − ½))), ½, 0. Published: H24 all four."""
    steepness: float = _key(10.0, above=0.0, high=1e4)
    """k of the mixing `reverse-sigmoid`. Published: open."""


@dataclass(frozen=True)
class Search(Training):
    """The bilevel search (T21, sections 3 and 4).

    A search of no epochs leaves α as they are drawn: its genotype is a random one.
    """

    relaxation: str = _key("sigmoid", choices="ssnas.networks.operations:RELAXATIONS")
    """σ of each architecture weight (FairDARTS), or softmax over an edge (DARTS). Published:
    `sigmoid`."""
    objective: str = _key("barlow-twins", choices="ssnas.training.objectives:OBJECTIVES")
    """Loss of ω and α; `supervised` is cross-entropy, and needs one label an image. Published:
    `barlow-twins`."""
    channels: Annotated[int, BY_NUMBER] = _key(16, low=2, high=4096)
    """Channels C of the first cell; each reduction cell doubles them; null: by the number of images
    (`ssnas.config.recipes.shaped`). Published: open."""
    cells: int = _key(3, low=3, high=100)
    """Number of cells L; the reduction cells are at ⌊L/3⌋ and ⌊2L/3⌋. Published: 3; Y24, H24 8."""
    stem_multiplier: int = _key(3, low=1, high=64)
    """The stem has this times C channels. Published: 3 (DARTS, CIFAR-10), 1 (DARTS, ImageNet)."""
    stem: str | None = _key("cifar", choices="ssnas.networks.backbone:STEMS")
    """Layers before the first cell: one convolution at full resolution, one that halves it, two
    that reduce images to a quarter, or three that reduce large ones to an eighth; null: by size
    and number of the images (`ssnas.config.recipes.shaped`).
    Derived networks and transfers keep it. Published: `cifar`; `imagenet` (DARTS, ImageNet)."""
    partial: int = _key(1, low=1, high=4096)
    """K: the operations see 1/K of the channels, and edges are normalised (PC-DARTS), which saves
    memory; a divisor of `channels`, above 1 with `softmax` and without `bilateral`. Published: 4
    (PC-DARTS)."""
    checkpoint: bool = False
    """Keep only the inputs of each cell and compute the rest again in the backward pass: the same
    figures with less memory, for one more forward pass."""
    omega_share: float = _key(0.5, above=0.0, high=0.9)
    """Share of the training images that drive ω; the others drive α. Published: 0.5; H24 0.8."""
    second_order: bool = False
    """Let the α step see how ω depends on α (DARTS), at two and a half times the passes. Published:
    open."""
    heterogeneous: bool = False
    """HLS: multiply the learning rate of the backbone's α by exp(1 − 1/a); with `bilateral`.
    Published: true (H24)."""
    alpha_learning_rate: float | None = _key(3e-4, above=0.0, high=100.0)
    """Learning rate of Adam on α; null: what moves α as far as the published search may, 8.6 over
    α's steps. Published: 3e-4 (DARTS, Y24); H24 0.02."""
    alpha_warm_up: float = _key(0.0, low=0.0, high=0.9)
    """Share of the epochs, at the start, in which α waits until ω has learned something. Published:
    0."""
    alpha_weight_decay: float = _key(1e-3, low=0.0, high=1.0)
    """Weight decay of Adam on α. Published: 1e-3 (DARTS, Y24)."""
    zero_one_norm: str = _key("l2", choices="ssnas.losses:ZERO_ONE_NORMS")
    """Form of the zero-one loss. Published: `l2`; Y24 `l1`."""
    zero_one_weight: float = _key(10.0, low=0.0, high=1e6)
    """Weight of the zero-one loss beside the objective; 0 switches it off. Published: 10
    (FairDARTS)."""
    projector: int = _key(512, low=2, high=2**16)
    """Width of the three-layer projector behind the network. Published: open; 8192 (Barlow Twins,
    ImageNet)."""
    loss_scale: float = _key(0.024, above=0.0, high=1e6)
    """Factor of the Barlow Twins loss. Published: 0.024 (Barlow Twins' code)."""
    lambd: float = _key(0.005, low=0.0, high=1e6)
    """λ of the Barlow Twins loss. Published: 0.005 (Barlow Twins)."""
    temperature: float = _key(0.5, above=0.0, high=1e6)
    """Temperature of NT-Xent. Published: 0.5 (SimCLR, CIFAR-10)."""
    early_stop: int = _key(0, low=0, high=10**5)
    """Epochs without a change of the genotype (the best operation of each edge) before the search
    stops; 0: search to the end. Published: 0."""
    knn_every: int = _key(1, low=0, high=10**5)
    """Epochs between measurements of the nearest-neighbour accuracy; 0: never."""


@dataclass(frozen=True)
class Derive:
    """The derivation rule, see `ssnas.networks.genotype.derive`.

    `op` is the operation of the rule `uniform`.
    """

    rule: str = _key("argmax", choices="ssnas.networks.genotype:RULES")
    """Operations that stay: the best on every edge, DARTS' or FairDARTS' rule, or `op` on every
    edge whatever the search says. Published: `argmax`."""
    threshold: float = _key(0.85, low=0.0, high=1.0)
    """Smallest weight that the rule `threshold` keeps. Published: 0.85 (FairDARTS)."""
    op: str = _key("sep_conv_3x3", choices="ssnas.networks.operations:kept_operations")
    """Operation of the rule `uniform`."""


@dataclass(frozen=True)
class Finetune(Training):
    """Supervised training of a network.

    `network` is the one of the derived genotype, the searched supernet itself (H24), or a
    baseline. `cells` and `channels` stack the derived cells to another size than the searched one;
    `pretrain_epochs` train it with the search's self-supervised objective first (SSNAS).
    """

    epochs: Annotated[int, BY_NUMBER] = _key(600, low=0, high=10**5)
    """Passes over the training images; null: by their number; 0 leaves the network as it starts.
    Published: 600; Y24 150."""
    network: str = _key("derived", choices="ssnas.networks.factory:NETWORKS")
    """Network to train: the derived one, the searched supernet itself (needs `search.objective` as
    `supervised`), or a published one. Published: `derived`; H24 `supernet`."""
    cells: int | None = _key(None, low=3, high=100)
    """Cells of the derived network; null: as searched. Published: as searched."""
    channels: int | None = _key(None, low=2, high=4096)
    """C of the derived network; null: as searched. Published: as searched."""
    parameters: int | None = _key(None, low=1, high=10**9)
    """Number of parameters that the derived network shall come nearest to, by its channels; null:
    by `channels`. It then starts from scratch. Published: no such rule."""
    pretrain_epochs: int = _key(0, low=0, high=10**5)
    """Epochs of the search's self-supervised objective before the labels. Published: 0; SSNAS
    above 0."""
    inherit: bool = True
    """Start the derived network from the searched weights, or from scratch. Published: true; Y24
    false."""
    freeze_backbone: bool = False
    """Train branches and classifiers alone; a bilateral supernet only. Published: H24 both."""
    loss: str = _key("focal+la", choices="ssnas.losses:LOSSES")
    """Training loss; `+la` is logit adjustment. In params.yaml the top-level `loss` sets it.
    Published: `focal+la`."""
    gamma: float = _key(2.0, low=0.0, high=100.0)
    """γ of the focal loss. Published: 2."""
    tau: float = _key(1.0, low=0.0, high=100.0)
    """τ of the logit adjustment. Published: 1."""
    averaging: float = _key(0.0, low=0.0, high=1.0)
    """Share of the steps, at the end, over which the final weights are averaged; not with
    `early_stop`. Published: 0."""
    early_stop: int = _key(0, low=0, high=10**5)
    """Epochs without a better validation figure before training stops, with the best weights; 0:
    train to the end. Published: 0."""


@dataclass(frozen=True)
class Transfer:
    """The data set that genotype and weights move to, and how they are trained there.

    Without a `dataset` nothing is moved. A source without a published test set is cross-validated
    over `folds` stratified parts.
    """

    dataset: str | None = None
    """Data set that genotype and weights move to; forms as `data.dataset`; null: no transfer.
    Published: the COVID-19 X-rays."""
    size: int | None = _key(None, low=8, high=4096)
    """As `data.size`. Published: 28 and 224."""
    channels: str = _key("keep", choices="ssnas.data.folders:CHANNELS")
    """As `data.channels`."""
    folds: int = _key(5, low=2, high=1000)
    """Parts of the cross-validation, where the data set has no test images. Published: 5."""
    val_fraction: float = _key(0.1, above=0.0, high=0.5)
    """Share of the training images held out for validation. Published: open."""
    bad_images: str = _key("error", choices="ssnas.data.folders:BAD_IMAGES")
    """As `data.bad_images`."""
    flip: bool | None = None
    """As `data.flip`. Published: open."""
    white_level: int | None = _key(None, low=1, high=65535)
    """As `data.white_level`."""
    groups: str | None = None
    """As `data.groups`; also one fold."""
    weights: str = _key("search", choices=TRANSFER_WEIGHTS)
    """Start from the searched weights, from the fine-tuned ones, or from none. Published:
    `search`."""
    loss: str = _key("focal+la", choices="ssnas.losses:LOSSES")
    """Training loss. In params.yaml the top-level `loss` sets it. Published: `focal+la`."""
    epochs: Annotated[int, BY_NUMBER] = _key(100, low=1, high=10**5)
    """Passes over the training images of each fold; null: by their number. Published: open."""


SECTIONS: dict[str, type] = {
    "data": Data,
    "views": Views,
    "search": Search,
    "derive": Derive,
    "finetune": Finetune,
    "transfer": Transfer,
}
SCALED = ("data", "search", "finetune", "transfer")
TOP_LEVEL = {
    "dataset": "Sets `data.dataset`.",
    "recipe": "Sets `search.recipe` and `finetune.recipe`; `views` and `transfer` follow.",
    "loss": "Sets `finetune.loss` and `transfer.loss`; null: the recipe's.",
    "decide": "Decision whose figures are the headline, see `ssnas.decision`: `balanced` (all "
    "classes equally frequent), `natural` (as frequent as among the training images), `published` "
    "(the papers': the softmax of the logits), `f1` (several labels an image: thresholds of the "
    "best F1), or the frequency of each class in the place of use, by name. Published: "
    "`published`.",
    "seed": "Seed of splits, initialisation, order and views: 0 to 2^31 − 1.",
    "scale": "Preset that applies: a key of `scales`, such as `small` or `paper`.",
    "device": "`auto` (the accelerator, if there is one), `cpu`, or a PyTorch device such as "
    "`cuda:0`. A change runs nothing again.",
}
"""The keys of params.yaml outside its sections, each with its meaning."""


@dataclass(frozen=True)
class Run:
    """The parameters of one run of the pipeline.

    A run has a data set, a search, a row (the fine-tuned network) and a transfer. Rows may share
    a search, and searches a data set, so each of the four has a folder and a seed.

    Attributes:
        folders: the folder of each of the four below data/, artifacts/ and metrics/, by its kind
            (`datasets`, `searches`, `rows`, `transfers`).
        root: the folder in which data/, artifacts/ and metrics/ are.
        scale: the preset that applies.
        seeds: the seed of each of the four, by its kind.
        device: `auto`, `cpu` or another device by its PyTorch name.
        decide: the decision whose figures are the headline: one of
            `ssnas.config.decide.MULTI_LABEL_DECISIONS`, or frequencies by class name.
    """

    folders: Mapping[str, str]
    scale: str
    seeds: Mapping[str, int]
    device: str
    data: Data = Data()
    views: Views = Views()
    search: Search = Search()
    derive: Derive = Derive()
    finetune: Finetune = Finetune()
    transfer: Transfer = Transfer()
    decide: str | Mapping[str, float] = "published"
    root: Path = Path()


def build(section: type, where: str, *layers: Mapping[str, Any]) -> Any:
    """Build an instance of `section` from its defaults and `layers`, the last layer winning.

    Args:
        section: a dataclass whose fields are declared by `_key`.
        where: how messages name the section, for instance `params.yaml: search`.
        layers: values by key.

    Raises:
        InputError: naming an unknown key, or a value of the wrong type or outside its limits,
            and what is accepted.

    Example:
        >>> build(Derive, "params.yaml: derive", {"rule": "argmax"}, {"rule": "darts"}).rule
        'darts'
        >>> build(Search, "params.yaml: search", {"cells": 2})
        Traceback (most recent call last):
        ssnas.errors.InputError: params.yaml: search.cells: found 2; accepted is at least 3 and \
at most 100
    """
    values = {}
    for layer in layers:
        for key, value in layer.items():
            values[key] = check_key(section, key, value, f"{where}.{key}")
    return section(**values)


def check_key(section: type, key: str, value: Any, where: str) -> Any:
    """Check a value against the declaration of a section's key.

    Args:
        section: a dataclass whose fields are declared by `_key`.
        key: one of its fields.
        value: as the user wrote it.
        where: the file and the key path at which the user wrote it.

    Returns:
        The value, whole numbers turned into floats where the key is one.

    Raises:
        InputError: for an unknown key, or a value of the wrong type or outside its limits.

    Example:
        >>> check_key(Data, "imbalance", 20, "params.yaml: data.imbalance")
        20.0
    """
    fields = {field.name: field for field in dataclasses.fields(section)}
    if key not in fields:
        raise InputError(
            f"{where}: unknown key; the keys of {section.__name__.lower()} are {', '.join(fields)}"
        )
    return check_value(value, where, hints_of(section)[key], fields[key].metadata)


def hints_of(section: type) -> dict[str, Any]:
    """Give the type of each key as a file may have it.

    Example:
        >>> hints_of(Search)["epochs"], hints_of(Search)["cells"]
        (int | None, <class 'int'>)
    """
    declared = typing.get_type_hints(section, include_extras=True)
    return {
        key: typing.get_args(hint)[0] | None if typing.get_origin(hint) is Annotated else hint
        for key, hint in declared.items()
    }


def check_value(
    value: Any, where: str, hint: Any, limits: Mapping[str, Any] = types.MappingProxyType({})
) -> Any:
    """Check a value against a type, `int`, `float`, `str` or `bool`, and limits as in `_key`.

    Raises:
        InputError: naming `where`, the value and what is accepted.

    Example:
        >>> check_value("3e-4", "params.yaml: search.alpha_learning_rate", float, {"above": 0})
        0.0003
    """
    optional = isinstance(hint, types.UnionType)
    kinds = typing.get_args(hint) if optional else (hint,)
    if value is None and optional:
        return None
    kind = kinds[0]
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 3e-4, without a point, as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # An integer may be too large for a float.
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        accepted = names[kind] + (" or null" if optional else "")
        raise InputError(f"{where}: found {shown(value)}; accepted is {accepted}")
    if "choices" in limits:
        choices = choices_of(limits["choices"])
        if value not in choices:
            raise InputError(f"{where}: found {shown(value)}; choose from {', '.join(choices)}")
    if kind in (int, float):
        _check_range(where, value, limits)
    return value


def choices_of(declared: Iterable[str] | str) -> tuple[str, ...]:
    """Resolve the `choices` of a key: the values themselves, or the keys of `module:name`.

    Example:
        >>> choices_of("ssnas.losses:ZERO_ONE_NORMS")
        ('l2', 'l1')
    """
    if not isinstance(declared, str):
        return tuple(declared)
    module, _, name = declared.partition(":")
    table = getattr(importlib.import_module(module), name)
    return tuple(table() if callable(table) else table)


def _check_range(where: str, value: float, limits: Mapping[str, Any]) -> None:
    bounds: list[tuple[str, str, Callable[[float], bool]]] = [
        ("low", "at least", lambda bound: value >= bound),
        ("above", "more than", lambda bound: value > bound),
        ("high", "at most", lambda bound: value <= bound),
    ]
    holds = [(word, limits[name], test) for name, word, test in bounds if name in limits]
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or not all(test(bound) for _, bound, test in holds):
        accepted = (
            " and ".join(f"{word} {bound:,.10g}" for word, bound, _ in holds) or "finite numbers"
        )
        raise InputError(f"{where}: found {shown(value)}; accepted is {accepted}")
