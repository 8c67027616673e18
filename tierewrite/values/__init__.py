"""What the source's bytes decide: whether ties are confirmed, and the contents that are not plain copies."""
