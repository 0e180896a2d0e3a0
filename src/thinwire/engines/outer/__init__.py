"""Local updates: each worker steps on its own, and what it has changed is exchanged like a gradient."""
