"""Text to Megatron's IndexedDataset, and IndexedDataset to training batches."""
