"""Evidence: many short trainings of small networks, so that the methods can be compared with intervals."""
