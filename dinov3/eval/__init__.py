"""What is measured on frozen features, and the set-up, extraction, metrics and result files that evaluations share."""
