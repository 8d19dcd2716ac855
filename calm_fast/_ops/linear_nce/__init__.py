"""linear_nce: definition, public function, implementations, registered ops, test cases."""
