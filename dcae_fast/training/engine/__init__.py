"""Runs a training, in one process or many, and resumes it exactly. Models and data belong to the task."""
