"""Is every implementation right? The error rule, the cases of each op, and `calm-fast verify`; tests use the same."""
