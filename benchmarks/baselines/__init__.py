"""What users would run otherwise, written as well as plain torch allows: the baselines of every comparison."""
