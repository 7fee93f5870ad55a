"""Features and the linear layer on top of them, plain or cosine."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssnas.errors import InputError


class FeatureClassifier(nn.Module):
    """A linear classifier of features.

    Args:
        features: a module from images (N, C, H, W) to features (N, out_features).
        out_features: length of a feature vector.
        num_classes: outputs of the classifier.
    """

    def __init__(self, features: nn.Module, out_features: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        return self.classifier(self.features(x))


class NormalisedLinear(nn.Linear):
    """The cosine classifier that Cao et al. 2019 put before the LDAM loss.

    f_c(x) = ⟨w_c / ‖w_c‖, x / ‖x‖⟩, in [−1, 1], without bias: a margin, which is subtracted from a
    logit, then means the same for every class and image. The loss applies the scale. The w_c start
    uniform in [−1, 1] per element and are brought to unit length.

    Args:
        in_features: length of a feature vector x.
        num_classes: outputs.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.uniform_(-1, 1)
        self.weight.copy_(functional.normalize(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Cosines (N, num_classes) of features (N, in_features)."""
        return functional.linear(functional.normalize(x), functional.normalize(self.weight))


def normalise_classifier(network: nn.Module) -> None:
    """Replace `network.classifier`, a linear layer, by a new cosine classifier of its size.

    Raises:
        InputError: for a network with another kind of classifier, such as a bilateral one.

    Example:
        >>> network = FeatureClassifier(nn.Flatten(), 4, 2)
        >>> normalise_classifier(network)
        >>> network.classifier
        NormalisedLinear(in_features=4, out_features=2, bias=False)
    """
    linear = network.classifier
    if not isinstance(linear, nn.Linear):
        raise InputError(
            f"loss: found 'ldam-drw' for a {type(network).__name__}, which has no single linear "
            "classifier; choose another loss"
        )
    cosine = NormalisedLinear(linear.in_features, linear.out_features)
    network.classifier = cosine.to(linear.weight)
