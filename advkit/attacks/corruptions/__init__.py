"""What happens to images without an adversary."""
