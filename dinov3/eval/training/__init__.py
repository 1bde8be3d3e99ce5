"""Training a head on a frozen backbone: the loop, its checkpoints, schedules and loader."""
