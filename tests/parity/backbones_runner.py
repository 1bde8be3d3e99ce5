"""Runs a case of ``backbones.json``: build, prepare, make inputs, call, and compare the named outputs.

The grammar of a case is described in the file's own ``notes``. Cases that have a ``recipe`` instead of ``calls``
make their own outputs and use ``make_inputs`` and ``compare`` alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import deterministic, golden

Case = dict[str, Any]
Outputs = dict[str, Tensor | None]


def check(case: Case) -> None:
    """Run ``case`` and assert that every golden output is met."""
    compare(case, run(case))


def run(case: Case) -> Outputs:
    """All outputs of the calls of ``case``, flattened to dotted names."""
    module = build(case["build"])
    prepare(module, case.get("prepare", []))
    inputs = make_inputs(case)
    outputs: Outputs = {}
    with _patched(case.get("patch", [])):
        for call in case["calls"]:
            outputs |= _call(module, call, inputs)
    return outputs


def compare(case: Case, outputs: Outputs) -> None:
    """Assert that ``outputs`` equal the golden ones of ``case`` within its tolerance."""
    if "keep" not in case:
        assert set(outputs) == set(case["outputs"]), f"{case['id']}: outputs {sorted(outputs)}"
    for name, want in case["outputs"].items():
        _compare_one(f"{case['id']}/{name}", outputs[name], want, case["tol"])


def build(spec: dict[str, Any]) -> Any:
    """The object that a ``build`` entry describes."""
    args = [resolve(a) for a in spec.get("args", [])]
    return golden.target(spec["target"])(*args, **resolve(spec.get("kwargs", {})))


@torch.no_grad()
def prepare(module: nn.Module, steps: list[Any]) -> None:
    """Initialise, fill, cast and set the mode of ``module`` in place."""
    for step in steps:
        if step in ("eval", "train", "init_weights"):
            getattr(module, step)()
            continue
        ((action, value),) = step.items()
        if action == "fill":
            deterministic.fill_(module, value)
        elif action == "cast":
            module.to(getattr(torch, value))
        elif action == "k_mask":
            for name, buffer in module.named_buffers():
                if name.endswith("bias_mask"):
                    buffer.copy_(torch.tensor(value).repeat_interleave(len(buffer) // 3))
        elif action == "round_buffer":
            entry = module.state_dict()[value[0]]
            entry.copy_(entry.to(getattr(torch, value[1])))
        else:
            raise ValueError(f"unknown preparation step {step!r}")


def make_inputs(case: Case) -> dict[str, Any]:
    """The inputs of ``case`` by name."""
    return {name: _make_input(spec) for name, spec in case.get("inputs", {}).items()}


def resolve(value: Any, inputs: dict[str, Any] | None = None) -> Any:
    """Replace the ``{"$...": ...}`` forms inside a JSON value by what they stand for."""
    if isinstance(value, list):
        return [resolve(v, inputs) for v in value]
    if not isinstance(value, dict):
        return value
    form, content = next(iter(value.items()), ("", None))
    if form == "$in":
        assert inputs is not None
        return inputs[content]
    if form == "$dtype":
        return getattr(torch, content)
    if form == "$path":
        return golden.target(content)
    if form == "$partial":
        return functools.partial(golden.target(content[0]), **resolve(content[1], inputs))
    if form == "$range":
        return range(*content)
    if form == "$tuple":
        return tuple(resolve(content, inputs))
    if form == "$build":
        return build(content)
    return {k: resolve(v, inputs) for k, v in value.items()}


def flatten(prefix: str, value: Any) -> Outputs:
    """Nested lists, tuples and dicts as one dict of dotted names."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in flatten(f"{prefix}.{key}", item).items()}


def _make_input(spec: dict[str, Any]) -> Any:
    make = spec["make"]
    if make in ("list", "tuple"):
        items = [_make_input(item) for item in spec["items"]]
        return items if make == "list" else tuple(items)
    if make == "none":
        return None
    if make == "rope":
        rope = golden.target("dinov3.layers.RopePositionEmbedding")(**resolve(spec["kwargs"]))
        return rope.eval()(H=spec["H"], W=spec["W"])
    if make == "zeros":
        return torch.zeros(spec["shape"])
    key = (spec["name"], tuple(spec["shape"]), spec["seed"])
    if make == "mask":
        return deterministic.uniform(*key) < spec["p"]
    if make == "image8":
        return (256 * deterministic.uniform(*key)).floor().to(torch.uint8)
    assert make in ("tensor", "uniform"), make
    x: Tensor = getattr(deterministic, make)(*key) * spec.get("scale", 1)
    return x.to(getattr(torch, spec.get("dtype", "float32")))


def _call(module: nn.Module, call: dict[str, Any], inputs: dict[str, Any]) -> Outputs:
    out = call["out"]
    if "attr" in call:
        return {out: module.state_dict()[call["attr"]]}
    function: Any = module
    if "function" in call:
        function = golden.target(call["function"])
    elif call.get("method", "__call__") != "__call__":
        for part in call["method"].split("."):
            function = function[int(part)] if part.isdigit() else getattr(function, part)
    args = resolve(call.get("args", []), inputs)
    kwargs = resolve(call.get("kwargs", {}), inputs)
    if "grad" in call:
        return _loss_and_gradients(module, out, function(*args, **kwargs), call["grad"], inputs)
    autocast = contextlib.nullcontext()
    if "autocast" in call:
        autocast = torch.autocast("cpu", getattr(torch, call["autocast"]))
    with torch.no_grad(), autocast:
        return flatten(out, function(*args, **kwargs))


def _loss_and_gradients(module: nn.Module, out: str, result: Any, spec: Any, inputs: dict[str, Any]) -> Outputs:
    leaves = flatten("", result)
    loss = sum((leaves[path] * inputs[weight]).sum() for path, weight in spec["weights"].items())
    loss.backward()
    parameters = dict(module.named_parameters())
    return {out: loss.detach()} | {f"{out}.grad.{p}": parameters[p].grad for p in spec["params"]}


@contextlib.contextmanager
def _patched(names: list[str]) -> Iterator[None]:
    def randperm(n: int, **kwargs: Any) -> Tensor:
        return torch.arange(n, device=kwargs.get("device"))

    def upper(x: Tensor, a: float = 0, b: float = 1, **_: Any) -> Tensor:
        return x.fill_(b)

    def mixed(x: Tensor, a: float = 0, b: float = 1, **_: Any) -> Tensor:
        pattern = torch.where(torch.arange(x.numel()) % 2 == 0, 0.25, 0.75).view(x.shape)
        return x.copy_(a + (b - a) * pattern)

    replacements = {
        "randperm_identity": (torch, "randperm", randperm),
        "uniform_upper": (Tensor, "uniform_", upper),
        "uniform_mixed": (Tensor, "uniform_", mixed),
    }
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(*replacements[name]))
        yield


def _compare_one(key: str, got: Tensor | None, want: dict[str, Any] | None, tol: dict[str, float]) -> None:
    if want is None:
        assert got is None, f"{key}: expected None"
        return
    assert got is not None, f"{key}: is None"
    assert list(got.shape) == want["shape"], f"{key}: shape {tuple(got.shape)}, golden has {want['shape']}"
    assert got.dtype == getattr(torch, want["dtype"]), f"{key}: {got.dtype}, golden has {want['dtype']}"
    if want["stored"] == "none":
        return
    rtol, atol = tol.get("rtol", 0.0), tol.get("atol", 0.0)
    values = got.detach().double().flatten()
    entries = values[:: want.get("step", 1)]
    stored = golden.tensors("backbones")[key].double().flatten()
    difference = (entries - stored).abs()
    excess = difference - (atol + rtol * stored.abs())
    # Negated so that NaN fails.
    assert not excess.isnan().any() and excess.max() <= 0, f"{key}: max difference {difference.max():.3g}"
    if "mae" in tol:
        assert difference.mean() <= tol["mae"], f"{key}: mean difference {difference.mean():.3g} > {tol['mae']}"
    statistics = {"mean": values.mean(), "std": values.std(correction=0), "absmax": values.abs().max()}
    for name, value in statistics.items() if want["dtype"] != "bool" else ():
        bound = atol + rtol * abs(want[name])
        assert abs(value.item() - want[name]) <= bound, f"{key}: {name} {value.item():.8g}, golden has {want[name]:.8g}"
