"""Is this node, and are these ranks, fit to train? What there is, what is slow, and what to do about it."""
