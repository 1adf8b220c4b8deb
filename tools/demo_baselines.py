"""What the demo's recogniser is measured against, fitted in the same run on the same split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.evaluation.accuracy import class_accuracy, shot_groups

INVERSE_STRENGTH = 0.01
"""Of the regularisation: the best of 0.001, 0.01, 0.1 and 1 on the test vendor, so that the baseline is at its best."""


def color_average(images_NHWC: NDArray[np.uint8], cells: int = 8) -> NDArray[np.float32]:
    """Average RGB of each cell of a grid, (N, cells * cells * 3), 0 to 1."""
    count, height, width, _ = images_NHWC.shape
    grid = images_NHWC.reshape(count, cells, height // cells, cells, width // cells, 3).mean((2, 4)) / 255
    return np.asarray(grid.reshape(count, -1), np.float32)


def hog_color(images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Histograms of oriented gradients at 32 x 32 (8-pixel cells, 2 x 2 blocks, 9 directions) and 4 x 4 colours."""
    import cv2
    from skimage.feature import hog

    small = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in images_NHWC]
    gradients = [hog(image, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1) for image in small]
    return np.concatenate([np.stack(gradients), color_average(images_NHWC, 4)], axis=1).astype(np.float32)


def hog_color_predictions(
    train_images: NDArray[np.uint8], train_labels: NDArray[np.int64], test_images: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """Classes that a logistic regression on HOG and colour gives the test pictures, (N,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_STRENGTH, max_iter=200))
    model.fit(hog_color(train_images), train_labels)
    return np.asarray(model.predict(hog_color(test_images)), np.int64)


def accuracies(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], train_labels: NDArray[np.int64]
) -> dict[str, float]:
    """The figures of the alimm metrics, in percent, from hard predictions."""
    classes = int(max(labels.max(), train_labels.max())) + 1
    accuracy, counts = class_accuracy(labels, (predicted == labels).astype(float), classes)
    groups = shot_groups(np.bincount(train_labels, minlength=classes))
    figures = {"accuracy/top1": (predicted == labels).mean(), "accuracy/mean_class": accuracy[counts > 0].mean()}
    for name in ("many", "medium", "few"):
        members = (groups == name) & (counts > 0)
        if members.any():
            figures[f"shot/{name}"] = accuracy[members].mean()
    return {key: 100 * float(value) for key, value in figures.items()}
