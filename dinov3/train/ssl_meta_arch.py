"""A student that learns from the moving average of itself, or from a larger teacher: DINO + iBOT + KoLeo + Gram.

DINO (arXiv 2104.14294) compares class tokens, iBOT (2111.07832) masked patches, KoLeo (1806.03198) spreads the class
tokens; combined as in DINOv2 (2304.07193) and DINOv3 (2508.10104, section "Learning with self-supervision"). Gram
anchoring (2508.10104, section 4) ties the similarities between patches to those of an earlier teacher.

Notable:
- `student`, `teacher` and `model_ema` are `ModuleDict`s of `backbone`, `dino_head`, `ibot_head`.
- Global crops and their targets are crop-major: first crop 0 of all images, then crop 1.
- Shapes: B images of this process, L local crops of each, P patches and R storage tokens of a global crop, D channels,
  K and K' prototypes of the DINO and iBOT heads, M masked patches of all 2B global crops.
- Everything runs without a process group, and in each rank of one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.distributed import get_default_process_group, get_process_subgroup, runtime
from dinov3.fsdp import ac_compile_parallelize
from dinov3.layers import set_attention_backend
from dinov3.loss import DINOLoss, GramLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from dinov3.train import networks
from dinov3.train.gram import GramCalendar, resize_patches, select_patches
from dinov3.train.param_groups import params_groups_of_networks
from dinov3.train.schedules import Schedule, warmup_cosine

logger = logging.getLogger("dinov3")

N_GLOBAL_CROPS = 2


class SSLMetaArch(nn.Module):
    """Student, EMA, teachers and losses of DINOv3's self-supervised training.

    Args:
        cfg: the merged training configuration (see `dinov3.configs`).
    """

    teacher: nn.ModuleDict
    gram_teacher: nn.ModuleDict | None

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.student, self.model_ema, self.embed_dim = networks.student_and_ema(cfg)
        # In self-distillation the teacher *is* the EMA, in distillation a frozen network. Not `self.teacher = ...`,
        # which would register it: checkpoints hold each tensor once, and no teacher that never changes.
        self.is_distillation_enabled: bool = cfg.distillation.enabled
        self.__dict__["teacher"] = networks.distillation_teacher(cfg) if cfg.distillation.enabled else self.model_ema

        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(cfg.ibot.head_n_prototypes)
        self.koleo_loss: nn.Module = KoLeoLoss()
        if cfg.dino.koleo_loss_distributed:
            self.koleo_loss = KoLeoLossDistributed(
                topk=cfg.dino.koleo_topk, loss_group_size=cfg.dino.koleo_distributed_loss_group_size
            )
        self.local_loss_weight = Schedule([1.0])
        if cfg.dino.reweight_dino_local_loss:
            self.local_loss_weight = warmup_cosine(cfg, cfg.dino.local_loss_weight_schedule)

        gram = cfg.gram
        self.gram_teacher = networks.gram_teacher(cfg) if gram.use_loss and not gram.ema_teacher else None
        self.gram_teacher_initialized = False
        self.gram_calendar = GramCalendar.from_config(cfg)
        self.gram_loss_weight = Schedule([0.0])
        if gram.use_loss:
            self.gram_loss = GramLoss(
                apply_norm=gram.normalized,
                remove_neg=gram.remove_neg,
                remove_only_teacher_neg=gram.remove_only_teacher_neg,
            )
            self.gram_loss_weight = Schedule([gram.loss_weight])
            if gram.loss_weight_schedule:
                self.gram_loss_weight = warmup_cosine(cfg, gram.loss_weight_schedule)

    def forward_backward(
        self, data: dict[str, Any], *, teacher_temp: float, iteration: int = 0
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Run one forward and backward pass; gradients accumulate in the student.

        Args:
            data: a batch of `collate_data_and_cast`, plus `global_batch_size`: global crops [2B, 3, S, S], local crops
                [L*B, 3, s, s], both crop-major; masks bool [2B, P].
            teacher_temp: temperature of the teacher's targets, > 0.
            iteration: absolute training iteration, for weights that follow a schedule.

        Returns:
            The total loss (0-dim float32, graph already freed) and the unweighted terms, detached, in a fixed order.
        """
        batch = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in data.items()
        }
        local_crops = batch["collated_local_crops"].unflatten(0, (self.cfg.crops.local_crops_number, -1))
        global_crops = batch["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [2, B, 3, S, S]
        if global_crops.shape[1] != local_crops.shape[1]:
            raise ValueError(f"{local_crops.shape[1]} images of local, but {global_crops.shape[1]} of global crops")
        masks, mask_indices = batch["collated_masks"], batch["mask_indices_list"]

        teacher_global = self.get_teacher_output(
            global_crops, mask_indices_list=mask_indices, teacher_temp=teacher_temp
        )
        student_crops = self.exchange_crops(global_crops)
        student_global, student_local = self.get_student_output(
            global_crops=student_crops,
            local_crops=self.exchange_crops(local_crops),
            masks=masks,
            mask_indices_list=mask_indices,
        )
        _check_grids(teacher_global, student_global, masks)
        gram_global: dict[str, Tensor] = {}
        if self.gram_loss_weight[iteration] != 0:
            gram_global = self.get_gram_teacher_output(
                batch.get("collated_gram_teacher_crops"),
                masks=masks,
                teacher_global=teacher_global,
                student_global=student_global,
            )
        total_loss, terms = self.compute_losses(
            teacher_global=teacher_global,
            student_global=student_global,
            student_local=student_local,
            gram_global=gram_global,
            masks=masks,
            mask_indices_list=mask_indices,
            masks_weight=batch["masks_weight"],
            iteration=iteration,
        )
        self.backprop_loss(total_loss)
        sizes = {"local_batch_size": student_crops.shape[1], "global_batch_size": batch["global_batch_size"]}
        return total_loss.detach(), sizes | terms

    def exchange_crops(self, crops: Tensor) -> Tensor:
        """Return the crops [n, B, ...] that the student sees, given those of this process: here the same."""
        return crops

    @torch.no_grad()
    def get_teacher_output(
        self, images: Tensor, *, mask_indices_list: Tensor, teacher_temp: float
    ) -> dict[str, Tensor]:
        """Return the teacher's features and targets for unmasked global crops.

        Args:
            images: [2, B, 3, S, S].
            mask_indices_list: int64 [M], positions in the flattened [2 * B * P] patches.
            teacher_temp: temperature of Sinkhorn-Knopp.

        Returns:
            What `_by_crop` names, `cls_after_head` [2, B, K], and the targets, float32: `cls_centered` [2, B, K] and
            `masked_patch_centered` [M, K'].
        """
        images = images.flatten(0, 1)
        scale = self.cfg.crops.teacher_to_student_resolution_scale
        if self.is_distillation_enabled and scale != 1:
            # A student of stride 32 has the patch grid of a teacher of stride 16 that sees half the resolution.
            size, dtype = [round(side / scale) for side in images.shape[-2:]], images.dtype
            images = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True).to(dtype)
        features = self.teacher["backbone"](images, is_training=True)
        cls_logits, patch_logits = self.teacher_logits(features, mask_indices_list)  # [2B, K], [M, K']
        # Both crops are centred together: Sinkhorn-Knopp balances the prototypes over the whole batch.
        cls_targets = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp=teacher_temp)
        patch_targets = self.ibot_patch_loss.sinkhorn_knopp_teacher(patch_logits, teacher_temp=teacher_temp)
        return _by_crop(features, N_GLOBAL_CROPS) | {
            "cls_after_head": cls_logits.unflatten(0, (N_GLOBAL_CROPS, -1)),
            "cls_centered": cls_targets.unflatten(0, (N_GLOBAL_CROPS, -1)),
            "masked_patch_centered": patch_targets,
        }

    def teacher_logits(self, features: dict[str, Tensor], mask_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the class tokens [2B, K] and masked patches [M, K'] that the student sees.

        Args:
            features: output of the teacher's backbone for the 2B global crops of this process.
            mask_indices: int64 [M], positions in the flattened patches of the student's global crops.
        """
        cls_logits = self.teacher["dino_head"](features["x_norm_clstoken"])
        patches = features["x_norm_patchtokens"].flatten(0, 1).index_select(0, mask_indices)
        return cls_logits, self.teacher["ibot_head"](patches)

    def get_student_output(
        self, *, global_crops: Tensor, local_crops: Tensor, masks: Tensor, mask_indices_list: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the student's features and logits for masked global and unmasked local crops.

        Args:
            global_crops, local_crops: [2, B, 3, S, S] and [L, B, 3, s, s].
            masks: bool [2B, P], True where the mask token replaces a patch.
            mask_indices_list: int64 [M], positions of the True entries in the flattened masks.

        Returns:
            For global and for local crops what `_by_crop` names and `cls_after_head` [crops, B, K]; the global ones
            also have `masked_patch_pre_head` [M, D] and `masked_patch_after_head` [M, K'].
        """
        # The backbone treats entry 1 as the local crops (untied class-token norms). From a larger teacher the student
        # learns with whole images: masks then only choose the patches of the iBOT term.
        features_global, features_local = self.student["backbone"](
            [global_crops.flatten(0, 1), local_crops.flatten(0, 1)],
            masks=[None if self.is_distillation_enabled else masks, None],
            is_training=True,
        )
        patches = features_global["x_norm_patchtokens"].flatten(0, 1)
        masked_patches = patches.index_select(0, mask_indices_list)  # [M, D]
        masked_patch_logits = self.student["ibot_head"](masked_patches)  # [M, K']
        # One call of the head for all crops.
        cls_tokens = [features_global["x_norm_clstoken"], features_local["x_norm_clstoken"]]
        cls_logits = self.student["dino_head"](torch.cat(cls_tokens))  # [(2 + L) B, K]
        global_logits, local_logits = cls_logits.split([len(tokens) for tokens in cls_tokens])

        student_global = _by_crop(features_global, len(global_crops)) | {
            "cls_after_head": global_logits.unflatten(0, (len(global_crops), -1)),
            "masked_patch_pre_head": masked_patches,
            "masked_patch_after_head": masked_patch_logits,
        }
        student_local = _by_crop(features_local, len(local_crops)) | {
            "cls_after_head": local_logits.unflatten(0, (len(local_crops), -1)),
        }
        return student_global, student_local

    def get_gram_teacher_output(
        self,
        images: Tensor | None,
        *,
        masks: Tensor,
        teacher_global: dict[str, Tensor],
        student_global: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the patches of student and Gram teacher that the Gram loss compares, on the student's grid.

        Args:
            images: the global crops [2B, 3, S', S'] for the Gram teacher; unused with `gram.ema_teacher`.
            masks: bool [2B, P].
            teacher_global: from `get_teacher_output`; its patches are the target with `gram.ema_teacher`.
            student_global: from `get_student_output`.

        Returns:
            `student_patches` and `teacher_patches`, [2B, P, D] or the rows [n, D] that `gram.tokens_used` chooses, and
            `orig_student_patches` and `orig_teacher_patches`, all of them.
        """
        gram = self.cfg.gram
        student_patches = student_global["patch_pre_head"].flatten(0, 1)  # [2B, P, D]
        if self.gram_teacher is None:
            teacher_patches = teacher_global["patch_pre_head"].flatten(0, 1)
        else:
            if not self.gram_teacher_initialized:
                raise ValueError(
                    "the Gram loss counts, but the Gram teacher has no weights yet: give gram.ckpt=FILE, or a "
                    "gram.loss_weight_schedule that is 0 until gram.it_load_ema_teacher"
                )
            if images is None:
                raise ValueError("the batch has no collated_gram_teacher_crops: set crops.gram_teacher_crops_size")
            with torch.no_grad():
                teacher_patches = self.gram_teacher["backbone"](images, is_training=True)["x_norm_patchtokens"]
        mode, antialias = gram.global_teacher_resize_method, gram.global_teacher_resize_antialias
        teacher_patches = resize_patches(teacher_patches, student_patches.shape[1], mode=mode, antialias=antialias)
        return {
            "student_patches": select_patches(student_patches, masks, gram.tokens_used),
            "teacher_patches": select_patches(teacher_patches, masks, gram.tokens_used),
            "orig_student_patches": student_patches,
            "orig_teacher_patches": teacher_patches,
        }

    def compute_losses(
        self,
        *,
        teacher_global: dict[str, Tensor],
        student_global: dict[str, Tensor],
        student_local: dict[str, Tensor],
        gram_global: dict[str, Tensor],
        masks: Tensor,
        mask_indices_list: Tensor,
        masks_weight: Tensor,
        iteration: int,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the total loss (0-dim, with graph) and its unweighted terms, detached.

        Arguments are those of `forward_backward` and the outputs above; `gram_global` is empty while the Gram loss does
        not count, `masks_weight` float32 [M] is the weight of each masked patch.
        """
        cfg = self.cfg
        targets, ignores_diagonal = teacher_global["cls_centered"], cfg.dino.global_ignore_diagonal
        dino_local = self.dino_loss(student_local["cls_after_head"], targets)
        dino_global = self.dino_loss(student_global["cls_after_head"], targets, ignore_diagonal=ignores_diagonal)
        koleo = torch.stack([self.koleo_loss(crop) for crop in student_global["cls_pre_head"]]).mean()
        ibot = self.ibot_patch_loss.forward_masked(
            student_global["masked_patch_after_head"],
            teacher_global["masked_patch_centered"],
            student_masks_flat=masks,
            n_masked_patches=len(mask_indices_list),
            masks_weight=masks_weight,
        )
        # Every (student crop, teacher crop) pair counts alike.
        global_pairs = N_GLOBAL_CROPS * (N_GLOBAL_CROPS - int(ignores_diagonal))
        local_pairs = N_GLOBAL_CROPS * len(student_local["cls_after_head"])
        local_share, global_share = (pairs / (local_pairs + global_pairs) for pairs in (local_pairs, global_pairs))
        local_weight = self.local_loss_weight[iteration]
        total = (
            cfg.dino.loss_weight * local_share * local_weight * dino_local
            + cfg.dino.loss_weight * global_share * dino_global
            # Per global crop, although the term is a mean over crops: the published weight is meant so.
            + cfg.dino.koleo_loss_weight * N_GLOBAL_CROPS * koleo
            + cfg.ibot.loss_weight * ibot
        )
        terms: dict[str, Tensor | float] = {
            "dino_local_crops_loss": dino_local.detach(),
            "dino_local_loss_weight": local_weight,
            "dino_global_crops_loss": dino_global.detach(),
            "koleo_loss": koleo.detach(),
            "ibot_loss": ibot.detach(),
        }
        if not cfg.gram.use_loss:
            return total, terms
        terms["gram_loss_weight"] = gram_weight = self.gram_loss_weight[iteration]
        if not gram_global:
            terms["gram_loss"] = torch.zeros((), device=masks.device)
            return total, terms
        student, teacher = gram_global["student_patches"], gram_global["teacher_patches"]
        gram_loss = self.gram_loss(student, teacher, img_level=cfg.gram.img_level)
        terms["gram_loss"] = gram_loss.detach()
        if cfg.gram.compute_stats:
            student, teacher = gram_global["orig_student_patches"].detach(), gram_global["orig_teacher_patches"]
            for which in ("masked", "unmasked"):
                terms[f"stats_only/{which}_gram_loss"] = self.gram_loss(
                    select_patches(student, masks, which), select_patches(teacher, masks, which), img_level=False
                )
        return total + gram_weight * gram_loss, terms

    def backprop_loss(self, loss: Tensor) -> None:
        """Back-propagate the loss of this rank into the student; sharding averages gradients over the ranks."""
        loss.backward()

    def update_ema(self, momentum: float) -> None:
        """Set every EMA parameter to momentum * itself + (1 - momentum) * the student's; buffers stay."""
        networks.lerp_(self.model_ema, self.student, 1 - momentum)

    def gram_load_ema_teacher(self) -> None:
        """Copy the backbone of the EMA, buffers included, into the Gram teacher."""
        if self.gram_teacher is not None:
            networks.copy_(self.gram_teacher["backbone"], self.model_ema["backbone"])
            self.gram_teacher_initialized = True

    def update_gram(self) -> None:
        """Refresh the Gram teacher: copy the EMA again."""
        self.gram_load_ema_teacher()

    def continue_gram(self, iteration: int, *, is_loaded: bool) -> None:
        """Refuse to resume after `iteration` without a Gram teacher, in the checkpoint (`is_loaded`) or to come."""
        if self.gram_teacher is None or self.gram_calendar.load_before > iteration:
            return
        self.gram_teacher_initialized |= is_loaded
        if not self.gram_teacher_initialized:
            raise ValueError(
                f"the checkpoint after iteration {iteration} has no Gram teacher: give one with gram.ckpt=FILE, or "
                f"copy the EMA teacher with gram.it_load_ema_teacher={iteration + 1} or later"
            )

    def init_weights(self) -> None:
        """Initialise everything; the EMA starts equal to the student, buffers included.

        In this order, so that what is later wins: random weights; `student.pretrained_weights` (the backbone);
        `gram.ckpt`; `student.resume_from_teacher_chkpt` (backbone and heads); `distillation.checkpoint_path`.

        Raises:
            CheckpointError, WeightsError: a checkpoint is damaged or does not fit; names the setting.
            FileNotFoundError: there is no such checkpoint.
        """
        cfg = self.cfg
        networks.materialize_(self)
        networks.init_weights_(self.student)
        self.dino_loss.init_weights()
        self.ibot_patch_loss.init_weights()
        if path := cfg.student.pretrained_weights:
            networks.load_backbone(self.student, path, cfg, setting="student.pretrained_weights")
        if self.gram_teacher is not None and cfg.gram.ckpt:
            networks.load_backbone(self.gram_teacher, cfg.gram.ckpt, cfg, setting="gram.ckpt")
            self.gram_teacher_initialized = True
        if path := cfg.student.resume_from_teacher_chkpt:
            networks.load_networks(self.student, path, setting="student.resume_from_teacher_chkpt")
        networks.copy_(self.model_ema, self.student)
        if not self.is_distillation_enabled:
            return
        networks.materialize_(self.teacher)
        if (path := cfg.distillation.checkpoint_path) == "ignore":
            logger.warning("distillation.checkpoint_path=%s: the teacher is random, which is for tests", path)
            networks.init_weights_(self.teacher)
        else:
            networks.load_networks(self.teacher, path, setting="distillation.checkpoint_path")

    @property
    def device(self) -> torch.device:
        """The device of the student's parameters."""
        return next(self.student.parameters()).device

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Set training mode for the student; teachers always stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.model_ema, self.teacher, self.gram_teacher):
            if frozen is not None:
                frozen.eval()
        return self

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups of the student with their learning-rate and weight-decay multipliers."""
        return params_groups_of_networks(self.student, self.cfg.optim)

    def prepare_for_distributed_training(self) -> None:
        """Checkpoint activations, compile and shard the networks as the configuration says.

        The student and its EMA are sharded over the processes of this student; teachers over all of them.
        """
        # Only the student sees crops of several sizes at once.
        set_attention_backend(self.student["backbone"], self.cfg.train.attention, runtime.device())
        subgroup, world = get_process_subgroup(), get_default_process_group()
        teachers = [self.gram_teacher, self.teacher if self.is_distillation_enabled else None]
        frozen = [(self.model_ema, subgroup), *((teacher, world) for teacher in teachers if teacher is not None)]
        ac_compile_parallelize(
            trained_model=self.student,
            inference_only_models=[network for network, _ in frozen],
            cfg=self.cfg,
            trained_model_process_group=subgroup,
            inference_only_models_process_groups=[group for _, group in frozen],
        )


def _check_grids(teacher: dict[str, Tensor], student: dict[str, Tensor], masks: Tensor) -> None:
    counts = [output["patch_pre_head"].shape[-2] for output in (teacher, student)]
    if counts != [masks.shape[1]] * 2:
        raise ValueError(
            f"a global crop has {counts[0]} patches for the teacher, {counts[1]} for the student and {masks.shape[1]} "
            "in the masks, which must agree: compare student.arch, student.patch_size and "
            "crops.teacher_to_student_resolution_scale with the teacher's"
        )


def _by_crop(features: dict[str, Tensor], n_crops: int) -> dict[str, Tensor]:
    return {
        "cls_pre_head": features["x_norm_clstoken"].unflatten(0, (n_crops, -1)),  # [crops, B, D]
        "reg_pre_head": features["x_storage_tokens"].unflatten(0, (n_crops, -1)),  # [crops, B, R, D]
        "patch_pre_head": features["x_norm_patchtokens"].unflatten(0, (n_crops, -1)),  # [crops, B, P, D]
    }
