"""Time of a backbone's forward pass on the CPU, next to timm, transformers and only the matrix products.

    python benchmarks/forward.py [--models vits16 convnext_tiny] [--sizes 224] [--batches 1] [--dtypes fp32] ...

All models of a row hold the same random weights, and their features are checked to be equal first. `optimized` is ours
after `dinov3.hub.optimize.optimize`, for `autocast` in bfloat16, so it needs no region. The floor computes the row's
matrix products, convolutions and attentions (queries times keys, softmax, times values: one fused operation) on tensors
of the same shapes and dtypes, and nothing else: no bias, norm, activation, rotation, residual or cast. Rounds
interleave the five in a rotating order; ratios are medians of the rounds' own ratios.

Dtypes: `fp32`; `autocast`, where each call enters an autocast region in bfloat16, as the loop of an evaluation does;
`bf16`, with weights and images in bfloat16. The floor of `autocast` has its weights in bfloat16 from the start.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.hub import backbones
from dinov3.hub.formats.conversion import from_release
from dinov3.hub.formats.huggingface import huggingface_config
from dinov3.hub.formats.timm import timm_config
from dinov3.hub.optimize import optimize

MODELS = ["vits16", "vitb16", "vitl16", "convnext_tiny"]
DTYPES = ["fp32", "autocast", "bf16"]
PEERS = ["timm", "transformers"]
#: Largest difference of features, relative to the largest feature, that counts as equal.
TOLERANCES = {"fp32": 1e-4, "autocast": 0.1, "bf16": 0.1}
#: Functions whose last two arguments are multiplied.
PRODUCTS = [torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm]
PRODUCTS += [Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm]
UNKNOWN_PRODUCTS = [torch.einsum, torch.tensordot, F.bilinear, F.conv1d, F.conv3d, F.multi_head_attention_forward]
Forward = Callable[[], Any]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    kind = "processor time" if args.cpu_time else "time"
    print(f"torch {torch.__version__}, {args.threads} threads, {kind}, at least {args.rounds} rounds a row\n")
    ratios_of = ["ours / timm", "ours / transformers", "ours / fastest peer", "ours / floor"]
    ratios_of += ["optimized / fastest peer", "optimized / floor"]
    print(f"| model | px | batch | dtype | ours, ms | {' | '.join(ratios_of)} |")
    print(f"| --- | ---: | ---: | --- | ---: {'| ---: ' * len(ratios_of)}|", flush=True)
    for model in args.models:
        for dtype in args.dtypes:
            networks = make_networks(f"dinov3_{model}", dtype)
            for size, batch in itertools.product(args.sizes, args.batches):
                seconds = measure(networks, dtype, torch.randn(batch, 3, size, size), args.rounds, args.seconds, clock)
                row = [model, str(size), str(batch), dtype, f"{1000 * statistics.median(seconds['ours']):.1f}"]
                print(f"| {' | '.join(row + ratios(seconds))} |", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512], help="side of the images, in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=7, help="at least this many of a row")
    parser.add_argument("--seconds", type=float, default=5.0, help="more rounds, up to this time for a row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the time that the process had a processor, where others share the machine; with --threads 1, "
        "because threads that wait for others take processor time, too",
    )
    return parser.parse_args()


def make_networks(entry: str, dtype: str) -> dict[str, nn.Module]:
    """Ours, ours optimized, timm's and transformers', of equal weights."""
    import timm
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    weights_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    ours = getattr(backbones, entry)(pretrained=False)
    randomise_(ours)
    state = ours.state_dict()
    # Cast by the hub, which keeps computing positions in float32.
    own = [getattr(backbones, entry)(pretrained=False, dtype=weights_dtype) for _ in range(2)]
    for model in own:
        model.load_state_dict(state)
    optimized = optimize(own[1], torch.bfloat16 if dtype == "autocast" else None)

    theirs = from_release(state, "timm").state
    config = timm_config(state, theirs, entry, ((0.5,) * 3, (0.5,) * 3))
    timm_model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    timm_model.load_state_dict(theirs)

    theirs = from_release(state, "huggingface").state
    eps = 1e-6 if "convnext" in entry else 1e-5
    options = huggingface_config(state, theirs, layer_norm_eps=eps)
    transformers_model = AutoModel.from_config(AutoConfig.for_model(**options))
    load_transformers_(transformers_model, theirs)
    peers = {"timm": timm_model, "transformers": transformers_model}
    peers = {name: model.to(weights_dtype).eval() for name, model in peers.items()}
    return {"ours": own[0], "optimized": optimized, **peers}


def randomise_(model: nn.Module) -> None:
    """Give layer scales an order at which every block shows in the features, and biases random values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.1, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)


def load_transformers_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict whose names are those of a file; in memory some have a prefix."""
    expected = list(model.state_dict())
    names = {name: name if name in expected else f"model.{name}" for name in state}
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()})


def measure(
    networks: dict[str, nn.Module],
    dtype: str,
    images: Tensor,
    rounds: int,
    budget: float,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of each round, by what was measured."""
    images = images.bfloat16() if dtype == "bf16" else images
    calls = {
        name: make_call(network, images, is_autocast=dtype == "autocast" and name != "optimized")
        for name, network in networks.items()
    }
    check_equal(calls, TOLERANCES[dtype])
    calls["floor"] = make_floor(networks["ours"], images, dtype)
    for call in itertools.chain(calls.values(), calls.values()):
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    started = time.perf_counter()
    while len(seconds["ours"]) < rounds or time.perf_counter() - started < budget:
        for name in order:
            before = clock()
            calls[name]()
            seconds[name].append(clock() - before)
        order = order[1:] + order[:1]
    return seconds


def make_call(network: nn.Module, images: Tensor, *, is_autocast: bool = False) -> Forward:
    """A call that returns all normed tokens."""
    forward: Any = getattr(network, "forward_features", network)
    # The final norm of timm's ConvNeXt is a part of its head.
    norm = network.head.norm if "timm.models.convnext" in type(network).__module__ else nn.Identity()

    def call() -> Any:
        with torch.inference_mode(), autocast() if is_autocast else nullcontext():
            return norm(forward(images))

    return call


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def check_equal(calls: dict[str, Forward], tolerance: float) -> None:
    """Stop if the features of the last patch differ."""
    wanted = last_patch(calls["ours"]())
    for name in (*PEERS, "optimized"):
        found = last_patch(calls[name]())
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= tolerance:
            sys.exit(f"{name} computes other features than ours: they differ by {difference:.1e} of the largest")


def last_patch(output: Any) -> Tensor:
    """The normed features [B, D] of the last patch."""
    if isinstance(output, dict) and "x_norm_patchtokens" in output:
        return output["x_norm_patchtokens"][:, -1].float()
    tokens = output if isinstance(output, Tensor) else output.last_hidden_state
    return (tokens[:, :, -1, -1] if tokens.ndim == 4 else tokens[:, -1]).float()


def ratios(seconds: dict[str, list[float]]) -> list[str]:
    """The columns of ratios; the fastest peer is that of the smallest median."""
    fastest = min(PEERS, key=lambda name: statistics.median(seconds[name]))
    pairs = [("ours", name) for name in (*PEERS, fastest, "floor")]
    pairs += [("optimized", fastest), ("optimized", "floor")]
    rounds = [zip(seconds[a], seconds[b], strict=True) for a, b in pairs]
    return [f"{statistics.median(a / b for a, b in pairs_of_seconds):.2f}" for pairs_of_seconds in rounds]


class Recorder(TorchFunctionMode):
    """Notes the products that run under it, as calls on other tensors of the same shapes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.calls: list[Forward] = []
        self.inputs: dict[Any, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = self._like(args[0]), args[1].detach().to(self.dtype)
            self.calls.append(lambda: F.linear(x, weight))
        elif func is F.conv2d or func is torch.conv2d:
            self._add_convolution(*args)
        elif func is F.scaled_dot_product_attention:
            q, k, v = (self._like(tensor.transpose(1, 2), i).transpose(1, 2) for i, tensor in enumerate(args[:3]))
            self.calls.append(lambda: F.scaled_dot_product_attention(q, k, v))
        elif func in PRODUCTS:
            a, b = (self._like(tensor, i) for i, tensor in enumerate(args[-2:]))
            self.calls.append(lambda: torch.matmul(a, b))
        elif func in UNKNOWN_PRODUCTS:
            raise NotImplementedError(
                f"the model calls {func.__name__}, whose products the floor leaves out, so that the model would look "
                "slower beside it than it is: teach benchmarks/forward.py's Recorder to repeat that call"
            )
        return func(*args, **kwargs)

    def _add_convolution(self, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, *rest: Any) -> None:
        # In the memory format in which it is faster.
        candidates = []
        for layout in (torch.contiguous_format, torch.channels_last):
            placed = self._like(x).contiguous(memory_format=layout)
            filters = weight.detach().to(self.dtype).contiguous(memory_format=layout)
            candidates.append(lambda x=placed, w=filters: F.conv2d(x, w, None, stride, padding, *rest))
        with torch.inference_mode():
            self.calls.append(min(candidates, key=seconds_of))

    def _like(self, tensor: Tensor, index: int = 0) -> Tensor:
        key = (*tensor.shape, index)
        if key not in self.inputs:
            self.inputs[key] = torch.randn(tensor.shape).to(self.dtype)
        return self.inputs[key]


def make_floor(network: nn.Module, images: Tensor, dtype: str) -> Forward:
    """The products of a forward, alone."""
    recorder = Recorder(torch.float32 if dtype == "fp32" else torch.bfloat16)
    with torch.inference_mode(), recorder:
        network.forward_features(images)  # type: ignore[operator]

    def run() -> None:
        with torch.inference_mode():
            for call in recorder.calls:
                call()

    return run


def seconds_of(call: Forward) -> float:
    call()
    times: list[float] = []
    for _ in range(3):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


if __name__ == "__main__":
    main()
