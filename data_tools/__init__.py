"""Text to token shards: the commands of `python -m data_tools`."""
