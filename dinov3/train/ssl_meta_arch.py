"""Self-distillation of a student by the moving average of itself: DINO + iBOT + KoLeo.

DINO (arXiv 2104.14294) compares class tokens, iBOT (2111.07832) masked patches, KoLeo (1806.03198) spreads the class
tokens; combined as in DINOv2 (2304.07193) and DINOv3 (2508.10104, section "Learning with self-supervision").

Notable:
- `student`, `teacher` and `model_ema` are `ModuleDict`s of `backbone`, `dino_head`, `ibot_head`. In self-distillation
  `teacher` *is* `model_ema`: an alias, not a second submodule, so that a checkpoint holds each tensor once.
- The module may be built on the meta device; `init_weights` then materialises it. Everything is filled with NaN before,
  so that an entry that nobody initialises shows at the first step.
- Global crops and their targets are crop-major: first crop 0 of all images, then crop 1.
- Everything runs without a process group, and in each rank of one.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.data import DataAugmentationDINO
from dinov3.distributed import get_process_subgroup, runtime
from dinov3.fsdp import ac_compile_parallelize
from dinov3.layers.dino_head import DINOHead
from dinov3.loss import DINOLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from dinov3.models import build_model_from_cfg
from dinov3.train.cosine_lr_scheduler import linear_warmup_cosine_decay
from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay_fsdp

N_GLOBAL_CROPS = 2


class SSLMetaArch(nn.Module):
    """Student, EMA teacher and losses of DINOv3's self-supervised training.

    Args:
        cfg: the merged training configuration (see `dinov3.configs`).

    Raises:
        ValueError: the configuration contradicts itself (see `dinov3.configs.validate`).
        NotImplementedError: it asks for a part of the method that this version does not train (Gram anchoring,
            distillation, fp8).
    """

    teacher: nn.ModuleDict

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        _check_supported(cfg)
        self.cfg = cfg

        student_backbone, ema_backbone, embed_dim = build_model_from_cfg(cfg)
        self.student = _with_heads(student_backbone, embed_dim, cfg)
        self.model_ema = _with_heads(ema_backbone, embed_dim, cfg).requires_grad_(False)
        # Not `self.teacher = ...`, which would register the same modules, and so save them, under a second name.
        self.__dict__["teacher"] = self.model_ema

        self.embed_dim: int = embed_dim
        self.dino_out_dim: int = cfg.dino.head_n_prototypes
        self.n_local_crops: int = cfg.crops.local_crops_number
        self.is_distillation_enabled = False
        self.dino_loss_weight: float = cfg.dino.loss_weight
        self.dino_koleo_loss_weight: float = cfg.dino.koleo_loss_weight
        self.ibot_loss_weight: float = cfg.ibot.loss_weight
        self.dino_global_ignore_diagonal: bool = cfg.dino.global_ignore_diagonal
        self.gram_use_loss = False

        self.dino_loss = DINOLoss(self.dino_out_dim)
        self.ibot_patch_loss = iBOTPatchLoss(cfg.ibot.head_n_prototypes)
        self.koleo_loss = _koleo_loss(cfg)
        if cfg.dino.reweight_dino_local_loss:
            self.dino_local_loss_schedule = _weight_schedule(cfg.dino.local_loss_weight_schedule, cfg)

    @property
    def device(self) -> torch.device:
        """The device of the student's parameters."""
        return next(self.student.parameters()).device

    def init_weights(self) -> None:
        """Initialise the student and the losses; the EMA starts equal to the student, buffers included."""
        materialize_(self)
        for network in self.student.values():
            network.init_weights()  # type: ignore[operator]
        self.dino_loss.init_weights()
        self.ibot_patch_loss.init_weights()
        self.model_ema.load_state_dict(self.student.state_dict())

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Training mode for the student; teachers always stay in evaluation mode."""
        super().train(mode)
        self.model_ema.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: a step is `forward_backward`, features are `model_ema["backbone"](images)`."""
        raise NotImplementedError("SSLMetaArch has no forward: train with forward_backward(data, teacher_temp=...)")

    def forward_backward(
        self, data: dict[str, Any], *, teacher_temp: float, iteration: int = 0, **_ignored: Any
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """One forward and backward pass; gradients accumulate in the student.

        Args:
            data: a batch of `collate_data_and_cast`, plus `global_batch_size`. B images: global crops [2B, 3, S, S],
                local crops [L*B, 3, s, s], both crop-major; masks bool [2B, P].
            teacher_temp: temperature of the teacher's targets, > 0.
            iteration: absolute training iteration, for weights that follow a schedule.

        Returns:
            The total loss (0-dim float32, graph already freed) and the unweighted terms, detached, in a fixed order.
        """
        batch: dict[str, Any] = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in data.items()
        }
        local_crops = batch["collated_local_crops"].unflatten(0, (self.n_local_crops, -1))  # [L, B, 3, s, s]
        global_crops = batch["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [2, B, 3, S, S]
        batch_size = local_crops.shape[1]
        if global_crops.shape[1] != batch_size:
            raise ValueError(f"{batch_size} images of local crops, but {global_crops.shape[1]} of global crops")

        teacher_global = self.get_teacher_output(
            global_crops,
            upperbound=batch["upperbound"],
            mask_indices_list=batch["mask_indices_list"],
            teacher_temp=teacher_temp,
            n_masked_patches_tensor=batch["n_masked_patches"],
        )
        student_global, student_local = self.get_student_output(
            global_crops=global_crops,
            local_crops=local_crops,
            upperbound=batch["upperbound"],
            masks=batch["collated_masks"],
            mask_indices_list=batch["mask_indices_list"],
        )
        total_loss, terms = self.compute_losses(
            teacher_global=teacher_global,
            student_global=student_global,
            student_local=student_local,
            masks=batch["collated_masks"],
            mask_indices_list=batch["mask_indices_list"],
            masks_weight=batch["masks_weight"],
            iteration=iteration,
        )
        self.backprop_loss(total_loss)
        sizes = {"local_batch_size": batch_size, "global_batch_size": batch["global_batch_size"]}
        return total_loss.detach(), sizes | terms

    @torch.no_grad()
    def get_teacher_output(
        self,
        images: Tensor,
        *,
        upperbound: int | None = None,
        mask_indices_list: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The teacher's features and targets for unmasked global crops.

        Args:
            images: [2, B, 3, S, S].
            upperbound: ignored; kept because the published batch carries it.
            mask_indices_list: int64 [M], positions in the flattened [2 * B * P] patches.
            teacher_temp: Sinkhorn-Knopp temperature.
            n_masked_patches_tensor: int64 [1], M.

        Returns:
            `cls_pre_head` [2, B, D], `reg_pre_head` [2, B, R, D], `patch_pre_head` [2, B, P, D],
            `cls_after_head` [2, B, K], and the targets, float32, `cls_centered` [2, B, K] and
            `masked_patch_centered` [M, K'].
        """
        features = self.teacher["backbone"](images.flatten(0, 1), is_training=True)
        cls_logits = self.teacher["dino_head"](features["x_norm_clstoken"])  # [2B, K]
        patch_logits = self.teacher["ibot_head"](_select(features["x_norm_patchtokens"], mask_indices_list))  # [M, K']
        # Both crops are centred together: Sinkhorn-Knopp balances the prototypes over the whole batch.
        cls_targets = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp=teacher_temp)
        patch_targets = self.ibot_patch_loss.sinkhorn_knopp_teacher(
            patch_logits, teacher_temp=teacher_temp, n_masked_patches_tensor=n_masked_patches_tensor
        )
        return _by_crop(features, N_GLOBAL_CROPS) | {
            "cls_after_head": cls_logits.unflatten(0, (N_GLOBAL_CROPS, -1)),
            "cls_centered": cls_targets.unflatten(0, (N_GLOBAL_CROPS, -1)),
            "masked_patch_centered": patch_targets,
        }

    def get_student_output(
        self,
        *,
        global_crops: Tensor,
        local_crops: Tensor,
        upperbound: int | None = None,
        masks: Tensor,
        mask_indices_list: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's features and logits for masked global and unmasked local crops.

        Args:
            global_crops: [2, B, 3, S, S].
            local_crops: [L, B, 3, s, s].
            upperbound: ignored; kept because the published batch carries it.
            masks: bool [2B, P], True where the mask token replaces a patch.
            mask_indices_list: int64 [M], positions of the True entries in the flattened masks.

        Returns:
            Two dictionaries (global, local) with `cls_pre_head`, `reg_pre_head`, `patch_pre_head` and `cls_after_head`,
            leading dimensions [crops, B]; the global one also has `masked_patch_pre_head` [M, D] and
            `masked_patch_after_head` [M, K'].
        """
        # The order matters: the backbone treats entry 1 as the local crops (untied class-token norms).
        features_global, features_local = self.student["backbone"](
            [global_crops.flatten(0, 1), local_crops.flatten(0, 1)], masks=[masks, None], is_training=True
        )
        masked_patches = _select(features_global["x_norm_patchtokens"], mask_indices_list)  # [M, D]
        masked_patch_logits = self.student["ibot_head"](masked_patches)  # [M, K']

        cls_tokens = [features_global["x_norm_clstoken"], features_local["x_norm_clstoken"]]
        cls_logits = self.student["dino_head"](torch.cat(cls_tokens))  # [(2 + L) B, K]
        global_logits, local_logits = cls_logits.split([len(tokens) for tokens in cls_tokens])

        student_global = _by_crop(features_global, N_GLOBAL_CROPS) | {
            "cls_after_head": global_logits.unflatten(0, (N_GLOBAL_CROPS, -1)),
            "masked_patch_pre_head": masked_patches,
            "masked_patch_after_head": masked_patch_logits,
        }
        student_local = _by_crop(features_local, self.n_local_crops) | {
            "cls_after_head": local_logits.unflatten(0, (self.n_local_crops, -1)),
        }
        return student_global, student_local

    def compute_losses(
        self,
        *,
        teacher_global: dict[str, Tensor],
        student_global: dict[str, Tensor],
        student_local: dict[str, Tensor],
        masks: Tensor,
        mask_indices_list: Tensor,
        masks_weight: Tensor,
        iteration: int,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The total loss and its unweighted terms.

        Args:
            teacher_global: from `get_teacher_output`.
            student_global: from `get_student_output`.
            student_local: from `get_student_output`.
            masks: bool [2B, P].
            mask_indices_list: int64 [M].
            masks_weight: float32 [M], the weight of each masked patch.
            iteration: absolute training iteration.

        Returns:
            The weighted sum (0-dim, with graph) and the terms, detached.
        """
        local_share, global_share = self._shares_of_crop_pairs()
        local_weight = self._local_loss_weight(iteration)

        dino_local = self.dino_loss(student_local["cls_after_head"], teacher_global["cls_centered"])
        dino_global = self.dino_loss(
            student_global["cls_after_head"],
            teacher_global["cls_centered"],
            ignore_diagonal=self.dino_global_ignore_diagonal,
        )
        koleo = torch.stack([self.koleo_loss(crop) for crop in student_global["cls_pre_head"]]).mean()
        ibot = self.ibot_patch_loss.forward_masked(
            student_global["masked_patch_after_head"],
            teacher_global["masked_patch_centered"],
            student_masks_flat=masks,
            n_masked_patches=len(mask_indices_list),
            masks_weight=masks_weight,
        )
        total = (
            self.dino_loss_weight * local_share * local_weight * dino_local
            + self.dino_loss_weight * global_share * dino_global
            # Per global crop, although the term is a mean over crops: the published weight is meant so.
            + self.dino_koleo_loss_weight * N_GLOBAL_CROPS * koleo
            + self.ibot_loss_weight * ibot
        )
        return total, {
            "dino_local_crops_loss": dino_local.detach(),
            "dino_local_loss_weight": local_weight,
            "dino_global_crops_loss": dino_global.detach(),
            "koleo_loss": koleo.detach(),
            "ibot_loss": ibot.detach(),
        }

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of `loss` into the student; each rank back-propagates its own, sharding averages them."""
        loss.backward()

    @torch.no_grad()
    def update_ema(self, momentum: float) -> None:
        """Every EMA parameter becomes momentum * itself + (1 - momentum) * the student's; buffers stay."""
        student = dict(self.student.named_parameters())
        ema = dict(self.model_ema.named_parameters())
        assert student.keys() == ema.keys(), student.keys() ^ ema.keys()
        # Shards line up, so the update needs no communication: work on the local part of sharded parameters.
        ema_local = [_local_part(parameter) for parameter in ema.values()]
        torch._foreach_mul_(ema_local, momentum)
        torch._foreach_add_(ema_local, [_local_part(student[name]) for name in ema], alpha=1 - momentum)

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups of the student with their learning-rate and weight-decay multipliers."""
        optim = self.cfg.optim
        groups: list[dict[str, Any]] = []
        for name, network in self.student.items():
            of_network = get_params_groups_with_decay_fsdp(
                network,
                lr_decay_rate=optim.layerwise_decay,
                patch_embed_lr_mult=optim.patch_embed_lr_mult,
                dino_head_wd_multiplier=optim.dino_head_wd_multiplier,
                is_dino_head=name == "dino_head",
            )
            groups += fuse_params_groups(of_network) if optim.multi_tensor_optim else of_network
        if not optim.multi_tensor_optim:
            return groups
        return [group | {"foreach": True, "fused": True} for group in groups]

    @staticmethod
    def build_data_augmentation_dino(cfg: Any, **overrides: Any) -> DataAugmentationDINO:
        """The multi-crop augmentation of `cfg.crops`; `overrides` replace arguments (one loader's crop sizes)."""
        crops = cfg.crops
        arguments = {
            "global_crops_scale": tuple(crops.global_crops_scale),
            "local_crops_scale": tuple(crops.local_crops_scale),
            "local_crops_number": crops.local_crops_number,
            "global_crops_size": crops.global_crops_size,
            "local_crops_size": crops.local_crops_size,
            "local_crops_subset_of_global_crops": crops.localcrops_subset_of_globalcrops,
            "patch_size": cfg.student.patch_size,
            "share_color_jitter": crops.share_color_jitter,
            "horizontal_flips": crops.horizontal_flips,
            "blur_probabilities": tuple(crops.blur_probabilities),
            "mean": tuple(crops.rgb_mean),
            "std": tuple(crops.rgb_std),
        }
        return DataAugmentationDINO(**(arguments | overrides))

    def prepare_for_distributed_training(self) -> None:
        """Checkpoint activations, compile and shard the networks as the configuration says."""
        subgroup = get_process_subgroup()
        ac_compile_parallelize(
            trained_model=self.student,
            inference_only_models=[self.model_ema],
            cfg=self.cfg,
            trained_model_process_group=subgroup,
            inference_only_models_process_groups=[subgroup],
        )

    def _shares_of_crop_pairs(self) -> tuple[float, float]:
        # Every (student crop, teacher crop) pair counts alike.
        global_pairs = N_GLOBAL_CROPS * (N_GLOBAL_CROPS - int(self.dino_global_ignore_diagonal))
        local_pairs = N_GLOBAL_CROPS * self.n_local_crops
        total = global_pairs + local_pairs
        return local_pairs / total, global_pairs / total

    def _local_loss_weight(self, iteration: int) -> float:
        if not self.cfg.dino.reweight_dino_local_loss:
            return 1.0
        return float(self.dino_local_loss_schedule[min(iteration, len(self.dino_local_loss_schedule) - 1)])


def materialize_(module: nn.Module) -> None:
    """Give every meta tensor of `module` memory on the runtime device, filled with NaN (integers: their minimum).

    Whatever `init_weights` then forgets shows as NaN at the first step instead of training on leftovers.
    """
    device = runtime.device()
    for child in module.modules():
        entries = itertools.chain(child.parameters(recurse=False), child.buffers(recurse=False))
        if any(entry.is_meta for entry in entries):
            child.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for entry in itertools.chain(module.parameters(), module.buffers()):
            _local_part(entry).fill_(torch.nan if entry.is_floating_point() else torch.iinfo(entry.dtype).min)


def _check_supported(cfg: Any) -> None:
    unsupported = {
        "gram.use_loss": (cfg.gram.use_loss, "Gram anchoring"),
        "distillation.enabled": (cfg.distillation.enabled, "distillation"),
        "multidistillation.enabled": (cfg.multidistillation.enabled, "multi-distillation"),
        "student.fp8_enabled": (cfg.student.fp8_enabled, "fp8 training"),
        "student.resume_from_teacher_chkpt": (bool(cfg.student.resume_from_teacher_chkpt), "starting from a teacher"),
    }
    for key, (is_set, what) in unsupported.items():
        if is_set:
            raise NotImplementedError(f"{key} is set, but this version does not train with {what} yet: unset {key}")


def _with_heads(backbone: nn.Module, embed_dim: int, cfg: Any) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "backbone": backbone,
            "dino_head": _projection_head(embed_dim, cfg.dino),
            "ibot_head": _projection_head(embed_dim, cfg.ibot),
        }
    )


def _projection_head(embed_dim: int, cfg: Any) -> DINOHead:
    return DINOHead(
        in_dim=embed_dim,
        out_dim=cfg.head_n_prototypes,
        hidden_dim=cfg.head_hidden_dim,
        bottleneck_dim=cfg.head_bottleneck_dim,
        nlayers=cfg.head_nlayers,
    )


def _koleo_loss(cfg: Any) -> KoLeoLoss | KoLeoLossDistributed:
    if not cfg.dino.koleo_loss_distributed:
        return KoLeoLoss()
    return KoLeoLossDistributed(topk=cfg.dino.koleo_topk, loss_group_size=cfg.dino.koleo_distributed_loss_group_size)


def _weight_schedule(schedule: Any, cfg: Any) -> Any:
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    cosine_epochs = schedule.get("cosine_epochs")
    return linear_warmup_cosine_decay(
        start=schedule.start,
        peak=schedule.peak,
        end=schedule.end,
        warmup_iterations=round(epoch * schedule.warmup_epochs),
        total_iterations=round(epoch * cfg.optim.epochs),
        cosine_iterations=None if cosine_epochs is None else round(epoch * cosine_epochs),
    )


def _by_crop(features: dict[str, Tensor], n_crops: int) -> dict[str, Tensor]:
    return {
        "cls_pre_head": features["x_norm_clstoken"].unflatten(0, (n_crops, -1)),  # [crops, B, D]
        "reg_pre_head": features["x_storage_tokens"].unflatten(0, (n_crops, -1)),  # [crops, B, R, D]
        "patch_pre_head": features["x_norm_patchtokens"].unflatten(0, (n_crops, -1)),  # [crops, B, P, D]
    }


def _select(patch_tokens: Tensor, indices: Tensor) -> Tensor:
    return patch_tokens.flatten(0, 1).index_select(0, indices)


def _local_part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
