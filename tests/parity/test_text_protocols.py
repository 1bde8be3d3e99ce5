"""Golden cases of `text`: zero-shot classification and open-vocabulary segmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.text.prompts import encode_classes
from dinov3.eval.text.segmenter import OpenVocabularySegmenter, patch_channels
from dinov3.heads.dinotxt.tokenizer import Tokenizer
from tests.parity import golden
from tests.parity.test_text_models import assert_returns, build_dinotxt, make_input


@torch.no_grad()
def test_zero_shot_classification() -> None:
    case = golden.case("text", "zero-shot")
    model, tokenizer = build_dinotxt(case), Tokenizer()
    weights = encode_classes(model, tokenizer, case["class_names"], case["templates"]).mT
    images = make_input(case["inputs"]["image"])
    logits = 100 * model.encode_image(images, normalize=True) @ weights
    # The dense demo: one sentence per class, and resizing before normalising.
    texts = encode_classes(model, tokenizer, case["class_names"], case["templates"][:1], channels=patch_channels(model))
    _, patch_tokens, _ = model.encode_image_with_patch_tokens(images[:1])
    maps = patch_tokens.mT.unflatten(2, (3, 3))
    maps = F.normalize(F.interpolate(maps, case["dense_size"], mode="bicubic", align_corners=False), dim=1)
    dense = torch.einsum("bdhw,cd->bchw", maps, texts)
    for call, got in zip(case["outputs"], (weights, logits, dense), strict=True):
        assert_returns(call, got)
    targets = torch.tensor(case["targets"])
    found = logits.topk(3, dim=1).indices == targets[:, None]
    assert [int(found[:, :k].sum()) for k in (1, 3)] == [case["correct_top1"], case["correct_top3"]]


@torch.no_grad()
def test_open_vocabulary_segmentation() -> None:
    case = golden.case("text", "open-vocabulary-segmentation")
    model = build_dinotxt(case)
    texts = encode_classes(
        model, Tokenizer(), case["class_names"], case["templates"], channels=patch_channels(model), batch_size=4
    )
    images = make_input(case["inputs"]["image"])[None]
    segmenter = OpenVocabularySegmenter(model, texts, "backbone")  # the tokens that the case was made with
    slide = make_inference(
        images,
        segmenter,
        "slide",
        rescale_to=images.shape[-2:],
        n_output_channels=len(texts),
        crop_size=(case["side"], case["side"]),
        stride=(case["stride"], case["stride"]),
    )
    whole = make_inference(images, segmenter, rescale_to=case["target_size"], whole_size=None)
    for call, got in zip(case["outputs"], (texts, segmenter.cosines(images)[0], slide[0]), strict=False):
        assert_returns(call, got)
    labels = {
        "whole": whole[0].argmax(0),
        "slide": F.interpolate(slide, case["target_size"], mode="bilinear", align_corners=False)[0].argmax(0),
    }
    for name, entry in zip(("whole", "slide"), case["outputs"][3]["returns"], strict=True):
        stored = golden.tensors("text")[entry["key"]].long()
        assert (labels[name][::3, ::3] != stored).float().mean() < 2e-3  # where the best two are within 1e-5
        histogram = labels[name].flatten().bincount(minlength=len(texts))
        assert (histogram - torch.tensor(case[f"label_histogram_{name}"])).abs().sum() <= 6
