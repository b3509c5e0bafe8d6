"""Training: `engine` runs a training of any task and resumes it exactly; the other packages are tasks."""
