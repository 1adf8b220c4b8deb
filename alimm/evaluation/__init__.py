"""Metrics: pure functions on arrays, and MMEngine metrics that call them.

The functions return fractions (0 to 1), the metrics per cent, as OpenMMLab's classification metrics do.
"""

from alimm.evaluation.accuracy import class_accuracy, label_place, shot_groups, topk_credit
from alimm.evaluation.classification_metrics import Accuracy, PerClassAccuracy, ShotAccuracy
from alimm.evaluation.confusion import confusion_matrix, top_confusions
from alimm.evaluation.retrieval import RetrievalScores, retrieval_from_features, retrieval_from_scores
from alimm.evaluation.retrieval_metric import RetrievalMetric
from alimm.evaluation.topk import TopKAccuracy

__all__ = [
    "Accuracy",
    "PerClassAccuracy",
    "RetrievalMetric",
    "RetrievalScores",
    "ShotAccuracy",
    "TopKAccuracy",
    "class_accuracy",
    "confusion_matrix",
    "label_place",
    "retrieval_from_features",
    "retrieval_from_scores",
    "shot_groups",
    "top_confusions",
    "topk_credit",
]
