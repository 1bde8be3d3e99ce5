"""Time of a backbone's forward pass on the CPU, next to timm, transformers and only the matrix products.

    python benchmarks/forward.py [--models vits16 convnext_tiny] [--sizes 224] [--batches 1] [--dtypes fp32] ...

Every implementation lives in a process of its own, which reads the weights from one file and builds its model as its
users do, so that none profits from, or suffers by, what another one did to the process (the memory allocator's state,
for example). They take turns of one forward pass in a rotating order; only one computes at a time. Ratios are medians
of the rounds' own ratios. Page faults are those of one forward pass, by the kernel's count: memory that an operation
had to get from the system again.

All models of a row hold the same random weights, and their features are checked to be equal first. `optimized` is ours
after `dinov3.hub.optimize.optimize`, for `autocast` in bfloat16, so it needs no region. The floor computes the row's
matrix products, convolutions and attentions (queries times keys, softmax, times values: one fused operation) on tensors
of the same shapes and dtypes, and nothing else: no bias, norm, activation, rotation, residual or cast.

Dtypes: `fp32`; `autocast`, where each call enters an autocast region in bfloat16, as the loop of an evaluation does;
`bf16`, with weights and images in bfloat16. The floor of `autocast` has its weights in bfloat16 from the start.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
CONTESTANTS = ["ours", "optimized", *PEERS, "floor"]
#: Largest difference of features, relative to the largest feature, that counts as equal.
TOLERANCES = {"fp32": 1e-4, "autocast": 0.1, "bf16": 0.1}
#: Functions whose last two arguments are multiplied.
PRODUCTS = [torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm]
PRODUCTS += [Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm]
UNKNOWN_PRODUCTS = [torch.einsum, torch.tensordot, F.bilinear, F.conv1d, F.conv3d, F.multi_head_attention_forward]
Forward = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What a process measures.

    Attributes:
        name: one of CONTESTANTS.
        entry: of the hub.
        dtype: one of DTYPES.
        directory: of the files of weights.
        threads: of PyTorch.
        is_cpu_time: measure the time that the process had a processor.
    """

    name: str
    entry: str
    dtype: str
    directory: Path
    threads: int
    is_cpu_time: bool


class Turn(NamedTuple):
    """One forward pass."""

    seconds: float
    faults: int


def main() -> None:
    args = parse_args()
    kind = "processor time" if args.cpu_time else "time"
    print(f"torch {torch.__version__}, {args.threads} threads, {kind}, at least {args.rounds} rounds a row\n")
    columns = ["model", "px", "batch", "dtype", "ours, ms", "ours / timm", "ours / transformers", "ours / fastest peer"]
    columns += ["ours / floor", "optimized / fastest peer", "optimized / floor", "faults: ours", *PEERS]
    print(f"| {' | '.join(columns)} |")
    print(f"| --- | ---: | ---: | --- |{' ---: |' * (len(columns) - 4)}", flush=True)
    for model, dtype in itertools.product(args.models, args.dtypes):
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            write_weights(f"dinov3_{model}", Path(directory))
            players = {}
            for name in CONTESTANTS:
                task = Task(name, f"dinov3_{model}", dtype, Path(directory), args.threads, args.cpu_time)
                players[name] = stack.enter_context(start(task))
            for size, batch in itertools.product(args.sizes, args.batches):
                turns = measure(players, (batch, 3, size, size), TOLERANCES[dtype], args.rounds, args.seconds)
                seconds = {name: [turn.seconds for turn in turns[name]] for name in turns}
                faults = [f"{statistics.median(t.faults for t in turns[name]):.0f}" for name in ("ours", *PEERS)]
                row = [model, str(size), str(batch), dtype, f"{1000 * statistics.median(seconds['ours']):.1f}"]
                print(f"| {' | '.join(row + ratios(seconds) + faults)} |", flush=True)


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


def write_weights(entry: str, directory: Path) -> None:
    """Write the same random weights, in the layout of each library, and how the peers build their models."""
    torch.manual_seed(0)
    ours = getattr(backbones, entry)(pretrained=False)
    randomise_(ours)
    state = ours.state_dict()
    torch.save(state, directory / "ours.pth")
    theirs = from_release(state, "timm").state
    torch.save((timm_config(state, theirs, entry, ((0.5,) * 3, (0.5,) * 3)), theirs), directory / "timm.pth")
    theirs = from_release(state, "huggingface").state
    options = huggingface_config(state, theirs, layer_norm_eps=1e-6 if "convnext" in entry else 1e-5)
    torch.save((options, theirs), directory / "transformers.pth")


def make_network(task: Task) -> nn.Module:
    """Build one contestant's model from its file, with its own library only."""
    dtype = torch.bfloat16 if task.dtype == "bf16" else torch.float32
    if task.name not in PEERS:
        # Cast by the hub, which keeps computing positions in float32.
        model = getattr(backbones, task.entry)(weights=task.directory / "ours.pth", dtype=dtype)
        return (
            optimize(model, torch.bfloat16 if task.dtype == "autocast" else None) if task.name == "optimized" else model
        )
    config, state = torch.load(task.directory / f"{task.name}.pth")
    if task.name == "timm":
        import timm

        model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
        model.load_state_dict(state)
    else:
        from transformers import AutoConfig, AutoModel

        model = AutoModel.from_config(AutoConfig.for_model(**config))
        load_transformers_(model, state)
    return model.to(dtype).eval()


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


@contextlib.contextmanager
def start(task: Task) -> Iterator[Any]:
    """Start a contestant's process; the connection takes what `serve` takes."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=serve, args=(task, other), daemon=True)
    process.start()
    other.close()
    try:
        yield connection
    finally:
        connection.close()
        process.join()


def serve(task: Task, connection: Any) -> None:
    """Answer a shape of images with features of the last patch, and None with a `Turn`, until the parent hangs up."""
    torch.set_num_threads(task.threads)
    clock = time.process_time if task.is_cpu_time else time.perf_counter
    network = make_network(task)
    call: Forward
    with contextlib.suppress(EOFError):
        while True:
            shape = connection.recv()
            if shape is not None:
                images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
                images = images.bfloat16() if task.dtype == "bf16" else images
                call = make_call(network, images, is_autocast=task.dtype == "autocast" and task.name != "optimized")
                features = last_patch(call())
                if task.name == "floor":
                    call = make_floor(network, images, task.dtype)
                for _ in range(2):
                    call()
                connection.send(features.numpy())
                continue
            faults, before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, clock()
            call()
            seconds = clock() - before
            connection.send(Turn(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))


def measure(
    players: dict[str, Any], shape: tuple[int, ...], tolerance: float, rounds: int, budget: float
) -> dict[str, list[Turn]]:
    """The turns of each contestant, round by round."""
    check_equal({name: ask(player, shape) for name, player in players.items()}, tolerance)
    turns: dict[str, list[Turn]] = {name: [] for name in players}
    order = list(players)
    started = time.perf_counter()
    while len(turns["ours"]) < rounds or time.perf_counter() - started < budget:
        for name in order:
            turns[name].append(ask(players[name], None))
        order = order[1:] + order[:1]
    return turns


def ask(connection: Any, question: Any) -> Any:
    connection.send(question)
    return connection.recv()


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


def check_equal(features: dict[str, Any], tolerance: float) -> None:
    """Stop if the features of the last patch differ."""
    for name, found in features.items():
        difference = abs(found - features["ours"]).max() / abs(features["ours"]).max()
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
