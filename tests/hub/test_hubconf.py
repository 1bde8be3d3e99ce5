"""`torch.hub` with this directory as the repository, and what importing the entry points needs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hubconf
from dinov3.hub.backbones import dinov3_vits16

REPOSITORY = Path(__file__).parents[2]
ENTRIES = [
    "dinov3_convnext_base",
    "dinov3_convnext_large",
    "dinov3_convnext_small",
    "dinov3_convnext_tiny",
    "dinov3_from_checkpoint",
    "dinov3_from_run",
    "dinov3_vit7b16",
    "dinov3_vit7b16_dd",
    "dinov3_vit7b16_de",
    "dinov3_vit7b16_lc",
    "dinov3_vit7b16_ms",
    "dinov3_vitb16",
    "dinov3_vith16plus",
    "dinov3_vitl16",
    "dinov3_vitl16_chmv2",
    "dinov3_vitl16_dinotxt_tet1280d20h24l",
    "dinov3_vitl16plus",
    "dinov3_vits16",
    "dinov3_vits16plus",
]

WITHOUT_OTHER_PACKAGES = """
import importlib.abc
import sys

import numpy
import torch

ALLOWED = {"torch", "sympy", "mpmath", "numpy", "dinov3", "hubconf"}  # PyTorch itself computes shapes with sympy.


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in sys.stdlib_module_names and root not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


before = set(sys.modules)
sys.meta_path.insert(0, Blocker())
repository, weights, *entries = sys.argv[1:]
for entry in entries:
    with torch.device("meta"):  # The largest has 27 GB.
        model = torch.hub.load(repository, entry, source="local", pretrained=False)
    assert not model.training and all(parameter.is_meta for parameter in model.parameters()), entry
for entry, channels in {"dinov3_vits16": 384, "dinov3_convnext_tiny": 768}.items():
    model = torch.hub.load(repository, entry, source="local", pretrained=False)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, channels)
model = torch.hub.load(repository, "dinov3_vits16", source="local", weights=weights)
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 384)
from dinov3.hub.transforms import make_transform, normalization_of

assert normalization_of("SAT493M").mean == (0.430, 0.411, 0.296)
try:
    make_transform()
except ModuleNotFoundError as error:
    assert "pip install torchvision" in str(error), error
else:
    raise AssertionError("torchvision is not blocked")
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= ALLOWED, new
"""


def test_loading_and_normalization_only_need_torch_and_numpy(tmp_path: Path) -> None:
    torch.save(dinov3_vits16(pretrained=False).state_dict(), tmp_path / "w.pth")
    # The tokenizer of dino.txt needs a package, which its error names.
    entries = [entry for entry in ENTRIES if not entry.startswith("dinov3_from_") and "dinotxt" not in entry]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_OTHER_PACKAGES, str(REPOSITORY), str(tmp_path / "w.pth"), *entries],
        check=True,
        cwd=tmp_path,
    )


def test_list_names_the_entries() -> None:
    # As torch.hub.list, which reads remote repositories only, finds them.
    found = [name for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")]
    assert sorted(found) == ENTRIES


def test_help_describes_each_entry() -> None:
    for entry in ENTRIES:
        text = inspect.getdoc(getattr(hubconf, entry)) or ""
        assert "Args:" in text and "Returns:" in text and "Raises:" in text


def test_load_passes_arguments_on() -> None:
    model = torch.hub.load(str(REPOSITORY), "dinov3_vits16plus", source="local", pretrained=False, device="meta")
    assert model.embed_dim == 384 and model.blocks[0].mlp.w1.out_features == 1536
    model = torch.hub.load(
        str(REPOSITORY), "dinov3_convnext_tiny", source="local", pretrained=False, device="meta", patch_size=16
    )
    assert model.embed_dim == 768 and model.patch_size == 16


def test_a_second_copy_of_the_project_in_one_process_is_refused(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "hubconf.py", tmp_path)
    (tmp_path / "dinov3").mkdir()
    (tmp_path / "dinov3" / "__init__.py").touch()
    torch.hub.load(str(REPOSITORY), "dinov3_vits16", source="local", pretrained=False, device="meta")
    pattern = re.escape(
        f"{tmp_path}/hubconf.py needs the package dinov3 in {tmp_path}/dinov3, but in this process dinov3 comes from "
        f"{REPOSITORY}/dinov3; a process can only have one. If that is another copy of this project, load the model "
    )
    with pytest.raises(ImportError, match=f"^{pattern}"):
        torch.hub.load(str(tmp_path), "dinov3_vits16", source="local", pretrained=False)
    torch.hub.load(str(REPOSITORY), "dinov3_vits16", source="local", pretrained=False, device="meta")


def test_the_same_copy_by_another_path_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(REPOSITORY)
    torch.hub.load(str(tmp_path / "link"), "dinov3_vits16", source="local", pretrained=False, device="meta")


@pytest.mark.parametrize("is_package", [True, False])
def test_another_package_of_the_name_is_refused(
    is_package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "dinov3" / "__init__.py" if is_package else tmp_path / "dinov3.py"
    foreign.parent.mkdir(exist_ok=True)
    foreign.touch()
    spec = importlib.util.spec_from_file_location("dinov3", foreign)
    assert spec is not None
    monkeypatch.setitem(sys.modules, "dinov3", importlib.util.module_from_spec(spec))
    place = re.escape(str(foreign.parent if is_package else foreign))
    with pytest.raises(ImportError, match=f"in this process dinov3 comes from {place}; .* rename or uninstall it"):
        torch.hub.load(str(REPOSITORY), "dinov3_vits16", source="local", pretrained=False, device="meta")
    monkeypatch.setitem(sys.modules, "dinov3", ModuleType("dinov3"))
    with pytest.raises(ImportError, match="in this process dinov3 is missing; a process can only have one"):
        torch.hub.load(str(REPOSITORY), "dinov3_vits16", source="local", pretrained=False, device="meta")
