"""Random plans of real training runs, and the laws that every one of them must hold."""
