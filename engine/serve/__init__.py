"""The network faces, and the one path that every request takes."""
