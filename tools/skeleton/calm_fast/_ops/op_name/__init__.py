"""The room of op_name: definition, public function, implementations, cases."""
