"""Which parameters the model declares tied, and what they are called on disk."""
