"""From a teacher to a student, blind to the kind of network."""
