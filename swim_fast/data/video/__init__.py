"""Frames and sizes of clips, decoded in a process of their own."""
