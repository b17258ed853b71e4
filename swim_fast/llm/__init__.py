"""Requests to language models; knows nothing of video."""
