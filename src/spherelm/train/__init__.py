"""The training loop, the same for every model, and the run directory that records what it did."""
