"""One visible training loop; defenses supply a loss and never a loop."""
