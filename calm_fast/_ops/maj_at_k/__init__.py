"""The room of maj_at_k: definition, public function, implementations, cases."""
