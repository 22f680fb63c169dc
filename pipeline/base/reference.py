"""The reference of all keys, as docs/configuration.md holds it, written from what stands beside the fields."""

from __future__ import annotations

import json

from pipeline.base.config import sections, settings


def keys_markdown() -> str:
    """A table per section: every key with its default, its valid values and its meaning."""
    lines: list[str] = []
    for section, kind in sections().items():
        lines += [f"### {section}", "", str(kind.__doc__), "", "| key | default | valid | meaning |"]
        lines.append("|---|---|---|---|")
        for name, setting in settings().items():
            if name.startswith(f"{section}."):
                default = "" if setting.default is None else f"`{json.dumps(setting.default)}`"
                valid = setting.valid().replace(" | ", ", ")
                lines.append(f"| `{name}` | {default} | {valid} | {setting.bounds.text} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n")
