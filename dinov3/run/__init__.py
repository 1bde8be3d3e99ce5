"""How jobs start and end: their context, their command lines, and their submission to a cluster."""
