"""Golden cases of the losses and of Sinkhorn-Knopp, in one process and in several."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multiprocess import run_ranks

from . import deterministic, golden

LOSS_TOLERANCE = 1e-5
TOLERANCE = 1e-4
DISTRIBUTED_KINDS = ("sinkhorn", "softmax_center", "koleo_distributed")


def of_kind(*kinds: str) -> list[Any]:
    found = [pytest.param(case, id=case["id"]) for case in golden.area("ssl")["cases"] if case["kind"] in kinds]
    assert found
    return found


def of_several_processes() -> list[Any]:
    return [param for param in of_kind(*DISTRIBUTED_KINDS) if param.values[0]["world_size"] > 1]


def of_one_process() -> list[Any]:
    return [param for param in of_kind(*DISTRIBUTED_KINDS) if param.values[0]["world_size"] == 1]


def make(spec: dict[str, Any]) -> Tensor:
    """The input that a case describes."""
    if "value" in spec:
        return torch.tensor(spec["value"]).to(getattr(torch, spec["dtype"]))
    value = getattr(deterministic, spec["fn"])(spec["name"], tuple(spec["shape"]), spec["seed"])
    if "row_scale" in spec:
        value = value * torch.tensor(spec["row_scale"]).view(-1, *[1] * (value.ndim - 1))
    value = value * spec.get("scale", 1.0) + spec.get("shift", 0.0)
    if "softmax" in spec:
        value = value.softmax(spec["softmax"])
    return value < spec["less_than"] if "less_than" in spec else value


def compare(case: dict[str, Any], outputs: dict[str, Tensor]) -> None:
    """Every tensor that the case stores."""
    for name in case["outputs"]:
        want = golden.tensors("ssl")[f"{case['id']}/{name}"]
        got = outputs[name].detach()
        assert got.dtype == want.dtype or want.dtype == torch.uint8, name
        tolerance = LOSS_TOLERANCE if name.rsplit(".", 1)[-1] in ("loss", "probs") else TOLERANCE
        golden.assert_near(got.to(want.dtype), want, relative_to_max=tolerance, name=f"{case['id']}/{name}")


def loss_class(name: str) -> Any:
    return golden.target(f"dinov3.loss.{name}")


@pytest.mark.parametrize("case", of_kind("dino_loss"))
def test_dino_loss(case: dict[str, Any]) -> None:
    loss_module = loss_class("DINOLoss")(**case["build"])
    loss_module.init_weights()
    student, teacher = (make(case["inputs"][name]) for name in ("student_logits", "teacher_probs"))
    loss = loss_module(student.requires_grad_(), teacher, **case["kwargs"])
    loss.backward()
    compare(case, {"loss": loss, "student_logits.grad": student.grad})


@pytest.mark.parametrize("case", of_kind("ibot_loss"))
def test_ibot_loss(case: dict[str, Any]) -> None:
    loss_module = loss_class("iBOTPatchLoss")(**case["build"])
    loss_module.init_weights()
    inputs = {name: make(spec) for name, spec in case["inputs"].items()}
    student, teacher, masks = (inputs.pop(name) for name in ("student", "teacher", "masks"))
    student.requires_grad_()
    if case["method"] == "forward":
        loss = loss_module(student, teacher, masks)
    else:
        loss = loss_module.forward_masked(student, teacher, student_masks_flat=masks, **case["kwargs"], **inputs)
    loss.backward()
    compare(case, {"loss": loss, "student.grad": student.grad, "masks": masks})


@pytest.mark.parametrize("case", of_kind("dino_center", "ibot_center"))
def test_sequence_of_centre_updates(case: dict[str, Any]) -> None:
    loss_module = loss_class("DINOLoss" if case["kind"] == "dino_center" else "iBOTPatchLoss")(**case["build"])
    loss_module.init_weights()
    outputs = {}
    for index, step in enumerate(case["steps"]):
        logits = make(step["input"])
        if step["op"] == "update_center":
            loss_module.update_center(logits)
        else:
            outputs[f"step{index}"] = loss_module.softmax_center_teacher(
                logits, step["temp"], update_centers=step["update_centers"]
            )
        outputs[f"step{index}.center"] = loss_module.center.clone()
    compare(case, outputs)


@pytest.mark.parametrize("case", of_kind("koleo"))
def test_koleo(case: dict[str, Any]) -> None:
    student = make(case["inputs"]["student_output"]).requires_grad_()
    loss = loss_class("KoLeoLoss")()(student, **case["kwargs"])
    loss.backward()
    compare(case, {"loss": loss, "student_output.grad": student.grad})


@pytest.mark.parametrize("case", of_kind("gram"))
def test_gram(case: dict[str, Any]) -> None:
    student, teacher = (make(case["inputs"][name]) for name in ("output_feats", "target_feats"))
    loss = loss_class("GramLoss")(**case["build"])(student.requires_grad_(), teacher, **case["kwargs"])
    loss.backward()
    compare(case, {"loss": loss, "output_feats.grad": student.grad})


@pytest.mark.parametrize("case", of_one_process())
def test_one_process_without_a_process_group(case: dict[str, Any]) -> None:
    compare(case, run_case(case, 0))


@pytest.mark.distributed
@pytest.mark.parametrize("case", of_several_processes())
def test_several_processes(case: dict[str, Any]) -> None:
    compare(case, results_of_all_cases(case["world_size"])[case["id"]])


@functools.cache
def results_of_all_cases(world_size: int) -> dict[str, dict[str, Tensor]]:
    # One start of the processes serves all cases.
    cases = [param.values[0] for param in of_several_processes() if param.values[0]["world_size"] == world_size]
    ranks = run_ranks(run_cases, world_size, cases)
    return {case["id"]: {k: v for rank in ranks for k, v in rank[case["id"]].items()} for case in cases}


def run_cases(rank: int, world_size: int, cases: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    return {case["id"]: run_case(case, rank) for case in cases}


def run_case(case: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """What rank `rank` computes in a case of several ranks."""
    run = {"sinkhorn": run_sinkhorn, "softmax_center": run_softmax_center, "koleo_distributed": run_koleo}
    outputs = run[case["kind"]](case, make(case["inputs"][rank]))
    return {f"rank{rank}.{name}": value.detach() for name, value in outputs.items()}


def run_sinkhorn(case: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
    n_prototypes = logits.shape[1]
    options = {"teacher_temp": case["teacher_temp"]}
    if "n_iterations" in case:
        options["n_iterations"] = case["n_iterations"]
    if case["head"] == "dino":
        return {"probs": loss_class("DINOLoss")(n_prototypes).sinkhorn_knopp_teacher(logits, **options)}
    teacher = loss_class("iBOTPatchLoss")(n_prototypes).sinkhorn_knopp_teacher
    return {"probs": teacher(logits, n_masked_patches_tensor=torch.tensor([len(logits)]), **options)}


def run_softmax_center(case: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
    loss_module = loss_class("DINOLoss")(**case["build"])
    loss_module.init_weights()
    loss_module.update_center(logits)
    return {
        "probs": loss_module.softmax_center_teacher(logits, case["teacher_temp"]),
        "center": loss_module.center,
    }


def run_koleo(case: dict[str, Any], features: Tensor) -> dict[str, Tensor]:
    features.requires_grad_()
    loss = loss_class("KoLeoLossDistributed")(**case["build"])(features)
    loss.backward()
    assert features.grad is not None
    return {"loss": loss, "student_output.grad": features.grad}
