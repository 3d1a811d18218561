"""The dataset format: shards of token records, their manifest, reading and writing."""
