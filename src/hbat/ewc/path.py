r"""The path integral of a task's loss: what each element of the weights contributed to its decrease.

$$w_i = -\sum_t g_{ti} (\theta_{t+1,i} - \theta_{ti})$$

with the task's gradient $g_t$ and the change of every optimizer step t (Zenke et al., arXiv:1703.04200). To first
order its sum over the elements is the decrease of the loss.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hbat.ewc.kernels import batches


@torch.no_grad()
def add_path_(
    path: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    after_step: bool,
) -> None:
    r"""Accumulate one side of an optimizer step, in place: $w \leftarrow w \pm g (\theta - \theta^*)$.

    Called with the same gradients before the step (plus) and after it (minus), the two add
    $-g (\theta_{t+1} - \theta_t)$ without a copy of the weights. Measured from $\theta^*$, the products have the size
    of the stage's change, so that float32 does not cancel.

    Args:
        path: $w$ so far, by name, in float32.
        parameters: Weights $\theta$, by name.
        anchor: $\theta^*$, any fixed point near the weights such as the stage's start.
        gradients: The task's gradient $g$, without penalty and clipping, of the parameters that have one.
        after_step: Whether the parameters have taken the step.
    """
    sign = -1.0 if after_step else 1.0
    for batch in batches(parameters, anchor, path, gradients):
        torch._foreach_addcmul_(batch.importances, batch.gradients, batch.differences, value=sign)
