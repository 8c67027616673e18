"""What to do with each tensor: a pure function of headers, ties and options."""
