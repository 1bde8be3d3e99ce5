"""Conversions into files that transformers and timm load, and back; and what the command line refuses."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import Tensor

from dinov3.configs import get_default_config
from dinov3.hub import backbones
from dinov3.hub import convert as convert_module
from dinov3.hub.architectures import published_name
from dinov3.hub.convert import convert, main
from dinov3.hub.formats.timm import VITS, timm_config
from dinov3.hub.weights import read_state_dict
from dinov3.models import build_model_from_cfg
from dinov3.utils.command_line import run_command_line
from dinov3.utils.weight_files import WeightsError, read_file, read_safetensors_header

from . import libraries
from .libraries import IMAGES, assert_bits_equal, assert_near, randomise_, release_state

ENTRIES = ("dinov3_vits16", "dinov3_vits16plus", "dinov3_vit7b16", "dinov3_convnext_tiny")
SAT_MEAN = [0.430, 0.411, 0.296]


@pytest.fixture(autouse=True)
def small_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.make_entries_small(monkeypatch)
    # At these sizes they are not those that timm knows by these names.
    monkeypatch.setattr(convert_module, "published_name", lambda state: None)


def save(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def ours(entry: str, weights: Any) -> Tensor:
    with torch.no_grad():
        features = getattr(backbones, entry)(weights=weights).forward_features(IMAGES)
    parts = [features["x_norm_clstoken"][:, None], features["x_storage_tokens"], features["x_norm_patchtokens"]]
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("entry", ENTRIES)
def test_transformers_loads_what_is_written(entry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModel

    source = save(release_state(entry, rounded=False), tmp_path / "release.pth")
    convert(source, tmp_path / "theirs", to="huggingface")
    model, report = AutoModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    assert_near(model.eval()(IMAGES).last_hidden_state, ours(entry, source))


@pytest.mark.parametrize("to", ["huggingface", "timm"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_there_and_back_changes_no_bit(entry: str, to: Any, tmp_path: Path) -> None:
    source = save(release_state(entry), tmp_path / "release.pth")
    for name in ("theirs", "theirs.safetensors"):
        convert(source, tmp_path / name, to=to)
        for back in ("back.pth", "back.safetensors"):
            convert(tmp_path / name, tmp_path / back, to="release", overwrite=True)
            assert_bits_equal(dict(read_file(tmp_path / back)), dict(read_file(source)))


@torch.no_grad()
@pytest.mark.parametrize("zero_bias", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_timm_loads_what_is_written(entry: str, zero_bias: bool, tmp_path: Path) -> None:
    import timm

    state = release_state(entry, rounded=False)
    if zero_bias:
        state |= {name: torch.zeros_like(tensor) for name, tensor in state.items() if "qkv.bias" in name}
    source = save(state, tmp_path / "release.pth")
    convert(source, tmp_path / "theirs", to="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    wanted = ours(entry, source)
    if entry == "dinov3_convnext_tiny":
        assert_near(model(IMAGES), wanted[:, 0])
    else:
        assert_near(model.forward_features(IMAGES), wanted)
        assert_near(model(IMAGES), wanted[:, 0])
        assert hasattr(model.blocks[0].attn, "q_bias") and (model.blocks[0].attn.q_bias is None) == (
            zero_bias or entry == "dinov3_vit7b16"
        )


@pytest.mark.parametrize("entry", ["vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", "vith16plus", "vit7b16"])
def test_published_sizes_are_those_that_timm_builds(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.undo()
    with torch.device("meta"):
        state = getattr(backbones, f"dinov3_{entry}")(pretrained=False).state_dict()
    periods = state["rope_embed.periods"]
    state["rope_embed.periods"] = 100 ** (torch.arange(len(periods)) / len(periods))
    gate = "w3" if "blocks.0.mlp.w3.weight" in state else "fc2"
    theirs = {"blocks.0.mlp.fc2.weight": state[f"blocks.0.mlp.{gate}.weight"]}
    name = published_name(state)
    assert name == f"dinov3_{entry}"
    config = timm_config(state, theirs, name, ((0.5,), (0.5,)))
    assert (config["architecture"] in VITS.values()) and (
        ("embed_dim" in config["model_args"]) == (entry == "vitl16plus")
    )
    with torch.device("meta"):
        model = timm.create_model(config["architecture"], **config["model_args"])
    hidden = model.blocks[0].mlp.fc2.weight.shape
    assert hidden == theirs["blocks.0.mlp.fc2.weight"].shape
    assert (model.embed_dim, len(model.blocks)) == (state["cls_token"].shape[-1], len(model.blocks))
    assert model.blocks[0].attn.num_heads * 4 * len(periods) == model.embed_dim


@torch.no_grad()
def test_through_all_formats_and_back(tmp_path: Path) -> None:
    state = release_state("dinov3_vits16plus")
    steps = [("huggingface", "a"), ("timm", "b"), ("huggingface", "c"), ("timm", "d.safetensors"), ("release", "e.pt")]
    source = save(state, tmp_path / "release.pth")
    for to, name in steps:
        convert(source, tmp_path / name, to=to)  # type: ignore[arg-type]
        source = tmp_path / name
        assert_near(ours("dinov3_vits16plus", source), ours("dinov3_vits16plus", state), relative=0.0)
    assert_bits_equal(read_state_dict(source), state)


@torch.no_grad()
def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    from transformers import AutoModel

    source = save(release_state("dinov3_vits16", rounded=False), tmp_path / "release.pth")
    written = convert(source, tmp_path / "theirs", to="huggingface", max_shard_bytes=20_000)
    names = [path.name for path in written.files if path.suffix == ".safetensors"]
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert sorted(path.stat().st_size for path in written.files)[-2] < 25_000  # Only one tensor is larger.
    model = AutoModel.from_pretrained(tmp_path / "theirs").eval()
    assert_near(model(IMAGES).last_hidden_state, ours("dinov3_vits16", source))
    assert_bits_equal(read_state_dict(tmp_path / "theirs"), torch.load(source, weights_only=True))


def test_normalisation_of_images_is_written_beside_the_weights(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    state = release_state("dinov3_vits16")
    for name, data, mean in (
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", None, SAT_MEAN),
        ("a.pth", None, [0.485, 0.456, 0.406]),
        ("a.pth", "sat493m", SAT_MEAN),
    ):
        source = save(state, tmp_path / name)
        convert(source, tmp_path / "theirs", to="huggingface", data=data, overwrite=True)  # type: ignore[arg-type]
        processor = AutoImageProcessor.from_pretrained(tmp_path / "theirs")
        assert list(processor.image_mean) == mean
        convert(source, tmp_path / "timm", to="timm", data=data, overwrite=True)  # type: ignore[arg-type]
        assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["mean"] == mean


def training_run(path: Path, **student: Any) -> Path:
    tiny = {"arch": "vit_tiny", "depth": 2, "n_storage_tokens": 1, "mask_k_bias": True, "layerscale": 1e-5} | student
    cfg = OmegaConf.merge(get_default_config(), {"student": tiny})
    OmegaConf.save(cfg, path / "config.yaml")
    model, _ = build_model_from_cfg(cfg, only_teacher=True)
    model.to_empty(device="cpu").init_weights()
    state = {f"backbone.{name}": tensor for name, tensor in randomise_(model).state_dict().items()}
    torch.save({"teacher": state | {"dino_head.last_layer.weight": torch.ones(2)}}, path / "teacher_checkpoint.pth")
    return path


@torch.no_grad()
@pytest.mark.parametrize("norm_layer", ["layernorm", "layernormbf16"])
def test_teacher_of_a_training_run(norm_layer: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    from dinov3.hub.runs import dinov3_from_run

    run = training_run(tmp_path, norm_layer=norm_layer, pos_embed_rope_dtype="fp32")
    convert(run, tmp_path / "theirs", to="huggingface")
    model = AutoModel.from_pretrained(tmp_path / "theirs").eval()
    assert model.config.layer_norm_eps == {"layernorm": 1e-6, "layernormbf16": 1e-5}[norm_layer]
    assert_near(model(IMAGES).pooler_output, dinov3_from_run(run)(IMAGES))
    for source in (run, tmp_path / "theirs"):
        if norm_layer == "layernorm":
            with pytest.raises(WeightsError, match="add 1e-06 to the variance, those of timm's .* --to huggingface"):
                convert(source, tmp_path / "timm", to="timm")
        else:
            convert(source, tmp_path / "timm", to="timm", overwrite=True)


def test_positions_that_others_do_not_know(tmp_path: Path) -> None:
    run = training_run(tmp_path, pos_embed_rope_normalize_coords="max")
    with pytest.raises(WeightsError, match="positions normalised by 'max'; .* huggingface only support 'separate'"):
        convert(run, tmp_path / "theirs", to="huggingface")
    convert(run, tmp_path / "release.pth", to="release")
    assert "cls_token" in torch.load(tmp_path / "release.pth", weights_only=True)


def test_distributed_checkpoint(tmp_path: Path) -> None:
    state = release_state("dinov3_vits16")
    entries = {f"model.model_ema.backbone.{name}": tensor for name, tensor in state.items()}
    dcp.save(entries | {"iteration": 3}, checkpoint_id=tmp_path / "9", no_dist=True)
    written = convert(tmp_path / "9", tmp_path / "release.pth", to="release")
    assert written.n_tensors == len(state) and written.n_bytes == sum(tensor.nbytes for tensor in state.values())
    assert_bits_equal(torch.load(tmp_path / "release.pth", weights_only=True), state)


def test_files_hold_no_more_than_their_tensors(tmp_path: Path) -> None:
    state = release_state("dinov3_vits16")
    size = sum(tensor.nbytes for tensor in state.values())
    joined = torch.zeros(10**6)
    save(state | {"cls_token": joined[:32].view(1, 1, 32)}, tmp_path / "large.pth")
    for name in ("release.pth", "release.safetensors"):
        convert(tmp_path / "large.pth", tmp_path / name, to="release")
        assert size < (tmp_path / name).stat().st_size < 2 * size
    header = read_safetensors_header(tmp_path / "release.safetensors")
    assert header.start % 8 == 0 and header.metadata == {"format": "pt"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return save(release_state("dinov3_vits16"), tmp_path / "release.pth")


@pytest.mark.parametrize(
    ("destination", "to", "error", "message"),
    [
        ("a", "release", ValueError, "the release's format is one file, ending in .pth, .pt, .safetensors"),
        ("a.pth", "timm", ValueError, "timm takes a directory, or a file ending in .safetensors"),
        ("none/a", "timm", FileNotFoundError, "there is no directory .*none"),
        ("a", "onnx", ValueError, "unknown format 'onnx': expected one of release, huggingface, timm"),
        (
            "there.safetensors",
            "timm",
            FileExistsError,
            "exists already: choose another name, or replace it with --over",
        ),
        ("there", "timm", FileExistsError, "exists already"),
        ("there.safetensors", "release", FileExistsError, "exists already"),
        ("directory.pth", "release", FileExistsError, "exists and is a directory: choose another name"),
        ("file", "huggingface", FileExistsError, "exists and is a file: choose another name"),
        ("mine", "huggingface", FileExistsError, r"holds files of something else \(thesis.tex\): choose another"),
    ],
)
def test_destinations_that_are_refused(
    destination: str, to: Any, error: type[Exception], message: str, release: Path, tmp_path: Path
) -> None:
    for name in ("there", "directory.pth", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "config.json").touch()
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "file").touch()
    (tmp_path / "mine" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        convert(release, tmp_path / destination, to=to)
    assert sorted(tmp_path.rglob("*")) == before


def test_source_is_not_replaced(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the source would be overwritten: .* choose another destination"):
        convert(release, release, to="release", overwrite=True)
    convert(release, tmp_path / "theirs", to="huggingface")
    for source in (tmp_path / "theirs", tmp_path / "theirs" / "model.safetensors"):
        with pytest.raises(ValueError, match="the source would be overwritten"):
            convert(source, tmp_path / "theirs", to="timm", overwrite=True)


def test_overwriting_leaves_nothing_of_the_old(release: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(release, tmp_path / "empty", to="timm")
    convert(release, tmp_path / "theirs", to="huggingface", max_shard_bytes=20_000)
    convert(release, tmp_path / "theirs", to="timm", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "a.pth").write_text("old")
    convert(release, tmp_path / "a.pth", to="release", overwrite=True)
    assert_bits_equal(read_state_dict(tmp_path / "a.pth"), read_state_dict(release))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "to"), [("a.pth", "release"), ("a.safetensors", "timm"), ("a", "huggingface"), ("old", "huggingface")]
)
def test_failure_in_the_middle_leaves_no_half_of_a_file(
    name: str, to: Any, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(release, tmp_path / "old", to="huggingface")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def break_off(self: Any, n_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module.tqdm, "update", break_off)
    with pytest.raises((OSError, RuntimeError)):
        convert(release, tmp_path / name, to=to, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_full_disk_is_noticed_before_writing(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(OSError, match=r"theirs needs 0.00 GB, but only 0.00 GB are free on that disk"):
        convert(release, tmp_path / "theirs", to="timm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "cls_token"}, r"complete DINOv3 backbone: it has .*patch_embed"),
        (lambda s: {n: t for n, t in s.items() if n != "blocks.1.norm1.bias"}, r"1 missing \(blocks.1.norm1.bias\)"),
        (lambda s: s | {"x": torch.ones(1)}, r"complete DINOv3 backbone: .*1 unknown \(x\)"),
        (lambda s: {"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "it is a single linear layer"),
        (lambda s: {"pos_embed": torch.ones(2), "cls_token": torch.ones(1, 1, 4)}, "it is a DINOv2 model"),
        (
            lambda s: s | {"blocks.0.attn.qkv.bias_mask": torch.full((96,), torch.nan)},
            "was saved from a model that was never initialised",
        ),
    ],
)
def test_source_that_is_not_a_complete_backbone(change: Any, message: str, release: Path, tmp_path: Path) -> None:
    save(change(release_state("dinov3_vits16")), release)
    with pytest.raises(WeightsError, match=message):
        convert(release, tmp_path / "theirs", to="huggingface")
    assert not (tmp_path / "theirs").exists()


def test_command_line(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(release), str(tmp_path / "theirs"), "--to", "huggingface"])
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith(f"{tmp_path / 'theirs'}: a backbone of another size")
    assert f'transformers.AutoModel.from_pretrained("{tmp_path / "theirs"}")' in out
    assert "writing: 100%" in err
    main([str(tmp_path / "theirs"), str(tmp_path / "b"), "--to", "timm", "--data", "sat493m", "--no-progress"])
    out, err = capsys.readouterr()
    assert f'timm.create_model("local-dir:{tmp_path / "b"}", pretrained=True)' in out and not err
    with pytest.raises(SystemExit):
        main([str(release), str(tmp_path / "c"), "--to", "onnx"])
    assert "invalid choice: 'onnx'" in capsys.readouterr().err


def test_errors_of_the_command_line_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DINOV3_TRACEBACK", raising=False)
    (tmp_path / "page.pth").write_text("<html>log in</html>")
    with pytest.raises(SystemExit, match="1"):
        run_command_line(lambda: main([str(tmp_path / "page.pth"), str(tmp_path / "x"), "--to", "timm"]))
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {tmp_path / 'page.pth'} is not a checkpoint: it is a web page")
    assert "Traceback" not in err
