"""The model that a person takes away: one file, predictions, and a graph for ONNX Runtime.

The file holds the weights as safetensors, and as JSON in its metadata everything else that a
prediction needs. Loading it runs no code that it may hold, and reads no other file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

import ssnas
from ssnas.config.decide import Prior, named_prior
from ssnas.config.schema import Finetune, Search, build
from ssnas.data.folders import DEEPEST, THREADS, as_image, decode, pixels
from ssnas.data.views import Normalise
from ssnas.decision import Decision, decision_of
from ssnas.errors import InputError
from ssnas.networks.derived import parameter_count
from ssnas.networks.factory import build_network
from ssnas.networks.genotype import Genotype
from ssnas.runtime.device import autocast, choose_device
from ssnas.runtime.files import written_whole

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 2
"""The newest format of the file that this version reads, and the one that it writes.

Format 1 had no checksum.
"""

ImageLike = str | os.PathLike[str] | np.ndarray | Image.Image
"""A file, a uint8 array (H, W), (H, W, 1) or (H, W, 3), or an image of Pillow's."""


def _versions() -> dict[str, str]:
    return {
        "ssnas": ssnas.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model's file says beside its weights.

    Attributes:
        class_names: one for each class or label.
        multi_label: whether an image may have several labels.
        image_shape: height, width and channels that images are brought to, see
            `ssnas.data.folders.pixels`.
        normalise: the mean and deviation that the network's input is standardised by.
        counts: the training images of each class, or with each label.
        num_images: how many training images there were.
        finetune: how the network was trained.
        search: the sizes of the searched network.
        genotype: the operations of a derived network, None for another one.
        temperature: of the decision.
        thresholds: of the decision `f1`, one a label; empty for single labels.
        decide: the decision of predictions, unless they ask for another one.
        white_level: the value that is white in image files of more than 8 bits.
        provenance: the origin of data and training, for people to read.
        versions: of the software that made it.
    """

    class_names: tuple[str, ...]
    multi_label: bool
    image_shape: tuple[int, int, int]
    normalise: Normalise
    counts: tuple[int, ...]
    num_images: int
    finetune: Finetune
    search: Search
    genotype: Genotype | None
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    decide: Prior = "balanced"
    white_level: int = DEEPEST
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=_versions)

    def to_json(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("normalise", "finetune", "search"):
            fields[name] = dataclasses.asdict(fields[name])
        fields["genotype"] = self.genotype and json.loads(self.genotype.to_json())
        return json.dumps({"format": FORMAT, **fields}, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Read what `to_json` wrote.

        Raises:
            InputError: for a newer format, or a text that is none.
        """
        try:
            fields = json.loads(text)
            written = fields.pop("format")
        except (ValueError, KeyError, AttributeError):
            raise InputError("found no description of a model; is it a file of ssnas?") from None
        if written > FORMAT:
            raise InputError(
                f"found format {written}; this version of ssnas reads up to {FORMAT}: "
                "install a newer one (pip install --upgrade ssnas)"
            )
        try:
            fields |= {key: tuple(fields[key]) for key in ("class_names", "counts", "thresholds")}
            height, width, channels = fields.pop("image_shape")
            statistics = {key: tuple(value) for key, value in fields.pop("normalise").items()}
            genotype = fields.pop("genotype")
            return cls(
                image_shape=(height, width, channels),
                normalise=Normalise(**statistics),
                finetune=build(Finetune, "finetune", fields.pop("finetune")),
                search=build(Search, "search", fields.pop("search")),
                genotype=genotype and Genotype.from_json(json.dumps(genotype)),
                **fields,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"found a damaged description ({error!r})") from None

    @property
    def decision(self) -> Decision:
        """The way from logits to probabilities."""
        unfitted = decision_of(self.finetune, self.counts, self.num_images, self.multi_label)
        return dataclasses.replace(
            unfitted, temperature=self.temperature, thresholds=self.thresholds
        )

    def network(self) -> nn.Module:
        """Build the network, with random weights."""
        classes = len(self.class_names)
        return build_network(self.finetune, self.search, self.genotype, classes, self.image_shape)


class Model:
    """A trained network with all that it takes to classify images.

    `ssnas.fit` and `ssnas.load` make one.

    Args:
        network: gives logits (N, C) for images (N, C_in, H, W).
        description: see `Description`.
        device: where it computes; `auto` for the accelerator if there is one.

    Example:
        >>> description = Description(
        ...     class_names=("dark", "light"), multi_label=False, image_shape=(8, 8, 1),
        ...     normalise=Normalise((0.5,), (0.25,)), counts=(30, 10), num_images=40,
        ...     finetune=Finetune(network="resnet-32"), search=Search(), genotype=None,
        ... )
        >>> model = Model(description.network(), description)
        >>> model.predict_proba(np.zeros((3, 8, 8, 1), np.uint8)).shape
        (3, 2)
        >>> list(model.predict([np.zeros((20, 30), np.uint8)]).columns)
        ['class', 'P(dark)', 'P(light)']
    """

    def __init__(self, network: nn.Module, description: Description, device: str = "auto") -> None:
        self.device = choose_device(device)
        self.network = network.to(self.device).eval()
        self.description = description
        self.decision = description.decision

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes or labels, in the order of the probabilities."""
        return self.description.class_names

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> Model:
        """Load a model that `save` wrote.

        Raises:
            InputError: naming the file, if it is missing, damaged, of a newer format, or no model.
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"{path}: not found; accepted: a model.ssnas") from None
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: damaged or no model ({error})") from None
        try:
            description = Description.from_json(_without_checksum(metadata, weights))
            network = description.network()
            network.load_state_dict(weights)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except RuntimeError:
            raise InputError(f"{path}: its weights are not those of its network") from None
        return cls(network, description, device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file, whole or not at all."""
        state = self.network.state_dict()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        text = self.description.to_json()
        # One entry: safetensors writes several in any order, and equal models give equal bytes.
        entry = json.dumps(json.loads(text) | {"sha256": _checksum(weights, text)})
        content = save(weights, {"ssnas": entry})
        with written_whole(Path(path)) as partial_path:
            partial_path.write_bytes(content)

    def predict(
        self,
        images: np.ndarray | Sequence[ImageLike] | ImageLike,
        prior: Prior | None = None,
        batch: int = 256,
    ) -> pd.DataFrame:
        """Classify images.

        Args:
            images: files, arrays or Pillow images, one or several, or one uint8 array
                (N, H, W, C). They may have any size: they are resized as the training images were.
            prior: the class frequencies in the place of use: `natural` (as in training),
                `balanced`, or a frequency for each class, by name or in order; None for the
                model's own decision. `published` is the papers' softmax of the logits, and `f1`
                gives labels by thresholds.
            batch: how many images are in memory at once.

        Returns:
            A row for each image, in the order given, with its file or number as index. The column
            `class` has the most probable class; for multi-label models `labels` has those above
            their threshold, joined by "; ". A column `P(name)` has each probability.

        Raises:
            InputError: naming a file that is no image, an array of another kind, or the prior.
        """
        import pandas as pd

        items = _items(images)
        probability = self.predict_proba(items, prior, batch)
        names = np.array(self.class_names, dtype=object)
        if self.description.multi_label:
            above = probability > self.decision.threshold(self._decide(prior))
            decided = {"labels": ["; ".join(names[row]) for row in above]}
        else:
            decided = {"class": list(names[probability.argmax(axis=1)])}
        index = [
            str(item) if isinstance(item, str | os.PathLike) else number
            for number, item in enumerate(items)
        ]
        columns = {f"P({name})": probability[:, i] for i, name in enumerate(names)}
        return pd.DataFrame(decided | columns, index=pd.Index(index, name="image"))

    def predict_proba(
        self,
        images: np.ndarray | Sequence[ImageLike] | ImageLike,
        prior: Prior | None = None,
        batch: int = 256,
    ) -> np.ndarray:
        """Compute the probability of each class or label, (N, C), see `predict`."""
        rule = self.decision.rule(self._decide(prior))
        parts = [rule(self._logits(chunk)).numpy() for chunk in self._read(_items(images), batch)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.class_names)))

    def export_onnx(self, path: str | os.PathLike[str], prior: Prior | None = None) -> None:
        """Write the model as an ONNX graph that needs neither ssnas nor PyTorch.

        Its input `images` are uint8 (N, H, W, C) of the model's size, for any N, its output
        `probabilities` are float32 (N, C). Standardisation and decision are in the graph; its
        metadata has `class_names`, `image_shape`, `thresholds` and `multi_label` as JSON. Resizing
        is left to the caller.

        Args:
            path: of the file.
            prior: of the decision, as in `predict`.

        Raises:
            InputError: if onnx or onnxscript are not installed.
        """
        try:
            import onnx
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"export: {error.name} is not installed; pip install 'ssnas[export]'"
            ) from None
        decide = self._decide(prior)
        graph = _Graph(self.network.cpu(), self.description.normalise, self.decision, decide).eval()
        images = torch.zeros((2, *self.description.image_shape), dtype=torch.uint8)
        try:
            with _quiet():
                program = torch.onnx.export(
                    graph,
                    (images,),
                    input_names=["images"],
                    output_names=["probabilities"],
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                    dynamo=True,
                    verbose=False,
                )
            assert program is not None
            proto = program.model_proto
            thresholds = self.decision.threshold(decide)
            facts = {
                "class_names": list(self.class_names),
                "image_shape": list(self.description.image_shape),
                "multi_label": self.description.multi_label,
                "thresholds": np.broadcast_to(thresholds, len(self.class_names)).tolist(),
                "decide": decide,
                "versions": dict(self.description.versions),
            }
            onnx.helper.set_model_props(
                proto, {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
            )
            with written_whole(Path(path)) as partial_path:
                onnx.save(proto, partial_path)
        finally:
            self.network.to(self.device)

    def info(self) -> str:
        """Describe the model in a few lines."""
        about = self.description
        height, width, channels = about.image_shape
        kind = "labels" if about.multi_label else "classes"
        source = about.provenance.get("source", "unknown")
        lines = {
            kind: ", ".join(
                f"{name} ({count:,})"
                for name, count in zip(about.class_names, about.counts, strict=True)
            ),
            "trained on": f"{about.num_images:,} images of {source}",
            "images": f"{height} x {width}, {'grey' if channels == 1 else 'colour'}",
            "network": f"{about.finetune.network}, {parameter_count(self.network):,} parameters",
            "loss": about.finetune.loss,
            "decision": f"{about.decide}, temperature {about.temperature:.3g}",
            "decisions": ", ".join(self.decision.names),
            "made by": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
        }
        return "\n".join(f"{key:<12}{value}" for key, value in lines.items())

    def _decide(self, prior: Prior | None) -> str | list[float]:
        decide = self.description.decide if prior is None else prior
        return named_prior(decide, self.class_names, self.description.multi_label)

    @torch.no_grad()
    def _logits(self, images: np.ndarray) -> Tensor:
        with autocast(self.device):
            x = self.description.normalise(torch.from_numpy(images).to(self.device))
            return self.network(x).float().cpu()

    def _read(self, items: np.ndarray | Sequence[ImageLike], batch: int) -> Iterator[np.ndarray]:
        """Yield the images, uint8 (B, H, W, C), batch by batch."""
        about = self.description
        read = partial(_read_one, shape=about.image_shape, white=about.white_level)
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(items), batch):
                yield np.stack(list(pool.map(read, items[start : start + batch])))


def load(path: str | os.PathLike[str], device: str = "auto") -> Model:
    """Load a model from its file.

    Args:
        path: of the file, such as `model.ssnas`.
        device: where it is to compute; `auto` for the accelerator if there is one.

    Raises:
        InputError: naming the file, if it is missing, damaged, of a newer format, or no model.
    """
    return Model.load(path, device)


def _checksum(weights: Mapping[str, Tensor], description: str) -> str:
    text = json.dumps(json.loads(description), sort_keys=True)
    return hashlib.sha256(save(dict(weights)) + text.encode()).hexdigest()


def _without_checksum(metadata: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """Return the description of a model's file, once its checksum is compared.

    Raises:
        InputError: if it differs.
    """
    text = metadata.get("ssnas", "")
    try:
        document = json.loads(text)
        written = document.pop("sha256", None)
    except (ValueError, AttributeError):
        return text  # reading the description says what is wrong
    text = json.dumps(document)
    if written is not None and written != _checksum(weights, text):
        raise InputError("damaged (its checksum differs); fetch it or make it anew")
    return text


def _items(
    images: np.ndarray | Sequence[ImageLike] | ImageLike,
) -> np.ndarray | Sequence[ImageLike]:
    """Make a sequence of one image; a sequence stays."""
    one = isinstance(images, str | os.PathLike | Image.Image)
    if one or (isinstance(images, np.ndarray) and images.ndim < 4 and images.dtype != object):
        return [images]  # type: ignore[list-item]
    return images  # type: ignore[return-value]


def _read_one(item: ImageLike, shape: tuple[int, int, int], white: int) -> np.ndarray:
    height, width, depth = shape
    if isinstance(item, Image.Image):
        return pixels(item, depth, (height, width), white)
    if not isinstance(item, str | os.PathLike):
        return pixels(as_image(np.asarray(item)), depth, (height, width))
    try:
        return decode(Path(item).read_bytes(), depth, (height, width), white)
    except OSError as error:
        raise InputError(f"{item}: {error.strerror}; accepted: image files") from None
    except InputError as error:
        raise InputError(f"{item}: {error}") from None


class _Graph(nn.Module):
    """Images to probabilities, as one module to export."""

    def __init__(
        self,
        network: nn.Module,
        normalise: Normalise,
        decision: Decision,
        decide: str | Sequence[float],
    ) -> None:
        super().__init__()
        self.network, self.normalise, self.rule = network, normalise, decision.rule(decide)

    def forward(self, images: Tensor) -> Tensor:
        return self.rule(self.network(self.normalise(images))).float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and warnings from the user, who can do nothing about them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
