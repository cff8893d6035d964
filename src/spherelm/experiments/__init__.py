"""Many runs together: comparisons, sweeps, the protocol of the speedup, and what a step costs."""
