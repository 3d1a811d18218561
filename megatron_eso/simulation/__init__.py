"""A training step at its real size on a GPU that is not there: what it takes, without a device."""
