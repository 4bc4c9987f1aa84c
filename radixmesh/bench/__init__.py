"""Benchmarks that print the figures that the documentation claims, with the machine that they were made on."""
