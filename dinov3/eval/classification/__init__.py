"""Classification on frozen features: data, scoring, metrics and the three protocols' parts."""
