"""Networks, their losses, and the registry of image tokenizers."""
