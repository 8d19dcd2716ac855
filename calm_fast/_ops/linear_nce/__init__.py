"""The room of linear_nce: definition, public function, implementations, cases."""
