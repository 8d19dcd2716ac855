"""The room of cross_attention: definition, public function, implementations, cases."""
