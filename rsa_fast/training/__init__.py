"""Training: one optimiser step, the loop around it, and what a run writes to its folder."""
