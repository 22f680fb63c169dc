"""The processes of a job: who is there, who lives, who failed, and how all of them end."""
