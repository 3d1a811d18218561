"""Shards behind a URL, and their copies on a local disk."""
