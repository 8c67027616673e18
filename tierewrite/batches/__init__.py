"""Many checkpoints: which ones, what was done before, one rewrite each, and what became of them."""
