"""The room of packed_linear: definition, internal functions, torch implementation, cases."""
