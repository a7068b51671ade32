"""What the methods of weight sparsity share: which weights can be marked, how they are chosen, and what marks do."""
