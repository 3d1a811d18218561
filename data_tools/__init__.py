"""Makes token shards from text: the commands of `python -m data_tools`."""
