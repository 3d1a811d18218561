"""Random bits as a function of (seed, purpose, index), and the one list of purposes."""
