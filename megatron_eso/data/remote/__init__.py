"""Shards that have a URL, and their copies on a local disk."""
