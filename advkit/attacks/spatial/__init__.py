"""Images whose pixels move: rotations, translations, flow fields."""
