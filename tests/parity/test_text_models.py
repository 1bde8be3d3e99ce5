"""Golden cases of `text`: towers, model, losses, tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.heads.dinotxt.model import DINOTxt, DINOTxtConfig
from dinov3.heads.dinotxt.text_tower import TextHead
from dinov3.heads.dinotxt.text_transformer import TextTransformer
from dinov3.heads.dinotxt.tokenizer import Tokenizer
from dinov3.heads.dinotxt.vision_tower import VisionHead
from dinov3.hub.dinotxt import dinov3_vitl16_dinotxt_tet1280d20h24l
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.multiprocess import run_ranks
from tests.parity import deterministic, golden
from tests.parity.state_dicts import assert_matches_manifest

HEADS = {"VisionHead": VisionHead, "TextHead": TextHead}


def by_id(*prefixes: str) -> Any:
    return pytest.mark.parametrize("case", golden.cases("text", *prefixes), ids=lambda case: case["id"])


def make_input(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    if entry["make"] == "list":
        return torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]))
    value = getattr(deterministic, entry["make"])(entry["name"], tuple(entry["shape"]), entry["seed"])
    for operation, argument in entry.get("then", []):
        if operation == "l2norm":
            value = nn.functional.normalize(value, dim=-1)
        else:
            value = {"mul": value.mul, "add": value.add}[operation](argument)
    return value


def build_dinotxt(case: dict[str, Any]) -> DINOTxt:
    build = case["build"]
    model = DINOTxt(
        DINOTxtConfig(**build["config"]),
        DinoVisionTransformer(**build["vision_backbone"]),
        TextTransformer(**build["text_backbone"]),
    )
    return fill(model, case["weights"]).train(case["mode"] != "eval")


@torch.no_grad()
def fill(module: Any, weights: dict[str, Any]) -> Any:
    module.init_weights()
    deterministic.fill_(module, weights["fill_seed"])
    for name, (operation, value) in weights.get("then", {}).items():
        entry = module.state_dict()[name]
        entry.fill_(value) if operation == "set" else entry.mul_(value)
    return module


def assert_returns(call: dict[str, Any], got: Any) -> None:
    """What a call returned against what the case stores of it."""
    got = [got] if isinstance(got, Tensor) else list(got)
    assert len(got) >= len(call["returns"])
    for value, entry in zip(got, call["returns"], strict=False):
        assert list(value.shape) == entry["shape"], entry["key"]
        stored = golden.tensors("text")[entry["key"]]
        part = value.detach()
        if "stored_slice" in entry:
            part = part[tuple(slice(*map(_integer, s.split(":"))) for s in entry["stored_slice"].split(","))]
        atol = 1e-5 * max(1.0, entry["absmax"])
        torch.testing.assert_close(part, stored, rtol=1e-4, atol=atol, msg=lambda text, k=entry["key"]: f"{k}: {text}")
        assert value.double().mean().item() == pytest.approx(entry["mean"], rel=1e-4, abs=atol), entry["key"]


def _integer(text: str) -> int | None:
    return int(text) if text.strip() else None


def test_hub_entry() -> None:
    case = golden.case("text", "hub-config")
    with torch.device("meta"):
        model, tokenizer = dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False)
    assert isinstance(tokenizer, Tokenizer) and not model.training
    assert {name: getattr(model.model_config, name) for name in case["config"]} == case["config"]
    assert_matches_manifest(model, "dinov3_vitl16_dinotxt_tet1280d20h24l")
    for prefix, count in case["parameters"].items():
        prefix = "" if prefix == "total" else prefix
        named = dict(model.named_parameters())
        assert sum(entry.numel() for name, entry in named.items() if name.startswith(prefix)) == count


@by_id("dinotxt-")
@torch.no_grad()
def test_model(case: dict[str, Any]) -> None:
    model = build_dinotxt(case)
    image, text = (make_input(case["inputs"][name]) for name in ("image", "text"))
    calls = {
        "encode_image(image)": lambda: model.encode_image(image),
        "encode_text(text)": lambda: model.encode_text(text),
        "encode_image_with_patch_tokens(image, normalize=True)": lambda: model.encode_image_with_patch_tokens(
            image, normalize=True
        ),
        "encode_text(text, normalize=True)": lambda: model.encode_text(text, normalize=True),
        "forward(image, text)[:3]": lambda: model(image, text)[:3],
        "get_logits(image, text)": lambda: model.get_logits(image, text),
    }
    for call in case["outputs"]:
        assert_returns(call, calls[call["call"]]())
    own = {name: entry for name, entry in model.state_dict().items() if not name.startswith("visual_model.backbone.")}
    assert {f"{name} {'x'.join(map(str, entry.shape))}" for name, entry in own.items()} == set(case["state_dict"])


@by_id("text-transformer-")
@torch.no_grad()
def test_text_transformer(case: dict[str, Any]) -> None:
    model = fill(TextTransformer(**case["build"]["text_backbone"]), case["weights"]).eval()
    assert_returns(case["outputs"][0], model(make_input(case["inputs"]["text"])))


@by_id("vision-head", "text-head")
@torch.no_grad()
def test_head(case: dict[str, Any]) -> None:
    ((name, arguments),) = case["build"].items()
    head = fill(HEADS[name](**arguments), case["weights"]).eval()
    assert_returns(case["outputs"][0], head(make_input(case["inputs"]["tokens"])))
    entries = {f"{name} {'x'.join(map(str, entry.shape))}" for name, entry in head.state_dict().items()}
    assert entries == set(case["state_dict"])


def contrast(rank: int, world_size: int, inputs: dict[str, Any]) -> list[Tensor]:
    loss_function = golden.target("dinov3.eval.text.clip_loss.memory_efficient_clip_loss")
    features = [
        make_input(inputs[name]).chunk(world_size)[rank].clone() for name in ("image_features", "text_features")
    ]
    leaves = [*features, torch.tensor([float(make_input(inputs["logit_scale"]))])]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = loss_function(*leaves, group=None)
    loss.backward()
    return [loss.detach(), *(leaf.grad.reshape(()) if leaf.shape == (1,) else leaf.grad for leaf in leaves)]


@by_id("clip-loss-")
def test_contrastive_loss(case: dict[str, Any]) -> None:
    world_size = case["inputs"]["world_size"]
    inputs = case["inputs"]
    ranks = [contrast(0, 1, inputs)] if world_size == 1 else run_ranks(contrast, world_size, inputs)
    assert_returns(case["outputs"][0], [torch.stack(values) for values in zip(*ranks, strict=True)])


@by_id("gram-loss-")
def test_gram_loss(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    backbone = make_input(inputs["backbone_patch_tokens"])
    head = make_input(inputs["patch_tokens"]).requires_grad_()
    torch.manual_seed(inputs.get("torch_manual_seed_before_the_call", 0))
    loss = golden.target("dinov3.eval.text.gram_loss.gram_loss_fn")(
        backbone, head, inputs["patch_sampling_rate"], inputs["normalize"]
    )
    loss.backward()
    loss_entry, _, head_entry = case["outputs"][0]["returns"]  # the backbone's side has no gradient here
    assert_returns({"returns": [loss_entry, head_entry]}, [loss.reshape(1), head.grad])


def test_tokenizer_vocabulary() -> None:
    case, tokenizer = golden.case("text", "tokenizer-vocabulary"), Tokenizer()
    assert len(tokenizer.encoder) == len(tokenizer.decoder) == case["size"]
    assert [tokenizer.encoder[token] for token in ("<|startoftext|>", "<|endoftext|>")] == [case["start"], case["end"]]
    assert {token: tokenizer.encoder[token] for token in case["entries"]} == case["entries"]


def test_tokenizer() -> None:
    tokenizer = Tokenizer()
    for row in golden.case("text", "tokenizer-encode")["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
    for row in golden.case("text", "tokenizer-decode")["rows"]:
        assert tokenizer.decode(row["ids"]) == row["text"]
    for row in golden.case("text", "tokenizer-tokenize")["rows"]:
        ids = tokenizer.tokenize(row["texts"], row["context_length"])
        assert list(ids.shape) == row["shape"] and ids.dtype == torch.int64
        assert ids.tolist() == row["ids"]
