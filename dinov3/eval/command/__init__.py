"""What every evaluation command shares: its configuration, model, progress and results."""
