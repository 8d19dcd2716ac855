"""The room of linear_logprob: definition, public function, implementations, cases."""
