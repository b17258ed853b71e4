"""Rendered clips with exact masks and a tiny Qwen2.5-VL, to see the whole way run without a GPU."""
