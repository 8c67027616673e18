"""A checkpoint made canonical while it is read: what a rewrite would write, and no second copy on disk."""
