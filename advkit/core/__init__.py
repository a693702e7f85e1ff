"""The nouns of advkit; imports nothing else of advkit."""
