"""Weights in the layouts of Hugging Face transformers and timm: recognised, and converted to our names and back.

Notable:
- A layout is told by the names of its entries, so that a file may be called anything and lie anywhere.
- Both libraries compute the rotary periods, fix the bias of the keys to zero, and know nothing of bias masks or of the
  norm for local crops; timm has no mask token. What they have no place for travels in the metadata of the safetensors
  file, so that converting there and back changes no bit.
- Tensors are shared with what went in wherever only their names change. Of a ViT in Hugging Face's layout, queries,
  keys and values are joined, which copies them; the other way they are views.
"""

from dinov3.hub.formats.conversion import Converted, Foreign, from_release, to_release
from dinov3.hub.formats.huggingface import huggingface_config
from dinov3.hub.formats.kept import METADATA_KEY
from dinov3.hub.formats.layouts import LAYER_NORM_EPS, Layout, Library, detect
from dinov3.hub.formats.positions import rope_base
from dinov3.hub.formats.reading import CONFIG_FILE, Content, is_model_directory, read_content
from dinov3.hub.formats.timm import timm_config

__all__ = [
    "CONFIG_FILE",
    "LAYER_NORM_EPS",
    "METADATA_KEY",
    "Content",
    "Converted",
    "Foreign",
    "Layout",
    "Library",
    "detect",
    "from_release",
    "huggingface_config",
    "is_model_directory",
    "read_content",
    "rope_base",
    "timm_config",
    "to_release",
]
