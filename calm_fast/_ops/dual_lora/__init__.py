"""Everything about dual_lora: its definition, public function, implementations and test cases."""
