"""Where a public path of the official release lives here: only entries that differ, longest prefix wins."""

TARGETS: dict[str, str] = {
    "dinov3.models.build_model_for_eval": "dinov3.hub.runs.build_model_for_eval",
}


def resolve(path: str) -> str:
    """The dotted path in this project for a dotted ``path`` of the release."""
    for prefix in sorted(TARGETS, key=len, reverse=True):
        if path == prefix or path.startswith(prefix + "."):
            return TARGETS[prefix] + path[len(prefix) :]
    return path
