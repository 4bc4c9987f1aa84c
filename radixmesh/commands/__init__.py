"""Commands of the command line, one a file; each has `register(app)`."""
