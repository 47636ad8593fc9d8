"""Methods of the catalogue side by side."""
