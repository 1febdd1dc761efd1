"""What learners share: everything about a run that is no algorithm."""
