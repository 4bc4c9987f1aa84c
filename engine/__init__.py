"""The hardware-neutral middle: descriptions, cache, scheduler, loop and text. Imports neither jax nor torch."""
