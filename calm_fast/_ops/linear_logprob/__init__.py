"""linear_logprob: definition, public function, implementations, registered ops, test cases."""
