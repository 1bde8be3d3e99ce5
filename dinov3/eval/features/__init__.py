"""Features of frozen backbones: extraction, one cache on disk, files."""
