"""What the `lit-dpo` command does besides training."""
