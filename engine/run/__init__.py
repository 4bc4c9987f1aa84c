"""Processes and time: the one loop, and the clients that talk to it."""
