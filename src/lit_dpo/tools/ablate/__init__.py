"""`lit-dpo ablate`: runs that differ in what is varied, and a comparison of them that can be trusted."""
