"""The Flower Strategy for adapters of different ranks, and the catalogue of methods."""
