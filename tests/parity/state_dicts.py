"""Published names, dtypes and shapes of state-dict entries, from the lists in `state_dict/`."""

from __future__ import annotations

from torch import nn

from . import golden

Entry = tuple[str, tuple[int, ...]]


def read_manifest(name: str) -> dict[str, Entry]:
    """Dtype and shape of each entry of `state_dict/<name>.txt`, e.g. `{"norm.bias": ("float32", (384,))}`."""
    # "-" is the shape of a number, e.g. of `num_batches_tracked`.
    rows = [line.split() for line in (golden.HERE / "state_dict" / f"{name}.txt").read_text().splitlines()]
    return {key: (dtype, () if shape == "-" else tuple(map(int, shape.split("x")))) for key, dtype, shape in rows}


def assert_matches_manifest(model: nn.Module, name: str) -> None:
    """Assert that the state dict of `model` has exactly the entries of the list `name`."""
    entries = {k: (str(v.dtype).removeprefix("torch."), tuple(v.shape)) for k, v in model.state_dict().items()}
    assert entries == read_manifest(name)
