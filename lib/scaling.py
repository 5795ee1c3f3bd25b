"""The scale of the loss in fp16 training, which keeps small gradients from being rounded to zero."""

import torch
from torch import Tensor


class LossScale:
    """What a loss is multiplied by before its backward pass, and its gradients divided by after it.

    Gradients below 2^-24 are zero in fp16 (Micikevicius et al. 2018, section 3.2). The factor moves
    as that of torch.amp.GradScaler: it is halved by a step whose gradient is not finite, and doubled
    by the last of so many in a row whose gradient is. Here it never falls below 1, where it is the
    true gradient that does not fit. All of it is on the device, so that nobody waits for it. One
    that is not used is 1 for good.
    """

    FIRST, LARGEST, PATIENCE = 2.0**16, 2.0**32, 2000

    def __init__(self, used: bool, device: torch.device):
        self.used = used
        first = self.FIRST if used else 1.0
        self.factor = torch.full((), first, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)  # good ones, since it moved

    def told(self) -> dict[str, float]:
        """What is logged of it."""
        if not self.used:
            return {}
        return {"loss_scale": self.factor.item()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        if not self.used:
            return {}
        return {"scale": self.factor, "good_steps": self.steps}

    def take_notice(self, finite: Tensor):
        """Move, after a step whose gradient was finite or was not."""
        if not self.used:
            return
        steps = torch.where(finite, self.steps + 1, 0)
        grows = steps == self.PATIENCE
        change = torch.where(finite, 1.0 + grows, 0.5)
        moved = self.factor * change
        self.factor.copy_(moved.clamp(1, self.LARGEST))
        self.steps.copy_(torch.where(grows, 0, steps))
