"""Runs: config, directory, checkpoints and metrics."""
