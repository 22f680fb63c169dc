"""What a user sees of a run: the view in the terminal, the plan, charts."""
