"""One rank at work: the schedule, and the stage that runs it."""
