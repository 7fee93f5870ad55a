"""The linear baseline against scikit-learn's logistic regression."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from ssnas.data import Dataset
from ssnas.networks.baselines.linear import linear_classifier


def standardised(train, test):
    x, shown = (d.images.reshape(len(d), -1) / 255 for d in (train, test))
    mean, std = x.mean(axis=0), x.std(axis=0)
    return (x - mean) / std, (shown - mean) / std


def test_linear_classifier_is_logistic_regression(splits):
    x, shown = standardised(splits.train, splits.test)
    expected = LogisticRegression(max_iter=300).fit(x, splits.train.labels).predict_proba(shown)
    probabilities = linear_classifier(splits.train, splits.test)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert (probabilities.argmax(axis=1) == splits.test.labels).mean() > 0.9


def test_linear_classifier_of_labels(multi_label):
    train, test = multi_label.train, multi_label.test
    labels = np.column_stack([train.labels, np.zeros(len(train)), np.ones(len(train))])
    train = Dataset(train.images, labels.astype(np.uint8), ("a", "b", "never", "always"))
    probabilities = linear_classifier(train, test)
    x, shown = standardised(train, test)
    for label in range(2):
        model = LogisticRegression(max_iter=300).fit(x, train.labels[:, label])
        np.testing.assert_allclose(
            probabilities[:, label], model.predict_proba(shown)[:, 1], atol=1e-6
        )
    assert (probabilities[:, 2:] == [0, 1]).all()


def test_linear_classifier_of_a_class_without_training_images(splits):
    names = ("absent", *splits.train.class_names)
    train, test = (Dataset(d.images, d.labels + 1, names) for d in (splits.train, splits.test))
    probabilities = linear_classifier(train, test)
    assert probabilities.shape == (len(test), 4)
    assert (probabilities[:, 0] == 0).all()
