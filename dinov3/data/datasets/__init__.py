"""Datasets: where images and their labels lie."""

from dinov3.data.datasets.concatenated import ConcatenatedDataset
from dinov3.data.datasets.extended import BadImageError, ExtendedVisionDataset
from dinov3.data.datasets.image_folder import ImageFolder
from dinov3.data.datasets.image_net import ImageNet

__all__ = ["BadImageError", "ConcatenatedDataset", "ExtendedVisionDataset", "ImageFolder", "ImageNet"]
