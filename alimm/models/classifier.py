"""The image classifier: backbone, neck, head, on MMEngine's BaseModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel

from alimm.distributed.shards import exclude_from_ddp
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A backbone with an optional neck and head.

    The backbone may be any registered one that maps (N, 3, H, W) to a tensor or a tuple of feature maps:
    `alimm.ResNetTiny`, `mmdet.ResNet`, `mmseg.MixVisionTransformer`. The neck makes one vector a picture of them.

    Args:
        backbone: config.
        neck: config; the features of the backbone must be (N, D) without one.
        head: config of an alimm head; without one the model only extracts features.
        data_preprocessor: config; `alimm.ClsDataPreprocessor` with its defaults if not given.
        init_cfg: initialisation, as in MMEngine.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        neck: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            data_preprocessor=MODELS.build(data_preprocessor or dict(type="alimm.ClsDataPreprocessor")),
            init_cfg=init_cfg,
        )
        self.backbone = MODELS.build(backbone)
        self.neck = None if neck is None else MODELS.build(neck)
        self.head = None if head is None else MODELS.build(head)
        exclude_from_ddp(self)

    def forward(
        self, inputs: torch.Tensor, data_samples: Sequence[ClsDataSample] | None = None, mode: str = "tensor"
    ) -> torch.Tensor | dict[str, torch.Tensor] | list[ClsDataSample]:
        """Run the model on a normalised batch.

        Args:
            inputs: float, (N, 3, H, W).
            data_samples: one for each picture; needed by ``'loss'``.
            mode: ``'tensor'`` gives logits (features if there is no head), ``'loss'`` a dict of losses, ``'predict'``
                the data samples with ``pred_score``, ``pred_label`` and ``feature``.
        """
        if mode == "tensor":
            features = self.extract_feat(inputs)
            return features if self.head is None else self.head(features)
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def extract_feat(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features before the head, (N, D)."""
        features = self.backbone(inputs)
        if self.neck is not None:
            features = self.neck(features)
        if isinstance(features, (tuple, list)):
            features = features[-1]
        if features.ndim != 2:
            raise ValueError(
                f"the features have the shape {tuple(features.shape)}, but a vector for each picture is needed: add "
                f"neck=dict(type='alimm.GlobalPoolNeck') to the model"
            )
        return features

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features of length one, (N, D), for search by cosine."""
        return F.normalize(self.extract_feat(inputs).float(), dim=1)

    def loss(self, inputs: torch.Tensor, data_samples: Sequence[ClsDataSample] | None) -> dict[str, torch.Tensor]:
        """The losses of a batch.

        Raises:
            ValueError: there is no head or there are no data samples.
        """
        if self.head is None:
            raise ValueError("a model without a head has no loss: give head=dict(type='alimm.LinearHead', ...)")
        if data_samples is None:
            raise ValueError("mode='loss' needs data_samples with labels, got None")
        if hasattr(self.head, "prefetch"):
            # A sharded head needs the labels alone for its first steps, which then run beside the backbone.
            self.head.prefetch(data_samples)
        losses: dict[str, torch.Tensor] = self.head.loss(self.extract_feat(inputs), data_samples)
        return losses

    def predict(self, inputs: torch.Tensor, data_samples: Sequence[ClsDataSample] | None = None) -> list[ClsDataSample]:
        """The data samples (new ones if None) with the predictions; with features alone if there is no head."""
        features = self.extract_feat(inputs)
        if self.head is not None:
            predicted: list[ClsDataSample] = self.head.predict(features, data_samples)
            return predicted
        samples = [ClsDataSample() for _ in features] if data_samples is None else list(data_samples)
        return [sample.set_feature(feature) for sample, feature in zip(samples, features, strict=True)]
