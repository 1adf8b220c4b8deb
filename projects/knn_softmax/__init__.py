"""KNN softmax: training with up to 100 million classes (KDD 2020)."""

from alimm.projects.knn_softmax.head import KNNSoftmaxHead
from alimm.projects.knn_softmax.hook import KNNGraphHook

__all__ = ["KNNGraphHook", "KNNSoftmaxHead"]
