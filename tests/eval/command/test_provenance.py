"""What results files say about where their figures come from."""

from __future__ import annotations

import json

import torch

from dinov3.eval.command.model import ModelConfig
from dinov3.eval.command.provenance import provenance
from dinov3.eval.knn import EvalConfig, Feature, KnnEvalConfig, TrainConfig


def test_settings_are_written_as_they_can_be_given_again() -> None:
    config = KnnEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(dataset="A", ks=[3]),
        eval=EvalConfig(test_dataset="B", feature=Feature.PATCH_MEAN),
    )
    content = provenance(config, "ViT", {"classes": 7}, torch.bfloat16, 1.234)
    assert json.loads(json.dumps(content)) == content
    assert content["config"]["eval"]["feature"] == "PATCH_MEAN"
    assert content["config"]["eval"]["test_metric_type"] == "MEAN_ACCURACY"
    assert content["config"]["train"]["ks"] == [3]
    assert (content["model"], content["datasets"], content["seconds"]) == ("ViT", {"classes": 7}, 1.23)
    assert content["processes"] == 1 and content["autocast_dtype"] == "torch.bfloat16"
    assert content["versions"]["torch"] == torch.__version__ and "scikit-learn" in content["versions"]
