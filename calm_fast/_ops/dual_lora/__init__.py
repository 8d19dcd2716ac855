"""The room of dual_lora: definition, public function, implementations, cases."""
