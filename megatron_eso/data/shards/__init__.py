"""The dataset format: shards of token records and their manifest, with reader and writer."""
