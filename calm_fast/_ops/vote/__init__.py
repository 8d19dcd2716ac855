"""The room of vote: definition, public function, implementations, cases."""
