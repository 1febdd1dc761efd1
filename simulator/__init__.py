"""The cluster: an exact event-driven simulator and the classical priority rules."""
