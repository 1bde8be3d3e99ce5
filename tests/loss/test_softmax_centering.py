from __future__ import annotations

import pytest
import torch

from dinov3.loss import DINOLoss, iBOTPatchLoss


@pytest.mark.parametrize("loss, shape", [(DINOLoss(4), (1, 4)), (iBOTPatchLoss(4), (1, 1, 4))])
def test_centre_is_unset_until_the_weights_are_initialised(loss: DINOLoss | iBOTPatchLoss, shape: tuple[int]) -> None:
    assert loss.center.shape == shape
    assert loss.center.isnan().all()
    loss.init_weights()
    assert not loss.center.any()
    assert "center" in loss.state_dict()


def test_update_waits_for_the_next_targets_and_is_applied_once() -> None:
    loss = DINOLoss(3, center_momentum=0.75)
    loss.init_weights()
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    loss.update_center(logits)
    assert not loss.center.any()
    loss.softmax_center_teacher(logits, 0.1, update_centers=False)
    assert not loss.center.any()
    for _ in range(2):
        probs = loss.softmax_center_teacher(logits, 0.5)
        torch.testing.assert_close(loss.center, torch.tensor([[0.5, 0.75, 1.0]]))
    torch.testing.assert_close(probs, ((logits - loss.center) / 0.5).softmax(-1))


def test_centre_of_patches_is_the_mean_over_patches_and_rows() -> None:
    loss = iBOTPatchLoss(3, center_momentum=0.5)
    loss.init_weights()
    logits = torch.arange(24.0).view(2, 4, 3)
    loss.update_center(logits)
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, logits.mean((0, 1)).view(1, 1, 3) / 2)
