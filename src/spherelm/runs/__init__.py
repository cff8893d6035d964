"""What a run is and leaves behind: its config, its directory, checkpoints and metrics."""
