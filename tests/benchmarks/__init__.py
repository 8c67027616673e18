"""Synthetic checkpoints at any scale and the timed comparisons made with them (`bin/bench` runs these)."""
