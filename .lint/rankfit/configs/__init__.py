"""Presets, and the typed settings that parse and check them."""
