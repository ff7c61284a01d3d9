"""What the paper says: the methods, the meta-gradients and the carries."""
