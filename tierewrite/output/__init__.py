"""The output on disk or in a store: shards, side files, index and manifest, staged and made visible in one step."""
