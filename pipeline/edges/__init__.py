"""Messages between neighbouring ranks: what they look like, how they travel, how edges are made."""
