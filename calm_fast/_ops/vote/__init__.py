"""Everything of the op vote: definition, public function, engines, cases."""
