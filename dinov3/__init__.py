"""DINOv3: self-supervised vision backbones, their training and their evaluation."""

__version__ = "0.1.0"
