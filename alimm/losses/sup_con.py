"""Supervised contrastive loss over the features of a batch.

Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, L_out of the paper:

    loss_i = - 1/|P(i)| sum_{p in P(i)} log ( exp(x_i.x_p / t) / sum_{a != i} exp(x_i.x_a / t) )

x are the features at length one, P(i) the other samples with the label of i, t the temperature; the result is the mean
over the samples that have a partner. One difference: a batch in which nobody has a partner gives 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from alimm.registry import MODELS


@MODELS.register_module()
class SupConLoss(nn.Module):
    """Pull samples with one label together, push all others away.

    Args:
        temperature: t in the formula.
        loss_weight: factor on the result.
    """

    def __init__(self, temperature: float = 0.1, loss_weight: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature, self.loss_weight = temperature, loss_weight

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Features (N, D) of any length and labels (N,) to a scalar."""
        # Under AMP the product would be in half precision, which at a small temperature costs two digits.
        with torch.autocast(features.device.type, enabled=False):
            x_ND = F.normalize(features.float(), dim=1)
            similarity_NN = x_ND @ x_ND.T
        self_NN = torch.eye(len(x_ND), dtype=torch.bool, device=x_ND.device)
        logits_NN = (similarity_NN / self.temperature).masked_fill(self_NN, float("-inf"))
        log_p_NN = F.log_softmax(logits_NN, dim=1)
        partner_NN = (labels[:, None] == labels[None, :]) & ~self_NN
        partners_N = partner_NN.sum(1)
        loss_N = -log_p_NN.masked_fill(~partner_NN, 0.0).sum(1) / partners_N.clamp(min=1)
        return self.loss_weight * loss_N.sum() / (partners_N > 0).sum().clamp(min=1)
