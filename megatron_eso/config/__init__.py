"""The configuration: sections of typed keys, rules of combination, TOML and JSON."""
