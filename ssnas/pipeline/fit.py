"""The whole pipeline in one call, from images to a model, in any folder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ssnas.config.load import load_options
from ssnas.config.schema import Run
from ssnas.data.npz import labelled_arrays
from ssnas.errors import InputError
from ssnas.model import Model
from ssnas.pipeline.budget import Budget
from ssnas.pipeline.derive_genotype import derive_genotype
from ssnas.pipeline.evaluate import evaluate
from ssnas.pipeline.export import model_of
from ssnas.pipeline.finetune import finetune
from ssnas.pipeline.lineage import ARTIFACTS, up_to_date
from ssnas.pipeline.make_longtail import make_longtail
from ssnas.pipeline.readers import read_splits
from ssnas.pipeline.search import run_search
from ssnas.runtime.files import written_whole
from ssnas.runtime.mapped import write_npz

log = logging.getLogger(__name__)

Images = str | os.PathLike[str] | tuple[np.ndarray, ...]
"""A folder of images, an .npz, a data set by name, or arrays (images, labels[, groups])."""


def fit(
    data: Images,
    /,
    out: str | os.PathLike[str] | None = None,
    params: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    **options: Any,
) -> Model:
    """Train a network for images, after a search without their labels if asked, and test it.

    It runs the stages of the DVC pipeline, but for the transfer, with the same functions: the same
    parameters give the same weights. Killed, it goes on where it was when it is called again with
    the same `out`; what is done and has not changed is not done again.

    Args:
        data: a folder with a sub-folder a class (or train, val and test folders of those), an .npz
            in MedMNIST's layout, a data set by its name, or a pair of uint8 images (N, H, W) or
            (N, H, W, C) and labels: one of any type an image, or 0 and 1 for each label (N, L);
            third may come groups (N,), such as the patients, each of which stays in one split.
        out: where data, weights, figures and checkpoints go, below it; None for nowhere, and no
            resuming.
        params: a file like params.yaml; None for the defaults of the command `ssnas fit`: the
            recipe `short`, no search, and classes as frequent as they are.
        minutes: for all of it on this machine, kept to within a fifth: the epochs follow from a few
            measured steps. None for as many as suit the number of images.
        options: parameters: `search`, which is `none` for a fixed genotype or an objective such as
            `barlow-twins`; `loss`, `decide`, `seed`, `scale` or `device`; keys of the section
            `data` such as `size`; or whole sections, such as `search={"epochs": 5}`.

    Returns:
        The model. With `out` it is also in `<out>/model.ssnas`, and the figures on the test images
        are in `<out>/metrics/evaluate.json`.

    Raises:
        InputError: for images or parameters that cannot be used; it names them.

    Example:
        Two classes of noise, dark and light, and a search of one epoch:

        >>> random = np.random.default_rng(0)
        >>> images = random.integers(0, 100, (48, 8, 8), dtype=np.uint8)
        >>> images[24:] += 150
        >>> short = {"epochs": 1, "channels": 4, "batch_size": 8, "projector": 8}
        >>> model = fit(
        ...     (images, ["dark"] * 24 + ["light"] * 24), search=short,
        ...     finetune={"epochs": 6, "batch_size": 8},
        ... )
        >>> list(model.predict([np.full((8, 8), 30, np.uint8)])["class"])
        ['dark']
    """
    with contextlib.ExitStack() as opened:
        root = Path(opened.enter_context(TemporaryDirectory()) if out is None else out)
        budget = None if minutes is None else Budget(minutes, root)
        run = run_of(data, root, params, options)
        _once(make_longtail, run, "splits")
        run = run if budget is None else budget.for_search(run)
        _once(run_search, run, "supernet")
        _once(derive_genotype, run, "genotype")
        run = run if budget is None else budget.for_training(run)
        _once(finetune, run, "network")
        splits = read_splits(run)
        if len(splits.test):
            evaluate(run)
        model = model_of(run, splits)
        model.save(root / "model.ssnas")
        return model


def run_of(
    data: Images,
    root: Path,
    params: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """Make the run of `fit`; arrays are written to an .npz below `root`.

    Raises:
        InputError: naming a wrong parameter, or data of another form.
    """
    if isinstance(data, tuple):
        if len(data) not in (2, 3):
            raise InputError(
                f"data: found {len(data)} arrays; accepted: (images, labels[, groups])"
            )
        path = root / "data" / "images.npz"
        with written_whole(path) as partial, partial.open("wb") as file:
            write_npz(file, labelled_arrays(*data))
        data = path
    if not isinstance(data, str | os.PathLike):
        raise InputError(
            f"data: found {type(data).__name__}; accepted: a folder, an .npz, a name, or the "
            "arrays (images, labels)"
        )
    chosen = {"dataset": os.fspath(data), **(options or {})}
    return load_options(chosen, None if params is None else Path(params), root)


def _once(stage: Callable[[Run], None], run: Run, artifact: str) -> None:
    """Run a stage, unless its artifact is there, made from the same things by the same code."""
    if up_to_date(run, artifact):
        log.info("%s: done before, nothing has changed", ARTIFACTS[artifact].stage)
    else:
        stage(run)
