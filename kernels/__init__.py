"""The verbs: one public function per op. This room imports nothing of the others."""
