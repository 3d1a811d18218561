"""Builds datasets of token shards from text, in parallel and with resumption."""
