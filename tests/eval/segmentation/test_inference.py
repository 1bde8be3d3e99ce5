from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.segmentation.inference import _default_limit, make_inference, slide_inference
from dinov3.heads.segmentation import build_segmentation_decoder
from tests.parity.dense import tiny_vit
from tests.parity.toy_segmentor import ToySegmentor

K = 5


class Segmentor(ToySegmentor):
    """The toy of the golden cases; remembers the images of each call, and returns maps of a dtype."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, q: int | None = None) -> None:
        super().__init__(K, seed=3, q=q)
        self.images: list[Tensor] = []
        self.dtype = dtype

    def predict(self, x: Tensor, rescale_to: Any = (512, 512)) -> Any:
        self.images.append(x)
        prediction = super().predict(x, rescale_to)
        return prediction.to(self.dtype) if isinstance(prediction, Tensor) else prediction

    @property
    def n_windows_by_call(self) -> list[int]:
        return [shape[0] for shape, _ in self.calls]


def images_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_mean(
    image: Tensor,
    predict: Callable[..., Tensor],
    crop: tuple[int, int],
    stride: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Windows one by one, padded to the image and added; for crops that fit into it."""
    height, width = image.shape[-2:]
    total, count = torch.zeros(1, K, height, width, dtype=dtype), torch.zeros(height, width, dtype=dtype)
    n_rows, n_columns = (-(-(side - c) // s) + 1 for side, c, s in zip((height, width), crop, stride, strict=True))
    for row in range(n_rows):
        for column in range(n_columns):
            top, left = min(row * stride[0], height - crop[0]), min(column * stride[1], width - crop[1])
            window = image[:, :, top : top + crop[0], left : left + crop[1]]
            margins = (left, width - left - crop[1], top, height - top - crop[0])
            total = total + F.pad(predict(window, rescale_to=crop).to(dtype), margins)
            count[top : top + crop[0], left : left + crop[1]] += 1
    return total / count


GEOMETRIES = {
    "exact": ((40, 56), (24, 24), (16, 16)),
    "ragged": ((45, 61), (24, 20), (17, 9)),
    "stride of the crop": ((48, 64), (16, 32), (16, 32)),
    "one window": ((24, 20), (24, 20), (7, 7)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_windows_one_by_one_give_the_naive_mean_to_the_bit(name: str) -> None:
    size, crop, stride = GEOMETRIES[name]
    image, model = images_of(1, 3, *size), Segmentor()
    got = slide_inference(image, model, "linear", K, crop, stride, max_windows_per_batch=1)
    assert torch.equal(got, naive_mean(image, Segmentor().predict, crop, stride))


@pytest.mark.parametrize("max_windows", [2, 3, 100])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_several_windows_in_one_call_give_the_same(name: str, max_windows: int) -> None:
    size, crop, stride = GEOMETRIES[name]
    image = images_of(1, 3, *size)
    one_by_one = slide_inference(image, Segmentor(), "linear", K, crop, stride, max_windows_per_batch=1)
    got = slide_inference(image, Segmentor(), "linear", K, crop, stride, max_windows_per_batch=max_windows)
    torch.testing.assert_close(got, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("crop", "stride", "most"), [(24, 2, 144), (40, 2, 169), (40, 1, 625)])
def test_hundreds_of_windows_over_a_pixel_are_counted(crop: int, stride: int, most: int) -> None:
    image = images_of(1, 3, 64, 64)
    ones = torch.zeros(64, 64)
    for top in range(0, 64 - crop + 1, stride):
        for left in range(0, 64 - crop + 1, stride):
            ones[top : top + crop, left : left + crop] += 1
    assert ones.max() == most > 127
    reference = naive_mean(image, Segmentor().predict, (crop, crop), (stride, stride), dtype=torch.float64)
    got = slide_inference(image, Segmentor(), "linear", K, (crop, crop), (stride, stride), max_windows_per_batch=64)
    torch.testing.assert_close(got.double(), reference, rtol=0, atol=2e-5)


def test_half_precision_is_summed_in_float32() -> None:
    image = images_of(1, 3, 40, 40).bfloat16()
    predict = Segmentor(dtype=torch.bfloat16).predict
    model = Segmentor(dtype=torch.bfloat16)
    got = slide_inference(image, model, "linear", K, (24, 24), (4, 4), max_windows_per_batch=1)
    assert got.dtype == torch.float32 and model.images[0].dtype == torch.bfloat16
    assert torch.equal(got, naive_mean(image, predict, (24, 24), (4, 4)))
    in_half = naive_mean(image, predict, (24, 24), (4, 4), dtype=torch.bfloat16)
    assert (in_half.float() - got).abs().max() > 0.01
    whole = make_inference(image, model, "whole", rescale_to=(40, 40))
    assert whole.dtype == torch.float32


def test_images_of_a_batch_give_what_each_gives_alone() -> None:
    images = images_of(3, 3, 37, 45)
    infer = functools.partial(
        make_inference,
        inference_mode="slide",
        n_output_channels=K,
        crop_size=(24, 24),
        stride=(16, 16),
        rescale_to=(50, 60),
    )
    alone = torch.cat([infer(image[None], Segmentor()) for image in images])
    assert torch.equal(infer(images, Segmentor()), alone)
    torch.testing.assert_close(infer(images, Segmentor(), max_windows_per_batch=5), alone, rtol=1e-5, atol=1e-6)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("max_windows", [1, 4, 5, 7])
def test_windows_in_flight_are_bounded(max_windows: int) -> None:
    model = Segmentor()
    slide_inference(images_of(2, 3, 40, 56), model, "linear", K, (24, 24), (16, 16), max_windows_per_batch=max_windows)
    n_windows = 2 * 6
    assert max(model.n_windows_by_call) == max_windows
    assert sum(model.n_windows_by_call) == n_windows and len(model.calls) == -(-n_windows // max_windows)


def test_default_is_one_window_on_the_cpu_and_what_memory_allows_elsewhere() -> None:
    gpu = torch.device("cuda")
    assert _default_limit(4 * 19 * 512 * 512, torch.device("cpu")) == 1
    assert _default_limit(4 * 19 * 512 * 512, gpu) == 8
    assert _default_limit(4 * 150 * 896 * 896, gpu) == 2
    assert _default_limit(4 * 1000 * 1024 * 1024, gpu) == 1


@pytest.mark.parametrize(
    ("max_windows", "num_max_forward", "n_windows_by_call"),
    [
        (1, 1, [1] * 6),
        (1, 8, [1] * 8),
        (4, 1, [4, 2]),
        (4, 3, [2, 2, 2]),
        (4, 4, [2, 2, 2, 1]),
        (4, 6, [1] * 6),
        (4, 9, [1] * 9),
    ],
)
def test_predict_is_called_as_often_as_processes_agreed(
    max_windows: int, num_max_forward: int, n_windows_by_call: list[int]
) -> None:
    image, model = images_of(1, 3, 40, 56), Segmentor()
    slide = functools.partial(slide_inference, image, model, "linear", K, (24, 24), (16, 16))
    got = slide(num_max_forward, max_windows_per_batch=max_windows)
    assert model.n_windows_by_call == n_windows_by_call
    for padding in model.images[len(n_windows_by_call) - (sum(n_windows_by_call) - 6) :]:
        assert padding.shape == (1, 3, 24, 24) and not padding.any()
    torch.testing.assert_close(got, slide(max_windows_per_batch=1), rtol=1e-5, atol=1e-6)


def test_calls_that_are_made_up_have_the_size_of_the_crop() -> None:
    model = Segmentor()
    slide_inference(images_of(1, 3, 30, 80), model, "linear", K, (48, 48), (30, 30), 4)
    assert model.calls == [[[1, 3, 30, 48], [30, 48]]] * 3 + [[[1, 3, 48, 48], [48, 48]]]
    model = Segmentor()
    slide_inference(images_of(1, 3, 30, 41), model, "linear", K, (64, 64), (40, 40), 3)
    assert model.calls == [[[1, 3, 30, 30], [30, 30]]] * 3


def test_a_stride_that_leaves_pixels_out_is_refused() -> None:
    model = Segmentor()
    slide = functools.partial(slide_inference, images_of(1, 3, 64, 64), model, "linear", K, (16, 16))
    with pytest.raises(ValueError, match=r"stride=\(16, 20\) leaves pixels .*\(64, 64\).*crop_size=\(16, 16\)"):
        slide((16, 20))
    assert model.calls == []
    # The last window moves back into the image, so a stride above the crop may leave out nothing.
    slide_inference(images_of(1, 3, 40, 40), model, "linear", K, (24, 24), (30, 30))


@pytest.mark.parametrize(("stride", "shrunk"), [((24, 24), (16, 16)), ((24, 12), (16, 12))])
def test_windows_of_a_panorama_smaller_than_the_crop_leave_nothing_out(
    stride: tuple[int, int], shrunk: tuple[int, int]
) -> None:
    image, model = images_of(1, 3, 16, 60), Segmentor()
    result = slide_inference(image, model, n_output_channels=K, crop_size=(64, 64), stride=stride)
    assert torch.equal(result, naive_mean(image, Segmentor().predict, (16, 16), shrunk))


class WithoutAutocast:
    """Predicts as outside autocast, so that only what comes after is under it."""

    def __init__(self, model: Segmentor) -> None:
        self.model = model

    def predict(self, x: Tensor, rescale_to: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.model.predict(x, rescale_to)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_queries_are_combined_in_float32_under_autocast_too(mode: str) -> None:
    infer = functools.partial(make_inference, images_of(1, 3, 45, 61), rescale_to=(45, 61), n_output_channels=K)
    infer = functools.partial(infer, inference_mode=mode, decoder_head_type="m2f", crop_size=(24, 24), stride=(17, 15))
    outside = infer(segmentation_model=Segmentor(q=7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = infer(segmentation_model=WithoutAutocast(Segmentor(q=7)))
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_no_object_is_left_out_after_the_softmax() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 5.0], [3.0, 1.0, 0.0, -4.0]])  # [Q, K + 1]
    masks = torch.tensor([2.0, -1.0])

    class Model:
        def predict(self, x: Tensor, rescale_to: Any) -> dict[str, Tensor]:
            return {
                "pred_masks": masks[None, :, None, None].expand(1, 2, *rescale_to),
                "pred_logits": logits[None],
            }

    got = make_inference(images_of(1, 3, 8, 8), Model(), "whole", "m2f", (2, 2))
    want = logits.softmax(dim=1)[:, :3].T @ masks.sigmoid()
    torch.testing.assert_close(got, want[None, :, None, None].expand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("options", "seen"),
    [({}, (512, 512)), ({"whole_size": (64, 32)}, (64, 32)), ({"whole_size": None}, (20, 30))],
)
def test_whole_image_at_a_size_or_as_it_is(options: dict[str, Any], seen: tuple[int, int]) -> None:
    image, model = images_of(1, 3, 20, 30), Segmentor()
    got = make_inference(image, model, "whole", rescale_to=(7, 9), **options)
    want = image if seen == (20, 30) else F.interpolate(image, seen, mode="bilinear", align_corners=False)
    assert torch.equal(model.images[0], want) and got.shape == (1, K, 7, 9)


def test_result_is_resized_then_mirrored_then_activated() -> None:
    image = images_of(1, 3, 40, 56)
    infer = functools.partial(make_inference, image, Segmentor(), "slide", "linear", (33, 50), K, (24, 24), (16, 16))
    resized = F.interpolate(
        slide_inference(image, Segmentor(), "linear", K, (24, 24), (16, 16)), (33, 50), mode="bilinear"
    )
    assert torch.equal(infer(), resized)
    assert torch.equal(infer(apply_horizontal_flip=True), resized.flip(-1))
    activated = infer(apply_horizontal_flip=True, output_activation=functools.partial(torch.softmax, dim=1))
    assert torch.equal(activated, resized.flip(-1).softmax(dim=1))


def test_result_carries_no_graph_and_can_be_changed() -> None:
    class Model:
        scale = torch.ones((), requires_grad=True)

        def predict(self, x: Tensor, rescale_to: Any) -> Tensor:
            return self.scale * x

    for mode in ("whole", "slide"):
        got = make_inference(
            images_of(1, 3, 32, 32), Model(), mode, "linear", (32, 32), 3, (16, 16), (8, 8), whole_size=None
        )
        assert not got.requires_grad
        got += 1


def test_documented_example_with_a_model_of_one_linear_head() -> None:
    model = build_segmentation_decoder(tiny_vit("segmentation"), "LAST", num_classes=150, autocast_dtype=torch.bfloat16)
    image_size = (75, 50)  # (width, height), as PIL has it
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        segmentation_map = make_inference(
            images_of(1, 3, 64, 96),
            model,
            inference_mode="slide",
            decoder_head_type="linear",
            rescale_to=(image_size[-1], image_size[-2]),
            n_output_channels=150,
            crop_size=(48, 48),
            stride=(48, 48),
            output_activation=functools.partial(F.softmax, dim=1),
        )
    assert segmentation_map.shape == (1, 150, 50, 75) and segmentation_map.dtype == torch.float32
    torch.testing.assert_close(segmentation_map.sum(dim=1), torch.ones(1, 50, 75))
    assert segmentation_map.argmax(dim=1, keepdim=True).shape == (1, 1, 50, 75)


SLIDE = {"inference_mode": "slide", "n_output_channels": K, "crop_size": (24, 24), "stride": (16, 16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inference_mode": "sliding"}, "inference_mode='sliding': expected 'whole' or 'slide'"),
        ({"decoder_head_type": "dpt"}, "decoder_head_type='dpt': expected 'linear' or 'm2f'"),
        ({"crop_size": None}, "crop_size=None: inference_mode='slide' needs"),
        ({"stride": None}, "stride=None: inference_mode='slide' needs"),
        ({"crop_size": 24}, "crop_size=24: expected"),
        ({"crop_size": (24, 0)}, r"crop_size=\(24, 0\): expected"),
        ({"stride": (16, 16, 16)}, r"stride=\(16, 16, 16\): expected"),
        ({"rescale_to": 40}, "rescale_to=40: expected"),
        ({"n_output_channels": 256}, "n_output_channels=256, but the model predicts 5 classes"),
        ({"n_output_channels": 1}, "n_output_channels=1, but the model predicts 5 classes"),
        ({"decoder_head_type": "m2f"}, "decoder_head_type='m2f': expected a dictionary .* got Tensor"),
        ({"max_windows_per_batch": 0}, "max_windows_per_batch=0"),
        ({"inference_mode": "whole", "whole_size": (0, 4)}, r"whole_size=\(0, 4\)"),
        ({"x": images_of(3, 40, 56)}, r"expected images .* got shape \[3, 40, 56\]"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    options = {"x": images_of(1, 3, 40, 56), "segmentation_model": Segmentor()} | SLIDE | changes
    with pytest.raises(ValueError, match=message):
        make_inference(**options)


def test_predictions_of_another_form_are_refused() -> None:
    class Model:
        def predict(self, x: Tensor, rescale_to: Any) -> Tensor:
            return x[:, :, ::2]

    with pytest.raises(ValueError, match=r"rescale_to=\(24, 24\).* returned maps of shape \[1, 3, 12, 24\]"):
        make_inference(images_of(1, 3, 40, 56), Model(), **{**SLIDE, "n_output_channels": 3})
    with pytest.raises(ValueError, match="decoder_head_type='linear': expected a tensor from predict, got dict"):
        make_inference(images_of(1, 3, 40, 56), Segmentor(q=7), **SLIDE)


def test_inference_needs_torch_and_nothing_heavy() -> None:
    program = """
import sys
import torch, torchvision
before = set(sys.modules)
import dinov3.eval.segmentation.inference
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"dinov3"}, new
ours = [name for name in sys.modules if name.startswith("dinov3.")]
heavy = ("dinov3.hub", "dinov3.configs", "dinov3.train", "dinov3.data")
assert not [name for name in ours if name.startswith(heavy)], ours
assert [name for name in ours if name.startswith("dinov3.eval")] == [
    "dinov3.eval", "dinov3.eval.segmentation", "dinov3.eval.segmentation.inference"
], ours
"""
    subprocess.run([sys.executable, "-c", program], check=True)
