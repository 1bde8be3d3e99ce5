"""Build the meta-architecture and the batch of a golden case, as `ssl.json` describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dinov3.configs import get_default_config
from dinov3.models import build_model_from_cfg
from dinov3.train.ssl_meta_arch import SSLMetaArch

from . import deterministic, golden

REPOSITORY = Path(__file__).parents[2]

#: Which part of a large tensor a case stores.
SLICES: dict[str, tuple[slice, ...]] = {
    "cls_token": (..., slice(16)),
    "mask_token": (..., slice(16)),
    "storage_tokens": (..., slice(16)),
    "patch_embed.proj.weight": (slice(3), slice(None), slice(3), slice(3)),
    "blocks.0.attn.qkv.weight": (slice(4), slice(8)),
    "blocks.11.mlp.fc2.weight": (slice(4), slice(8)),
    "dino_head.mlp.0.weight": (slice(4), slice(8)),
    "dino_head.last_layer.weight": (slice(4), slice(8)),
    "ibot_head.last_layer.weight": (slice(4), slice(8)),
    "norm.weight": (slice(16),),
    "local_cls_norm.weight": (slice(16),),
    "ibot_head.mlp.4.bias": (slice(16),),
}


def config(case: dict[str, Any], *extra: dict[str, Any]) -> Any:
    """The default configuration merged with the case's recipe files and settings, and with `extra`."""
    files = [OmegaConf.load(REPOSITORY / path) for path in case.get("yaml", [])]
    return OmegaConf.merge(get_default_config(), *files, case.get("config", {}), *extra)


def build(case: dict[str, Any], directory: Path, architecture: type[SSLMetaArch] = SSLMetaArch) -> SSLMetaArch:
    """The meta-architecture with the case's deterministic weights, in training mode."""
    arch = architecture(config(case, teacher_files(case, directory)))
    arch.init_weights()
    fill(arch, case["seeds"])
    return arch.train()


def teacher_files(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Write the files that a case's settings stand for; returns the settings that name them."""
    settings: dict[str, Any] = {}
    if case["config"].get("gram", {}).get("ckpt") == "given":
        backbone, _ = build_model_from_cfg(config(case), only_teacher=True)
        backbone.to_empty(device="cpu").init_weights()
        deterministic.fill_(nn.ModuleDict({"backbone": backbone}), case["seeds"]["gram_teacher"])
        torch.save({"teacher": backbone.state_dict()}, directory / "gram.pth")
        settings["gram"] = {"ckpt": str(directory / "gram.pth")}
    if "distill_config" in case:
        OmegaConf.save(case["distill_config"], directory / "teacher.yaml")
        settings["distillation"] = {"full_cfg_path": str(directory / "teacher.yaml")}
    return settings


def fill(arch: SSLMetaArch, seeds: dict[str, Any]) -> None:
    """Deterministic weights in student, EMA and the teachers that there are."""
    networks = {"student": arch.student, "ema": arch.model_ema, "gram_teacher": arch.gram_teacher}
    if arch.is_distillation_enabled:
        networks["distill_teacher"] = arch.teacher
    for name, network in networks.items():
        if network is not None:
            deterministic.fill_(network, seeds[name])
            scale_gamma_(network, seeds.get("gamma_scale"))


@torch.no_grad()
def scale_gamma_(module: nn.Module, scale: float | None) -> None:
    """Multiply every layer scale, which keeps patch tokens diverse."""
    if scale:
        for name, entry in module.state_dict().items():
            if name.endswith(".gamma"):
                entry.mul_(scale)


def batch(data: dict[str, Any], *, seed_offset: int = 0, masks: list[list[int]] | None = None) -> dict[str, Any]:
    """The batch of a case; masks are lists of masked positions per global crop."""
    size, seed = data["B"], data["seed"] + seed_offset
    side = data["global_size"] // data.get("mask_patch", 16)
    positions = data["masks"] if masks is None else masks
    mask = torch.zeros(len(positions), side * side, dtype=torch.bool)
    for row, masked in zip(mask, positions, strict=True):
        row[masked] = True
    indices = mask.flatten().nonzero().flatten()
    weights = (1 / mask.sum(1).clamp(min=1.0)).unsqueeze(1).expand_as(mask)[mask]

    def crops(name: str, count: int, pixels: int) -> Tensor:
        return deterministic.tensor(name, (count * size, 3, pixels, pixels), seed)

    gram_size = data.get("gram_size")
    gram_crops = {"collated_gram_teacher_crops": crops("gram_teacher_crops", 2, gram_size)} if gram_size else {}
    return gram_crops | {
        "collated_global_crops": crops("global_crops", 2, data["global_size"]),
        "collated_local_crops": crops("local_crops", data["n_local"], data["local_size"]),
        "collated_masks": mask,
        "mask_indices_list": indices,
        "masks_weight": weights.float(),
        "upperbound": len(indices),
        "n_masked_patches": torch.tensor([len(indices)]),
        "global_batch_size": data.get("global_batch_size", size),
    }


def step_outputs(arch: SSLMetaArch, case: dict[str, Any], data: dict[str, Any]) -> dict[str, Tensor]:
    """Run `forward_backward` and collect everything that a case may store."""
    seen: dict[str, dict[str, Tensor]] = {}
    compute_losses = arch.compute_losses

    def spy(**kwargs: Any) -> Any:
        seen.update({name: value for name, value in kwargs.items() if isinstance(value, dict)})
        return compute_losses(**kwargs)

    arch.compute_losses = spy  # type: ignore[method-assign]
    total, terms = arch.forward_backward(data, teacher_temp=case["teacher_temp"], iteration=case.get("iteration", 0))
    outputs = {"total_loss": torch.as_tensor(total, dtype=torch.float64)}
    outputs |= {f"loss/{name}": torch.as_tensor(value, dtype=torch.float64) for name, value in terms.items()}
    for source, values in seen.items():
        outputs |= {f"{source}.{name}": value.detach() for name, value in values.items()}
        outputs |= {f"{source}.{name}[...,:4]": value.detach()[..., :4] for name, value in values.items()}
    return outputs | gradients(dict(arch.student.named_parameters()))


def gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient norms per sub-model and parameter, and the stored slices."""
    outputs = {
        "grad_norm_per_param": torch.stack(
            [
                _norm(parameters[n].grad) if parameters[n].grad is not None else torch.tensor(-1.0, dtype=torch.float64)
                for n in sorted(parameters)
            ]
        )
    }
    for part in ("backbone", "dino_head", "ibot_head"):
        grads = [p.grad for n, p in parameters.items() if n.startswith(part + ".") and p.grad is not None]
        outputs[f"grad_norm/{part}"] = torch.stack([_norm(g) for g in grads]).norm()
    return outputs | slices("grad", {n: p.grad for n, p in parameters.items() if p.grad is not None})


def slices(prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """`<prefix>/<name>` for the entries of which cases store a slice."""
    return {
        f"{prefix}/{name}": value.detach()[SLICES[key]]
        for name, value in entries.items()
        if (key := name if name in SLICES else name.removeprefix("backbone.")) in SLICES
    }


def norms(module: nn.Module) -> Tensor:
    """L2 norms of all parameters in sorted name order, float64."""
    parameters = dict(module.named_parameters())
    return torch.stack([_norm(parameters[name]) for name in sorted(parameters)])


def compare(case: dict[str, Any], outputs: dict[str, Tensor], *, prefix: str = "") -> int:
    """Compare with every stored tensor of the case whose name starts with `prefix`; returns how many there were."""
    bf16 = case.get("tolerance_class") == "bf16"
    compared = 0
    for name in case["outputs"]:
        if not name.startswith(prefix):
            continue
        is_loss = "loss" in name.rsplit(".", 1)[-1] and case["outputs"][name]["shape"] == []
        tolerance = (1e-4 if is_loss else 2e-2) if bf16 else (1e-5 if is_loss else 1e-4)
        want = golden.tensors("ssl")[f"{case['id']}/{name}"]
        golden.assert_near(
            outputs[name.removeprefix(prefix)].to(want.dtype), want, relative_to_max=tolerance, name=name
        )
        compared += 1
    assert compared, f"{case['id']} stores nothing that starts with {prefix!r}"
    return compared


def _norm(value: Tensor) -> Tensor:
    return value.detach().double().norm()
