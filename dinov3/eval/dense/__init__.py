"""What depth and segmentation share: settings, paired data, transforms, pictures and the predict command."""
