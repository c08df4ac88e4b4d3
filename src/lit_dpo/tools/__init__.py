"""What the `lit-dpo` command does beside training."""
