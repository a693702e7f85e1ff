"""Defenses that train on adversarial examples."""
