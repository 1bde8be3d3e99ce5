"""Where a public path of the official release lives here: only entries that differ, longest prefix wins."""

CLASSIFICATION = "dinov3.eval.classification"
METRICS = "dinov3.eval.classification.metrics"
FEATURES = "dinov3.eval.features"
TARGETS: dict[str, str] = {
    "dinov3.models.build_model_for_eval": "dinov3.hub.runs.build_model_for_eval",
    # What evaluations share: commands, features, classification.
    "dinov3.eval.helpers": "dinov3.eval.command.config",
    "dinov3.eval.helpers.write_results": "dinov3.eval.command.results.write_results",
    "dinov3.eval.setup": "dinov3.eval.command.model",
    "dinov3.eval.results": "dinov3.eval.command.results",
    "dinov3.eval.data": "dinov3.eval.classification.data",
    "dinov3.eval.utils": "dinov3.eval.classification.scoring",
    "dinov3.eval.utils.ModelWithIntermediateLayers": "dinov3.models.intermediate_layers.ModelWithIntermediateLayers",
    "dinov3.eval.utils.LossType": CLASSIFICATION + ".linear_config.LossType",
    "dinov3.eval.utils.extract_features": FEATURES + ".extraction.extract_features",
    "dinov3.eval.utils.extract_features_with_dataloader": FEATURES + ".extraction.extract_features_with_dataloader",
    "dinov3.eval.utils.load_features_dict": FEATURES + ".files.load_features_dict",
    "dinov3.eval.utils.save_features_dict": FEATURES + ".files.save_features_dict",
    # The commands hold their protocol only.
    "dinov3.eval.knn.KnnEvalConfig": CLASSIFICATION + ".knn_config.KnnEvalConfig",
    "dinov3.eval.knn.TrainConfig": CLASSIFICATION + ".knn_config.TrainConfig",
    "dinov3.eval.knn.EvalConfig": CLASSIFICATION + ".knn_config.EvalConfig",
    "dinov3.eval.knn.TransformConfig": CLASSIFICATION + ".config.TransformConfig",
    "dinov3.eval.knn.FewShotConfig": CLASSIFICATION + ".config.FewShotConfig",
    "dinov3.eval.knn.RESULTS_FILENAME": CLASSIFICATION + ".knn_config.RESULTS_FILENAME",
    "dinov3.eval.knn.MAIN_METRICS": CLASSIFICATION + ".knn_config.MAIN_METRICS",
    "dinov3.eval.knn.KnnModule": CLASSIFICATION + ".knn_module.KnnModule",
    "dinov3.eval.knn.DictKeysModule": CLASSIFICATION + ".scoring.DictKeysModule",
    "dinov3.eval.knn.make_transform": CLASSIFICATION + ".data.make_transform",
    "dinov3.eval.knn.make_test_data_loader": FEATURES + ".extraction.make_enumerated_loader",
    "dinov3.eval.log_regression.LogregEvalConfig": CLASSIFICATION + ".log_regression_config.LogregEvalConfig",
    "dinov3.eval.log_regression.TrainConfig": CLASSIFICATION + ".log_regression_config.TrainConfig",
    "dinov3.eval.log_regression.EvalConfig": CLASSIFICATION + ".log_regression_config.EvalConfig",
    "dinov3.eval.log_regression.TransformConfig": CLASSIFICATION + ".config.TransformConfig",
    "dinov3.eval.log_regression.FewShotConfig": CLASSIFICATION + ".config.FewShotConfig",
    "dinov3.eval.log_regression.RESULTS_FILENAME": CLASSIFICATION + ".log_regression_config.RESULTS_FILENAME",
    "dinov3.eval.log_regression.MAIN_METRICS": CLASSIFICATION + ".log_regression_config.MAIN_METRICS",
    "dinov3.eval.log_regression.LogRegModule": CLASSIFICATION + ".log_regression_module.LogRegModule",
    "dinov3.eval.log_regression.C_POWER_RANGE": CLASSIFICATION + ".log_regression_module.C_POWER_RANGE",
    "dinov3.eval.log_regression.train_for_C": CLASSIFICATION + ".log_regression_module.train_for_C",
    "dinov3.eval.log_regression.sweep_C_values": CLASSIFICATION + ".log_regression_module.sweep_C_values",
    "dinov3.eval.log_regression.get_best_logreg_with_features": (
        CLASSIFICATION + ".log_regression_module.get_best_logreg_with_features"
    ),
    "dinov3.eval.log_regression.make_transform": CLASSIFICATION + ".data.make_transform",
    "dinov3.eval.log_regression.make_logreg_data_loader": FEATURES + ".extraction.make_enumerated_loader",
    "dinov3.eval.linear.RESULTS_FILENAME": CLASSIFICATION + ".linear_config.RESULTS_FILENAME",
    "dinov3.eval.linear.MAIN_METRICS": CLASSIFICATION + ".linear_config.MAIN_METRICS",
    "dinov3.eval.linear.EvalConfig": CLASSIFICATION + ".linear_config.EvalConfig",
    "dinov3.eval.linear.LinearEvalConfig": CLASSIFICATION + ".linear_config.LinearEvalConfig",
    "dinov3.eval.linear.LossType": CLASSIFICATION + ".linear_config.LossType",
    "dinov3.eval.linear.OptimizerType": CLASSIFICATION + ".linear_config.OptimizerType",
    "dinov3.eval.linear.SchedulerType": CLASSIFICATION + ".linear_config.SchedulerType",
    "dinov3.eval.linear.TrainConfig": CLASSIFICATION + ".linear_config.TrainConfig",
    "dinov3.eval.linear.FewShotConfig": CLASSIFICATION + ".config.FewShotConfig",
    "dinov3.eval.linear.TransformConfig": CLASSIFICATION + ".config.TransformConfig",
    "dinov3.eval.linear.AllClassifiers": CLASSIFICATION + ".linear_heads.AllClassifiers",
    "dinov3.eval.linear.LinearClassifier": CLASSIFICATION + ".linear_heads.LinearClassifier",
    "dinov3.eval.linear.LinearPostprocessor": CLASSIFICATION + ".linear_heads.LinearPostprocessor",
    "dinov3.eval.linear.create_linear_input": CLASSIFICATION + ".linear_heads.create_linear_input",
    "dinov3.eval.linear.scale_lr": CLASSIFICATION + ".linear_heads.scale_lr",
    "dinov3.eval.linear.setup_linear_classifiers": CLASSIFICATION + ".linear_heads.setup_linear_classifiers",
    "dinov3.eval.linear.Evaluator": CLASSIFICATION + ".linear_scoring.Evaluator",
    "dinov3.eval.linear.make_evaluators": CLASSIFICATION + ".linear_scoring.make_evaluators",
    "dinov3.eval.linear.train_linear_classifiers": CLASSIFICATION + ".linear_training.train_linear_classifiers",
    "dinov3.eval.accumulators": "dinov3.eval.features.extraction",
    "dinov3.eval.metrics": METRICS,
    "dinov3.eval.metrics.MacroAveragedMeanReciprocalRank": METRICS + ".counting.MacroAveragedMeanReciprocalRank",
    "dinov3.eval.metrics.MeanAveragePrecisionVOC2007": METRICS + ".curves.MeanAveragePrecisionVOC2007",
    "dinov3.eval.metrics.classification.AnyMatchAccuracy": METRICS + ".counting.AnyMatchAccuracy",
    "dinov3.eval.metrics.classification.GroupByAnyMatchAccuracy": METRICS + ".counting.GroupByAnyMatchAccuracy",
    # Training.
    "dinov3.train.cosine_lr_scheduler": "dinov3.train.schedules",
    "dinov3.train.ssl_meta_arch.SSLMetaArch.broadcast_to_subgroups": "dinov3.distributed.distribute_to_subgroups",
    # Depth: models are heads, what evaluations share lies in eval/dense.
    "dinov3.eval.depth.models.BackboneLayersSet": "dinov3.heads.backbone_layers.BackboneLayersSet",
    "dinov3.eval.depth.models.encoder.BackboneLayersSet": "dinov3.heads.backbone_layers.BackboneLayersSet",
    "dinov3.eval.depth.models.encoder._get_backbone_out_indices": "dinov3.heads.backbone_layers.backbone_out_indices",
    "dinov3.eval.depth.models.encoder": "dinov3.heads.depth.encoder",
    "dinov3.eval.depth.models.PatchSizeAdaptationStrategy": "dinov3.heads.depth.encoder.PatchSizeAdaptationStrategy",
    "dinov3.eval.depth.models.DinoVisionTransformerWrapper": "dinov3.heads.depth.encoder.DinoVisionTransformerWrapper",
    "dinov3.eval.depth.models.embed": "dinov3.layers.patch_multiple",
    "dinov3.eval.depth.models.dpt_head": "dinov3.heads.depth.dpt",
    "dinov3.eval.depth.models.DPTHead": "dinov3.heads.depth.dpt.DPTHead",
    "dinov3.eval.depth.models.linear_head.LinearHead": "dinov3.heads.linear.LinearDepthHead",
    "dinov3.eval.depth.models.LinearHead": "dinov3.heads.linear.LinearDepthHead",
    "dinov3.eval.depth.models.FeaturesToDepth": "dinov3.heads.depth.features_to_depth.FeaturesToDepth",
    "dinov3.eval.depth.models": "dinov3.heads.depth.depther",
    "dinov3.eval.depth.utils.create_chmv2_mixlog_bins": "dinov3.heads.depth.features_to_depth.create_chmv2_mixlog_bins",
    "dinov3.eval.depth.utils.create_outputs_with_chmv2_mixlog_norm": (
        "dinov3.heads.depth.features_to_depth.create_outputs_with_chmv2_mixlog_norm"
    ),
    "dinov3.eval.depth.utils.align_depth_least_square": "dinov3.eval.depth.metrics.align_depth_least_square",
    "dinov3.eval.depth.schedulers": "dinov3.eval.training.schedulers",
    "dinov3.eval.depth.checkpoint_utils": "dinov3.eval.training.checkpoints",
    "dinov3.eval.depth.visualization_utils": "dinov3.eval.dense.pictures",
    "dinov3.eval.depth.visualization_utils.save_predictions": "dinov3.eval.depth.eval.save_predictions",
    "dinov3.eval.depth.datasets.datasets_utils": "dinov3.eval.depth.metrics",
    "dinov3.eval.depth.datasets.datasets_utils._EvalCropType": "dinov3.eval.depth.metrics.EvalCropType",
    # dino.txt: networks are heads, losses are with the losses.
    "dinov3.eval.text.dinotxt_model": "dinov3.heads.dinotxt.model",
    "dinov3.eval.text.vision_tower": "dinov3.heads.dinotxt.vision_tower",
    "dinov3.eval.text.text_tower": "dinov3.heads.dinotxt.text_tower",
    "dinov3.eval.text.text_transformer": "dinov3.heads.dinotxt.text_transformer",
    "dinov3.eval.text.tokenizer": "dinov3.heads.dinotxt.tokenizer",
    "dinov3.eval.text.clip_loss.memory_efficient_clip_loss": "dinov3.loss.contrastive_loss.contrastive_loss",
    "dinov3.eval.text.gram_loss.gram_loss_fn": "dinov3.loss.gram_loss.sampled_gram_loss",
    # Detection.
    "dinov3.eval.detection.config": "dinov3.heads.plain_detr.config",
    "dinov3.eval.detection.models.detr": "dinov3.heads.plain_detr.detr",
    "dinov3.eval.detection.models.detr.PostProcess": "dinov3.heads.plain_detr.postprocess.PostProcess",
    "dinov3.eval.detection.models.position_encoding": "dinov3.heads.plain_detr.config",
    "dinov3.eval.detection.util.misc": "dinov3.heads.plain_detr.nested",
    "dinov3.eval.detection.util.box_ops": "dinov3.layers.boxes",
    # Segmentation.
    "dinov3.eval.segmentation.schedulers": "dinov3.eval.training.schedulers",
    "dinov3.eval.segmentation.models.BackboneLayersSet": "dinov3.heads.backbone_layers.BackboneLayersSet",
    "dinov3.eval.segmentation.models.heads.linear_head.LinearHead": "dinov3.heads.linear.LinearSegmentationHead",
    "dinov3.eval.segmentation.models.backbone.dinov3_adapter": "dinov3.heads.mask2former.adapter",
    "dinov3.eval.segmentation.models.heads.mask2former_head": "dinov3.heads.mask2former.head",
    "dinov3.eval.segmentation.models": "dinov3.heads.segmentation",
}


def resolve(path: str) -> str:
    """The dotted path in this project for a dotted ``path`` of the release."""
    for prefix in sorted(TARGETS, key=len, reverse=True):
        if path == prefix or path.startswith(prefix + "."):
            return TARGETS[prefix] + path[len(prefix) :]
    return path
