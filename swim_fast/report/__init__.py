"""Finished runs to one page: what they were told, how they went, and where they look."""
