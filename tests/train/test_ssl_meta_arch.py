"""Construction, initialisation and modes of the meta-architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.configs import get_default_config
from dinov3.train.networks import materialize_
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import build_model

from . import tiny


def make_config(**sections: Any) -> Any:
    return OmegaConf.merge(get_default_config(), tiny.CONFIG, sections)


def test_init_weights_reaches_every_entry() -> None:
    arch = build_model(make_config())
    materialize_(arch)
    assert all(value.isnan().all() for value in arch.state_dict().values())
    arch.init_weights()
    assert all(value.isfinite().all() for value in arch.state_dict().values())


def test_ema_starts_equal_to_the_student() -> None:
    arch = SSLMetaArch(make_config())
    arch.init_weights()
    tiny.assert_same_weights(dict(arch.model_ema.state_dict()), dict(arch.student.state_dict()))


def test_teacher_is_the_ema_and_saved_once() -> None:
    arch = SSLMetaArch(make_config())
    assert arch.teacher is arch.model_ema
    assert not any(name.startswith("teacher.") for name in arch.state_dict())


def test_modes() -> None:
    arch = SSLMetaArch(make_config()).train()
    assert arch.student["backbone"].training and not arch.model_ema["backbone"].training
    assert not arch.eval().student["backbone"].training


def test_only_the_student_gets_gradients() -> None:
    arch = SSLMetaArch(make_config())
    assert all(parameter.requires_grad for parameter in arch.student.parameters())
    assert not any(parameter.requires_grad for parameter in arch.model_ema.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_update_ema_moves_parameters_and_leaves_buffers(momentum: float) -> None:
    arch = SSLMetaArch(make_config())
    arch.init_weights()
    with torch.no_grad():
        for entry in (*arch.student.parameters(), *arch.student.buffers()):
            entry.add_(1.0)
    before = {name: value.clone() for name, value in arch.model_ema.state_dict().items()}
    arch.update_ema(momentum)
    parameters = dict(arch.model_ema.named_parameters())
    for name, value in arch.model_ema.state_dict().items():
        expected = before[name] + (1 - momentum if name in parameters else 0.0)
        torch.testing.assert_close(value, expected, msg=name)


def test_batches_that_do_not_fit_are_refused() -> None:
    arch = SSLMetaArch(make_config())
    arch.init_weights()
    data = {"collated_local_crops": torch.zeros(4, 3, 16, 16), "collated_global_crops": torch.zeros(6, 3, 32, 32)}
    with pytest.raises(ValueError, match="2 images of local, but 3"):
        arch.forward_backward(data, teacher_temp=0.07)
