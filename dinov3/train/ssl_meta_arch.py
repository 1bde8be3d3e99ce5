"""A student that learns from the moving average of itself, or from a larger teacher: DINO + iBOT + KoLeo + Gram.

DINO (arXiv 2104.14294) compares class tokens, iBOT (2111.07832) masked patches, KoLeo (1806.03198) spreads the class
tokens; combined as in DINOv2 (2304.07193) and DINOv3 (2508.10104, section "Learning with self-supervision"). Gram
anchoring (2508.10104, section 4) ties the similarities between patches to those of an earlier teacher.

Notable:
- `student`, `teacher` and `model_ema` are `ModuleDict`s of `backbone`, `dino_head`, `ibot_head`. In self-distillation
  `teacher` *is* `model_ema`; in distillation it is a frozen network. Either way it is no submodule, so that checkpoints
  hold each tensor once, and no teacher that never changes.
- The module may be built on the meta device; `init_weights` then materialises it. Everything is filled with NaN before,
  so that an entry that nobody initialises shows at the first step.
- Global crops and their targets are crop-major: first crop 0 of all images, then crop 1.
- Everything runs without a process group, and in each rank of one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data import DataAugmentationDINO
from dinov3.distributed import (
    distribute_to_subgroups,
    get_default_process_group,
    get_process_subgroup,
    runtime,
)
from dinov3.fsdp import ac_compile_parallelize
from dinov3.layers import set_attention_backend
from dinov3.loss import DINOLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from dinov3.train import networks, starting_weights
from dinov3.train.cosine_lr_scheduler import linear_warmup_cosine_decay
from dinov3.train.gram import GramCalendar, make_gram_loss, resize_patches, select_patches
from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay_fsdp

logger = logging.getLogger("dinov3")

N_GLOBAL_CROPS = 2
RANDOM_TEACHER = "ignore"


class SSLMetaArch(nn.Module):
    """Student, EMA, teachers and losses of DINOv3's self-supervised training.

    Args:
        cfg: the merged training configuration (see `dinov3.configs`).

    Raises:
        ValueError: the configuration contradicts itself (see `dinov3.configs.validate`).
        FileNotFoundError: there is no configuration of the teacher to distil.
    """

    teacher: nn.ModuleDict
    gram_teacher: nn.ModuleDict | None

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.student, self.model_ema, self.embed_dim = networks.student_and_ema(cfg)
        self.is_distillation_enabled: bool = cfg.distillation.enabled
        # Not `self.teacher = ...`, which would register it, and so save it in every checkpoint.
        self.__dict__["teacher"] = networks.distillation_teacher(cfg) if cfg.distillation.enabled else self.model_ema

        self.dino_out_dim: int = cfg.dino.head_n_prototypes
        self.n_local_crops: int = cfg.crops.local_crops_number
        self.dino_loss_weight: float = cfg.dino.loss_weight
        self.dino_koleo_loss_weight: float = cfg.dino.koleo_loss_weight
        self.ibot_loss_weight: float = cfg.ibot.loss_weight
        self.dino_global_ignore_diagonal: bool = cfg.dino.global_ignore_diagonal

        self.dino_loss = DINOLoss(self.dino_out_dim)
        self.ibot_patch_loss = iBOTPatchLoss(cfg.ibot.head_n_prototypes)
        self.koleo_loss = _koleo_loss(cfg)
        if cfg.dino.reweight_dino_local_loss:
            self.dino_local_loss_schedule = _weight_schedule(cfg.dino.local_loss_weight_schedule, cfg)
        self._set_up_gram(cfg)

    def _set_up_gram(self, cfg: Any) -> None:
        gram = cfg.gram
        self.gram_use_loss: bool = gram.use_loss
        self.gram_ema_teacher: bool = gram.ema_teacher
        self.has_gram_teacher: bool = gram.use_loss and not gram.ema_teacher
        self.gram_teacher = networks.gram_teacher(cfg) if self.has_gram_teacher else None
        self.gram_teacher_initialized = False
        self.gram_calendar = GramCalendar.from_config(cfg)
        self.gram_ckpt: str | None = gram.ckpt
        self.gram_img_level: bool = gram.img_level
        self.gram_tokens_used: str = gram.tokens_used
        self.gram_compute_stats: bool = gram.compute_stats
        self.gram_loss_weight: float = gram.loss_weight
        self.gram_loss_schedule = (
            _weight_schedule(gram.loss_weight_schedule, cfg) if gram.use_loss and gram.loss_weight_schedule else None
        )
        if gram.use_loss:
            self.gram_loss = make_gram_loss(cfg)

    @property
    def device(self) -> torch.device:
        """The device of the student's parameters."""
        return next(self.student.parameters()).device

    def init_weights(self) -> None:
        """Initialise everything; the EMA starts equal to the student, buffers included.

        In this order, so that what is later wins: random weights; `student.pretrained_weights` (the backbone);
        `gram.ckpt`; `student.resume_from_teacher_chkpt` (backbone and heads); `distillation.checkpoint_path`.

        Raises:
            CheckpointError, WeightsError: a checkpoint is damaged or does not fit; names the setting.
            FileNotFoundError: there is no such checkpoint.
        """
        networks.materialize_(self)
        for network in self.student.values():
            network.init_weights()  # type: ignore[operator]
        self.dino_loss.init_weights()
        self.ibot_patch_loss.init_weights()
        student = self.cfg.student
        if student.pretrained_weights:
            starting_weights.load_backbone(
                self.student, student.pretrained_weights, self.cfg, setting="student.pretrained_weights"
            )
        if self.gram_teacher is not None and self.gram_ckpt:
            starting_weights.load_backbone(self.gram_teacher, self.gram_ckpt, self.cfg, setting="gram.ckpt")
            self.gram_teacher_initialized = True
        if student.resume_from_teacher_chkpt:
            starting_weights.load_networks(
                self.student, student.resume_from_teacher_chkpt, setting="student.resume_from_teacher_chkpt"
            )
        networks.copy_(self.model_ema, self.student)
        if self.is_distillation_enabled:
            self._init_distillation_teacher(self.cfg.distillation.checkpoint_path)

    def _init_distillation_teacher(self, checkpoint: str) -> None:
        networks.materialize_(self.teacher)
        if checkpoint == RANDOM_TEACHER:
            logger.warning("distillation.checkpoint_path=%s: the teacher is random, which is for tests", checkpoint)
            for network in self.teacher.values():
                network.init_weights()  # type: ignore[operator]
        else:
            starting_weights.load_networks(self.teacher, checkpoint, setting="distillation.checkpoint_path")

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Training mode for the student; teachers always stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.model_ema, self.teacher, self.gram_teacher):
            if frozen is not None:
                frozen.eval()
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
        batch = self._on_device(data)
        local_crops = batch["collated_local_crops"].unflatten(0, (self.n_local_crops, -1))  # [L, B, 3, s, s]
        global_crops = batch["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [2, B, 3, S, S]
        if global_crops.shape[1] != local_crops.shape[1]:
            raise ValueError(f"{local_crops.shape[1]} images of local, but {global_crops.shape[1]} of global crops")

        teacher_global = self.get_teacher_output(
            global_crops,
            upperbound=batch["upperbound"],
            mask_indices_list=batch["mask_indices_list"],
            teacher_temp=teacher_temp,
            n_masked_patches_tensor=batch["n_masked_patches"],
        )
        student_crops = self.exchange_crops(global_crops)
        student_global, student_local = self.get_student_output(
            global_crops=student_crops,
            local_crops=self.exchange_crops(local_crops),
            upperbound=batch["upperbound"],
            masks=batch["collated_masks"],
            mask_indices_list=batch["mask_indices_list"],
        )
        _check_grids(teacher_global, student_global, batch["collated_masks"])
        gram_global: dict[str, Tensor] = {}
        if self.gram_use_loss and self._gram_loss_weight(iteration) != 0:
            gram_global = self.get_gram_teacher_output(
                batch.get("collated_gram_teacher_crops"),
                masks=batch["collated_masks"],
                teacher_global=teacher_global,
                student_global=student_global,
            )
        total_loss, terms = self.compute_losses(
            teacher_global=teacher_global,
            student_global=student_global,
            student_local=student_local,
            gram_global=gram_global,
            masks=batch["collated_masks"],
            mask_indices_list=batch["mask_indices_list"],
            masks_weight=batch["masks_weight"],
            iteration=iteration,
        )
        self.backprop_loss(total_loss)
        sizes = {"local_batch_size": student_crops.shape[1], "global_batch_size": batch["global_batch_size"]}
        return total_loss.detach(), sizes | terms

    def exchange_crops(self, crops: Tensor) -> Tensor:
        """The crops [n, B, ...] that the student sees, given those of this process: here the same."""
        return crops

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
        features = self.teacher["backbone"](self._shrunk_for_teacher(images.flatten(0, 1)), is_training=True)
        cls_logits, patch_logits = self.teacher_logits(features, mask_indices_list)  # [2B, K], [M, K']
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

    def teacher_logits(self, features: dict[str, Tensor], mask_indices: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher's heads say of the images that the student sees.

        Args:
            features: of the teacher's backbone for the 2B global crops of this process.
            mask_indices: int64 [M], positions in the flattened patches of the student's global crops.

        Returns:
            [2B, K] of the class tokens and [M, K'] of the masked patches.
        """
        cls_logits = self.teacher["dino_head"](features["x_norm_clstoken"])
        return cls_logits, self.teacher["ibot_head"](_select(features["x_norm_patchtokens"], mask_indices))

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
        # The order matters: the backbone treats entry 1 as the local crops (untied class-token norms). Of a larger
        # teacher the student learns from whole images: masks then only choose the patches of the iBOT term.
        features_global, features_local = self.student["backbone"](
            [global_crops.flatten(0, 1), local_crops.flatten(0, 1)],
            masks=[None if self.is_distillation_enabled else masks, None],
            is_training=True,
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

    def get_gram_teacher_output(
        self,
        images: Tensor | None,
        *,
        masks: Tensor,
        teacher_global: dict[str, Tensor],
        student_global: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The patches of the student and of the Gram teacher that the Gram loss compares, on the student's grid.

        Args:
            images: the global crops [2B, 3, S', S'] for the Gram teacher; unused with `gram.ema_teacher`.
            masks: bool [2B, P].
            teacher_global: from `get_teacher_output`; its patches are the target with `gram.ema_teacher`.
            student_global: from `get_student_output`.

        Returns:
            `student_patches` and `teacher_patches`, [2B, P, D] or the rows [n, D] that `gram.tokens_used` chooses, and
            `orig_student_patches` and `orig_teacher_patches`, all of them.

        Raises:
            ValueError: the Gram teacher has no weights yet, the batch has no crops for it, or they are not square.
        """
        gram = self.cfg.gram
        student_patches = student_global["patch_pre_head"].flatten(0, 1)  # [2B, P, D]
        if self.has_gram_teacher:
            teacher_patches = self._gram_teacher_patches(images)
        else:
            teacher_patches = teacher_global["patch_pre_head"].flatten(0, 1)
        teacher_patches = resize_patches(
            teacher_patches,
            student_patches.shape[1],
            mode=gram.global_teacher_resize_method,
            antialias=gram.global_teacher_resize_antialias,
        )
        return {
            "student_patches": select_patches(student_patches, masks, self.gram_tokens_used),
            "teacher_patches": select_patches(teacher_patches, masks, self.gram_tokens_used),
            "orig_student_patches": student_patches,
            "orig_teacher_patches": teacher_patches,
        }

    @torch.no_grad()
    def _gram_teacher_patches(self, images: Tensor | None) -> Tensor:
        if not self.gram_teacher_initialized:
            raise ValueError(
                "the Gram loss counts, but the Gram teacher has no weights yet: give gram.ckpt=FILE, or a "
                "gram.loss_weight_schedule that is 0 until gram.it_load_ema_teacher"
            )
        if images is None:
            raise ValueError("the batch has no collated_gram_teacher_crops: set crops.gram_teacher_crops_size")
        assert self.gram_teacher is not None
        return self.gram_teacher["backbone"](images, is_training=True)["x_norm_patchtokens"]

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
        """The total loss and its unweighted terms.

        Args:
            teacher_global: from `get_teacher_output`.
            student_global: from `get_student_output`.
            student_local: from `get_student_output`.
            gram_global: from `get_gram_teacher_output`; empty while the Gram loss does not count.
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
        terms: dict[str, Tensor | float] = {
            "dino_local_crops_loss": dino_local.detach(),
            "dino_local_loss_weight": local_weight,
            "dino_global_crops_loss": dino_global.detach(),
            "koleo_loss": koleo.detach(),
            "ibot_loss": ibot.detach(),
        }
        if not self.gram_use_loss:
            return total, terms
        weighted_gram, gram_terms = self._gram_terms(gram_global, masks, iteration)
        return total + weighted_gram, terms | gram_terms

    def _gram_terms(
        self, gram_global: dict[str, Tensor], masks: Tensor, iteration: int
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        weight = self._gram_loss_weight(iteration)
        if not gram_global:  # the weight is 0
            nothing = torch.zeros((), device=masks.device)
            return nothing, {"gram_loss_weight": weight, "gram_loss": nothing}
        loss = self.gram_loss(
            gram_global["student_patches"], gram_global["teacher_patches"], img_level=self.gram_img_level
        )
        terms: dict[str, Tensor | float] = {"gram_loss_weight": weight, "gram_loss": loss.detach()}
        if self.gram_compute_stats:
            terms |= self._gram_statistics(gram_global, masks)
        return weight * loss, terms

    @torch.no_grad()
    def _gram_statistics(self, gram_global: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor | float]:
        student, teacher = gram_global["orig_student_patches"], gram_global["orig_teacher_patches"]
        return {
            f"stats_only/{which}_gram_loss": self.gram_loss(
                select_patches(student, masks, which), select_patches(teacher, masks, which), img_level=False
            )
            for which in ("masked", "unmasked")
        }

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of `loss` into the student; each rank back-propagates its own, sharding averages them."""
        loss.backward()

    def update_ema(self, momentum: float) -> None:
        """Every EMA parameter becomes momentum * itself + (1 - momentum) * the student's; buffers stay."""
        networks.lerp_(self.model_ema, self.student, 1 - momentum)

    def gram_load_ema_teacher(self) -> None:
        """The backbone of the EMA, buffers included, becomes the Gram teacher."""
        if self.gram_teacher is not None:
            networks.copy_(self.gram_teacher["backbone"], self.model_ema["backbone"])
            self.gram_teacher_initialized = True

    def update_gram(self, m: float = 0) -> None:
        """Every parameter of the Gram teacher becomes m * itself + (1 - m) * the EMA's; with m = 0 buffers, too."""
        if self.gram_teacher is None:
            return
        if m == 0:  # 0 times a value that is not finite is not 0
            self.gram_load_ema_teacher()
        else:
            networks.lerp_(self.gram_teacher["backbone"], self.model_ema["backbone"], 1 - m)

    def continue_gram(self, iteration: int, *, is_loaded: bool) -> None:
        """Say where the Gram teacher stands in a run that goes on after `iteration`.

        Args:
            iteration: the last that was finished.
            is_loaded: whether its weights came from the checkpoint.

        Raises:
            ValueError: it has none and would never get any.
        """
        will_be_loaded = self.gram_calendar.load_before > iteration
        if self.gram_teacher is None or will_be_loaded:
            return
        self.gram_teacher_initialized |= is_loaded
        if not self.gram_teacher_initialized:
            raise ValueError(
                f"the checkpoint after iteration {iteration} has no Gram teacher: give one with gram.ckpt=FILE, or "
                f"copy the EMA teacher with gram.it_load_ema_teacher={iteration + 1} or later"
            )

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
            "gram_teacher_crops_size": crops.gram_teacher_crops_size if needs_gram_crops(cfg) else None,
            "gram_teacher_no_distortions": crops.gram_teacher_no_distortions,
            "local_crops_subset_of_global_crops": crops.localcrops_subset_of_globalcrops,
            "patch_size": cfg.student.patch_size,
            "share_color_jitter": crops.share_color_jitter,
            "horizontal_flips": crops.horizontal_flips,
            "blur_probabilities": tuple(crops.blur_probabilities),
            "mean": tuple(crops.rgb_mean),
            "std": tuple(crops.rgb_std),
        }
        return DataAugmentationDINO(**(arguments | overrides))

    @staticmethod
    def broadcast_to_subgroups(tensor: Tensor, over_dim: int, global_batch_size: int | None = None) -> Tensor:
        """See `dinov3.distributed.distribute_to_subgroups`."""
        return distribute_to_subgroups(tensor, over_dim, global_batch_size)

    def prepare_for_distributed_training(self) -> None:
        """Checkpoint activations, compile and shard the networks as the configuration says.

        The student and its EMA are sharded over the processes of this student; teachers over all of them.
        """
        # Only the student sees crops of several sizes at once.
        set_attention_backend(self.student["backbone"], self.cfg.train.attention, runtime.device())
        subgroup, world = get_process_subgroup(), get_default_process_group()
        frozen = [(self.model_ema, subgroup)]
        if self.gram_teacher is not None:
            frozen.append((self.gram_teacher, world))
        if self.is_distillation_enabled:
            frozen.append((self.teacher, world))
        ac_compile_parallelize(
            trained_model=self.student,
            inference_only_models=[network for network, _ in frozen],
            cfg=self.cfg,
            trained_model_process_group=subgroup,
            inference_only_models_process_groups=[group for _, group in frozen],
        )

    def _on_device(self, data: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in data.items()
        }

    def _shrunk_for_teacher(self, images: Tensor) -> Tensor:
        # A student of stride 32 has the patch grid of a teacher of stride 16 that sees half the resolution.
        scale = self.cfg.crops.teacher_to_student_resolution_scale
        if not self.is_distillation_enabled or scale == 1:
            return images
        size = [round(side / scale) for side in images.shape[-2:]]
        wide = images.float()
        return F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True).to(images.dtype)

    def _shares_of_crop_pairs(self) -> tuple[float, float]:
        # Every (student crop, teacher crop) pair counts alike.
        global_pairs = N_GLOBAL_CROPS * (N_GLOBAL_CROPS - int(self.dino_global_ignore_diagonal))
        local_pairs = N_GLOBAL_CROPS * self.n_local_crops
        total = global_pairs + local_pairs
        return local_pairs / total, global_pairs / total

    def _local_loss_weight(self, iteration: int) -> float:
        if not self.cfg.dino.reweight_dino_local_loss:
            return 1.0
        return _at(self.dino_local_loss_schedule, iteration)

    def _gram_loss_weight(self, iteration: int) -> float:
        if self.gram_loss_schedule is None:
            return self.gram_loss_weight
        return _at(self.gram_loss_schedule, iteration)


def _check_grids(teacher: dict[str, Tensor], student: dict[str, Tensor], masks: Tensor) -> None:
    counts = [output["patch_pre_head"].shape[-2] for output in (teacher, student)]
    if counts != [masks.shape[1]] * 2:
        raise ValueError(
            f"a global crop has {counts[0]} patches for the teacher, {counts[1]} for the student and {masks.shape[1]} "
            "in the masks, which must agree: compare student.arch, student.patch_size and "
            "crops.teacher_to_student_resolution_scale with the teacher's"
        )


def needs_gram_crops(cfg: Any) -> bool:
    """Whether batches need `collated_gram_teacher_crops`."""
    return bool(cfg.gram.use_loss and not cfg.gram.ema_teacher)


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


def _at(schedule: Any, iteration: int) -> float:
    return float(schedule[min(iteration, len(schedule) - 1)])
