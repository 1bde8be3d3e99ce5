"""Datasets: where images and their labels lie."""

from dinov3.data.datasets.ade20k import ADE20K
from dinov3.data.datasets.coco_captions import CocoCaptions
from dinov3.data.datasets.concatenated import ConcatenatedDataset
from dinov3.data.datasets.depth_folder import DepthFolder
from dinov3.data.datasets.extended import BadImageError, ExtendedVisionDataset
from dinov3.data.datasets.hf_dataset import HFDataset
from dinov3.data.datasets.image_folder import ImageFolder
from dinov3.data.datasets.image_net import ImageNet
from dinov3.data.datasets.image_net_22k import ImageNet22k
from dinov3.data.datasets.image_net_variants import ImageNetC, ImageNetReaL
from dinov3.data.datasets.nyu import NYU
from dinov3.data.datasets.segmentation_folder import SegmentationFolder
from dinov3.data.datasets.web_dataset import WebDataset

__all__ = [
    "ADE20K",
    "NYU",
    "BadImageError",
    "CocoCaptions",
    "ConcatenatedDataset",
    "DepthFolder",
    "ExtendedVisionDataset",
    "HFDataset",
    "ImageFolder",
    "ImageNet",
    "ImageNet22k",
    "ImageNetC",
    "ImageNetReaL",
    "SegmentationFolder",
    "WebDataset",
]
