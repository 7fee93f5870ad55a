"""The linear baseline against scikit-learn's logistic regression."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from ssnas.data import Dataset
from ssnas.networks.baselines.linear import STRENGTHS, linear_classifier


def chosen_by_validation(train, val, test):
    """Each set is a pair of images and one label an image."""
    x, held_out, shown = (images.reshape(len(images), -1) / 255 for images, _ in (train, val, test))
    mean, std = x.mean(axis=0), x.std(axis=0)
    fitted = [
        LogisticRegression(C=strength, max_iter=300).fit((x - mean) / std, train[1])
        for strength in STRENGTHS
    ]
    losses = [
        log_loss(val[1], model.predict_proba((held_out - mean) / std), labels=model.classes_)
        for model in fitted
    ]
    return fitted[np.argmin(losses)].predict_proba((shown - mean) / std), np.argmin(losses)


def test_linear_classifier_is_the_regression_that_validation_prefers(splits):
    parts = splits.train, splits.val, splits.test
    expected, _ = chosen_by_validation(*((part.images, part.labels) for part in parts))
    probabilities = linear_classifier(*parts)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert (probabilities.argmax(axis=1) == splits.test.labels).mean() > 0.9


def test_validation_of_noise_asks_for_more_regularisation(splits):
    rng = np.random.default_rng(0)
    noise = Dataset(splits.val.images, rng.integers(0, 3, 12), splits.val.class_names)
    parts = splits.train, noise, splits.test
    expected, strength = chosen_by_validation(*((part.images, part.labels) for part in parts))
    assert strength < len(STRENGTHS) - 1
    np.testing.assert_allclose(linear_classifier(*parts), expected, atol=1e-6)


def test_linear_classifier_of_labels(multi_label):
    names = ("a", "b", "never", "always")

    def with_more(data):
        rows = [data.labels, np.zeros(len(data)), np.ones(len(data))]
        return Dataset(data.images, np.column_stack(rows).astype(np.uint8), names)

    parts = [with_more(part) for part in (multi_label.train, multi_label.val, multi_label.test)]
    probabilities = linear_classifier(*parts)
    for label in range(2):
        pairs = ((part.images, part.labels[:, label]) for part in parts)
        np.testing.assert_allclose(
            probabilities[:, label], chosen_by_validation(*pairs)[0][:, 1], atol=1e-6
        )
    assert (probabilities[:, 2:] == [0, 1]).all()


def test_linear_classifier_of_a_class_without_training_images(splits):
    names = ("absent", *splits.train.class_names)
    parts = (
        Dataset(part.images, part.labels + 1, names)
        for part in (splits.train, splits.val, splits.test)
    )
    probabilities = linear_classifier(*parts)
    assert probabilities.shape == (18, 4)
    assert (probabilities[:, 0] == 0).all()
