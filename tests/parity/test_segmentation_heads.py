"""Golden cases of `segmentation`: the linear head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.parity import golden
from tests.parity.dense import assert_expected, assert_output, by_id, case_of, make_input
from tests.parity.deterministic import fill_


def build_head(case: dict[str, Any]) -> Any:
    head = golden.target(case["build"]["class"])(**case["build"]["kwargs"])
    return fill_(head, case["build"]["fill_seed"]).train(case["build"]["mode"] == "train")


def levels_of(case: dict[str, Any]) -> list[Any]:
    """The map of each level, or (map, class token)."""
    n_levels = sum(name.startswith("patch") for name in case["inputs"])
    if "cls0" not in case["inputs"]:
        return [make_input(case, f"patch{i}") for i in range(n_levels)]
    return [(make_input(case, f"patch{i}"), make_input(case, f"cls{i}")) for i in range(n_levels)]


@by_id("segmentation", *(f"linear-head/{name}" for name in ("four", "sizes", "no")))
def test_linear_head(case: dict[str, Any]) -> None:
    head, levels = build_head(case), levels_of(case)
    assert_output(case, "out", head(levels))
    assert_output(case, "predict", head.predict(levels, make_input(case, "rescale_to")))
    shapes = {name: list(entry.shape) for name, entry in head.state_dict().items()}
    assert_expected(case, shapes, case["expected"]["state_dict"])


def test_linear_head_in_training_mode() -> None:
    case = case_of("segmentation", "linear-head/train-bn")
    head, weights = build_head(case), make_input(case, "g")
    out: Tensor = head(levels_of(case))
    (out * weights).sum().backward()
    outputs = {"out": out, **dict(head.batchnorm_layer.named_buffers())}
    outputs |= {f"grad_{name}": parameter.grad for name, parameter in head.named_parameters()}
    for name in case["outputs"]:
        assert_output(case, name, outputs[name])
