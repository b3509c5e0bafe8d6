"""How good pictures are: metrics, the networks that some of them need, and whole evaluations."""
