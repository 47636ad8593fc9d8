"""LoRA state as mathematics: names, slices, products, merging and wire encoding."""
