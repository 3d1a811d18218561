"""Random bits as a function of (seed, purpose, index), and the registry of purposes."""
