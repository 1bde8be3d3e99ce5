"""What depth and segmentation share: schedules, training of a head, checkpoints, the command line, pictures."""
