"""How attention is computed: which backend runs, and why each other one did not."""
