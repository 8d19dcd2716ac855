"""The room of packed_linear: products with a weight that was packed once."""
