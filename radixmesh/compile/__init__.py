"""Compiling for chips that are not here: what it takes, what it costs, whether it may go out."""
