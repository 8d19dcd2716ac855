"""Everything of the op maj_at_k: definition, public function, engines, cases."""
