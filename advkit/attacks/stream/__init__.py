"""Online attacks: which k items of a stream to spend the attack on."""
