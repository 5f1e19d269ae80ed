"""One module per op: its reference, schema, launchers, autograd Function and public function, in that order."""
