"""One file per op: what is measured, against what, and what it must cost."""
